"""Language consistency, R³ and the similarity of clauses."""

import json
import re
from pathlib import Path

import pytest
import torch
from trl_rewards_shaping.clause_similarity import clauses, coverage
from trl_rewards_shaping.language import scripts_of
from trl_rewards_shaping.r3 import RelevanceR3, distinct_trigrams, length_incentive, mapped
from trl_rewards_shaping.reward_fusion import RewardFusion, fused

from tests.conftest import SENTENCES
from trl_rewards import Context, Pipeline, Recipe, RecipeError, RewardError, Samples, load_reward
from trl_rewards.testing import check_reward, make_samples

(R3,) = json.loads(Path(__file__).with_name("shaping_cases.json").read_text(encoding="utf-8"))["11_R3"]


@pytest.mark.parametrize(
    ("language", "text", "share"),
    [
        ("en", "So the answer is four.", 1.0),
        ("en", "So 答案 is four", 3 / 5),  # each of the two letters counts
        ("zh", "答案是 four", 3 / 4),
        ("ja", "答えは四です", 1.0),
        ("ja", "サーバーの時々、ＡＢ株式会社ｶﾅ", 13 / 14),  # ＡＢ is a Latin word
        ("hi", "नमस्ते दुनिया four", 2 / 3),  # vowel signs end no word
        ("ru", "ответ is четыре", 2 / 3),
        ("zh", "因为 $x^2 = \\text{four}$ 所以 `print(four)` <answer>四</answer> x", 1.0),
        ("de", "ohne Größe", 1.0),
        ("en", "12 + 5 = 17", None),
    ],
)
def test_the_share_of_words_in_the_languages_script(language, text, share):
    assert load_reward("language_consistency", language=language).score(make_samples([text])) == [share]


def test_the_language_may_be_that_of_the_last_message():
    chat = [{"role": "system", "content": "You are helpful and kind."}, {"role": "user", "content": "法国的首都是？"}]
    samples = Samples([chat, "What?", "1 + 1", "これは何"], ["巴黎 Paris", "a cat", "a cat", "はい漢字"])
    assert load_reward("language_consistency").score(samples) == [2 / 3, 1.0, None, 1.0]


def test_words_are_counted_by_script():
    assert scripts_of("ein Wort 漢字 слово я x π ```код```") == {"LATIN": 2, "CJK": 2, "CYRILLIC": 2}


def make_encoder(folder):
    """A random two-layer BERT with a WordPiece tokenizer trained on a few sentences."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizer

    words = BertWordPieceTokenizer()
    words.train_from_iterator(SENTENCES, vocab_size=80, min_frequency=1)
    words.save_model(str(folder))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=24)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def vector(path, text, pooling="mean"):
    """A text's vector by the whole model, alone."""
    from transformers import AutoModel, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(path).eval()(**inputs).last_hidden_state[0]
    return states.mean(dim=0) if pooling == "mean" else states[0]


def test_r3s_terms_equal_the_reviews():
    given, wanted = R3["inputs"], R3["outputs"]
    assert length_incentive(given["text"]) == pytest.approx(wanted["LI"])
    assert distinct_trigrams(given["text"]) == pytest.approx(wanted["RP"])
    reward = RelevanceR3(path="x")
    assert reward.regularised(given["text"], given["r_x"], closed=False) == pytest.approx(wanted["R3_open"])
    assert reward.regularised(given["text"], given["F_ry"], closed=True) == pytest.approx(wanted["R3_closed"])
    ranged = RelevanceR3(path="x", closed_range=[1.0, 3.0], open_range=[0.0, 0.5])
    assert ranged.regularised("a b", 2.0, closed=True) == mapped(2.0, [1.0, 3.0], [0.0, 0.5]) == 0.25
    assert [distinct_trigrams(text) for text in ("", "a a", "a a a a")] == [0.0, 1.0, 0.5]


def test_r3_is_the_encoders_relevance_regularised(encoder_path):
    prompts = ["the cat sat", "the dog ran", "the sky", "x", "the cat"]
    texts = ["the dog ran 3 times", "the cat", "the sky", "", "dog"]
    columns = {
        "query_type": ["open", "closed", None, "open", "closed"],
        "reference": [None, "the dog", "x", "x", None],
    }
    for pooling in ("mean", "first"):
        reward = load_reward("relevance_r3", path=encoder_path, device="cpu", pooling=pooling)
        scores = reward.score(Samples(prompts, texts, columns=columns))
        opened = vector(encoder_path, texts[0], pooling) @ vector(encoder_path, prompts[0], pooling)
        closed = vector(encoder_path, texts[1], pooling) @ vector(encoder_path, "the dog", pooling)
        assert scores[:2] == pytest.approx([opened.item() * 0.05, closed.item()], rel=1e-4)
        assert scores[2:] == [None, 0.0, None]
    check_reward(
        load_reward("relevance_r3", path=encoder_path, device="cpu"), **{k: [*v, v[0]] for k, v in columns.items()}
    )
    with pytest.raises(
        ValueError, match=re.escape("column 'query_type', row 0: wanted `open` or `closed`, got 'both'")
    ):
        reward.score(Samples(["q"], ["a"], columns={"query_type": ["both"], "reference": ["r"]}))
    with pytest.raises(RecipeError, match="closed_range and open_range go together"):
        load_reward("relevance_r3", path="x", closed_range=[0.0, 1.0])


