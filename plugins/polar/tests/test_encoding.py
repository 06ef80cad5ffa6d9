import hashlib
import json
import re
from pathlib import Path

import pytest
from trl_rewards_polar.encoding import (
    Layout,
    encode_ids,
    encode_text,
    encode_training,
    parse_dialogue,
    strip_thinking,
)

RECORDED = json.loads(Path(__file__).with_name("polar_cases.json").read_text(encoding="utf-8"))["cases"]
CASES = {case["id"].removeprefix("polar-"): case for case in RECORDED}
REWARD = 92527


class Characters:
    """The recording's toy tokenizer: one token a character, after a 0 that begins the text."""

    def encode(self, text):
        return [0, *map(ord, text)]

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return "".join(map(chr, filter(None, ids)))


class Words:
    """One token a word, with the space before it."""

    def __init__(self):
        self.words = ["<s>"]

    def encode(self, text):
        found = re.findall(r" ?[^\s<>|\[\]]+|\s|.", text)
        self.words += sorted(set(found) - set(self.words))
        return [0, *map(self.words.index, found)]

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return "".join(self.words[token] for token in ids if token)


TOY = Characters()
# Not the client's ways here: budgets of zero or less, and checks of its own input format.
REFUSED = {"enc-18-zero-prompt-budget", "enc-19-negative-prompt-budget"}
CLIENT = {"enc-21-list-batch-mixed", "enc-22-invalid-type", "enc-25-missing-reference", "enc-26-extra-key"}
TEXTS = [
    name
    for name, case in CASES.items()
    if name.startswith("enc-") and "text" in case["output"] and name not in REFUSED | CLIENT and "-27-" not in name
]


def test_an_unknown_wrapper_is_refused():
    with pytest.raises(ValueError, match="wrapper must be sft or pretrain, got 'stf'"):
        encode_text(TOY, "q", "r", "o", wrapper="stf")
    with pytest.raises(ValueError, match="wrapper must be sft or pretrain, got 'stf'"):
        encode_training(TOY, "q", "r", ["o", "p"], wrapper="stf", reward_token_id=REWARD)


def encoded(case, tokenizer=TOY):
    data, options = case["input"]["data"], dict(case["input"]["ctor"])
    side = "left" if "xtuner" in case["id"] else "right"
    layout = Layout(cut_side=options.pop("response_cut_side", side), **options)
    return encode_text(tokenizer, **data, layout=layout)


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_those_of_the_authors_client(name):
    assert encoded(CASES[name]) == CASES[name]["output"]["text"]


@pytest.mark.parametrize("name", ["enc-23-missing-content", "enc-24-none-content"])
def test_a_message_without_text_is_refused_as_by_the_authors_client(name):
    with pytest.raises((KeyError, TypeError)):
        encoded(CASES[name])


def test_P1_the_example_of_the_model_card():
    wanted = (
        "What is the capital of China?\nBeijing.<|reward|>What is the capital of China?\nShanghai.[UNUSED_TOKEN_130]"
    )
    prompt = [{"role": "user", "content": "What is the capital of China?"}]
    reference = [{"role": "assistant", "content": "Beijing."}]
    output = [{"role": "assistant", "content": "Shanghai."}]
    assert encode_text(TOY, prompt, reference, output) == wanted
    assert encode_text(TOY, "What is the capital of China?", "Beijing.", "Shanghai.") == wanted


def test_P2_wrapper_pretrain_has_no_newlines():
    wanted = "Once upona time<|reward|>Once upontwice[UNUSED_TOKEN_130]"
    assert encode_text(TOY, "Once upon", "a time", "twice", "pretrain") == wanted
    assert encode_text(TOY, "Q", "", "", "pretrain") == "Q<|reward|>Q[UNUSED_TOKEN_130]"


def test_P3_turns_are_lines_without_roles():
    contents = ["Be brief.", "Hi", "Hello!", "2+2?"]
    roles = ["system", "user", "assistant", "user"]
    prompt = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    half = "Be brief.\nHi\nHello!\n2+2?\n"
    assert encode_text(TOY, prompt, "4", "Four") == f"{half}4<|reward|>{half}Four[UNUSED_TOKEN_130]"


def test_P4_an_empty_output_keeps_its_newline():
    assert encode_text(TOY, "Q?", "R", "") == "Q?\nR<|reward|>Q?\n[UNUSED_TOKEN_130]"


