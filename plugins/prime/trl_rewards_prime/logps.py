"""How probable a language model finds completions, token by token.  https://huggingface.co/papers/2412.01981"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Text = str | list[dict[str, Any]]


class CompletionModel:
    """A causal language model with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, name: str):
        """`name` is what messages call it."""
        from trl_rewards.models import Sampler

        self.model, self.tokenizer = model, tokenizer
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._sampler = Sampler(tokenizer, self.context, (), name)

    @property
    def device(self) -> Any:
        return self.model.device

    def encode(self, prompt: Text) -> list[int]:
        """A prompt's token ids, as TRL has them for the policy. RewardError where it is empty or does not fit."""
        return self._sampler.encode(prompt)

    def encode_pair(self, prompt: Text, completion: Text) -> tuple[list[int], list[int]]:
        """Token ids of prompt and completion, as TRL's KTOTrainer has them: encoded together, with their end.

        A string ends with the end-of-sequence token, a chat as its template ends it. The completion begins where the
        two of them differ from the prompt alone. RewardError as `encode`.
        """
        alone, tokenizer = self.encode(prompt), self.tokenizer
        if isinstance(prompt, str):
            end = tokenizer.eos_token or ""
            whole = tokenizer(f"{prompt}{str(completion).removesuffix(end)}{end}")["input_ids"]
        else:
            text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        shared = next((at for at, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
        return whole[:shared], whole[shared:]

    def padded(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> tuple[Tensor, Tensor, int]:
        """Ids and mask (B, …), prompts padded on the left and completions on the right, and the completions' width."""
        from trl_rewards.models import padded_rollout

        return padded_rollout(prompts, completions, self.tokenizer.pad_token_id)

    def logps(self, ids: Tensor, attention: Tensor, width: int) -> Tensor:
        """(B, width) float32 log-probabilities of the last `width` tokens, on the model's device."""
        import torch

        ids, attention = ids.to(self.device), attention.to(self.device)
        positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
        logits = self.model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=width + 1,
        ).logits[:, :-1]
        chosen = logits.gather(2, ids[:, -width:, None]).squeeze(2).float()
        return chosen - torch.stack([row.float().logsumexp(dim=-1) for row in logits])  # one row's copy at a time
