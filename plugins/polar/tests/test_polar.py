import asyncio
import importlib.util
import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from trl_rewards_polar.encoding import encode_ids, encode_text
from trl_rewards_polar.internlm2 import internlm2
from trl_rewards_polar.polar import POLAR_IDS, Polar

from trl_rewards import Context, Failed, RecipeError, RewardError, Samples, load_reward
from trl_rewards.testing import check_reward, make_samples

RECORDED = json.loads(Path(__file__).with_name("polar_cases.json").read_text(encoding="utf-8"))["cases"]
EXACT = {"dtype": "float32", "device": "cpu"}
QUESTION, CITIES = "What is the capital of China?", ["Beijing.", "Shanghai.", "It is Beijing.", ""]


@pytest.fixture(scope="module")
def polar(polar_path):
    return load_reward("polar", path=polar_path, **EXACT)


def rows(completions, references, prompt=QUESTION):
    return Samples([prompt] * len(completions), list(completions), columns={"reference": list(references)})


def score(reward, completions, references, prompt=QUESTION):
    return reward.score(rows(completions, references, prompt))


def marks(tokenizer):
    separator, reward = tokenizer.convert_tokens_to_ids(["<|reward|>", "[UNUSED_TOKEN_130]"])
    return {"separator_id": separator, "reward_token_id": reward}


def by_hand(path, tokenizer, completions, references, prompt=QUESTION, model_class=None, **options):
    model = (model_class or internlm2().reward_model).from_pretrained(path, dtype=torch.float32)
    found = []
    for completion, reference in zip(completions, references, strict=True):
        ids = encode_ids(tokenizer, prompt, reference, completion, **options, **marks(tokenizer))
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits.item())
    return found


def test_scores_are_the_models_own_raw_outputs(polar, polar_path, tokenizer):
    found = score(polar, CITIES, ["Beijing."] * 4)
    assert found == pytest.approx(by_hand(polar_path, tokenizer, CITIES, ["Beijing."] * 4), abs=1e-4)
    assert len({round(value, 3) for value in found}) == 4


def test_a_classifier_of_any_architecture_with_the_marks_works(classifier_path, tokenizer):
    from transformers import AutoModelForSequenceClassification

    reward = load_reward("polar", path=classifier_path, **EXACT)
    wanted = by_hand(
        classifier_path, tokenizer, CITIES, ["Beijing."] * 4, model_class=AutoModelForSequenceClassification
    )
    assert score(reward, CITIES, ["Beijing."] * 4) == pytest.approx(wanted, abs=1e-4)


def test_prefix_reuse_does_not_change_scores(polar_path):
    answers = [f"It is {city} {'and so on ' * times}" for times in (1, 5, 2) for city in ("Beijing", "Shanghai")]
    prompts = [QUESTION * 5] * 3 + [QUESTION * 4] * 3
    samples = Samples(prompts, answers, columns={"reference": ["Beijing. " * 9] * 6})
    on, off = (load_reward("polar", path=polar_path, prefix_reuse=choice, **EXACT) for choice in ("on", "off"))
    assert on.score(samples) == pytest.approx(off.score(samples), abs=1e-4)
    assert on._running.scorer.metrics["prefix_saved"] > 0.4
    assert off._running.scorer.metrics["prefix_saved"] == 0


@pytest.mark.slow
def test_4_bit_weights_work_on_a_cpu(polar_path, polar, tokenizer):
    pytest.importorskip("bitsandbytes")
    quantised = load_reward("polar", path=polar_path, load_in_4bit=True, **EXACT)
    model = quantised._running.scorer.head.model
    assert {weight.dtype for weight in model.model.layers.parameters()} == {torch.uint8, torch.float32}
    ids = encode_ids(tokenizer, QUESTION, "Beijing.", "Shanghai.", **marks(tokenizer))
    found = score(quantised, ["Shanghai."], ["Beijing."])
    assert found == pytest.approx([model(input_ids=torch.tensor([ids])).logits.item()], abs=1e-4)
    assert found != pytest.approx(score(polar, ["Shanghai."], ["Beijing."]), abs=1e-2)


def test_chat_rows_score_as_their_texts_and_bare_tool_calls_are_left_out(polar):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    said = [
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": "Beijing"},
        {"role": "assistant", "content": "It is Beijing."},
    ]
    reference = [{"role": "assistant", "content": "Beijing."}]
    chat = polar.score(Samples([prompt], [said], columns={"reference": [reference]}))
    assert chat == score(polar, ["Beijing\nIt is Beijing."], ["Beijing."], f"Be brief.\n{QUESTION}")


