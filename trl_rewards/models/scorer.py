"""Scalar reward models: scoring texts in micro-batches, and prefixes that rows share only once."""

from __future__ import annotations

import copy
import functools
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch

from trl_rewards.errors import RewardError
from trl_rewards.models.batching import Shared, batches, shared_prefixes
from trl_rewards.models.encoding import Truncate, completion_token, encode, truncated
from trl_rewards.models.heads import Head, HeadKind, Output, YesScore, load_head, load_yes, output_weights
from trl_rewards.models.pretrained import Loading, at_work, device_of, load_config, load_tokenizer
from trl_rewards.samples import Failed

logger = logging.getLogger(__name__)

PrefixReuse = Literal["auto", "on", "off"]

SPEED_UP = 1.3
"""`auto` shares a prefix where G(P + C) / (P + GC), its saving in tokens, is above this …"""
SHORTEST_PREFIX = 32
"""… and the prefix has at least these tokens."""
TOLERANCE, ROUGH_TOLERANCE = 1e-4, 5e-2
"""How far, relative to its length, a hidden state may be off when a prefix is shared: in float32, and otherwise."""
BUDGET, CPU_BUDGET = 16384, 4096
"""Default token budgets. On a CPU small batches are the fastest, on a GPU those that keep it busy."""


