"""LaRe: the outcome's reward given out to the steps that earned it.  https://huggingface.co/papers/2412.11120

Steps are described by a few numbers, their latent factors, and a small network learns from outcomes alone what they
are worth. Losses are those of the released code (thu-rllab/LaRe@332cbe9, mujoco/reward_model), with random return
decomposition (https://huggingface.co/papers/2111.13485).
"""

from __future__ import annotations

import itertools
from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar

from trl_rewards import Context, Failed, RewardBatch, Samples, Score, StepReward, TrainableReward
from trl_rewards.models import as_text
from trl_rewards_process.factors import BUILT_IN, CONFINED, FactorSet, Found

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trl_rewards.models import Learner


def decomposition_losses(
    rewards: Tensor, mask: Tensor, returns: Tensor, lengths: Tensor, unbiased: bool = False
) -> Tensor:
    """(mean of the K step rewards - R / T)² of each row: (B, K), (B, K), (B,), (B,) -> (B,).

    `mask`: which steps are there. All steps (K = T) are LaRe's loss, K at random that of random return decomposition.
    `unbiased` takes off what the sampling of K steps without replacement adds on average, the unbiased variance of
    the K rewards times (1 - K/T) / K, which may make a loss negative. With K = 1 there is no variance to be had, and
    nothing is taken off.
    """
    count = mask.sum(dim=1)
    mean = (rewards * mask).sum(dim=1) / count
    losses = (mean - returns / lengths) ** 2
    if unbiased:
        squares = ((rewards - mean[:, None]) ** 2 * mask).sum(dim=1)
        losses = losses - squares / (count - 1).clamp(min=1) * (1 - count / lengths) / count
    return losses