def test_several_references_are_combined(polar_path, polar):
    one, other = score(polar, ["Shanghai."] * 2, ["Beijing.", "Paris."])
    messages = [{"role": "assistant", "content": "Paris."}]
    assert score(polar, ["Shanghai."], [["Beijing.", messages]]) == pytest.approx([(one + other) / 2], abs=1e-5)
    best = load_reward("polar", path=polar_path, references="max", **EXACT)
    assert score(best, ["Shanghai."], [["Beijing.", None, "Paris."]]) == pytest.approx([max(one, other)], abs=1e-5)


@pytest.mark.parametrize("reference", [None, float("nan"), "", " \n", [], [None, ""], [{"role": "x", "content": ""}]])
def test_a_row_without_a_reference_has_no_opinion(polar_path, reference):
    reward = load_reward("polar", path=polar_path, empty_score=-15.0, **EXACT)
    assert score(reward, ["Beijing.", ""], [reference, reference]) == [None, None]


@pytest.mark.parametrize("reference", [3, ["Beijing.", 3], [["Beijing."]], {"content": "Beijing."}])
def test_a_reference_that_is_no_text_is_refused_with_its_row(polar, reference):
    with pytest.raises(TypeError, match="column 'reference', row 1: wanted text, messages or a list of them"):
        score(polar, ["a", "b"], ["Beijing.", reference])


def test_the_reference_column_can_be_named(polar_path, polar):
    reward = load_reward("polar", path=polar_path, reference="answer", **EXACT)
    assert reward.reads() == ("answer",)
    found = reward.score(Samples([QUESTION], ["Paris."], columns={"answer": ["Beijing."]}))
    assert found == score(polar, ["Paris."], ["Beijing."])


def test_thoughts_are_not_scored_unless_asked_for(polar_path, polar):
    thought = "<think>China has Beijing</think>\nBeijing."
    assert score(polar, [thought], ["Beijing."]) == score(polar, ["Beijing."], ["Beijing."])
    whole = load_reward("polar", path=polar_path, strip_thinking=False, **EXACT)
    assert score(whole, [thought], ["Beijing."]) != score(polar, [thought], ["Beijing."])


def test_empty_completions_get_the_score_that_is_set(polar_path):
    reward = load_reward("polar", path=polar_path, empty_score=-15.0, **EXACT)
    assert score(reward, ["", " \n", "<think>x</think> "], ["Beijing."] * 3) == [-15.0] * 3
    assert score(reward, ["Beijing."], ["Beijing."]) != [-15.0]


def test_options_of_the_text_reach_it(polar_path, tokenizer):
    reward = load_reward("polar", path=polar_path, wrapper="pretrain", **EXACT)
    wanted = by_hand(polar_path, tokenizer, ["Paris."], ["Beijing."], wrapper="pretrain")
    assert score(reward, ["Paris."], ["Beijing."]) == pytest.approx(wanted, abs=1e-4)
    cut, left = (
        load_reward("polar", path=polar_path, max_response_length=3, cut_side=side, **EXACT)
        for side in ("right", "left")
    )
    assert score(cut, ["Paris. Beijing."], ["Paris. Shanghai."]) != score(
        left, ["Paris. Beijing."], ["Paris. Shanghai."]
    )


def test_the_contract_is_kept(polar):
    references = [
        "The sum is 22.",
        None,
        ["hot", "It is hot."],
        "cold",
        "Tuesday",
        [{"role": "assistant", "content": "x"}],
    ]
    check_reward(polar, reference=references)


def test_a_score_that_is_no_number_fails_alone(polar_path):
    reward = load_reward("polar", path=polar_path, prefix_reuse="off", token_budget=1, **EXACT)
    embedding = reward._running.scorer.head.model.get_input_embeddings()
    token = reward._running.tokenizer.encode("Z", add_special_tokens=False)[0]
    with torch.no_grad():
        embedding.weight[token] = float("nan")
    good, bad = score(reward, ["Beijing.", "Z"], ["Beijing."] * 2)
    assert isinstance(good, float)
    assert isinstance(bad, Failed)


def test_metrics_are_logged_under_its_name(polar_path):
    logged = {}
    reward = load_reward("polar", path=polar_path, **EXACT)
    reward.setup(Context(log_metric=logged.__setitem__))
    score(reward, ["Paris."], ["Beijing."])
    assert logged["polar/tokens_per_second"] > 0


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_length": 4096}, "max_length 4096 leaves no room"),
        ({"backend": "vllm"}, "got backend 'vllm' and no endpoint"),
        ({"endpoint": "http://localhost:1"}, "got backend 'transformers' and endpoint"),
        ({"backend": "vllm", "endpoint": "localhost:1"}, "must start with http"),
        ({"backend": "vllm", "endpoint": "http://localhost:1", "chunk_size": 0}, "chunk_size must be above 0"),
        (
            {"backend": "vllm", "endpoint": "http://localhost:1", "api_key_env": "sk-1"},
            "name of an environment variable",
        ),
        ({"load_in_4bit": True, "load_in_8bit": True}, "not both"),
        ({"backend": "tgi"}, "must be 'transformers' or 'sglang'"),
    ],
)
def test_wrong_options_are_refused(options, said):
    with pytest.raises(RecipeError, match=said):
        load_reward("polar", path="nowhere", **options)


