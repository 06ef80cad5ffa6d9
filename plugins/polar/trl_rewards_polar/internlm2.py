"""InternLM2, the architecture of the released POLAR models.  https://huggingface.co/papers/2403.17297

Llama with its own parameter names, one fused matrix for queries, keys and values, and `v_head` for a score. Parameters
have the published names, so `internlm/POLAR-7B` needs no conversion and none of the Python code in its repository,
which was written for transformers 4.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


class InternLM2(NamedTuple):
    """The classes that `internlm2` makes."""

    config: type[PreTrainedConfig]
    backbone: type[PreTrainedModel]
    reward_model: type[PreTrainedModel]


def split_heads(fused: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, kv·(g + 2)·d) -> queries (B, kv·g, T, d), keys (B, kv, T, d), values (B, kv, T, d).

    For each key/value head, wqkv has its g query heads, then its key head, then its value head.
    """
    grouped = fused.unflatten(-1, (kv_heads, -1, head_dim))  # (B, T, kv, g + 2, d)
    queries = grouped[..., :-2, :].flatten(2, 3)
    return queries.transpose(1, 2), grouped[..., -2, :].transpose(1, 2), grouped[..., -1, :].transpose(1, 2)


def last_attended(mask: Tensor) -> Tensor:
    """(B, T) attention mask -> (B,) position of each row's last 1; 0 where a row has none."""
    return mask.long().cumsum(dim=1).argmax(dim=1)


@functools.cache
def register() -> None:
    """Let `AutoConfig`, `AutoModel` and `AutoModelForSequenceClassification` load InternLM2 with the classes here.

    In this process they then do so also where they are told to trust the code of an InternLM2 repository.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    config, backbone, reward_model = internlm2()
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, backbone)
    AutoModelForSequenceClassification.register(config, reward_model)


# Inside a function, because a plugin's modules import no torch.
@functools.cache
def internlm2() -> InternLM2:
    """The classes, made once."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaModel
    from transformers import initialization as init
    from transformers.activations import ACT2FN
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import (
        LlamaPreTrainedModel,
        LlamaRMSNorm,
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
        eager_attention_forward,
    )

    class InternLM2Config(LlamaConfig):
        model_type = "internlm2"
        base_model_tp_plan = None
        base_model_pp_plan = None
        bias = False
        reward_token_id = None

        @classmethod
        def from_dict(cls, config_dict, **kwargs):
            # Released configs ask for flash_attention_2, a package of its own; those who have it can say so.
            own = {name: value for name, value in config_dict.items() if name != "attn_implementation"}
            return super().from_dict(own, **kwargs)

    class InternLM2Attention(nn.Module):
        is_causal = True

        def __init__(self, config: Any, layer_idx: int):
            super().__init__()
            self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
            self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
            self.scaling = self.head_dim**-0.5
            queries = config.num_attention_heads * self.head_dim
            fused = queries + 2 * config.num_key_value_heads * self.head_dim
            self.wqkv = nn.Linear(config.hidden_size, fused, bias=config.bias)
            self.wo = nn.Linear(queries, config.hidden_size, bias=config.bias)

        def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
            fused = self.wqkv(hidden_states)
            queries, keys, values = split_heads(fused, self.config.num_key_value_heads, self.head_dim)
            queries, keys = apply_rotary_pos_emb(queries, keys, *position_embeddings)
            if past_key_values is not None:
                keys, values = past_key_values.update(keys, values, self.layer_idx)
            implementation = self.config._attn_implementation
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            dropout = self.config.attention_dropout if self.training else 0.0
            attended, weights = attend(
                self, queries, keys, values, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
            return self.wo(attended.flatten(2)), weights

    class InternLM2MLP(nn.Module):
        def __init__(self, config: Any):
            super().__init__()
            self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
            self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
            self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
            self.activation = ACT2FN[config.hidden_act]

        def forward(self, hidden_states):
            return self.w2(self.activation(self.w1(hidden_states)) * self.w3(hidden_states))

    class InternLM2DecoderLayer(GradientCheckpointingLayer):
        def __init__(self, config: Any, layer_idx: int):
            super().__init__()
            self.attention = InternLM2Attention(config, layer_idx)
            self.feed_forward = InternLM2MLP(config)
            self.attention_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.ffn_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        def forward(self, hidden_states, **kwargs):
            attended, _ = self.attention(self.attention_norm(hidden_states), **kwargs)
            hidden_states = hidden_states + attended
            return hidden_states + self.feed_forward(self.ffn_norm(hidden_states))

    class InternLM2PreTrainedModel(LlamaPreTrainedModel):
        config_class = InternLM2Config
        _no_split_modules = ["InternLM2DecoderLayer"]
        _input_embed_layer = "tok_embeddings"
        _can_record_outputs = {"hidden_states": InternLM2DecoderLayer, "attentions": InternLM2Attention}
        _keys_to_ignore_on_load_unexpected = [r"^output\.weight$"]  # the language model's head

    class InternLM2Model(InternLM2PreTrainedModel, LlamaModel):
        def __init__(self, config: Any):
            super(LlamaModel, self).__init__(config)
            self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
            self.layers = nn.ModuleList(
                InternLM2DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
            )
            self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.rotary_emb = LlamaRotaryEmbedding(config)
            self.gradient_checkpointing = False
            self.post_init()

        @property
        def embed_tokens(self):  # the name in Llama's forward, which is this model's too
            return self.tok_embeddings

    class InternLM2ForRewardModel(InternLM2PreTrainedModel):
        """One score per row: `v_head` of the last attended position, whatever token is there."""

        def __init__(self, config: Any):
            super().__init__(config)
            self.model = InternLM2Model(config)
            self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
            self.post_init()

        def _init_weights(self, module):
            super()._init_weights(module)
            if module is self.v_head:
                init.zeros_(module.weight)

        def forward(self, input_ids=None, attention_mask=None, **kwargs) -> SequenceClassifierOutputWithPast:
            """(B, T) -> logits (B, 1), raw and unbounded. With a cache, the mask covers what is cached too."""
            outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            hidden = outputs.last_hidden_state
            last = torch.full((len(hidden),), hidden.shape[1] - 1, device=hidden.device)
            if attention_mask is not None:
                cached = attention_mask.shape[1] - hidden.shape[1]
                last = (last_attended(attention_mask) - cached).clamp(min=0)
            return SequenceClassifierOutputWithPast(
                logits=self.v_head(hidden[torch.arange(len(hidden), device=hidden.device), last]),
                past_key_values=outputs.past_key_values,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )

    return InternLM2(InternLM2Config, InternLM2Model, InternLM2ForRewardModel)
