"""The engine of scalar reward models: the same scores whatever the batch, the padding, or the prefixes it shares."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random

import pytest
import torch

from trl_rewards import RewardError
from trl_rewards.models.batching import Shared, batches, common_prefix, shared_prefixes
from trl_rewards.models.encoding import completion_token, encode, truncated
from trl_rewards.models.heads import output_weights
from trl_rewards.models.pretrained import Loading
from trl_rewards.models.scorer import Scorer, load_scorer, longrope_switch, padded
from trl_rewards.samples import Failed

FAMILIES = ["qwen2", "qwen3", "llama", "mistral", "gpt2", "bloom", "v_head"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def close(wanted, tolerance=1e-4):
    return pytest.approx(wanted, abs=tolerance)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_hold_rows_of_like_length_within_the_budget():
    #           0  1  2  3  4  5
    lengths = [5, 1, 9, 2, 5, 30]
    assert batches(lengths, 10) == [[1, 3], [0, 4], [2], [5]]  # 2·2, 2·5, 9, and one that is longer than the budget
    assert batches(lengths, 1) == [[1], [3], [0], [4], [2], [5]]
    assert batches(lengths, 1000) == [[1, 3, 0, 4, 2, 5]]
    assert batches([], 10) == []


def test_batches_count_a_prefix_that_lies_in_the_cache():
    assert batches([2, 2, 2], 20) == [[0, 1, 2]]
    assert batches([2, 2, 2], 20, prefix=8) == [[0, 1], [2]]


def test_batches_do_not_mix_rows_on_both_sides_of_a_switch():
    assert batches([3, 8, 4, 7], 1000, switch=4) == [[0, 2], [3, 1]]


@pytest.mark.parametrize("seed", range(20))
def test_batches_hold_every_row_once_and_no_more_than_the_budget(seed):
    rng = random.Random(seed)
    lengths = [rng.randrange(1, 50) for _ in range(40)]
    found = batches(lengths, 100)
    assert sorted(itertools.chain(*found)) == list(range(40))
    assert all(len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 100 for batch in found)


# --- shared prefixes -------------------------------------------------------------------------------------------------


def test_rows_of_a_prompt_share_it_wherever_they_stand():
    ids = [[1, 2, 3, 7], [9, 8, 5], [1, 2, 3, 8], [9, 8, 6], [4], [1, 2, 3, 9]]
    assert shared_prefixes(ids, range(6)) == [Shared([0, 2, 5], 3), Shared([1, 3], 2)]
    assert shared_prefixes(ids, range(6), shortest=3) == [Shared([0, 2, 5], 3)]
    assert shared_prefixes(ids, [1, 2, 3]) == [Shared([1, 3], 2)]


def test_a_prompt_of_many_rows_is_not_given_up_for_the_header_that_it_shares_with_others():
    header, one, other = [1, 2], [3] * 50, [4] * 50
    ids = [[*header, *prompt, row] for prompt in (one, other) for row in range(3)]
    assert shared_prefixes(ids, range(6)) == [Shared([0, 1, 2], 52), Shared([3, 4, 5], 52)]
    long_header = [5] * 500  # 5 · 500 tokens saved together, 4 · 552 by two groups
    ids = [[*long_header, *row] for row in ids]
    assert shared_prefixes(ids, range(6)) == [Shared([0, 1, 2, 3, 4, 5], 502)]


def test_each_row_keeps_a_token_to_compute():
    assert shared_prefixes([[1, 2, 3], [1, 2, 3], [1, 2]], range(3)) == [Shared([0, 1], 2)]  # 2 saved, as 2 · 1
    assert shared_prefixes([[1, 2, 3], [1, 2, 3, 4]], range(2)) == [Shared([0, 1], 2)]
    assert shared_prefixes([[1], [1], [1]], range(3)) == []


@pytest.mark.parametrize("seed", range(30))
def test_shared_prefixes_save_as_many_tokens_as_any_cut_of_the_sorted_rows(seed):
    rng = random.Random(seed)
    ids = [[rng.randrange(2) for _ in range(rng.randrange(1, 7))] for _ in range(6)]
    found = shared_prefixes(ids, range(6))
    ordered = sorted(ids)

    def saved(rows: list[list[int]]) -> int:
        prefix = min(common_prefix(one, other) for one in rows for other in rows)
        return (len(rows) - 1) * min(prefix, *(len(row) - 1 for row in rows))

    best = 0
    for cuts in itertools.product([False, True], repeat=5):
        ends = [index + 1 for index, cut in enumerate(cuts) if cut] + [6]
        best = max(best, sum(saved(ordered[start:end]) for start, end in itertools.pairwise([0, *ends])))
    assert sum(group.prefix * (len(group.rows) - 1) for group in found) == best
    for group in found:
        assert len({tuple(ids[row][: group.prefix]) for row in group.rows}) == 1
        assert all(len(ids[row]) > group.prefix for row in group.rows)


def test_speed_up_is_the_ratio_of_tokens():
    ids = [[0] * 1000 + [row] * 250 for row in range(8)]  # 8 · 1250 / (1000 + 8 · 250)
    assert shared_prefixes(ids, range(8))[0].speed_up(ids) == pytest.approx(10000 / 3000)


# --- encoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "limit", "kept", "wanted"),
    [  # prompt 0 1 2 3 4, completion 5 6 7
        ("prompt_head", 8, 0, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("prompt_head", 5, 0, [3, 4, 5, 6, 7]),
        ("prompt_head", 5, 1, [0, 4, 5, 6, 7]),
        ("prompt_head", 3, 0, [5, 6, 7]),
        ("prompt_head", 2, 0, [6, 7]),
        ("prompt_head", 3, 1, [0, 6, 7]),
        ("prompt_tail", 5, 0, [0, 1, 5, 6, 7]),
        ("prompt_tail", 4, 1, [0, 5, 6, 7]),
        ("prompt_tail", 2, 0, [6, 7]),
        ("refuse", 8, 0, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("refuse", 7, 0, Failed("the text has 8 tokens, limit 7")),
    ],
)
def test_truncation_cuts_the_prompt_before_the_completion(policy, limit, kept, wanted):
    assert truncated(list(range(8)), 5, limit, policy, kept) == wanted


@pytest.fixture(scope="module")
def tokenizer(reward_model_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(reward_model_path)


def test_the_completion_starts_at_the_token_that_holds_its_first_character(tokenizer):
    text = "the cat sat"
    tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, [text], True)[0])
    assert tokens == ["the", "Ġcat", "Ġsat"]
    assert [completion_token(tokenizer, text, start, True) for start in (0, 1, 3, 4, 7, 10, 11)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
    ]


def test_without_offsets_the_completion_starts_where_text_and_prompt_part():
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()  # a token per byte, and </s> at the end
    assert not slow.is_fast
    assert len(encode(slow, ["Größe 1"], True)[0]) == 10
    assert completion_token(slow, "Größe 1", 6, True) == 8
    assert completion_token(slow, "Größe 1", 7, True) == 10  # nothing but the prompt


def test_a_text_that_brings_its_beginning_of_sequence_gets_no_second_one(tokenizer, tmp_path):
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    llama = AutoTokenizer.from_pretrained(tmp_path, bos_token="<|im_start|>")
    start = llama.bos_token_id
    llama.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    plain = tokenizer("the cat")["input_ids"]
    assert encode(llama, ["the cat", "<|im_start|>the cat"], True) == [[start, *plain]] * 2
    assert encode(llama, ["<|im_start|>the cat"], False) == [[start, *plain]]
    assert completion_token(llama, "the cat", 3, True) == 2
    assert completion_token(llama, "<|im_start|>the cat", 15, True) == 2


# --- models ----------------------------------------------------------------------------------------------------------


def make_v_head_class():
    from transformers import Qwen2Model, Qwen2PreTrainedModel

    class Qwen2WithValueHead(Qwen2PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.model = Qwen2Model(config)
            self.v_head = torch.nn.Linear(config.hidden_size, 1, bias=False)
            self.post_init()

    return Qwen2WithValueHead


V_HEAD = make_v_head_class()


def make_model(family: str, vocabulary: int, **options):
    """A random model with weights so large that texts score differently."""
    import transformers as hf

    options = (
        SIZES | {"vocab_size": vocabulary, "initializer_range": 0.3, "pad_token_id": 0, "num_labels": 1} | options
    )
    options["max_position_embeddings"] = 256
    torch.manual_seed(3)
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
        return hf.GPT2ForSequenceClassification(hf.GPT2Config(**sizes, **options))
    if family == "bloom":
        return hf.BloomForSequenceClassification(hf.BloomConfig(n_layer=2, n_head=2, **options))
    if family == "yes":
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(num_key_value_heads=1, **options))
    if family == "mistral":
        return hf.MistralForSequenceClassification(
            hf.MistralConfig(sliding_window=12, num_key_value_heads=1, **options)
        )
    if family == "llama":
        return hf.LlamaForSequenceClassification(hf.LlamaConfig(num_key_value_heads=1, **options))
    if family == "qwen3":
        return hf.Qwen3ForSequenceClassification(hf.Qwen3Config(num_key_value_heads=1, head_dim=16, **options))
    config = hf.Qwen2Config(num_key_value_heads=1, **options)
    return V_HEAD(config) if family == "v_head" else hf.Qwen2ForSequenceClassification(config)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """saved(family) -> folder of a random model of that family with a tokenizer."""
    folders: dict[str, str] = {}

    def save(family: str) -> str:
        if family not in folders:
            folder = folders[family] = str(tmp_path_factory.mktemp(family))
            make_model(family, len(tokenizer)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folders[family]

    return save


def scorer(path: str, **options) -> Scorer:
    model_class = V_HEAD if "v_head" in path else None
    loading = Loading(path=path, dtype=options.pop("dtype", "float32"), device=options.pop("device", "cpu"))
    return load_scorer(loading, model_class=model_class, **options)


@torch.no_grad()
def by_hand(path: str, ids: list[list[int]]) -> list[float]:
    """Each row alone: the head at the last token of the hidden states."""
    from transformers import AutoModelForSequenceClassification

    model_class = V_HEAD if "v_head" in path else AutoModelForSequenceClassification
    model = model_class.from_pretrained(path, dtype=torch.float32).eval()
    head = model.v_head if "v_head" in path else model.score
    return [head(model.base_model(torch.tensor([row])).last_hidden_state[0, -1]).item() for row in ids]


def random_rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 250) for _ in range(length)] for length in lengths]


class Spy:
    """A backbone that remembers what it was called with."""

    def __init__(self, scorer: Scorer):
        self.backbone, self.calls = scorer.head.backbone, []
        scorer.head = scorer.head._replace(backbone=self)

    def __call__(self, **arguments):
        self.calls.append(arguments)
        return self.backbone(**arguments)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(call["input_ids"].shape) for call in self.calls]


# --- one score per text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_depends_on_its_own_tokens_alone(family, saved):
    rows = random_rows([7, 3, 20, 1, 12, 7, 2, 33])
    wanted = by_hand(saved(family), rows)
    assert max(wanted) - min(wanted) > 0.1  # so that something is compared
    whole = scorer(saved(family), prefix_reuse="off")
    assert whole.score_ids(rows) == close(wanted)
    assert whole.score_ids(rows[::-1]) == close(wanted[::-1])
    small = scorer(saved(family), token_budget=16)
    assert small.score_ids(rows) == close(wanted)
    assert [score for row in rows for score in small.score_ids([row])] == close(wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_does_not_matter(side, saved, tokenizer, tmp_path):
    texts = ["the cat sat 3 times", "the dog", "sky"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    make_model("qwen2", len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path, padding_side=side)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": side}))
    found = scorer(str(tmp_path))
    assert found.tokenizer.padding_side == side
    assert found.score_texts(texts, add_special_tokens=True) == close(by_hand(str(tmp_path), rows))


def test_the_score_is_read_at_the_last_token_even_if_it_is_the_pad_token(saved):
    rows = [[5, 6, 0], [5, 6], [5, 0, 0, 0], [0, 0]]  # 0 is the pad token
    wanted = by_hand(saved("qwen2"), rows)
    assert scorer(saved("qwen2")).score_ids(rows) == close(wanted)
    assert abs(wanted[0] - wanted[1]) > 0.01


def test_batches_of_one_length_have_no_mask_and_none_keeps_a_cache(saved):
    found = scorer(saved("qwen2"), token_budget=20)
    spy = Spy(found)
    found.score_ids(random_rows([3, 9, 5, 9, 5, 4]))
    assert [(shape, call["attention_mask"] is None) for shape, call in zip(spy.shapes, spy.calls, strict=True)] == [
        ((4, 5), False),
        ((2, 9), True),
    ]
    assert not any(call["use_cache"] for call in spy.calls)
    assert padded([[1, 2], [3, 4]], 0, torch.device("cpu"))[1] is None
    tokens, mask = padded([[1, 2], [3]], 9, torch.device("cpu"))
    assert mask is not None
    assert (tokens.tolist(), mask.tolist()) == ([[1, 2], [3, 9]], [[1, 1], [1, 0]])


# --- shared prefixes, computed once ----------------------------------------------------------------------------------


def grouped_rows(prefix: int, lengths: list[int], seed: int = 1) -> list[list[int]]:
    (start,) = random_rows([prefix], seed)
    return [start + row for row in random_rows(lengths, seed + 1)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [4096, 60])
def test_scores_with_a_shared_prefix_are_those_without(family, budget, saved):
    rows = grouped_rows(40, [3, 9, 1, 5, 5, 12]) + random_rows([8, 30]) + grouped_rows(33, [2, 6, 4], seed=5)
    random.Random(0).shuffle(rows)
    wanted = by_hand(saved(family), rows)
    off, on = (scorer(saved(family), prefix_reuse=choice, token_budget=budget) for choice in ("off", "on"))
    assert off.score_ids(rows) == close(wanted)
    assert on.score_ids(rows) == close(wanted)
    assert off.metrics["prefix_saved"] == 0
    total = 6 * 40 + 35 + 38 + 3 * 33 + 12
    assert on.metrics["prefix_saved"] == pytest.approx((5 * 40 + 2 * 33) / total, abs=0.01)  # a token shared by chance


@pytest.mark.parametrize("family", ["qwen2", "v_head"])
def test_in_bfloat16_a_shared_prefix_moves_scores_by_rounding_only(family, saved):
    rows = grouped_rows(40, [3, 9, 1, 5, 5, 12])
    wanted = by_hand(saved(family), rows)
    spread = max(wanted) - min(wanted)
    for choice in ("off", "on"):
        found = scorer(saved(family), dtype="bfloat16", prefix_reuse=choice).score_ids(rows)
        assert found == close(wanted, 0.1 * spread)
        assert len(set(found)) == 6  # the head computes in float32: no ties


def test_a_prefix_is_computed_once_and_its_rows_fill_the_budget(saved):
    rows = grouped_rows(40, [3, 9, 1, 5])
    found = scorer(saved("qwen2"), token_budget=100)
    found.score_ids(rows)  # the check at first use
    spy = Spy(found)
    found.score_ids(rows)
    assert spy.shapes == [(1, 40), (2, 3), (2, 9)]  # 2 · (40 + 3), 2 · (40 + 9); three of them would be above 100
    assert [tuple(call["attention_mask"].shape) for call in spy.calls[1:]] == [(2, 43), (2, 49)]
    assert spy.calls[2]["position_ids"].tolist() == [list(range(40, 49))] * 2


def test_a_row_that_is_the_prefix_of_others_is_scored_too(saved):
    (start,) = random_rows([40])
    rows = [start, [*start, 7], start, [*start, 7, 8], start[:20]]
    assert scorer(saved("qwen2"), prefix_reuse="on").score_ids(rows) == close(by_hand(saved("qwen2"), rows))


def test_auto_shares_where_it_saves_enough(saved):
    def prefix_forwards(rows):
        found = scorer(saved("llama"))
        found.score_ids(rows)
        spy = Spy(found)
        found.score_ids(rows)
        return [shape for shape in spy.shapes if shape[0] == 1]

    assert prefix_forwards(grouped_rows(40, [20] * 3)) == [(1, 40)]  # 180 / 100
    assert prefix_forwards(grouped_rows(40, [100] * 3)) == []  # 420 / 340 = 1.24
    assert prefix_forwards(grouped_rows(31, [2] * 8)) == []  # too short


def test_a_cache_that_cannot_be_shared_is_found_out_at_first_use(saved, caplog):
    class Forgetful(Spy):
        """Attends to what it is given and not to the cache."""

        def __call__(self, past_key_values=None, **arguments):
            if past_key_values is not None:
                arguments = {"input_ids": arguments["input_ids"], "use_cache": False}
            return super().__call__(**arguments)

    rows = grouped_rows(40, [3, 9, 1, 5])
    found = scorer(saved("qwen2"))
    Forgetful(found)
    with caplog.at_level(logging.INFO, logger="trl_rewards.models.scorer"):
        assert found.score_ids(rows) == close(by_hand(saved("qwen2"), rows))
        found.score_ids(rows)
    (said,) = [record.message for record in caplog.records if "not shared" in record.message]
    assert "hidden states are off by" in said
    forced = scorer(saved("qwen2"), prefix_reuse="on")
    Forgetful(forced)
    with pytest.raises(RewardError, match=r"prefix_reuse: .* cannot share prefixes: hidden states are off by"):
        forced.score_ids(rows)


def test_an_architecture_whose_cache_fails_goes_without(saved, caplog):
    class Old(Spy):
        """Knows no positions."""

        def __call__(self, **arguments):
            if "position_ids" in arguments:
                raise TypeError("unexpected keyword argument 'position_ids'")
            return super().__call__(**arguments)

    rows = grouped_rows(40, [3, 9, 1, 5])
    found = scorer(saved("qwen2"))
    Old(found)
    with caplog.at_level(logging.INFO, logger="trl_rewards.models.scorer"):
        assert found.score_ids(rows) == close(by_hand(saved("qwen2"), rows))
    assert ["its cache cannot be shared (TypeError" in record.message for record in caplog.records] == [True]


def save_bert(folder, tokenizer) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_an_encoder_runs_as_a_whole_and_shares_no_prefix(tokenizer, tmp_path):
    from transformers import BertForSequenceClassification

    save_bert(tmp_path, tokenizer)
    rows = grouped_rows(40, [3, 9, 1, 5])
    bert = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted = [bert(torch.tensor([row])).logits.item() for row in rows]
    assert scorer(str(tmp_path)).score_ids(rows) == close(wanted)
    with pytest.raises(RewardError, match=r"cannot share prefixes: its outputs come from the whole model; use 'auto'"):
        scorer(str(tmp_path), prefix_reuse="on")


def test_longrope_texts_on_both_sides_of_the_switch_never_meet(tokenizer, tmp_path):
    from transformers import Phi3Config, Phi3ForSequenceClassification, Qwen2Config

    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [8.0] * 8, "rope_theta": 1e4}
    config = Phi3Config(
        **SIZES,
        vocab_size=len(tokenizer),
        num_labels=1,
        initializer_range=0.3,
        pad_token_id=0,
        max_position_embeddings=256,
        original_max_position_embeddings=16,
        rope_parameters=rope | {"original_max_position_embeddings": 16},
    )
    Phi3ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (longrope_switch(config), longrope_switch(Qwen2Config())) == (16, None)
    rows = random_rows([15, 16, 17, 30])
    assert scorer(str(tmp_path)).score_ids(rows) == close(by_hand(str(tmp_path), rows))
    with pytest.raises(RewardError, match="its position embedding changes with the length of the text"):
        scorer(str(tmp_path), prefix_reuse="on")


# --- memory ----------------------------------------------------------------------------------------------------------


class Small(Spy):
    """A backbone on a device with room for so many tokens."""

    room = 30

    def __call__(self, **arguments):
        if arguments["input_ids"].numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__call__(**arguments)


def test_running_out_of_memory_halves_the_budget_for_good(saved, caplog):
    rows = random_rows([7, 3, 20, 1, 12, 7, 2, 25])
    found = scorer(saved("qwen2"), token_budget=100)
    Small(found)
    assert found.score_ids(rows) == close(by_hand(saved("qwen2"), rows))
    assert found.token_budget == 25
    assert [record.message.endswith("out of memory; token_budget is now 25") for record in caplog.records] == [True]
    found.score_ids(rows)
    assert found.token_budget == 25


def test_a_row_has_a_score_at_each_of_its_places_in_one_pass_and_within_memory(saved):
    rows, places = random_rows([7, 3, 20, 12]), [[0, 6], [2], [3, 4, 19], []]
    found = scorer(saved("qwen2"), token_budget=100)
    Small(found)
    outputs = found.outputs_at(rows, places)
    for row, at, scores in zip(rows, places, outputs, strict=True):
        wanted = by_hand(saved("qwen2"), [row[: place + 1] for place in at]) if at else []
        assert [score for (score,) in scores] == close(wanted)
    assert found.token_budget == 25
    Small.room, room = 15, Small.room
    try:
        assert [row is None for row in found.outputs_at(rows, places)] == [False, False, True, False]
    finally:
        Small.room = room


def test_a_row_that_does_not_fit_alone_is_an_error_that_says_what_to_do(saved):
    found = scorer(saved("qwen2"), token_budget=100)
    Small(found)
    with pytest.raises(RewardError, match="out of memory for a single row of 31 tokens; use load_in_4bit, offload"):
        found.score_ids(random_rows([31, 40]))


def test_a_row_that_does_not_fit_is_a_hole_where_others_fit(saved):
    found = scorer(saved("qwen2"), token_budget=100)
    rows = random_rows([5, 31, 6])
    wanted = found.score_ids(rows)
    Small(found)
    scores = found.score_ids(rows)
    assert [scores[0], scores[2]] == pytest.approx([wanted[0], wanted[2]], abs=1e-5)
    assert math.isnan(scores[1])
    assert found.token_budget == 100


def test_threads_take_turns(saved):
    import threading

    model = scorer(saved("qwen2"), token_budget=8, prefix_reuse="off")
    rows, inside, most = random_rows([5, 6, 7, 8]), [], []
    second, plain = threading.Event(), model.head.read

    def read(hidden):
        inside.append(threading.current_thread().name)
        most.append(len(set(inside)))
        second.wait(0.05)  # a chance for the other thread to come in
        inside.remove(threading.current_thread().name)
        return plain(hidden)

    wanted = model.score_ids(rows)
    model.head = model.head._replace(read=read)
    found = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: model.score_ids(rows)})) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(3), wanted)
    assert len(most) >= 12
    assert max(most) == 1


def test_nothing_but_the_hidden_states_is_kept_of_a_batch(saved):
    found = scorer(saved("yes"), head="yes", yes_token="the", no_token="cat")
    calls = []
    found.head.model.lm_head.register_forward_hook(lambda *arguments: calls.append(arguments))
    found.score_ids(random_rows([4, 5]))
    assert calls == []  # no (B, T, V) logits
    assert not torch.is_inference_mode_enabled()


def test_an_offloaded_model_is_on_its_device_only_while_it_scores(saved, monkeypatch):
    from contextlib import contextmanager

    from trl_rewards.models import scorer as module

    found = load_scorer(Loading(path=saved("qwen2"), dtype="float32", device="cpu", offload=True))
    events = []

    @contextmanager
    def at_work(model, loading):
        assert (model, loading.offload) == (found.head.model, True)
        events.append("moved there")
        yield torch.device("cpu")
        events.append("moved back")

    monkeypatch.setattr(module, "at_work", at_work)
    Spy(found).calls = events
    found.score_ids(random_rows([3, 4]))
    assert [event if isinstance(event, str) else "forward" for event in events] == [
        "moved there",
        "forward",
        "moved back",
    ]


# --- heads -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def hidden_by_hand(path: str, rows: list[list[int]]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return torch.stack([model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows])


@pytest.mark.parametrize("file", ["model.safetensors", "shards", "pytorch_model.bin", "value_head.safetensors"])
def test_a_value_head_saved_with_a_causal_lm_is_found(file, tokenizer, tmp_path):
    from safetensors.torch import save_file

    model = make_model("yes", len(tokenizer))
    torch.manual_seed(0)
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.randn(1)}
    weights = dict(model.state_dict())
    model.config.architectures = ["Qwen2ForCausalLM"]
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if file == "model.safetensors":
        save_file(weights | head, tmp_path / file, {"format": "pt"})
    elif file == "pytorch_model.bin":
        torch.save(weights | head, tmp_path / file)
    elif file == "shards":
        parts = {"model-00001-of-00002.safetensors": weights, "model-00002-of-00002.safetensors": head}
        for name, part in parts.items():
            save_file(part, tmp_path / name, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        save_file(head, tmp_path / file)
    rows = random_rows([3, 9, 5])
    wanted = hidden_by_hand(str(tmp_path), rows) @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"]
    assert scorer(str(tmp_path)).score_ids(rows) == close(wanted.tolist())
    assert scorer(str(tmp_path), head="v_head").score_ids(rows) == close(wanted.tolist())


def test_a_value_head_of_the_models_own_code_is_found(saved, tokenizer, tmp_path):
    rows = random_rows([3, 9, 5])
    wanted = scorer(saved("v_head")).score_ids(rows)
    model = make_model("v_head", len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_rm.RewardModel"}}))
    (tmp_path / "modeling_rm.py").write_text(
        "import torch\n"
        "from transformers import Qwen2Model, Qwen2PreTrainedModel\n\n\n"
        "class RewardModel(Qwen2PreTrainedModel):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.model = Qwen2Model(config)\n"
        "        self.v_head = torch.nn.Linear(config.hidden_size, 1, bias=False)\n"
        "        self.post_init()\n"
    )
    path = str(tmp_path)
    loading = Loading(path=path, dtype="float32", device="cpu", trust_remote_code=True)
    assert load_scorer(loading).score_ids(rows) == close(wanted)
    with pytest.raises(RewardError, match="is not run without trust_remote_code"):
        load_scorer(Loading(path=path, dtype="float32", device="cpu"))


def test_a_model_without_a_value_head_is_refused(saved):
    with pytest.raises(RewardError, match=r"has no value head: no weights v_head.summary.\*, and no model class"):
        scorer(saved("qwen2"), head="v_head")
    with pytest.raises(RewardError, match=r"its checkpoint has no weights for v_head.weight, which would be random"):
        load_scorer(Loading(path=saved("qwen2"), dtype="float32", device="cpu"), model_class=V_HEAD)


def test_a_class_without_a_head_is_refused(saved):
    from transformers import Qwen2ForCausalLM

    with pytest.raises(RewardError, match="Qwen2ForCausalLM has neither `v_head` nor `score`, but model, lm_head"):
        load_scorer(Loading(path=saved("yes"), dtype="float32", device="cpu"), model_class=Qwen2ForCausalLM)


def test_a_causal_lm_is_no_classifier(saved):
    with pytest.raises(
        RewardError, match=r"^'\S+' is not a reward model: its checkpoint has no weights for score.wei"
    ):
        scorer(saved("yes"))


@pytest.mark.parametrize("prefix_reuse", ["off", "on"])
def test_yes_is_the_difference_of_two_logits_or_their_share(prefix_reuse, saved, tokenizer):
    from transformers import AutoModelForCausalLM

    yes, no = tokenizer.convert_tokens_to_ids(["the", "Ġcat"])
    rows = grouped_rows(20, [3, 9, 5])
    model = AutoModelForCausalLM.from_pretrained(saved("yes"), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
    options = {"head": "yes", "yes_token": "the", "no_token": " cat", "prefix_reuse": prefix_reuse}
    assert scorer(saved("yes"), **options).score_ids(rows) == close((logits[:, yes] - logits[:, no]).tolist())
    share = logits.softmax(dim=1)[:, [yes, no]]
    wanted = (share[:, 0] / share.sum(dim=1)).tolist()
    assert scorer(saved("yes"), yes_score="probability", **options).score_ids(rows) == close(wanted)


def test_yes_must_be_one_token(saved):
    with pytest.raises(RewardError, match="yes_token: 'Yes' is 2 tokens to this model; give a word that is one"):
        scorer(saved("yes"), head="yes", no_token="the")


def test_yes_knows_gemmas_soft_cap_and_refuses_a_scale_that_it_does_not_know(tokenizer, tmp_path):
    import transformers as hf

    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "initializer_range": 0.3}
    gemma = hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes, head_dim=16, final_logit_softcapping=2.0)).eval()
    granite = hf.GraniteForCausalLM(hf.GraniteConfig(**sizes, logits_scaling=8.0))
    for name, model in (("gemma", gemma), ("granite", granite)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    words = {"head": "yes", "yes_token": "the", "no_token": " cat"}
    yes, no = tokenizer.convert_tokens_to_ids(["the", "Ġcat"])
    rows = random_rows([3, 9, 5])
    with torch.no_grad():
        logits = [gemma(torch.tensor([row])).logits[0, -1] for row in rows]
    wanted = [(row[yes] - row[no]).item() for row in logits]
    assert scorer(str(tmp_path / "gemma"), **words).score_ids(rows) == close(wanted)
    with pytest.raises(RewardError, match="changes its logits after the output layer"):
        scorer(str(tmp_path / "granite"), **words)


# --- several outputs -------------------------------------------------------------------------------------------------

LABELS = ["helpful", "correct", "verbose"]


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        (1, [0.0, 1.0, 0.0]),
        ("verbose", [0.0, 0.0, 1.0]),
        ({0: 0.5, "correct": 2, 2: -1.0}, [0.5, 2.0, -1.0]),
        ({"0": 0.5, 1: 1.0}, None),
        (3, None),
        (-1, None),
        ("kind", None),
        ({"kind": 1.0}, None),
        (None, None),
    ],
)
def test_output_says_what_counts(output, wanted):
    if wanted:
        assert output_weights(output, LABELS, "rm") == wanted
    else:
        with pytest.raises(RewardError, match=r"'rm' has .*0 \(helpful\), 1 \(correct\), 2 \(verbose\)"):
            output_weights(output, LABELS, "rm")


def test_outputs_are_weighed(tokenizer, tmp_path):
    model = make_model("qwen2", len(tokenizer), num_labels=3, id2label=dict(enumerate(LABELS))).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = random_rows([3, 9, 5])
    with torch.no_grad():
        outputs = torch.cat([model(torch.tensor([row])).logits for row in rows])
    path = str(tmp_path)
    assert scorer(path, output=1).score_ids(rows) == close(outputs[:, 1].tolist())
    mixture = outputs @ torch.tensor([0.5, 0.0, -2.0])
    assert scorer(path, output={0: 0.5, "verbose": -2.0}).score_ids(rows) == close(mixture.tolist())
    with pytest.raises(RewardError, match=r"has 3 outputs: 0 \(helpful\).*say with `output` which is the score"):
        scorer(path)


def test_a_config_without_labels_may_have_two_outputs_or_one(saved, tokenizer, tmp_path):
    model = make_model("qwen2", len(tokenizer), num_labels=2).eval()  # what a config says that says nothing
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = random_rows([3, 9, 5])
    with torch.no_grad():
        wanted = [model(torch.tensor([row])).logits[0, 1].item() for row in rows]
    assert scorer(str(tmp_path), output=1).score_ids(rows) == close(wanted)
    with pytest.raises(RewardError, match="is not a reward model with one output"):
        scorer(str(tmp_path))


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truncate", "limit", "wanted"),
    [
        ("prompt_head", 7, " sat the sky ran sat cat"),
        ("prompt_tail", 7, "the catthe sky ran sat cat"),
        ("prompt_head", 4, " sky ran sat cat"),
        ("prompt_tail", 4, " sky ran sat cat"),
    ],
)
def test_a_text_that_is_too_long_loses_its_prompt_first_and_is_counted(truncate, limit, wanted, saved, tokenizer):
    prompt, completion = "the cat sat ", "the sky ran sat cat"
    assert [len(ids) for ids in encode(tokenizer, [prompt, prompt + completion], True)] == [4, 9]
    found = scorer(saved("qwen2"), max_length=limit, truncate=truncate)
    scores = found.score_texts([prompt + completion, "the dog"], True, lambda row: len(prompt))
    assert found.metrics["truncated"] == 0.5
    whole = scorer(saved("qwen2"))
    cut = [*encode(tokenizer, [wanted], True)[0]]
    if truncate == "prompt_tail" and limit == 7:  # 'cat' and 'the' as two tokens
        cut = [*encode(tokenizer, ["the cat"], True)[0], *encode(tokenizer, [completion], True)[0]]
    assert tokenizer.decode(cut) == wanted
    assert scores == close(whole.score_ids([cut, tokenizer("the dog")["input_ids"]]))


def test_a_text_that_is_too_long_may_be_refused(saved):
    found = scorer(saved("qwen2"), max_length=5, truncate="refuse")
    long, short, empty = found.score_texts(["the cat sat the dog ran", "the dog", ""], True)
    assert long == Failed("the text has 7 tokens, limit 5")
    assert empty == Failed("the text has no tokens")
    assert isinstance(short, float)
    assert found.metrics["truncated"] == pytest.approx(1 / 3)
    assert found.score_texts([], True) == []


def test_the_limit_is_the_least_of_option_tokenizer_and_positions(saved, tokenizer, tmp_path):
    path = saved("qwen2")
    assert scorer(path).max_length == 256
    assert (scorer(path, max_length=40).max_length, scorer(path, max_length=1000).max_length) == (40, 256)
    make_model("qwen2", len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path, model_max_length=64)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 64}))
    assert scorer(str(tmp_path)).max_length == 64
    assert scorer(str(tmp_path), max_length=100).max_length == 100  # said so: the positions are there


def test_a_score_that_is_no_number_is_a_failure(saved):
    found = scorer(saved("qwen2"))
    with torch.no_grad():
        found.head.model.score.weight.fill_(float("inf"))
    (score,) = found.score_texts(["the cat"], True)
    assert isinstance(score, Failed)
    assert score.reason.startswith("the model's score is")


def test_a_bar_is_shown_on_a_terminal_while_there_is_more_than_one_batch(saved, monkeypatch):
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def said(budget: int, stream: io.StringIO, progress: bool = True) -> str:
        found = scorer(saved("qwen2"), token_budget=budget, progress=progress)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            found.score_ids(random_rows([5, 5, 5]))
        return stream.getvalue()

    assert "scoring" in said(5, Terminal())
    assert said(100, Terminal()) == ""
    assert said(5, Terminal(), progress=False) == ""
    assert said(5, io.StringIO()) == ""
