"""What asking a judge over HTTP costs, and what is left of it on a bad day.

    python benchmarks/judge.py

First, 64 calls that take the server 100 ms each, 16 at a time: the ideal is 0.4 s. Then a server that answers 20 %
garbage, 10 % errors, 10 % never, and is dead for 10 s: how long 3 batches of 64 take, and that no score is invented.
Servers are the scripted judge, in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from trl_rewards import Context, Pipeline, load_reward
from trl_rewards.components import Status
from trl_rewards.scoring import Source
from trl_rewards.testing import make_samples

ROWS = 64
TEXTS = [" ".join(["word"] * (row % 40) + ["please"] * (row % 3)) or "x" for row in range(ROWS)]
JUDGE = {"model": "m", "criteria": "Be short and polite.", "scale": [0, 100], "in_flight": 16}


@contextmanager
def server(*arguments: str) -> Generator[str]:
    """The address of a scripted judge in another process."""
    command = [sys.executable, "-m", "trl_rewards.models.scripted_judge", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split(" at ")[1].partition(";")[0]
        finally:
            process.terminate()


def throughput(rounds: int) -> dict[str, float]:
    """Seconds for 64 calls of 100 ms, 16 at a time, with connections that are kept: through a pipeline, and beside it
    the same requests sent by a bare client in a loop, in turn."""
    with server("--delay", "0.1") as url:
        reward: Any = load_reward("judge", endpoint=url, **JUDGE)
        pipeline = Pipeline([Source("judge", reward)])
        pipeline.score(make_samples(TEXTS))
        ours, bare = [], []
        for step in range(rounds):
            start = time.perf_counter()
            pipeline.score(make_samples(TEXTS, step=step))
            ours.append(time.perf_counter() - start)
            bare.append(asyncio.run(bare_seconds(url, [ask.messages for ask in reward.asks(make_samples(TEXTS))])))
        pipeline.close()
    return {
        "median_seconds": statistics.median(ours),
        "best_seconds": min(ours),
        "bare_client_median_seconds": statistics.median(bare),
        "median_to_ideal": statistics.median(ours) / 0.4,
        "best_to_ideal": min(ours) / 0.4,
        "median_to_bare_client": statistics.median(ours) / statistics.median(bare),
    }


async def bare_seconds(url: str, conversations: list[list[dict[str, str]]]) -> float:
    """What the same requests take without anything around them, after one round that opens the connections."""
    from huggingface_hub.utils import httpx

    slots = asyncio.Semaphore(16)
    async with httpx.AsyncClient(trust_env=False) as client:

        async def post(messages: list[dict[str, str]]) -> None:
            async with slots:
                answer = await client.post(url + "/chat/completions", json={"model": "m", "messages": messages})
                answer.json()

        for _ in range(2):
            start = time.perf_counter()
            await asyncio.gather(*map(post, conversations))
    return time.perf_counter() - start


def bad_day(hang: float, dead: float) -> dict[str, float]:
    """Three batches against a server with faults; `hang` is the request's time-out, `dead` how long it is gone."""
    with server() as url:
        truth = Pipeline([Source("judge", load_reward("judge", endpoint=url, **JUDGE))]).score(make_samples(TEXTS))
    shares = ("--garbage", "0.2", "--errors", "0.1", "--hangs", "0.1", "--down-after", "90", "--down-for", str(dead))
    sums: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        sums[name] = sums.get(name, 0.0) + value

    with server(*shares) as url:
        reward = load_reward("judge", endpoint=url, request_timeout=hang, **JUDGE)
        pipeline = Pipeline([Source("judge", reward)])
        pipeline.setup(Context(log_metric=add))
        start, holes, wrong = time.perf_counter(), 0, 0
        for step in range(3):
            batch = pipeline.score(make_samples(TEXTS, step=step))
            scored = batch.scores.status[:, 0] == Status.OK
            holes += int((~scored).sum())
            wrong += int((batch.scores.values[:, 0] != truth.scores.values[:, 0])[scored].sum())
        seconds = time.perf_counter() - start
        pipeline.close()
    return {"seconds": seconds, "scores": 3 * ROWS - holes, "holes": holes, "invented": wrong} | sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hang", type=float, default=10.0, help="seconds after which a hung request is given up")
    parser.add_argument("--dead", type=float, default=10.0, help="seconds that the server is gone")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    print(json.dumps({"64 calls of 100 ms, 16 at a time": throughput(arguments.rounds)}), flush=True)
    print(json.dumps({"a bad day": bad_day(arguments.hang, arguments.dead)}))


if __name__ == "__main__":
    main()
