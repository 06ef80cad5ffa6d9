import pytest

from tests.conftest import SENTENCES
from trl_rewards import RewardError, Samples, load_reward
from trl_rewards.testing import check_reward

TEXTS = ["the cat sat 3 times", "the dog ran", "sky", "the sky ran 7 times and the cat sat"]
REFERENCES = [["the cat ran 3 times", "dog"], ["the dog ran"], ["", "the sky sat 1 times"], ["the cat", "the sky"]]


def make_encoder(folder, kind):
    """A random three-layer encoder with a WordPiece tokenizer trained on a few sentences."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import AutoModel, BertConfig, BertTokenizer, DistilBertConfig

    words = BertWordPieceTokenizer()
    words.train_from_iterator(SENTENCES, vocab_size=80, min_frequency=1)
    words.save_model(str(folder))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=16)
    tokenizer.save_pretrained(folder)
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    if kind == "bert":
        config = BertConfig(**size, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    else:
        config = DistilBertConfig(**size, dim=32, hidden_dim=64, n_layers=3, n_heads=2)
    model = AutoModel.from_config(config)
    with torch.no_grad():  # otherwise a random model's tokens hardly differ
        model.embeddings.word_embeddings.weight.mul_(30)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["bert", "distilbert"])
def encoder_path(request, tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp(request.param), request.param)


def score(path, completions, references, **options):
    samples = Samples(["q"] * len(completions), completions, columns={"references": references})
    return load_reward("bertscore", path=path, device="cpu", **options).score(samples)


def plain(path, layer, answer, reference):
    """Precision, recall and F1 in loops over numbers, from the hidden states of the whole model, text by text."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    sides = []
    for text in (answer, reference):
        encoded = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            states = model(**encoded, output_hidden_states=True).hidden_states[layer][0].tolist()
        sides.append((encoded["input_ids"][0].tolist(), states))

    def cosine(one, other):
        norms = sum(a * a for a in one) ** 0.5 * sum(b * b for b in other) ** 0.5
        return sum(a * b for a, b in zip(one, other, strict=True)) / norms

    def matched(ids, states, others):
        best = [max(cosine(state, other) for other in others) for state in states]
        kept = [
            cos
            for token, cos in zip(ids, best, strict=True)
            if token not in (tokenizer.cls_token_id, tokenizer.sep_token_id)
        ]
        return sum(kept) / len(kept)

    (answer_ids, answer_states), (reference_ids, reference_states) = sides
    precision = matched(answer_ids, answer_states, reference_states)
    recall = matched(reference_ids, reference_states, answer_states)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}


@pytest.mark.parametrize("layer", [2, 3])
def test_scores_are_those_of_a_plain_computation(encoder_path, layer):
    each = [
        [plain(encoder_path, layer, text, one) for one in references if one]
        for text, references in zip(TEXTS, REFERENCES, strict=True)
    ]
    for measure in ("precision", "recall", "f1"):
        wanted = [max(found[measure] for found in row) for row in each]
        assert max(wanted) - min(wanted) > 0.1
        found = score(encoder_path, TEXTS, REFERENCES, layer=layer, measure=measure)
        assert found == pytest.approx(wanted, abs=1e-5)


def test_small_batches_give_the_same_scores(encoder_path, monkeypatch):
    whole = score(encoder_path, TEXTS, REFERENCES)
    monkeypatch.setattr("trl_rewards_bleuberi.bertscore.HELD_TOKENS", 20)
    assert score(encoder_path, TEXTS, REFERENCES, token_budget=8) == pytest.approx(whole, abs=1e-5)


def test_memory_that_runs_out_halves_the_batches(encoder_path, monkeypatch):
    import torch

    from trl_rewards.models import Embedder, embedding

    wanted = score(encoder_path, TEXTS, REFERENCES)
    reward = load_reward("bertscore", path=encoder_path, device="cpu")
    samples = Samples(["q"] * 4, TEXTS, columns={"references": REFERENCES})
    room = [24]

    def padded(ids, pad, device, whole=embedding.padded):
        tokens, mask = whole(ids, pad, device)
        if tokens.numel() > room[0]:
            raise torch.OutOfMemoryError("no memory")
        return tokens, mask

    monkeypatch.setattr(embedding, "padded", padded)
    assert reward.score(samples) == pytest.approx(wanted, abs=1e-5)
    embedder = reward._embedder
    assert isinstance(embedder, Embedder)
    assert embedder.token_budget <= 24 < 4096
    room[0] = 2
    with pytest.raises(RewardError, match="out of memory for a single row of 3 tokens"):
        reward.score(samples)


def test_empty_answers_score_0_and_rows_without_a_reference_have_no_opinion(encoder_path):
    found = score(encoder_path, ["", " ", "the cat", ""], [["the cat"], "the cat", ["", None], []])
    assert found == [0.0, 0.0, None, None]


def test_it_keeps_the_contract(encoder_path):
    reward = load_reward("bertscore", path=encoder_path, device="cpu", layer=2)
    check_reward(reward, references=[["The sum is 22."], ["hot", "It is hot."], [], None, ["Tuesday"], ["x"]])


def test_layers_that_are_not_there_are_refused(encoder_path, policy_path):
    with pytest.raises(RewardError, match=r"layer: .* has 3 layers, got 4"):
        score(encoder_path, ["a"], [["a"]], layer=4)
    with pytest.raises(ValueError, match="layer must be at least 1, got 0"):
        load_reward("bertscore", path=encoder_path, layer=0)
    with pytest.raises(RewardError, match="no encoder at"):
        score("/nowhere", ["a"], [["a"]])


def test_a_decoder_can_embed_too(policy_path):
    assert score(policy_path, ["the cat sat"], [["the cat sat", "dog"]]) == pytest.approx([1.0], abs=1e-5)