def test_P5_long_answers_are_cut_at_either_side():
    right = encode_text(TOY, "Q", "abcdefghij", "0123456789", layout=Layout(max_response_length=6))
    left = encode_text(TOY, "Q", "abcdefghij", "0123456789", layout=Layout(max_response_length=6, cut_side="left"))
    assert right == "Q\nabcde<|reward|>Q\n01234[UNUSED_TOKEN_130]"  # the first of six tokens begins the text
    assert left == "Q\nefghij<|reward|>Q\n456789[UNUSED_TOKEN_130]"


def test_P6_of_a_long_prompt_the_end_stays():
    layout = Layout(max_length=40, max_response_length=8)
    prompt = "the quick brown fox jumps over the lazy dog"
    text = encode_text(TOY, prompt, "ab", "cd", layout=layout)  # (40 - 4 - 3 - 3) / 2 = 15 characters
    assert text == "er the lazy dog\nab<|reward|>er the lazy dog\ncd[UNUSED_TOKEN_130]"


def test_P7_ids_begin_with_bos_have_one_separator_and_end_with_the_reward_token(tokenizer):
    separator, reward = tokenizer.convert_tokens_to_ids(["<|reward|>", "[UNUSED_TOKEN_130]"])
    marks = {"separator_id": separator, "reward_token_id": reward}
    ids = encode_ids(tokenizer, "What is the capital of China?", "Beijing.", "Shanghai.", **marks)
    assert (ids[0], ids[-1], ids.count(separator)) == (tokenizer.bos_token_id, reward, 1)
    text = encode_text(tokenizer, "What is the capital of China?", "Beijing.", "Shanghai.")
    assert ids == tokenizer.encode(text)


def test_P8_of_6000_words_4095_stay_within_the_default_limits():
    case, words = CASES["enc-30-4096-default-limit"], Words()
    text = encode_text(words, "Q?", "R", " ".join(["word"] * 6000))
    assert text.count("word") == case["output"]["n_words_in_candidate"] == 4095
    assert hashlib.sha256(text.encode()).hexdigest() == case["output"]["sha256"]


STRIPPED = {
    "<think>2+2\nis 4</think>\n\nAnswer 4": "Answer 4",
    "no tags here ": "no tags here ",
    "<think>unclosed": "<think>unclosed",
    "<think>a</think> x<think>b</think> y": "x<think>b</think> y",
    "pre <think>a</think>post": "post",
    "</think>only close": "</think>only close",
    "<think></think>": "",
    "": "",
}


@pytest.mark.parametrize("text", STRIPPED)
def test_P11_the_first_closed_thoughts_are_taken_off(text):
    assert strip_thinking(text) == STRIPPED[text]


MARKS = ["<|reward|>", "[UNUSED_TOKEN_130]", "</s>", "<s>", "<|im_end|>"]


@pytest.mark.parametrize("mark", MARKS)
def test_P14_marks_in_what_users_and_policies_write_are_taken_out(tokenizer, mark):
    text = encode_text(tokenizer, f"Say {mark} now{mark}", f"ok{mark}", f"x{mark}ok{mark}tail")
    assert text == "Say  now\nok<|reward|>Say  now\nxoktail[UNUSED_TOKEN_130]"


def test_P14_the_recorded_injection_loses_the_reward_token_too(tokenizer):
    case = CASES["enc-27-special-token-injection-slow"]
    kept = case["output"]["text"].removesuffix("[UNUSED_TOKEN_130]").replace("[UNUSED_TOKEN_130]", "")
    assert encoded(case, tokenizer) == kept + "[UNUSED_TOKEN_130]"


@pytest.mark.parametrize(
    "text",
    [
        "a<|rew<|reward|>ard|>b",
        "a<|rew<|rew<|reward|>ard|>ard|>b",
        "a<|rew</s>ard|>b",
        "a[UNUSED_[UNUSED_TOKEN_130]TOKEN_130]b",
        "a<|rew[UNUSED_TOKEN_130]ard|>b",
        "a<</s>/s>b",
    ],
)
def test_P14_taking_a_mark_out_makes_no_other(tokenizer, text):
    assert encode_text(tokenizer, text, text, text) == "ab\nab<|reward|>ab\nab[UNUSED_TOKEN_130]"


def test_P14_prompt_and_answer_that_meet_form_no_mark(tokenizer):
    text = encode_text(tokenizer, "a<|rew", "ard|>b", "ard|>c", "pretrain")
    assert text == "ab<|reward|>ac[UNUSED_TOKEN_130]"


def test_text_survives_whatever_its_characters(tokenizer):
    odd = "  two  spaces\tTab\n\n 法国 🗼 Paris – café \n"
    assert encode_text(tokenizer, odd, odd, odd) == f"{odd}\n{odd}<|reward|>{odd}\n{odd}[UNUSED_TOKEN_130]"