def test_clauses_are_compared_with_the_demonstrations(encoder_path):
    assert clauses("The cat sat. It ran; then!\n\n...\nIt is 3.5 high") == [
        "The cat sat.",
        "It ran;",
        "then!",
        "It is 3.5 high",
    ]
    reward = load_reward("clause_similarity", path=encoder_path, device="cpu")
    shown = "the dog ran. the cat sat."
    samples = make_samples(["the cat sat. the sky!", shown, "", "x"], demonstration=[shown, shown, shown, None])
    scores = reward.score(samples)
    made = torch.stack([vector(encoder_path, text) for text in ("the cat sat.", "the sky!")])
    theirs = torch.stack([vector(encoder_path, text) for text in ("the dog ran.", "the cat sat.")])
    assert scores[0] == pytest.approx(coverage(made, theirs).item(), rel=1e-4)
    assert scores[1:] == [pytest.approx(1.0), 0.0, None]
    check_reward(reward, demonstration=[shown] * 5 + [None])


def test_fusion_is_as_recorded():
    assert fused(3.0, torch.tensor([0.95, 0.92]), torch.tensor([2.0, 4.0])) == pytest.approx(2.989547038)
    assert fused(3.0, torch.tensor([]), torch.tensor([])) == 3.0


def test_a_reward_is_fused_with_those_of_known_answers_that_are_alike(encoder_path, write):
    known = [("the cat", "the dog ran"), ("the sky", "the cat sat"), ("the cat", "the dog sat")]
    lines = [{"prompt": prompt, "completion": text, "answer": "the dog sat"} for prompt, text in known]
    pairs = write("known.jsonl", "\n".join(map(json.dumps, lines)))
    options = {"path": encoder_path, "device": "cpu", "source": "right", "pairs": pairs}
    source = load_reward("exact_match")
    prompts, texts = ["the cat", "the sky", "the cat"], ["the dog ran", "zzz 9", "the dog sat"]
    samples = Samples(prompts, texts, columns={"answer": ["the dog sat", "zzz 9", None]})
    rows = [*known, *zip(prompts, texts, strict=True)]
    vectors = [vector(encoder_path, f"{prompt}\n{text}").double() for prompt, text in rows]
    near = [torch.cosine_similarity(vectors[3], each, dim=0).item() for each in vectors[:3]]
    for most, least in ((5, 1e-6), (1, 1e-6), (5, 0.999999)):
        reward = RewardFusion(**options, most=most, least=least)
        reward.setup(Context(sources={"right": source}))
        scores = reward.score(samples)
        kept = sorted([(sim, float(k == 2)) for k, sim in enumerate(near) if sim >= least], reverse=True)[:most]
        assert kept[0][0] == pytest.approx(1.0)  # the row itself is among those that are known
        wanted = sum(sim * known_reward for sim, known_reward in kept) / (1 + sum(sim for sim, _ in kept))
        assert scores[0] == pytest.approx(wanted, abs=1e-5)
        assert scores[2] is None
    check_reward(reward, answer=["22", "hot", None, "cold", "", "22"])
    watched = {"use": "exact_match", "as": "right", "weight": 0.0}
    fusion = {"use": "reward_fusion", "with": options | {"most": 1}}
    pipeline = Pipeline.from_recipe(Recipe.parse({"rewards": [watched, fusion]}, check_trl=False))
    pipeline.setup(Context())
    assert pipeline.score(samples, 3).rewards[0].item() == pytest.approx(0.0, abs=1e-6)  # the most alike is wrong too


def test_what_fusion_cannot_use_is_said(write):
    def made(source="right", pairs="none.jsonl"):
        return RewardFusion(path="x", source=source, pairs=pairs)

    with pytest.raises(RewardError, match="source: 'left' must be a source of the recipe that scores row by row"):
        made("left").setup(Context())
    sources = {"right": load_reward("exact_match")}
    with pytest.raises(RewardError, match=r"pairs: 'none\.jsonl'"):
        made().setup(Context(sources=sources))
    pairs = write("known.jsonl", '{"prompt": "a", "completion": "b"}')
    with pytest.raises(RewardError, match="line 1: wanted an object with 'answer'"):
        made(pairs=pairs).setup(Context(sources=sources))
    with pytest.raises(ValueError, match="least must be above 0"):
        RewardFusion(path="x", source="right", pairs="p", least=0.0)