class LatentReward(StepReward, TrainableReward):
    """What each step is worth, by a small network that learns it from outcomes while the policy learns.
    https://huggingface.co/papers/2412.11120

    A step is described by factors (`factors`), numbers that the network decodes to its reward. It is trained so that a
    completion's step rewards add up to its outcome R: the mean over T steps is brought to R / T. The policy learns
    from these rewards in place of the outcome, whose `weight` is 0 then. Rewards of a batch are made before it is
    learned from, and start at 0 (the released network starts at random). An evaluation scores, and does not learn.

    The released code trains on a replay buffer; here each batch is gone through `passes` times.
    """

    deterministic: ClassVar[bool] = False  # it learns

    outcome: str | None = None
    """Name of the source whose scores are R. None: the only other one."""
    factors: list[str] = field(default_factory=lambda: [*BUILT_IN])
    """Functions of a step's factors: `length`, `position`, `repetition`, `digits`, `equations`, and functions
    `(question, steps) -> list of numbers per step` as `./file.py:name`. A file runs in this process: read it first,
    above all if a model wrote it (`python -m trl_rewards_process.propose`), or set `sandbox`."""
    sandbox: str | None = None
    """Run files of `factors` in a sandbox (`auto`, `bwrap`, `landlock`, as in docs/sandbox.md), never in this process.
    Names of modules cannot be used then."""
    seconds: float = 30.0
    """Time for the factors of a batch in the sandbox."""
    sampled: int | None = None
    """K, steps of a completion at random that a loss is made of (64 in the released code). None: all of them, and so
    for completions of K steps and fewer, where the released code draws some of them twice."""
    unbiased: bool = False
    """Take off the loss what sampling adds to it on average; for `sampled`."""
    layers: int = 3
    """Of the network."""
    hidden: int = 256
    """Width of its layers."""
    learning_rate: float = 3.0e-4
    """Of Adam, constant."""
    passes: int = 8
    """How often each batch is learned."""
    mini_batch: int = 64
    """Completions per optimiser step, over all processes."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("seconds", "hidden", "layers", "learning_rate", "passes", "mini_batch"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.sampled is not None and self.sampled < 1:
            raise ValueError(f"sampled must be at least 1, got {self.sampled}")
        if self.unbiased and (self.sampled is None or self.sampled < 2):
            raise ValueError(f"unbiased needs the variance of 2 sampled steps or more, got sampled {self.sampled}")
        if not self.factors:
            raise ValueError(f"factors is empty; there is {', '.join(BUILT_IN)}, or a function ./file.py:name")
        for name in self.factors:
            if name not in BUILT_IN and ":" not in name:
                raise ValueError(f"factors: no {name!r}; there is {', '.join(BUILT_IN)}, or a function ./file.py:name")
            if self.sandbox and name not in BUILT_IN and not name.partition(":")[0].endswith(".py"):
                raise ValueError(f"factors: {name!r} is no file, and the sandbox runs files: ./file.py:name")
        if self.sandbox is not None and self.sandbox not in CONFINED:
            raise ValueError(f"sandbox must be one of {', '.join(CONFINED)}, got {self.sandbox!r}")
        self._factors: FactorSet | None = None
        self._decoder: torch.nn.Module | None = None
        self._learner: Learner | None = None

    def setup(self, context: Context) -> None:
        import torch

        from trl_rewards.models import Learner

        self.close()
        super().setup(context)
        self._factors = FactorSet(self.factors, context, self.sandbox, self.seconds)
        assert self._factors.width is not None
        self._decoder = decoder(self._factors.width, self.hidden, self.layers, context.seed)
        self._decoder.to(context.device or "cpu")
        parameters = dict(self._decoder.named_parameters())
        self._learner = Learner(
            self.display_name, parameters, torch.enable_grad, self.learning_rate, max_grad_norm=float("inf")
        )

    def close(self) -> None:
        if self._factors is not None:
            self._factors.close()
        self._factors = self._decoder = self._learner = None

    def _ready(self) -> tuple[FactorSet, torch.nn.Module, Learner]:
        if self._factors is None:
            self.setup(Context())
        assert self._factors is not None
        assert self._decoder is not None
        assert self._learner is not None
        return self._factors, self._decoder, self._learner

    def score_steps(self, samples: Samples, steps: list[list[str]]) -> list[list[float | None] | Score]:
        import torch

        _, network, learner = self._ready()
        rows = self._factors_of(samples, steps, range(len(samples)))
        whole = [row for row in rows.values() if isinstance(row, list)]
        flat = torch.tensor([step for row in whole for step in row], device=learner.device)
        with torch.no_grad():
            values = iter(network(flat).squeeze(1).tolist() if len(flat) else [])
        return [row if isinstance(row, Failed) else list(itertools.islice(values, len(row))) for row in rows.values()]

    def update(self, batch: RewardBatch) -> dict[str, float]:
        """Learn from a batch: each process takes its share of every mini-batch, and gradients are added up."""
        import torch

        from trl_rewards import World
        from trl_rewards.models import source_of

        _, network, learner = self._ready()
        world, samples = World.current(), batch.samples
        place = batch.scores.names.index(source_of(batch, self.display_name, self.outcome))
        returns = batch.scores.values[:, place].masked_fill(batch.rewards.isnan(), float("nan"))
        mine = range(world.rank, len(samples), world.size)
        found = self._factors_of(samples, self.steps_of(samples), mine)
        every = {row: values for share in world.gather_objects(found) for row, values in share.items()}
        factors = {
            row: torch.tensor(values, device=learner.device)
            for row, values in sorted(every.items())
            if isinstance(values, list) and values and not returns[row].isnan()
        }
        if not factors:
            return {}

        def losses(part: list[int]) -> Tensor:
            chosen = [factors[row] if picks[row] is None else factors[row][picks[row]] for row in part]
            counts, lengths = (
                torch.tensor([len(steps) for steps in each], device=learner.device)
                for each in (chosen, [factors[row] for row in part])
            )
            padded = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
            mask = torch.arange(padded.shape[1], device=learner.device) < counts[:, None]
            rewards = network(padded).squeeze(2)
            return decomposition_losses(rewards, mask, returns[part].to(rewards), lengths, self.unbiased)

        rows = list(factors)
        metrics: list[dict[str, float]] = []
        for _ in range(self.passes):
            # Drawn alike on all processes, which have the same random numbers here.
            order = [rows[place] for place in torch.randperm(len(rows)).tolist()]
            picks = {row: self._pick(len(steps)) for row, steps in factors.items()}
            metrics.append(learner.learn(order, losses, world, self.mini_batch, self.mini_batch))
        return metrics[-1]

    def _pick(self, steps: int) -> Tensor | None:
        """Which of so many steps a loss is made of; None for all."""
        import torch

        return torch.randperm(steps)[: self.sampled] if self.sampled is not None and steps > self.sampled else None

    def _factors_of(self, samples: Samples, steps: list[list[str]], rows: range) -> dict[int, Found]:
        """Factors of some rows' steps, or why there are none."""
        described = self._ready()[0]([(as_text(samples.prompts[row]), steps[row]) for row in rows])
        return dict(zip(rows, described, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return self._learner.state_dict() if self._learner is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._ready()[2].load_state_dict(state)


def decoder(width: int, hidden: int, layers: int, seed: int) -> torch.nn.Module:
    """A network (…, width) -> (…, 1) of linear layers with ReLU between them, whose output starts at 0."""
    import torch

    sizes = [width, *[hidden] * (layers - 1), 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = [torch.nn.Linear(one, other) for one, other in itertools.pairwise(sizes)]
    torch.nn.init.zeros_(linear[-1].weight)
    torch.nn.init.zeros_(linear[-1].bias)
    parts = [part for layer in linear for part in (layer, torch.nn.ReLU())]
    return torch.nn.Sequential(*parts[:-1])
