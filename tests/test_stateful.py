"""Every component with a state: the same on 1, 2 and 3 processes and after a resume. None can be forgotten."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.test_contract import ADVANTAGES, COMBINERS, REWARDS, SHAPERS, TOKEN_SHAPERS
from trl_rewards import Context, Failed, Pipeline, Reward, Samples, TokenReward, TokenShaper, World, load_plugins
from trl_rewards.components import Component
from trl_rewards.loading import build
from trl_rewards.scoring import Source
from trl_rewards.testing import make_samples

WITH_A_MODEL = {"adversarial", "cooper", "prime"}
"""Rewards that learn with a model, whose plugins' own tests run them on two processes."""
MORE = {  # options beside those of the contract's tables, with which a component has a state
    "armorm": {"verbosity": "b", "rows": 20},  # full in the second batch
    "grpo_s": {"hardness": "hard", "category": "kind"},
    "latent_reward": {"hidden": 8, "passes": 2},
}
OPTIONS = {
    "shaper": {name: options for name, (options, _) in SHAPERS.items()} | TOKEN_SHAPERS,
    "combiner": COMBINERS,
    "advantage": ADVANTAGES,
    "reward": {name: options for name, (options, _) in REWARDS.items()},
}
ROWS, GROUP, BATCHES = 12, 4, 3  # groups are split on 2 processes and whole on 3


class Words(Reward):
    """Scores with holes of both kinds."""

    factor: float

    def score(self, samples):
        special = {"word 5": None, "word 7": Failed("down")}
        return [special.get(text, int(text.split()[1]) * self.factor % 1) for text in samples.texts]


class Tokens(TokenReward):
    """Process rewards, none for some tokens."""

    def score_tokens(self, samples):
        return [[None if len(text) % 3 else int(text.split()[1]) / 30] * 2 for text in samples.texts]


def stateful() -> list[tuple[str, str]]:
    """(kind, name) of the registered components that keep a state."""
    entries = [entry for kind in OPTIONS for entry in load_plugins().of_kind(kind)]
    return sorted((e.kind, e.name) for e in entries if e.load().state_dict is not Component.state_dict)


def run_here() -> list[tuple[str, str]]:
    return [(kind, name) for kind, name in stateful() if name not in WITH_A_MODEL]


def pipeline(kind: str, name: str) -> Pipeline:
    """The component among sources that need no model."""
    made, problems = build(kind, name, OPTIONS[kind][name] | MORE.get(name, {}))
    assert made is not None, problems
    made.setup(Context())
    first = Tokens() if isinstance(made, TokenShaper) else Words(factor=0.37)
    sources = [Source("a", first, shape=[made] if kind == "shaper" else []), Source("b", Words(factor=0.61))]
    if kind == "reward":
        return Pipeline([sources[0], Source(name, made)])
    return Pipeline(sources, **{{"combiner": "combine"}.get(kind, kind): made} if kind != "shaper" else {})