def test_a_path_without_a_model_is_refused(tmp_path):
    with pytest.raises(RewardError, match="no reward model at"):
        load_reward("polar", path=str(tmp_path / "nothing"))


def test_a_tokenizer_without_the_marks_is_refused(reward_model_path):
    with pytest.raises(RewardError, match=r"has no token '<\|reward\|>'"):
        load_reward("polar", path=reward_model_path)


def test_a_model_that_reads_fewer_tokens_is_refused(classifier_path, tmp_path):
    folder = copied(classifier_path, tmp_path, max_position_embeddings=512)
    with pytest.raises(RewardError, match="reads at most 512 tokens; set max_length"):
        load_reward("polar", path=folder, **EXACT)
    fitting = load_reward("polar", path=folder, max_length=512, max_response_length=100, **EXACT)
    assert isinstance(score(fitting, ["word " * 999], ["word " * 999])[0], float)


def test_another_kind_of_internlm2_reward_model_is_refused(polar_path, tmp_path):
    with pytest.raises(RewardError, match="reads its score at token 4"):
        load_reward("polar", path=copied(polar_path, tmp_path, reward_token_id=4), **EXACT)


def test_a_checkpoint_without_a_head_is_refused(polar_path, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copied(polar_path, tmp_path)
    weights = load_file(Path(folder, "model.safetensors"))
    del weights["v_head.weight"]
    save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"no weights for v_head\.weight"):
        load_reward("polar", path=folder, **EXACT)


def copied(path, folder, **settings):
    for file in Path(path).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return str(folder)