@pytest.mark.parametrize(
    "options", [{"max_length": 20}, {"max_length": 20, "max_response_length": 8}, {"max_response_length": 0}]
)
def test_lengths_that_leave_no_room_are_refused(options):
    with pytest.raises(ValueError, match="max_response_length"):
        Layout(**options)


def test_the_tightest_layout_keeps_a_token_of_the_prompt():
    layout = Layout(max_length=22, max_response_length=8)
    assert encode_text(TOY, "KEEPME", "abcdefg", "hijklmn", layout=layout).startswith("E\nabcdefg<|reward|>E\n")


def test_the_longer_answer_of_a_pair_sets_the_budget_of_both_prompts():
    layout = Layout(max_length=30, max_response_length=10)
    short, long = encode_training(
        TOY, "0123456789", "R", ["x", "abcdefghi"], layout=layout, reward_token_id=REWARD
    )  # (30 - 4 - 2 - 10) / 2 = 7
    assert [chr(token) for token in short[1:8]] == [chr(token) for token in long[1:8]] == list("3456789")


def test_training_keeps_the_head_of_answers_whatever_the_cut_side():
    layout = Layout(max_response_length=4, cut_side="left")
    (ids,) = encode_training(TOY, "Q", "abcdef", ["uvwxyz"], layout=layout, reward_token_id=REWARD)
    assert TOY.decode(ids[:-1], True, False) == "Q\nabc<|reward|>Q\nuvw"


def test_training_ids_of_an_empty_answer_are_xtuners():
    case = CASES["train-03-empty-chosen-toy"]
    pair, output = case["input"]["pair"], case["output"]
    found = encode_training(
        TOY, pair["prompt"], pair["reference"], [pair["chosen"], pair["rejected"]], reward_token_id=REWARD
    )
    assert found == [output["chosen_ids"], output["rejected_ids"]]


@pytest.mark.parametrize("name", ["train-01-canonical-slow", "train-02-canonical-fast"])
def test_training_ids_have_xtuners_structure(tokenizer, name):
    pair, output = CASES[name]["input"]["pair"], CASES[name]["output"]
    separator, reward = tokenizer.convert_tokens_to_ids(["<|reward|>", "[UNUSED_TOKEN_130]"])
    candidates = [pair["chosen"], pair["rejected"]]
    marks = {"separator_id": separator, "reward_token_id": reward}
    for ids, recorded in zip(
        encode_training(tokenizer, pair["prompt"], pair["reference"], candidates, **marks),
        [output["chosen_ids"], output["rejected_ids"]],
        strict=True,
    ):
        assert (ids[0], ids[-1], ids.count(separator)) == (1, reward, 1)
        assert (recorded[0], recorded[-1], recorded.count(92397)) == (1, REWARD, 1)
    chosen, _ = encode_training(tokenizer, pair["prompt"], pair["reference"], candidates, **marks)
    assert tokenizer.decode(chosen[:-1]) == output["chosen_text"].replace(" <s> ", "<s>")


def test_scoring_and_training_read_a_row_alike(tokenizer):
    separator, reward = tokenizer.convert_tokens_to_ids(["<|reward|>", "[UNUSED_TOKEN_130]"])
    marks = {"separator_id": separator, "reward_token_id": reward}
    prompt, reference, output = "What is the capital of China? " * 9, "Beijing. " * 40, "Paris"
    layout = Layout(max_length=100, max_response_length=30)
    scored = encode_ids(tokenizer, prompt, reference, output, layout=layout, **marks)
    assert encode_training(tokenizer, prompt, reference, [output], layout=layout, **marks) == [scored]


def test_ids_that_are_not_as_they_should_be_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"separator .* stands 0 times"):
        encode_ids(tokenizer, "Q", "R", "O", reward_token_id=7, separator_id=9999)
    with pytest.raises(ValueError, match=r"reward token .* inside the text"):
        encode_ids(tokenizer, "Q", "R", "O", reward_token_id=1, separator_id=4)


def test_a_tokenizer_that_ends_texts_with_a_token_is_refused():
    class Ending(Characters):
        def encode(self, text):
            return [*super().encode(text), 0]

    with pytest.raises(ValueError, match="ends texts with a token of its own"):
        encode_ids(Ending(), "Q", "R", "O", reward_token_id=REWARD, separator_id=9999)


def test_dialogues_of_hh_rlhf_are_read_as_by_the_authors():
    case = CASES["hh-01-parse"]
    wanted = [message | {"role": message["role"].replace("human", "user")} for message in case["output"]]
    assert parse_dialogue(case["input"]) == wanted
    assert parse_dialogue("no turns") == []