def samples(kind: str, name: str, step: int) -> Samples:
    """All processes' rows of a batch."""
    table = {"shaper": SHAPERS, "reward": REWARDS}.get(kind, {})
    _, given = table.get(name, ({}, {}))
    columns = {key: [values[(row + step) % 6] for row in range(ROWS)] for key, values in given.items()}
    columns |= {"hard": [(row + step) % 5 / 5 for row in range(ROWS)], "kind": ["ab"[row // 8] for row in range(ROWS)]}
    texts = [f"word {row + step}" for row in range(ROWS)]
    prompts = [f"prompt {row // GROUP}" for row in range(ROWS)]
    return make_samples(texts, prompts, step=step, max_steps=BATCHES, **columns)


def one_batch(made: Pipeline, kind: str, name: str, step: int, world: World) -> list:
    """Totals and advantages, after what learns has learned."""
    local = ROWS // world.size
    mine = samples(kind, name, step).take(range(world.rank * local, (world.rank + 1) * local))
    batch = made.score(mine, GROUP, world, training=True)
    ones = torch.ones(ROWS, 2)
    batch = batch._replace(mask=ones, token_rewards=batch.rewards.nan_to_num()[:, None] * ones / 2, values=ones * 0.25)
    batch = batch._replace(process_rewards=ones * 0, logps=-ones, ref_logps=-ones)
    advantages = made.advantages(batch) if made.advantage else batch.rewards
    made.update(batch)
    return [batch.rewards.tolist(), advantages.tolist()]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def plain(state):
    """A state as JSON can hold it."""
    if isinstance(state, torch.Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {str(key): plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, list | tuple) else state


def run(kind: str, name: str, world: World) -> dict:
    """Some batches; before the last one a copy goes on from the state in a checkpoint, and must do the same."""
    made, resumed, found = pipeline(kind, name), pipeline(kind, name), []
    for step in range(BATCHES):
        if step == BATCHES - 1:
            resumed.load_state_dict(through_a_file(made.state_dict()))
            again = one_batch(resumed, kind, name, step, world)
        found.append(one_batch(made, kind, name, step, world))
    state = plain(made.state_dict())
    assert str(again) == str(found[-1]), f"{kind} {name} goes on otherwise after a resume"
    assert str(plain(resumed.state_dict())) == str(state), f"{kind} {name} has another state after a resume"
    return {"found": found, "state": state}


def results(world: World) -> dict[str, dict]:
    return {f"{kind} {name}": run(kind, name, world) for kind, name in run_here()}


def ranks_main() -> None:
    """On three processes: all together, then two of them while the third is alone. One import of torch for all."""
    from accelerate import PartialState

    rank, folder = int(os.environ["RANK"]), sys.argv[1]
    said = {}
    for size, members in ((3, (0, 1, 2)), (2, (0, 1)), (1, (2,))):
        if rank not in members:
            continue
        PartialState._reset_state()
        os.environ["WORLD_SIZE"] = str(size)
        if size > 1:
            store = torch.distributed.FileStore(f"{folder}/store{size}", size)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
            assert PartialState(cpu=True).num_processes == size
        world = World.current()
        assert (world.rank, world.size) == (members.index(rank), size)
        said[size] = results(world)
        if size > 1:
            every = world.gather_objects(json.dumps(said[size]))
            assert every == every[:1] * size, "ranks disagree"
            torch.distributed.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(said), encoding="utf-8")


def same(first, second) -> bool:
    """Equal but for the rounding of sums in another order."""
    if isinstance(first, float) and isinstance(second, float):
        return first == pytest.approx(second, rel=1e-5, abs=1e-6, nan_ok=True)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def test_those_with_a_model_are_run_on_processes_by_their_own_tests():
    assert {name for _, name in stateful()} >= WITH_A_MODEL
    files = Path(__file__).parent.parent.glob("plugins/*/tests/test_*.py")
    texts = [text for file in files if "run_ranks" in (text := file.read_text())]
    for name in WITH_A_MODEL:
        assert any(f'"{name}"' in text for text in texts), name


@pytest.mark.parametrize(("kind", "name"), run_here())
def test_a_stateful_component_has_a_state_and_resumes_exactly(kind, name):
    found = run(kind, name, World())
    assert any(found["state"].values()), f"{name} overrides state_dict and has no state here: give it options in MORE"
    assert found["found"][0] != found["found"][1]


@pytest.mark.slow
def test_stateful_components_are_the_same_on_1_2_and_3_processes(run_ranks, tmp_path):
    root = Path(__file__).parent.parent
    script = (
        f"import sys\nsys.path.insert(0, {str(root)!r})\nfrom tests.test_stateful import ranks_main\nranks_main()\n"
    )
    run_ranks(script, 3, str(tmp_path))
    together, apart = (json.loads(Path(tmp_path, f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 2))
    three, two, one = together["3"], together["2"], apart["1"]
    assert set(one) == {f"{kind} {name}" for kind, name in run_here()}
    for name, alone in one.items():
        assert same(alone, two[name]), name
        assert same(alone, three[name]), name
