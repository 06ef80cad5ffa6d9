"""Which answers a policy gains that is best for a reward, transformed or not: what log-sigmoid.yaml runs.

    python recipes/claims/log-sigmoid.py sample OUT SEED
    python recipes/claims/log-sigmoid.py measure OUT ANSWERS SHAPER

The policy with the most reward at a given KL from its start has each answer exp(u / γ) times as often as that, u being
its reward. Of many answers to a prompt that policy is known by weights alone, without training it.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import parts
import torch

from trl_rewards import bundled, load_reward, load_shaper
from trl_rewards.bundled import quiz, teach
from trl_rewards.testing import make_samples

# Kinds of reply from the best to the worst: pairs are of any two, so that scores have more than two levels.
GRADES = ("clean", "bare", "ramble", "unhelpful", "slip", "guess")
PAIRS, STEPS = 4000, 60
PROMPTS, ANSWERS, REFERENCES = 64, 64, 10
KLS = (0.1, 0.25, 0.5, 1.0)  # nats per answer; figures are means over these
WORST = 0.1  # share of answers that are the worst ones


def sample(out: Path, seed: int) -> None:
    """Train a reward model, and write its scores of answers (P, M) and of the references before them."""
    from trl_rewards.models import Loading, Sampling, load_sampler, sample_candidates

    rng = random.Random(seed)
    torch.manual_seed(seed)
    taken = quiz.known_questions()
    pairs = []
    for question in quiz.more_questions(rng, PAIRS, taken):
        better, worse = sorted(rng.sample(range(len(GRADES)), 2))
        pairs.append((question, *(quiz.REPLIES[GRADES[grade]](rng, question) for grade in (better, worse))))
    losses = teach.train_reward_model(out / "rm", pairs, STEPS, rng)
    print(f"loss {statistics.fmean(losses[-5:]):.3f}", flush=True)

    rows = [quiz.row(question) for question in quiz.more_questions(rng, PROMPTS, taken)]
    prompts, each = [row["prompt"] for row in rows], REFERENCES + ANSWERS
    sampler = load_sampler(Loading(path=str(bundled.model_path()), dtype="float32"))
    drawn = sample_candidates(sampler, prompts, each, Sampling(max_new_tokens=48, batch_tokens=16384), seed=seed)
    asked = [prompt for prompt in prompts for _ in range(each)]
    replies = [[{"role": "assistant", "content": reply.text}] for group in drawn for reply in group]
    wanted = [row["answer"] for row in rows for _ in range(each)]
    model = load_reward("model", path=str(out / "rm"), dtype="float32")
    found = {
        "scores": model(asked, replies),
        "exact": load_reward("exact_match", take="last_word")(asked, replies, answer=wanted),
    }
    groups = {name: torch.tensor(values).view(PROMPTS, each) for name, values in found.items()}
    torch.save(groups, out / "answers.pt")


def measure(out: Path, answers: Path, shaper: str) -> None:
    """Write the mean score of the worst answers, of all, and the share of exact ones, each a mean over KLS."""
    found = torch.load(answers / "answers.pt")
    references, scores = found["scores"][:, :REFERENCES], found["scores"][:, REFERENCES:].double()
    repeated = references.repeat_interleave(ANSWERS, dim=0).tolist()
    samples = make_samples([""] * scores.numel(), reference_rewards=repeated)
    utility = load_shaper(shaper)(scores.flatten(), samples).view_as(scores)
    exact, scores = found["exact"][:, REFERENCES:].double().flatten(), scores.flatten()
    order = scores.argsort()
    result = dict.fromkeys(("worst", "reward", "exact"), 0.0)
    for kl in KLS:
        weights = tilted(utility, kl).flatten() / PROMPTS
        below = weights[order].cumsum(dim=0)
        tail = (WORST - below + weights[order]).clamp(min=0).minimum(weights[order])  # the lowest tenth of the mass
        result["worst"] += (tail * scores[order]).sum().item() / WORST / len(KLS)
        result["reward"] += (weights * scores).sum().item() / len(KLS)
        result["exact"] += (weights * exact).sum().item() / len(KLS)
    (out / "worst.json").write_text(json.dumps(result) + "\n")


def tilted(utility: torch.Tensor, kl: float) -> torch.Tensor:
    """softmax(u / γ) of each row (P, M), with the γ at which its KL from equal weights is `kl`, a mean over rows."""
    low, high = 1e-4, 1e4
    for _ in range(100):
        middle = math.sqrt(low * high)
        logs = (utility / middle).log_softmax(dim=1)
        found = (logs.exp() * logs).sum(dim=1).mean().item() + math.log(utility.shape[1])
        low, high = (middle, high) if found > kl else (low, middle)
    return (utility / high).softmax(dim=1)


if __name__ == "__main__":
    parts.run(__doc__, {sample: {"seed": int}, measure: {"answers": Path, "shaper": str}})
