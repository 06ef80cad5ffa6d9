"""A sequence-classification reward model, by folder or Hub name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from trl_rewards.components import Context, Reward, Score, resolve_path
from trl_rewards.samples import Failed, Samples

if TYPE_CHECKING:
    from trl_rewards.models.scorer import RewardModel


class Model(Reward):
    """The scalar score of a reward model for prompt and completion. Unbounded; one forward pass per row.

    Chat prompts go through the reward model's own chat template, plain ones are joined to the completion. The model
    is loaded on each rank, before the policy.
    """

    path: str
    """Folder or Hub name of a sequence-classification model with one output."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    batch_size: int = 8
    """Texts in one forward pass."""
    max_length: int | None = None
    """Tokens kept of prompt and completion; of longer texts the beginning is cut, so that the answer stays. None: the
    model's own limit."""
    load_in_4bit: bool = False
    """bitsandbytes nf4, whatever the policy's quantisation is."""
    load_in_8bit: bool = False
    trust_remote_code: bool = False

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("set load_in_4bit or load_in_8bit, not both")
        self._model: RewardModel | None = None

    def setup(self, context: Context) -> None:
        from trl_rewards.models.scorer import load_reward_model

        self._model = load_reward_model(
            resolve_path(self.path, context.base_dir),
            self.revision,
            self.dtype,
            context.device,
            self.batch_size,
            self.max_length,
            self.trust_remote_code,
            "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else None,
        )

    def close(self) -> None:
        self._model = None

    def score(self, samples: Samples) -> list[Score]:
        from trl_rewards.models.scorer import score_texts

        if self._model is None:
            self.setup(Context())
        assert self._model is not None
        texts = [
            self._text(prompt, completion)
            for prompt, completion in zip(samples.prompts, samples.completions, strict=True)
        ]
        templated = not isinstance(next(iter(samples.prompts), ""), str)
        scores = score_texts(self._model, texts, templated) if texts else []
        return [Failed("the text has no tokens") if score is None else score for score in scores]

    def _text(self, prompt, completion) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        assert self._model is not None
        tokenizer: Any = self._model.tokenizer
        return tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