def as_released(folder):
    """A tokenizer in the files of InternLM2's, and the sentencepiece model that it must agree with."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = folder / "text.txt"
    text.write_text("\n".join(["What is the capital of China? It is Beijing, not Shanghai.", "巴黎 café"] * 200))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=450,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=[f"[UNUSED_TOKEN_{index}]" for index in range(131)],
        minloglevel=2,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    named = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|reward|>": pieces.piece_to_id("[UNUSED_TOKEN_0]")}
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {str(token): {"content": content, **plain} for content, token in named.items()},
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "tokenizer_class": "InternLM2Tokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return pieces


def test_a_sentencepiece_model_as_the_released_ones_is_read_without_remote_code(tmp_path):
    pieces = as_released(tmp_path)
    classes, reward = internlm2(), pieces.piece_to_id("[UNUSED_TOKEN_130]")
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {"max_position_embeddings": 32768, "pad_token_id": 2, "reward_token_id": reward}
    classes.reward_model(classes.config(**tiny, **settings, vocab_size=len(pieces))).save_pretrained(tmp_path)
    running = load_reward("polar", path=str(tmp_path), **EXACT)._running
    separator = pieces.piece_to_id("[UNUSED_TOKEN_0]")
    assert (running.separator_id, running.reward_id) == (separator, reward)
    odd = "  two  spaces\tTab\n\n 巴黎 🗼 café is Beijing."
    ids = encode_ids(running.tokenizer, odd, odd, odd, separator_id=separator, reward_token_id=reward)
    half = pieces.encode(f"{odd}\n{odd}")
    assert ids == [1, *half, separator, *half, reward]


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_where_sentencepiece_is_needed_the_error_names_it(polar_path, tmp_path):
    (tmp_path / "config.json").write_bytes(Path(polar_path, "config.json").read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(b"a sentencepiece model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "InternLM2Tokenizer"}')
    with pytest.raises(RewardError, match="pip install sentencepiece"):
        load_reward("polar", path=str(tmp_path), **EXACT)


def test_the_tokenizer_of_an_adapter_is_taken_where_it_has_one(polar_path, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = internlm2().reward_model.from_pretrained(polar_path)
    get_peft_model(model, LoraConfig(target_modules=["wqkv", "w1"])).save_pretrained(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    copied(polar_path, bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(tmp_path)
    reward = load_reward("polar", path=str(bare), adapter=str(tmp_path), **EXACT)
    assert isinstance(score(reward, ["Paris."], ["Beijing."])[0], float)


def test_P7_the_known_ids_of_the_released_vocabulary_are_the_recorded_ones():
    (case,) = (case for case in RECORDED if case["id"] == "polar-enc-29-canonical-real-slow")
    assert case["output"]["server_side_ids_slow"] == POLAR_IDS
    assert (len(POLAR_IDS), POLAR_IDS[0], POLAR_IDS[-1], POLAR_IDS.count(92397)) == (23, 1, 92527, 1)


def test_P7_a_tokenizer_with_the_released_marks_but_other_ids_is_refused(polar_path, tokenizer, monkeypatch):
    ids = marks(tokenizer)
    monkeypatch.setattr("trl_rewards_polar.polar.SEPARATOR_ID", ids["separator_id"])
    monkeypatch.setattr("trl_rewards_polar.polar.REWARD_ID", ids["reward_token_id"])
    with pytest.raises(RewardError, match="reads a known text as"):
        load_reward("polar", path=polar_path, **EXACT)


# Servers


SHAPES = {"lmdeploy": lambda value: value, "vllm_sequence": lambda value: [value]}


@pytest.fixture
def serve(polar):
    """Starts a server that scores token ids, or texts that it tokenises, with the model of `polar`."""
    servers = []
    model, tokenizer = polar._running.scorer, polar._running.tokenizer

    def start(backend, break_token=None, status=200):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append((self.path, body))
                reply = json.dumps(answer(body)).encode()
                self.send_response(status)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *arguments):
                pass

        def answer(body):
            if backend == "sglang":
                texts = [
                    text.replace(break_token, " ".join(break_token)) if break_token else text for text in body["text"]
                ]
                ids = [tokenizer.encode(text) for text in texts]
                scores = model.score_ids(ids)
                return [
                    {"embedding": [value], "meta_info": {"prompt_tokens": len(row)}}
                    for value, row in zip(scores, ids, strict=True)
                ]
            scores = model.score_ids(body["input"])
            last = SHAPES.get(backend, lambda value: [[0.0], [value]])
            return {"data": [{"index": index, "data": last(value)} for index, value in enumerate(scores)]}

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("backend", ["sglang", "vllm", "vllm_sequence", "vllm_bare", "lmdeploy"])
def test_P9_a_served_model_gives_the_scores_of_the_one_in_this_process(serve, polar, polar_path, tokenizer, backend):
    url, requests = serve(backend)
    reward = load_reward("polar", path=polar_path, backend=backend, endpoint=url, chunk_size=2)
    samples = rows(CITIES, ["Beijing.", "Beijing.", ["Beijing.", "Paris."], None])
    found = asyncio.run(reward.ascore(samples))
    assert found == pytest.approx(polar.score(samples), abs=1e-4)
    asked = requests[2:]  # after the self-test's two
    if backend == "sglang":
        texts = [encode_text(tokenizer, QUESTION, "Beijing.", city) for city in CITIES[:2]]
        assert ("/classify", {"model": Path(polar_path).name, "text": texts}) in asked
    else:
        ids = [encode_ids(tokenizer, QUESTION, "Beijing.", city, **marks(tokenizer)) for city in CITIES[:2]]
        assert ids in [body["input"] for _, body in asked]
        assert {path for path, _ in asked} == {"/pooling"}
        assert not any("model" in body for _, body in asked)
    reward.close()


def test_a_served_reward_survives_pickling_and_works_as_a_plain_trl_reward(serve, polar, polar_path):
    url, _ = serve("lmdeploy")
    reward = load_reward("polar", path=polar_path, backend="lmdeploy", endpoint=url, served_as="polar")
    again = pickle.loads(pickle.dumps(reward))
    wanted = score(polar, ["Paris."], ["Beijing."])
    assert again([QUESTION], ["Paris."], reference=["Beijing."]) == pytest.approx(wanted, abs=1e-4)
    check_reward(reward, make_samples(["Paris.", ""], reference=["Beijing.", "Beijing."]))


def test_a_server_that_splits_the_reward_token_is_refused(serve, polar_path):
    url, _ = serve("sglang", break_token="[UNUSED_TOKEN_130]")
    with pytest.raises(RewardError, match="splits the reward token"):
        load_reward("polar", path=polar_path, backend="sglang", endpoint=url)


def test_P10_a_server_that_always_fails_is_asked_8_times_and_refused_at_the_start(serve, polar_path):
    url, requests = serve("lmdeploy", status=503)
    with pytest.raises(RewardError, match="503"):
        load_reward("polar", path=polar_path, backend="lmdeploy", endpoint=url)
    assert len(requests) == 8


def test_P10_where_a_server_fails_later_rows_are_failures_and_never_numbers(serve, polar_path):
    url, _ = serve("lmdeploy")
    reward = load_reward("polar", path=polar_path, backend="lmdeploy", endpoint=url, attempts=1)
    gone, _ = serve("lmdeploy", status=500)
    reward._running = reward._running._replace(
        server=Polar(path=polar_path, backend="lmdeploy", endpoint=gone, attempts=1)._server(gone)
    )
    found = asyncio.run(reward.ascore(rows(["Paris.", "Beijing."], ["Beijing.", None])))
    assert isinstance(found[0], Failed)
    assert found[1] is None
