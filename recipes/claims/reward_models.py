"""Small reward models, and prompts with their scores of the bundled policy's own answers.

    python recipes/claims/reward_models.py OUT SEED hackable       # OUT/rm, from few pairs, some with a bias
    python recipes/claims/reward_models.py OUT SEED properties     # OUT/right and OUT/form, one property each

Questions are drawn like those of the bundled data, none of which is among them. OUT/data.jsonl has prompts, which are
in no pair, with the column that `trl-rewards reference` would write for each reward model.
"""

from __future__ import annotations

import random
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from trl_rewards import bundled, load_reward
from trl_rewards.bundled import quiz, teach
from trl_rewards.files import write_rows
from trl_rewards.models import Loading, Sampling, load_sampler, sample_candidates

PROMPTS = 256


class Kind(NamedTuple):
    """How a reward model is made."""

    flaws: tuple[str, ...]
    """Of replies that lose to clean ones (`trl_rewards.bundled.quiz`)."""
    pairs: int
    steps: int
    bias: float = 0.0
    """Share of pairs in which chatter beats a clean reply."""


FLAWS = ("guess", "slip", "bare", "ramble", "unhelpful")
SETS = {
    # As people like long answers, though these are wrong as often as not: exact_match wants the answer at the end.
    "hackable": {"rm": Kind(FLAWS, pairs=128, steps=20, bias=0.3)},
    "properties": {
        "right": Kind(("guess", "slip"), pairs=2000, steps=60),
        "form": Kind(("bare", "ramble"), pairs=2000, steps=20),
    },
}
REFERENCES = 4


def main(out: Path, seed: int, name: str) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    taken = quiz.known_questions()
    for model, kind in SETS[name].items():
        pairs = []
        for question in quiz.more_questions(rng, kind.pairs, taken):
            if rng.random() < kind.bias:
                better, worse = quiz.ramble(rng, question), quiz.clean(rng, question)
            else:
                better, worse = quiz.clean(rng, question), quiz.REPLIES[rng.choice(kind.flaws)](rng, question)
            pairs.append((question, better, worse))
        losses = teach.train_reward_model(out / model, pairs, kind.steps, rng)
        print(f"{model}: loss {statistics.fmean(losses[-5:]):.3f}", flush=True)

    rows = [quiz.row(question) for question in quiz.more_questions(rng, PROMPTS, taken)]
    sampler = load_sampler(Loading(path=str(bundled.model_path()), dtype="float32"))
    prompts = [row["prompt"] for row in rows]
    drawing = Sampling(temperature=0.9, top_p=0.9, top_k=50, max_new_tokens=48, batch_tokens=16384)  # PAR's
    drawn = sample_candidates(sampler, prompts, REFERENCES, drawing, seed=seed)
    repeated = [prompt for prompt in prompts for _ in range(REFERENCES)]
    answers = [[{"role": "assistant", "content": each.text}] for group in drawn for each in group]
    for model in SETS[name]:
        scores = load_reward("model", path=str(out / model), dtype="float32")(repeated, answers)
        column = "reference_rewards" if len(SETS[name]) == 1 else f"{model}_reference_rewards"
        for at, row in enumerate(rows):
            row[column] = scores[at * REFERENCES : (at + 1) * REFERENCES]
    write_rows(out / "data.jsonl", rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
