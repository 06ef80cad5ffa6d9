"""Free process rewards: what tokens and steps are worth to a language model that was trained on outcomes alone.
https://huggingface.co/papers/2412.01981
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from trl_rewards import Context, Failed, OutcomeObjective, Outcomes, RewardError, Samples, Score, StepReward
from trl_rewards.models import Held, InProcess
from trl_rewards.steps import aggregate
from trl_rewards_prime.implicit import at_steps, ce_loss
from trl_rewards_prime.logps import CompletionModel

if TYPE_CHECKING:
    from torch import Tensor

    from trl_rewards.models import Loading

Ids = tuple[list[int], list[int]]
"""Of a prompt and its completion."""


class ImplicitPRMCE(OutcomeObjective):
    """Cross-entropy of σ(β Σ log-ratios) and the label, over answers that are right or wrong.

    https://huggingface.co/papers/2412.01981. The paper trains for one epoch in batches of 64 with a learning rate of
    5e-7, all weights. A label between 0 and 1 is the share of graders, or of tries, that found the answer right.
    """

    def loss(self, batch: Outcomes) -> Tensor:
        return ce_loss(self.beta * batch.log_ratios, batch.labels).mean()


class ImplicitPRM(InProcess, StepReward):
    """β (log π - log π_ref) of each token or step, π trained on outcomes with `implicit_prm_ce`, DPO or the like.

    https://huggingface.co/papers/2412.01981. With LoRA the reference is the same model with the adapter off: one model
    in memory, which may be quantised. A number for the whole completion (`take`), and the values of steps of the text,
    are made of the text as it was read in training, with its end, in the model's own tokens: any policy will do.
    Single tokens' values need a policy with the same tokens; others are refused.
    """

    path: str
    """Folder or Hub name of π; or of its adapter, as training with LoRA leaves it."""
    reference: str | None = None
    """Folder or Hub name of π_ref, which π was trained from. None: π without its adapter, which it then must have."""
    use_reference: bool = True
    """false: log π alone, where the reference costs too much; the paper's ablation."""
    beta: float = 0.05
    """β; the one of training makes σ of a completion's sum the probability that it is right."""
    steps: str | dict[str, str] | Callable = "token"
    """`token`: every token is a step. `blank_line`, `line`, `sentence`, `turn`; `{separator: …}`, `{start: …}` or
    `{end: …}` with a regular expression; or a function `(text) -> list of parts`, as `./file.py:name`. The last step
    reaches to the completion's end, so that steps add up to the whole."""
    value: Literal["single", "cumulative"] = "single"
    """Of a step: what its tokens are worth together; or with all those before them."""
    micro_batch: int = 8
    """Rows that go through the model together."""

    def __post_init__(self):
        InProcess.__post_init__(self)
        for name in ("beta", "micro_batch"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.reference is not None and not self.use_reference:
            raise ValueError("reference is not looked at with use_reference: false; leave one out")
        if self.take == "product":
            raise ValueError("take: product is for probabilities, and implicit rewards are logarithms; take sum")
        if self.steps != "token":
            StepReward.__post_init__(self)
        if self.reference is not None and self.adapter is not None:
            raise ValueError("reference: with adapter it is the model of path without it; leave one of them out")
        self._context = Context()
        self._model: _Pair | None = None

    def held(self) -> list[Held]:
        return [Held(path) for path in (self.path, self.reference) if path]

    def setup(self, context: Context) -> None:
        if self.steps != "token":
            StepReward.setup(self, context)
        self._context = context
        loading = self.loading(self.path, context)
        if self.use_reference and self.reference is None and loading.adapter is None:
            raise RewardError(
                f"{self.display_name!r}: {self.path!r} is a whole model, with no adapter to switch off; give the "
                "model that it was trained from as reference, or use_reference: false"
            )
        reference = replace(self.loading(self.reference, context), revision=None) if self.reference else None
        self._model = _Pair(loading, reference, self.use_reference)

    def close(self) -> None:
        self._model = None

    def score_steps(self, samples: Samples, steps: list[list[str]]) -> list[list[float | None] | Score]:
        pairs = self._read(samples)
        tokenizer, found = self._ready().tokenizer, list[list[float | None] | Score]()
        for row, q in enumerate(self._worth(pairs)):
            pair = pairs[row]
            if isinstance(q, Failed):
                found.append(q)
                continue
            assert not isinstance(pair, Failed)  # it would have no q
            ids = pair[1]
            ends = self.ends_in(tokenizer, ids, samples.completions[row], steps[row])
            if ends and not isinstance(ends, Failed):
                ends[-1] = len(ids) - 1
            found.append(ends if isinstance(ends, Failed) else self._at(ends, q))
        return found

    def score_tokens(self, samples: Samples) -> list[list[float | None] | Score]:
        if self.steps != "token":
            return StepReward.score_tokens(self, samples)
        if self.take != "steps" or self._context.tokenizer is None or not samples.completion_ids:
            return [*self.score(samples)]
        model = self._ready()
        model.check_tokens(self._context.tokenizer, self.display_name)
        prompts = [_hole_or(model.encode, prompt) for prompt in samples.prompts]
        pairs = [
            prompt if isinstance(prompt, Failed) else (prompt, ids)
            for prompt, ids in zip(prompts, samples.completion_ids, strict=True)
        ]
        return [q if isinstance(q, Failed) else self._at(range(len(q)), q) for q in self._worth(pairs)]

    def score(self, samples: Samples) -> list[Score]:
        if self.steps != "token":
            return StepReward.score(self, samples)
        found = self._worth(self._read(samples))
        return [q if isinstance(q, Failed) else aggregate(self._at(range(len(q)), q), self.take) for q in found]

    def _at(self, ends: Sequence[int], q: list[float]) -> list[float | None]:
        return [*at_steps(q, ends, self.value == "cumulative")]

    def _read(self, samples: Samples) -> list[Ids | Failed]:
        """The rows as the model read such in training."""
        encode = self._ready().encode_pair
        return [_hole_or(encode, *row) for row in zip(samples.prompts, samples.completions, strict=True)]

    def _worth(self, pairs: Sequence[Ids | Failed]) -> list[list[float] | Failed]:
        """β times each completion token's log-ratio."""
        from trl_rewards.models import parts

        model = self._ready()
        found: list[Any] = [model.too_long(pair) or pair for pair in pairs]
        rows = [row for row, pair in enumerate(found) if not isinstance(pair, Failed)]
        rows.sort(key=lambda row: sum(map(len, found[row])))
        with model.at_work():
            for part in parts(rows, self.micro_batch):
                prompts, completions = zip(*(found[row] for row in part), strict=True)
                worth = self.beta * model.log_ratios(prompts, completions)
                for row, values, ids in zip(part, worth, completions, strict=True):
                    found[row] = values[: len(ids)].tolist()
        return found

    def _ready(self) -> _Pair:
        if self._model is None:
            raise RewardError(f"{self.display_name!r} has not been set up")
        return self._model


class _Pair(CompletionModel):
    """A causal LM and its reference: another model, itself without its adapter, or none."""

    def __init__(self, loading: Loading, reference: Loading | None, use_reference: bool):
        from trl_rewards.models import load_tokenizer

        super().__init__(_load(loading), load_tokenizer(loading), loading.adapter or loading.path)
        self._name, self._loaded = loading.adapter or loading.path, [(self.model, loading)]
        self._switches = use_reference and reference is None
        self._reference: CompletionModel | None = None
        self._matched: Any = None
        if reference is not None:
            tokenizer = load_tokenizer(reference)
            if tokenizer.get_vocab() != self.tokenizer.get_vocab():
                raise RewardError(f"reference: {reference.path!r} has other tokens than {self._name!r}")
            self._reference = CompletionModel(_load(reference), tokenizer, reference.path)
            self._loaded.append((self._reference.model, reference))

    def check_tokens(self, policy: Any, name: str) -> None:
        """RewardError if another tokenizer than the model's made the policy's tokens."""
        if policy is not self._matched and policy.get_vocab() != self.tokenizer.get_vocab():
            raise RewardError(
                f"{name!r}: the policy has other tokens than {self._name!r}, so that what tokens are worth cannot be "
                "told; for one number per completion set take: sum (or mean, min, last), for values of steps of the "
                "text steps: blank_line (or another)"
            )
        self._matched = policy

    def too_long(self, pair: Ids | Failed) -> Failed | None:
        if isinstance(pair, Failed) or self.context is None or sum(map(len, pair)) <= self.context:
            return None
        return Failed(f"prompt and completion have {sum(map(len, pair))} tokens, and the model reads {self.context}")

    @contextmanager
    def at_work(self) -> Generator[None]:
        """Models that are kept in CPU memory are moved to their device, and back."""
        from trl_rewards.models import at_work

        with ExitStack() as stack:
            for model, loading in self._loaded:
                stack.enter_context(at_work(model, loading))
            yield

    def log_ratios(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Tensor:
        """(B, T) float32 log π - log π_ref of the completions' tokens, log π where there is no reference."""
        import torch

        from trl_rewards.models import using

        padded = self.padded(prompts, completions)
        with torch.no_grad():
            found = self.logps(*padded)
            if self._reference is not None:
                found = found - self._reference.logps(*padded).to(found.device)
        if self._switches:
            with using(self.model, None):
                found = found - self.logps(*padded)
        return found


def _load(loading: Loading) -> Any:
    from transformers import AutoModelForCausalLM

    from trl_rewards.models import load_pretrained

    model, missing = load_pretrained(AutoModelForCausalLM, loading)
    if missing:
        raise RewardError(f"{loading.path!r} is no causal language model: it has no weights for {missing[0]}")
    return model


def _hole_or(encode: Callable, *row: Any) -> Any:
    """What `encode` makes of a row; Failed where it cannot."""
    try:
        return encode(*row)
    except RewardError as error:
        return Failed(str(error))