@dataclass(kw_only=True)
class Scorer:
    """Scalar scores of token sequences, in float32.

    A row's score depends on its own tokens alone, up to rounding: 1e-6 in float32; in bfloat16 the shape of a batch
    moves scores by some hundredths of their spread. The same rows always make the same batches. Threads take turns.
    """

    head: Head
    weights: list[float]
    """How much each of the head's outputs counts."""
    loading: Loading
    tokenizer: Any
    max_length: int
    """Tokens that `score_texts` cuts a text to."""
    truncate: Truncate
    token_budget: int
    """Padded tokens of one forward pass; halved for good when memory runs out."""
    prefix_reuse: PrefixReuse
    progress: bool
    """Show a bar on the terminal while there is more than one batch."""
    surrounding: Callable[[], AbstractContextManager[Any]] = torch.inference_mode
    """What forward passes run in, for a model that is not this scorer's alone."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last call: `tokens_per_second`, `prefix_saved` (share of tokens that needed no computing), `truncated`
    (share of texts that were too long) and, on an accelerator, `peak_memory_gb`."""

    def __post_init__(self):
        self._turn = threading.RLock()
        self._rope_switch = longrope_switch(self.head.model.config)
        self._reuse: bool | None = None if self.prefix_reuse != "off" else False  # None: not tried yet
        if self._reuse is None and self.head.backbone is None:
            self._give_up_reuse("its outputs come from the whole model")
        elif self._reuse is None and self._rope_switch is not None:
            self._give_up_reuse("its position embedding changes with the length of the text")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_turn"}  # a lock does not pickle

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _turn=threading.RLock())

    def score_texts(
        self, texts: Sequence[str], add_special_tokens: bool, completion_start: Callable[[int], int] | None = None
    ) -> list[float | Failed]:
        """One score per text; Failed for a text without tokens, one that is refused, and a score that is no number.

        `add_special_tokens`: False for texts from a chat template, which brings its own. `completion_start` gives the
        character at which the completion of a row starts, and is asked for rows that are too long. Without it all of
        a text counts as prompt.
        """
        with self._turn:
            found = self.outputs_of_texts(texts, add_special_tokens, completion_start)
        scores = iter(self._weighted([outputs for outputs in found if not isinstance(outputs, Failed)]))
        return [outputs if isinstance(outputs, Failed) else _score(next(scores)) for outputs in found]

    def outputs_of_texts(
        self, texts: Sequence[str], add_special_tokens: bool, completion_start: Callable[[int], int] | None = None
    ) -> list[list[float] | Failed]:
        """All K outputs of each text, as `score_texts` does it; those that are no number stay as they are."""
        with self._turn:
            encoded, too_long = self.encode_texts(texts, add_special_tokens, completion_start)
            outputs = iter(self.outputs_of([ids for ids in encoded if not isinstance(ids, Failed)]))
            self.metrics["truncated"] = too_long / max(len(texts), 1)
        return [ids if isinstance(ids, Failed) else next(outputs) for ids in encoded]

    def encode_texts(
        self, texts: Sequence[str], add_special_tokens: bool, completion_start: Callable[[int], int] | None = None
    ) -> tuple[list[list[int] | Failed], int]:
        """The token ids that `score_texts` scores, and how many texts were too long."""
        found: list[list[int] | Failed] = []
        too_long = 0
        for row, ids in enumerate(encode(self.tokenizer, texts, add_special_tokens)):
            fit: list[int] | Failed = ids
            if len(ids) > self.max_length:
                too_long += 1
                start = completion_start(row) if completion_start else len(texts[row])
                completion = completion_token(self.tokenizer, texts[row], start, add_special_tokens)
                kept = int(ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id))
                fit = truncated(ids, completion, self.max_length, self.truncate, kept)
            found.append(fit or Failed("the text has no tokens"))
        return found, too_long

    def score_ids(self, ids: Sequence[list[int]]) -> list[float]:
        """One score per row of token ids, in order; each row has at least one token and none is cut."""
        return self._weighted(self.outputs_of(ids))

    def _weighted(self, outputs: list[list[float]]) -> list[float]:
        return (torch.tensor(outputs) @ torch.tensor(self.weights)).tolist() if outputs else []

    def scores_with_gradient(self, ids: list[list[int]]) -> torch.Tensor:
        """(B,) float32 scores of rows that go through the model together, to be trained on."""
        outputs = self._outputs(ids, device_of(self.loading))
        return outputs.float() @ torch.tensor(self.weights, device=outputs.device)

    def outputs_of(self, ids: Sequence[list[int]]) -> list[list[float]]:
        """All K outputs of each row of token ids, in order; NaN for a row that does not fit into memory."""
        with self._turn:
            found = self._run(ids, functools.partial(self._batches, ids))
        return [[math.nan] * len(self.weights) if outputs is None else outputs for outputs in found]

    def outputs_at(self, ids: Sequence[list[int]], places: Sequence[Sequence[int]]) -> list[list[list[float]] | None]:
        """All K outputs at each of a row's `places`, which are indices of its tokens; None for a row that does not
        fit into memory. One forward pass for all places of a row, for models whose tokens see what is before them
        alone. Prefixes are not shared."""
        with self._turn:
            return self._run(ids, functools.partial(self._batches_at, ids, places))

    def continuations(
        self, contexts: Sequence[list[int]], tails: Sequence[list[int]]
    ) -> list[list[list[float]] | None]:
        """Of each context and each tail, the log-probability of each of the tail's tokens, one after another, in nats.
        None for a context that does not fit into memory.

        For a head that reads the next token (`load_next_token`). Contexts and tails have at least one token each, and
        none is cut. A context goes through the model once, where its prefix can be shared.
        """
        with self._turn:
            tokens = sum(len(context) + len(tail) for context in contexts for tail in tails)
            return self._run(contexts, functools.partial(self._batches_after, contexts, tails), tokens)

    def _run(
        self,
        ids: Sequence[list[int]],
        batches_of: Callable[[list[int], torch.device], Iterator[tuple[list[int], list[Any], int]]],
        tokens: int | None = None,
    ) -> list[Any]:
        """What `batches_of` gives for each row, in order; None for a row that does not fit into memory. `tokens`: how
        many there are to read, if not those of the rows."""
        self.metrics = {}
        if not ids:
            return []
        found: dict[int, Any] = {}
        tokens = tokens or sum(map(len, ids))
        computed, started = 0, time.perf_counter()
        bar, budget = _bar(self.progress and tokens > self.token_budget, len(ids)), self.token_budget
        with at_work(self.head.model, self.loading) as device, self.surrounding(), bar as advance:
            memory = torch.get_device_module(device) if device.type in ("cuda", "xpu") else None
            if memory:
                memory.reset_peak_memory_stats(device)
            while rest := [row for row in range(len(ids)) if row not in found]:
                try:
                    for rows, outputs, cost in batches_of(rest, device):
                        found |= zip(rows, outputs, strict=True)
                        computed += cost
                        advance(len(rows))
                except torch.OutOfMemoryError:
                    rest = [row for row in rest if row not in found]
                    shortest = min(len(ids[row]) for row in rest)
                    if self.token_budget > shortest:
                        self.token_budget //= 2
                    elif found:  # rows of this length and more do not fit; the others keep theirs
                        logger.warning("%s: out of memory for a row of %d tokens", self.loading.path, shortest)
                        found |= dict.fromkeys(rest)
                        self.token_budget = budget  # it was not too much for the other rows
                    else:
                        self._refuse_row(shortest)
            if self.token_budget < budget:
                logger.warning("%s: out of memory; token_budget is now %d", self.loading.path, self.token_budget)
            if memory:
                self.metrics["peak_memory_gb"] = memory.max_memory_allocated(device) / 2**30
        self.metrics["tokens_per_second"] = tokens / (time.perf_counter() - started)
        self.metrics["prefix_saved"] = 1 - computed / tokens
        return [found[row] for row in range(len(ids))]

    def _batches(
        self, ids: Sequence[list[int]], rows: list[int], device: torch.device
    ) -> Iterator[tuple[list[int], list[list[float]], int]]:
        """Rows, their K outputs each, and how many tokens went through the model for them."""
        groups = self._groups(ids, rows, device)
        alone = sorted(set(rows) - {row for group in groups for row in group.rows})
        for batch in batches([len(ids[row]) for row in alone], self.token_budget, switch=self._rope_switch):
            chosen = [alone[index] for index in batch]
            texts = [ids[row] for row in chosen]
            yield chosen, self._outputs(texts, device).tolist(), sum(map(len, texts))
        for group in groups:
            cache, cost = prefix_cache(self.head.backbone, ids[group.rows[0]][: group.prefix], device), group.prefix
            tails = [ids[row][group.prefix :] for row in group.rows]
            for batch in batches([len(tail) for tail in tails], self.token_budget, prefix=group.prefix):
                texts = [tails[index] for index in batch]
                hidden = hidden_after(self.head.backbone, cache, group.prefix, texts, self._pad, device)
                outputs = self.head.read(hidden).tolist()
                yield [group.rows[index] for index in batch], outputs, cost + sum(map(len, texts))
                cost = 0

    def _batches_at(
        self, ids: Sequence[list[int]], places: Sequence[Sequence[int]], rows: list[int], device: torch.device
    ) -> Iterator[tuple[list[int], list[list[list[float]]], int]]:
        """Rows, their K outputs at each of their places, and how many tokens went through the model for them."""
        if self.head.backbone is None:
            raise RewardError(f"{self.loading.path!r}: only decoders have a score at every token")
        for batch in batches([len(ids[row]) for row in rows], self.token_budget, switch=self._rope_switch):
            chosen = [rows[index] for index in batch]
            texts = [ids[row] for row in chosen]
            hidden = states(self.head.backbone, texts, self._pad, device)
            at = [(index, place) for index, row in enumerate(chosen) for place in places[row]]
            index, place = torch.tensor(at, dtype=torch.long, device=hidden.device).view(-1, 2).unbind(dim=1)
            outputs = self.head.read(hidden[index, place].float()).cpu()
            by_row = outputs.split([len(places[row]) for row in chosen])
            yield chosen, [found.tolist() for found in by_row], sum(map(len, texts))

    def _batches_after(
        self, contexts: Sequence[list[int]], tails: Sequence[list[int]], rows: list[int], device: torch.device
    ) -> Iterator[tuple[list[int], list[list[list[float]]], int]]:
        """A row, its tails' log-probabilities, and how many tokens went through the model for them."""
        backbone = self.head.backbone
        for row in rows:
            whole = [contexts[row] + tail for tail in tails]
            prefix = len(contexts[row]) - 1  # the hidden state of the context's last token is read for each tail
            cache, cost = None, 0
            if self._shares(whole, prefix, device):
                cache, cost = prefix_cache(backbone, contexts[row][:prefix], device), prefix
                whole = [ids[prefix:] for ids in whole]
            found: dict[int, list[float]] = {}
            lengths = [len(ids) for ids in whole]
            for batch in batches(lengths, self.token_budget, prefix if cache is not None else 0, self._rope_switch):
                texts = [whole[index] for index in batch]
                if cache is not None:
                    hidden = states_after(backbone, cache, prefix, texts, self._pad, device)
                else:
                    hidden = states(backbone, texts, self._pad, device)
                chosen = [tails[index] for index in batch]
                logps = torch.cat(
                    [
                        self._logps(hidden[place, len(text) - len(tail) - 1 : len(text) - 1], tail)
                        for place, (text, tail) in enumerate(zip(texts, chosen, strict=True))
                    ]
                )
                found |= zip(batch, (each.tolist() for each in logps.cpu().split([*map(len, chosen)])), strict=True)
                cost += sum(map(len, texts))
            yield [row], [[found[index] for index in range(len(tails))]], cost

    def _logps(self, hidden: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        """(T,) float32 log-probabilities of the tokens that come after these hidden states (T, H)."""
        wanted = torch.tensor(tokens, device=hidden.device)
        return self.head.read(hidden.float()).log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]

    def _shares(self, ids: list[list[int]], prefix: int, device: torch.device) -> bool:
        """Whether the prefix of all these rows is computed once."""
        group = Shared(list(range(len(ids))), prefix)
        if self._reuse is False or not prefix or len(ids) < 2:
            return False
        if self.prefix_reuse != "on" and group.speed_up(ids) <= SPEED_UP:
            return False
        if self._reuse is None:
            self._try_reuse(ids, group, device)
        return bool(self._reuse)

    def _outputs(self, texts: list[list[int]], device: torch.device) -> torch.Tensor:
        if self.head.backbone is not None:
            return self.head.read(last_hidden(self.head.backbone, texts, self._pad, device))
        tokens, mask = padded(texts, self._pad, device)
        logits = self.head.model(input_ids=tokens, attention_mask=mask).logits
        return self.head.read(logits.reshape(len(texts), -1))

    @property
    def _pad(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def _refuse_row(self, tokens: int) -> NoReturn:
        raise RewardError(
            f"{self.loading.path!r}: out of memory for a single row of {tokens} tokens; use load_in_4bit, "
            "offload, another device or a smaller max_length"
        ) from None

    def _groups(self, ids: Sequence[list[int]], rows: list[int], device: torch.device) -> list[Shared]:
        """The groups whose prefix is computed once."""
        if self._reuse is False:
            return []
        if self.prefix_reuse == "on":
            groups = shared_prefixes(ids, rows)
        else:
            found = shared_prefixes(ids, rows, SHORTEST_PREFIX)
            groups = [group for group in found if group.speed_up(ids) > SPEED_UP]
        if groups and self._reuse is None:
            self._try_reuse(ids, groups[0], device)
        return groups if self._reuse else []

    def _try_reuse(self, ids: Sequence[list[int]], group: Shared, device: torch.device) -> None:
        """Compute two rows in both ways: not every architecture has a cache that can be copied, or attends to the left
        alone."""
        backbone, prefix = self.head.backbone, group.prefix
        texts = sorted((ids[row] for row in group.rows), key=len)[:2]
        wanted = torch.cat([last_hidden(backbone, [text], self._pad, device) for text in texts])
        try:
            cache = prefix_cache(backbone, texts[0][:prefix], device)
            found = hidden_after(backbone, cache, prefix, [text[prefix:] for text in texts], self._pad, device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a foreign model's cache may fail in any way
            return self._give_up_reuse(f"its cache cannot be shared ({error!r})")
        off = ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max().item()
        exact = self.loading.dtype == "float32" and not self.loading.quantization
        if not off <= (TOLERANCE if exact else ROUGH_TOLERANCE):  # also where it is NaN
            return self._give_up_reuse(f"hidden states are off by {off:.1e} of their length then")
        self._reuse = True

    def _give_up_reuse(self, why: str) -> None:
        if self.prefix_reuse == "on":
            raise RewardError(f"prefix_reuse: {self.loading.path!r} cannot share prefixes: {why}; use 'auto' or 'off'")
        logger.info("%s: prefixes are not shared: %s", self.loading.path, why)
        self._reuse = False


def load_scorer(
    loading: Loading,
    *,
    model_class: Any = None,
    tokenizer: Any = None,
    head: HeadKind = "auto",
    output: Output | None = None,
    fresh_head: bool = False,
    yes_token: str = "Yes",
    no_token: str = "No",
    yes_score: YesScore = "logit",
    token_budget: int | None = None,
    max_length: int | None = None,
    truncate: Truncate = "prompt_head",
    prefix_reuse: PrefixReuse = "auto",
    progress: bool = False,
) -> Scorer:
    """A reward model from a folder or the Hub.

    `model_class`: its class, where the Auto classes do not know it; the head is its part `v_head` or `score`.
    `fresh_head`: a classifier whose checkpoint lacks the head gets one of zeros, to be trained.
    RewardError if the path is wrong, the head is not in the checkpoint, or an output or the device is not there.
    """
    config = load_config(loading, "reward model")
    tokenizer = tokenizer or load_tokenizer(loading)
    if head == "yes":
        found = load_yes(loading, tokenizer, yes_token, no_token, yes_score)
    else:
        found = load_head(loading, config, head, model_class, output, fresh_head)
    return Scorer(
        head=found,
        weights=output_weights(output, found.labels, loading.path),
        loading=loading,
        tokenizer=tokenizer,
        max_length=longest_text(max_length, config, tokenizer),
        truncate=truncate,
        token_budget=token_budget or default_budget(loading),
        prefix_reuse=prefix_reuse,
        progress=progress,
    )


def _score(value: float) -> float | Failed:
    return value if math.isfinite(value) else Failed(f"the model's score is {value}")


def longest_text(max_length: int | None, config: Any, tokenizer: Any) -> int:
    """Tokens that a text may have: `max_length`, or what the tokenizer says, within what the model can read."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    return min(max_length or tokenizer.model_max_length, positions)


def default_budget(loading: Loading) -> int:
    """Padded tokens of one forward pass where nobody said."""
    return CPU_BUDGET if device_of(loading).type == "cpu" else BUDGET


def padded_rollout(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids and mask (B, …), prompts padded on the left and completions on the right, and the completions' width."""
    longest, width = max(map(len, prompts)), max(1, *map(len, completions))
    ids = torch.full((len(prompts), longest + width), pad)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        place = slice(longest - len(prompt), longest + len(completion))
        ids[row, place], mask[row, place] = torch.tensor([*prompt, *completion]), 1
    return ids, mask, width


def padded(ids: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, T) token ids padded on the right, and their mask: None for rows of one length, which is what lets attention
    take its fastest kernel."""
    longest = max(map(len, ids))
    tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in ids], device=device)
    lengths = torch.tensor([len(row) for row in ids], device=device)
    if (len(ids[0]), longest) == (longest, min(map(len, ids))):
        return tokens, None
    return tokens, (torch.arange(longest, device=device) < lengths[:, None]).long()


def last_hidden(backbone: Any, ids: list[list[int]], pad: int, device: torch.device) -> torch.Tensor:
    """(B, H) float32: the hidden state of each row's last token, whatever token that is."""
    return _last(states(backbone, ids, pad, device), ids)


def states(backbone: Any, ids: list[list[int]], pad: int, device: torch.device) -> torch.Tensor:
    """(B, T, H) the hidden states of rows that are padded on the right."""
    tokens, mask = padded(ids, pad, device)
    return backbone(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state


def prefix_cache(backbone: Any, prefix: list[int], device: torch.device) -> Any:
    """Keys and values of a prefix, for one row."""
    return backbone(input_ids=torch.tensor([prefix], device=device), use_cache=True).past_key_values


def hidden_after(
    backbone: Any, cache: Any, prefix: int, ids: list[list[int]], pad: int, device: torch.device
) -> torch.Tensor:
    """(B, H) float32, as `last_hidden` of rows that begin with the `prefix` tokens in `cache` and go on with `ids`."""
    return _last(states_after(backbone, cache, prefix, ids, pad, device), ids)


def states_after(
    backbone: Any, cache: Any, prefix: int, ids: list[list[int]], pad: int, device: torch.device
) -> torch.Tensor:
    """(B, T, H) the hidden states of `ids`, which follow the `prefix` tokens in `cache`."""
    tokens, mask = padded(ids, pad, device)
    own = torch.ones_like(tokens) if mask is None else mask
    copied = copy.deepcopy(cache)  # a forward pass appends to it
    copied.batch_repeat_interleave(len(ids))
    output = backbone(
        input_ids=tokens,
        attention_mask=torch.cat([own.new_ones(len(ids), prefix), own], dim=1),
        position_ids=torch.arange(prefix, prefix + tokens.shape[1], device=device).expand(len(ids), -1),
        past_key_values=copied,
        use_cache=True,
    )
    return output.last_hidden_state


def _last(hidden: torch.Tensor, ids: list[list[int]]) -> torch.Tensor:
    last = torch.tensor([len(row) - 1 for row in ids], device=hidden.device)
    return hidden[torch.arange(len(ids), device=hidden.device), last].float()


def longrope_switch(config: Any) -> int | None:
    """The length of text above which a LongRoPE model (Phi-3) takes other rotary frequencies, for all of a batch."""
    rope = config.get_text_config().to_dict().get("rope_parameters") or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    switches = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(switches, default=None)


@contextmanager
def _bar(shown: bool, rows: int) -> Generator[Callable[[int], None]]:
    """A progress bar that goes away when it is done; call what it gives with the number of rows scored."""
    if not shown or not sys.stderr.isatty():
        yield lambda rows: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task("scoring", total=rows)
        yield lambda rows: progress.advance(task, rows)
