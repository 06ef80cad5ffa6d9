"""How far the policy gradient that a batch estimates is from batch to batch, by advantage: what bnpo.yaml runs.

    python recipes/claims/bnpo.py sample OUT SEED
    python recipes/claims/bnpo.py measure OUT SAMPLES reinforce|grpo|bnpo

`sample` draws answers of the bundled policy, checks them, and takes of each prompt p the exact gradient of
Σ (R - p) log π over its answers, all weights of the policy. REINFORCE with a group mean, GRPO and BNPO weigh these
gradients and do nothing else, so `measure` asks the library's advantage for the weights, batch after batch, and needs
no more of the gradients than their inner products.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import parts
import torch

from trl_rewards import bundled, load_advantage, load_reward
from trl_rewards.maths import centered
from trl_rewards.testing import make_batch

PROMPTS, GROUP = 320, 16
BATCH = 32  # prompts, of 16 answers each, as in the paper
SHUFFLES = 100
# The paper divides R - p by a Beta density: REINFORCE by that which is 1, GRPO by Beta(3/2, 3/2), 8 / π deviations.
ADVANTAGES = {
    "reinforce": ("center", {}, 1.0),
    "grpo": ("group_norm", {"ddof": 0, "eps": 0.0}, math.pi / 8),
    "bnpo": ("bnpo", {}, 1.0),
}


def sample(out: Path, seed: int) -> None:
    """Write rewards (P, G) of a seed's answers, and the inner products (P, P) of the prompts' gradients."""
    from trl_rewards.models import Loading, Sampling, load_sampler, sample_candidates

    data = bundled.load_data()["train"]
    rows = data.select(random.Random(seed).sample(range(len(data)), PROMPTS))
    sampler = load_sampler(Loading(path=str(bundled.model_path()), dtype="float32"))
    prompts = list(rows["prompt"])
    drawn = sample_candidates(sampler, prompts, GROUP, Sampling(max_new_tokens=48, batch_tokens=16384), seed=seed)
    right = load_reward("exact_match", take="last_word")
    model = sampler.model.requires_grad_(True)
    rewards, gradients = [], []
    for prompt, answer, group in zip(prompts, rows["answer"], drawn, strict=True):
        found = right([prompt] * GROUP, [each.text for each in group], answer=[answer] * GROUP)
        rewards.append(found)
        if 0 < sum(found) < GROUP:  # else all R - p are 0, and the gradient is
            signal = centered(torch.tensor(found), GROUP)
            gradients.append(gradient(model, sampler.encode(prompt), [each.ids for each in group], signal))
        else:
            gradients.append(None)
    there = [at for at, each in enumerate(gradients) if each is not None]
    stacked = torch.stack([gradients[at] for at in there])
    products = torch.zeros(PROMPTS, PROMPTS, dtype=torch.float64)
    products[torch.tensor(there)[:, None], torch.tensor(there)] = (stacked @ stacked.T).double()
    torch.save({"rewards": torch.tensor(rewards), "products": products}, out / "samples.pt")


def gradient(model: torch.nn.Module, prompt: list[int], answers: list[list[int]], signal: torch.Tensor):
    """(D,) gradient of the sum of signal · log π over answers to a prompt."""
    width = max(map(len, answers))
    ids = torch.tensor([prompt + answer + [0] * (width - len(answer)) for answer in answers])
    kept = torch.tensor([[1.0] * len(answer) + [0.0] * (width - len(answer)) for answer in answers])
    logits = model(input_ids=ids, logits_to_keep=width + 1).logits[:, :-1]
    logps = logits.log_softmax(dim=-1).gather(2, ids[:, -width:, None]).squeeze(2)
    ((logps * kept).sum(dim=1) * signal).sum().backward()
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    found = torch.cat([parameter.grad.flatten() for parameter in parameters])
    model.zero_grad()
    return found


def measure(out: Path, samples: Path, arm: str) -> None:
    """Write the variance of the gradient estimate over batches, and its ratio to the squared length of the gradient.

    Batches of one shuffle share no prompt, so variance and squared length are unbiased; they are means over shuffles.
    """
    found = torch.load(samples / "samples.pt")
    rewards, products = found["rewards"], found["products"]
    name, options, scale = ADVANTAGES[arm]
    advantage, rng = load_advantage(name, **options), random.Random(0)
    batches = PROMPTS // BATCH
    variances, lengths = [], []
    for _ in range(SHUFFLES):
        order = torch.tensor(rng.sample(range(PROMPTS), PROMPTS)).view(batches, BATCH)
        weights = torch.zeros(batches, PROMPTS, dtype=torch.float64)
        for batch, rows in enumerate(order):
            weights[batch, rows] = scale * prompt_weights(advantage, rewards[rows]) / (BATCH * GROUP)
        between = weights @ products @ weights.T  # inner products of the batches' estimates
        own = between.trace().item()
        lengths.append((between.sum().item() - own) / (batches * (batches - 1)))
        variances.append(own / batches - lengths[-1])
    variance, length = statistics.fmean(variances), statistics.fmean(lengths)
    result = {"variance": variance, "noise": variance / length, "right": rewards.mean().item()}
    (out / "variance.json").write_text(json.dumps(result) + "\n")


def prompt_weights(advantage, rewards: torch.Tensor) -> torch.Tensor:
    """By what an advantage multiplies R - p of each prompt: (P, G) -> (P,)."""
    signal = centered(rewards.flatten(), GROUP).view_as(rewards)
    found = advantage(make_batch(rewards.flatten().tolist(), GROUP)).double().view_as(rewards)
    size = signal.square().sum(dim=1)
    weights = (found * signal).sum(dim=1) / size.masked_fill(size == 0, 1.0)
    if not torch.allclose(weights[:, None] * signal, found, atol=1e-6):
        raise ValueError(f"{type(advantage).__name__} is no multiple of R - p within a prompt's answers")
    return weights


if __name__ == "__main__":
    parts.run(__doc__, {sample: {"seed": int}, measure: {"samples": Path, "arm": ADVANTAGES}})
