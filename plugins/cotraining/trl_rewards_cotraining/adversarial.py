"""Adv-GRPO for text: a reward model that learns to tell references from the policy's own.  https://huggingface.co/papers/2511.20256"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from trl_rewards import Failed, RewardBatch, Samples, Score
from trl_rewards_cotraining.losses import hinge_loss, logistic_loss, preference_loss
from trl_rewards_cotraining.trained import TrainedModel

if TYPE_CHECKING:
    from torch import Tensor

    from trl_rewards import World

LOSSES = {"softmax": preference_loss, "hinge": hinge_loss, "logistic": logistic_loss}


class Adversarial(TrainedModel):
    """The score of a reward model that learns to put reference answers above the policy's, clamped.

    https://huggingface.co/papers/2511.20256, whose samples are images; a reference here is a text, and the model reads
    prompt and completion as `model` does. The paper trains in turns: a batch teaches the reward model or the policy,
    never both (`alternate`). With `update_mode: gate`, its variant for a trained reward model, it is the reward
    model's turn when it does not score the references above the policy's answers on average, which is what a hacked
    reward looks like; with `schedule`, that for a discriminator, it is the policy's turn every `d_times`-th batch. The
    paper's gate stays shut where the means are equal, and a head that starts at 0 would never learn.

    Rows without a reference are rewarded and teach nothing. The paper's advantages are `group_norm` with `ddof: 0`,
    or over the deviation of the batch. `rewards/<name>/gap` is the references' mean reward less that of the policy.
    With DPO the policy learns from every batch.
    """

    references: str = "references"
    """Dataset column with a good answer, or a list of several, which a group's rows take in turns. Of an answer in
    chat messages the last one of the assistant counts."""
    loss: Literal["softmax", "hinge", "logistic"] = "softmax"
    """`softmax` over reference and generation, the paper's for a reward model; `hinge`, its discriminator's;
    `logistic`, after which the score is the log density ratio (https://huggingface.co/papers/2509.25035)."""
    update_mode: Literal["gate", "schedule", "always", "none"] = "gate"
    """When the reward model learns: see above; from every batch; never."""
    d_times: int = 10
    """`schedule`: of so many batches all but one teach the reward model."""
    alternate: bool = True
    """The policy does not learn from batches that the reward model learns from: their advantages are 0. The policy's
    optimiser goes on with its momentum, and a KL term with its pull."""
    clamp: float | None = 10.0
    """Rewards are within ± this. Losses see the scores as they are."""
    learning_rate: float = 5.0e-6
    """Of AdamW, constant. The paper's for the last layers of a reward model; 1e-4 for the heads of a discriminator."""

    def __post_init__(self):
        super().__post_init__()
        if self.d_times < 2:
            raise ValueError(f"d_times must be at least 2, got {self.d_times}")
        if self.clamp is not None and self.clamp <= 0:
            raise ValueError(f"clamp must be above 0, got {self.clamp}")
        if self.update_mode == "always" and self.alternate:
            raise ValueError(
                "update_mode: always leaves the policy no batch to learn from; set alternate: false with it"
            )
        self._batches = 0
        self._seen: tuple[Samples, Tensor, bool] | None = None

    def reads(self) -> tuple[str, ...]:
        return (self.references,)

    def score(self, samples: Samples) -> list[Score]:
        return [self._clamped(score) for score in self._scores(*self._shown(samples, samples.completions))]

    def holds_back(self, batch: RewardBatch) -> bool:
        return self.alternate and self._looked_at(batch)[1]

    def update(self, batch: RewardBatch) -> dict[str, float]:
        """Learn from a batch whose turn it is: each process takes its share of the rows with a reference."""
        from trl_rewards import World

        references, learns = self._looked_at(batch)
        self._batches, self._seen = self._batches + 1, None
        mine = self._mine(batch)
        known = ~(references.isnan() | mine.isnan() | batch.rewards.isnan())
        if not known.any():
            return {"learns": 0.0}
        gap = (references - mine)[known]
        metrics = {
            "learns": float(learns),
            "references": references[known].mean().item(),
            "gap": gap.mean().item(),
            "accuracy": (gap > 0).float().mean().item(),
        }
        if not learns:
            return metrics
        samples, answers = batch.samples, self._references(batch)

        def losses(rows: list[int]) -> Tensor:
            chosen = samples.take([*rows, *rows])
            texts = [answers[row] for row in rows] + [samples.completions[row] for row in rows]
            real, fake = self._trainable_scores(*self._shown(chosen, texts)).chunk(2)
            return LOSSES[self.loss](real, fake)

        _, learner = self._ready()
        rows = known.nonzero().squeeze(1).tolist()
        return metrics | learner.learn(rows, losses, World.current(), self.mini_batch, self.micro_batch)

    def _looked_at(self, batch: RewardBatch) -> tuple[Tensor, bool]:
        """(N,) rewards of the references as the model is, NaN for none, and whether it is to learn from the batch."""
        if self._seen is not None and self._seen[0] is batch.samples:
            return self._seen[1], self._seen[2]
        from trl_rewards import World

        references = self._reference_rewards(batch, World.current())
        mine = self._mine(batch)
        known = ~(references.isnan() | mine.isnan() | batch.rewards.isnan())
        learns = bool(known.any()) and self._has_its_turn(references[known], mine[known])
        self._seen = (batch.samples, references, learns)
        return references, learns

    def _has_its_turn(self, references: Tensor, mine: Tensor) -> bool:
        if self.update_mode == "gate":
            return gate_opens(references, mine)
        if self.update_mode == "schedule":
            return (self._batches + 1) % self.d_times != 0
        return self.update_mode == "always"

    def _mine(self, batch: RewardBatch) -> Tensor:
        return batch.scores.values[:, batch.scores.names.index(self.display_name)]

    def _reference_rewards(self, batch: RewardBatch, world: World) -> Tensor:
        """(N,) the rewards of each row's reference, NaN without one; each process scores its share of them."""
        import torch

        answers = self._references(batch)
        rows: dict[tuple[str, str], list[int]] = {}
        for row, answer in enumerate(answers):
            if answer is not None:
                rows.setdefault((str(batch.samples.prompts[row]), str(answer)), []).append(row)
        mine = list(rows.values())[world.rank :: world.size]
        device = batch.scores.values.device
        found = torch.zeros(len(answers), device=device)
        with world.together(f"{self.display_name!r} could not score the references", device):
            chosen = [same[0] for same in mine]
            scores = self._scores(*self._shown(batch.samples.take(chosen), [answers[row] for row in chosen]))
            for same, score in zip(mine, scores, strict=True):
                clamped = self._clamped(score)
                found[same] = float("nan") if isinstance(clamped, Failed) else clamped
        absent = torch.tensor([answer is None for answer in answers], device=device)
        return world.total(found).masked_fill(absent, float("nan"))

    def _references(self, batch: RewardBatch) -> list[str | None]:
        """Each row's reference; None for none. Rows of a group take several in turns."""
        found: list[str | None] = []
        for row, given in enumerate(batch.samples[self.references]):
            texts = _texts(given)
            found.append(texts[row % batch.scores.group_size % len(texts)] if texts else None)
        return found

    def _shown(self, samples: Samples, completions: list[Any]) -> tuple[list[str], bool, Any]:
        """What the model reads of completions to the samples' prompts, and where they start."""
        from trl_rewards.models import completion_start, shown_text

        tokenizer = self._ready()[0].tokenizer
        texts = [
            shown_text(tokenizer, prompt, completion, self.path)
            for prompt, completion in zip(samples.prompts, completions, strict=True)
        ]
        plain = all(isinstance(prompt, str) for prompt in samples.prompts)
        return texts, plain, lambda row: completion_start(tokenizer, samples.prompts[row], texts[row], self.path)

    def _clamped(self, score: float | Failed) -> float | Failed:
        if isinstance(score, Failed) or self.clamp is None:
            return score
        return min(max(score, -self.clamp), self.clamp)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | {"batches": self._batches} if state else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._batches = state["batches"]
        super().load_state_dict(state)


def gate_opens(references: Tensor, generations: Tensor) -> bool:
    """Whether the references' mean reward is not above that of the policy's answers: (M,), (N,)."""
    return bool((references.mean() <= generations.mean()).item())


def _texts(given: Any) -> list[str]:
    """The texts of one reference or of a list of several, each a string or chat messages; missing ones left out."""
    several = isinstance(given, list) and not (given and isinstance(given[0], dict))
    references = given if several else [given]
    return [text for text in Samples([""] * len(references), references).texts if text.strip()]
