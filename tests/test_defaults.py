"""The core's own components, against numbers worked by hand and against TRL's."""

from __future__ import annotations

import math
import pickle
import shutil

import pytest
import torch

from tests.conftest import round_to_4_bits
from trl_rewards import RecipeError, RewardError, load_advantage, load_combiner, load_reward, load_shaper
from trl_rewards.components import Context, RewardBatch
from trl_rewards.defaults.accuracy import final_answer, inner_answer
from trl_rewards.samples import Samples
from trl_rewards.testing import make_batch, make_samples, make_scores

NAN = float("nan")


def close(wanted, **options):
    return pytest.approx(wanted, nan_ok=True, **({"abs": 1e-6} | options))


# --- combiners -------------------------------------------------------------------------------------------------------


def combine(name: str, values, weights=None, **options) -> list[float]:
    scores = make_scores(values, weights, group_size=1)
    return load_combiner(name, **options)(scores, make_samples(["t"] * len(values))).tolist()


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        # values [1, 2], [1, –], [–, 2], [–, –]
        ([1.0, 0.5], [2.0, 1.5, 3.0, NAN]),  # 1·1 + 2·0.5; 1·1 · 1.5/1; 2·0.5 · 1.5/0.5
        ([1.0, -0.5], [0.0, 1.5, -3.0, NAN]),
        ([1.0, 0.0], [1.0, 1.0, NAN, NAN]),  # a watched source alone says nothing
        ([0.0, 0.0], [0.0, 0.0, 0.0, NAN]),
        ([-1.0, -1.0], [-3.0, -2.0, -4.0, NAN]),
    ],
    ids=str,
)
def test_weighted_sum_renormalises_over_what_is_there(weights, wanted):
    assert combine("weighted_sum", [[1.0, 2.0], [1.0, None], [None, 2.0], [None, None]], weights) == close(wanted)


def test_weighted_sum_without_holes_is_the_plain_sum_to_the_last_bit():
    values = torch.rand(64, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.1, 0.7, 1.3])
    assert combine("weighted_sum", values.tolist(), weights.tolist()) == (values * weights).sum(dim=1).tolist()


FOUR = [[1.0, 10.0, 2.0, 3.0], [1.0, None, 2.0, 3.0], [None, None, 2.0, 3.0], [None, None, None, None]]


@pytest.mark.parametrize(
    ("name", "weights", "wanted"),
    [
        ("mean", None, [4.0, 2.0, 2.5, NAN]),
        ("mean", [1.0, 0.0, 9.0, 1.0], [2.0, 2.0, 2.5, NAN]),
        ("median", None, [2.5, 2.0, 2.5, NAN]),
        ("median", [0.0, 1.0, 1.0, 1.0], [3.0, 2.5, 2.5, NAN]),
        ("median", [0.0, 0.0, 0.0, 0.0], [2.5, 2.0, 2.5, NAN]),
        ("min", None, [1.0, 1.0, 2.0, NAN]),
        ("min", [0.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, NAN]),
        ("product", None, [60.0, 6.0, 6.0, NAN]),
        ("product", [1.0, 0.0, 1.0, 0.0], [2.0, 2.0, 2.0, NAN]),
        ("product", [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, NAN, NAN]),
    ],
)
def test_combiners_leave_holes_and_sources_of_weight_0_out(name, weights, wanted):
    assert combine(name, FOUR, weights) == close(wanted)


# Two prompts of four, weights [1, 0.5], the last row unscorable; numbers of trl 1.16.0 (grpo_trainer.py, nanstd).
TRL_SCORES = [[1.0, 0.2], [0.0, 0.4], [0.0, 0.9], [1.0, 0.1], [1.0, 0.5], [1.0, 0.5], [1.0, 0.7], [None, None]]
TRL_WEIGHTS = [1.0, 0.5]
TRL_ADVANTAGES = {
    "group_norm": [0.89797579, -1.12246974, -0.56123487, 0.78572882, -0.576352, -0.576352, 1.152704, 0.0],
    "batch_norm": [0.89986783, -1.12483479, -0.5624174, 0.78738436, -0.07498899, -0.07498899, 0.14997797, 0.0],
    "center": [0.4, -0.5, -0.25, 0.35, -0.03333333, -0.03333333, 0.06666667, 0.0],
}
TRL_GDPO = [1.06326991, -1.57383411, -0.29742362, 0.80798782, -0.52424822, -0.52424822, 1.04849645, 0.0]


def trl_batch(combiner: str) -> RewardBatch:
    scores = make_scores(TRL_SCORES, TRL_WEIGHTS, group_size=4)
    samples = make_samples(["t"] * 8)
    return RewardBatch(load_combiner(combiner)(scores, samples), scores, samples)


@pytest.mark.parametrize("name", TRL_ADVANTAGES)
def test_advantages_are_those_of_trl(name):
    assert load_advantage(name)(trl_batch("weighted_sum")).tolist() == close(TRL_ADVANTAGES[name], abs=1e-5)


def test_normalize_then_sum_with_center_is_that_of_trl():
    batch = trl_batch("normalize_then_sum")
    assert batch.rewards.isnan().tolist() == [False] * 7 + [True]
    assert load_advantage("center")(batch).tolist() == close(TRL_GDPO, abs=1e-5)


def test_normalize_then_sum_gives_a_constant_group_0():
    # One source, groups [0, 1] and [5, 5]: z = ∓√½, ±√½, 0, 0; then over the batch, with mean 0 and variance 1/3.
    (first, second, third, fourth) = load_combiner("normalize_then_sum", eps=1e-12)(
        make_scores([[0.0], [1.0], [5.0], [5.0]], group_size=2), make_samples(["t"] * 4)
    ).tolist()
    assert (first, second) == close((-math.sqrt(1.5), math.sqrt(1.5)))
    assert third == fourth == 0.0


def test_normalize_then_sum_of_constant_sources_is_0_and_needs_an_eps():
    assert combine("normalize_then_sum", [[1.0, 2.0]] * 4) == [0.0] * 4
    with pytest.raises(RecipeError, match=r"eps must be above 0, got 0.0"):
        load_combiner("normalize_then_sum", eps=0.0)


# --- shapers ---------------------------------------------------------------------------------------------------------


def shape(name: str, rewards, **options) -> list[float]:
    return load_shaper(name, **options)(torch.tensor(rewards), make_samples(["t"] * len(rewards))).tolist()


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        # rewards -3, –, 0, 2
        ("clip", {"low": -1.0, "high": 1.0}, [-1.0, NAN, 0.0, 1.0]),
        ("clip", {"low": -1}, [-1.0, NAN, 0.0, 2.0]),
        ("clip", {"high": 0}, [-3.0, NAN, 0.0, 0.0]),
        ("clip", {"low": 1.0, "high": 1.0}, [1.0, NAN, 1.0, 1.0]),
        ("scale", {"factor": -2.0, "offset": 1.0}, [7.0, NAN, 1.0, -3.0]),
        ("tanh", {}, [math.tanh(-3), NAN, 0.0, math.tanh(2)]),
        ("tanh", {"center": 2.0, "scale": 4.0}, [math.tanh(-1.25), NAN, math.tanh(-0.5), 0.0]),
        ("sigmoid", {}, [1 / (1 + math.exp(3)), NAN, 0.5, 1 / (1 + math.exp(-2))]),
        ("sigmoid", {"center": 2.0, "scale": 0.5}, [1 / (1 + math.exp(10)), NAN, 1 / (1 + math.exp(4)), 0.5]),
    ],
    ids=str,
)
def test_shapers_by_hand(name, options, wanted):
    assert shape(name, [-3.0, NAN, 0.0, 2.0], **options) == close(wanted)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("clip", {}, "clip needs low, high or both"),
        ("clip", {"low": 2.0, "high": 1.0}, "low must not be above high, got low 2.0 and high 1.0"),
        ("tanh", {"scale": 0.0}, "scale must be above 0, got 0.0"),
        ("sigmoid", {"scale": -1.0}, "scale must be above 0, got -1.0"),
    ],
)
def test_shapers_refuse_options_that_make_no_sense(name, options, complaint):
    with pytest.raises(RecipeError, match=complaint):
        load_shaper(name, **options)


def whiten(shaper, rewards) -> list[float]:
    return shaper(torch.tensor(rewards), make_samples(["t"] * len(rewards))).tolist()


def test_whiten_runs_over_all_rewards_of_the_run():
    shaper = load_shaper("whiten")
    assert whiten(shaper, [1.0, 3.0]) == close([-1.0, 1.0])  # mean 2, population deviation 1
    assert whiten(shaper, [5.0, NAN]) == close([2 / math.sqrt(8 / 3), NAN])  # 1, 3, 5: mean 3, variance 8/3
    assert shaper.state_dict() == {"count": 3, "mean": close(3.0), "squares": close(8.0)}


def test_whiten_of_equal_rewards_is_0_and_of_holes_a_hole():
    shaper = load_shaper("whiten")
    assert whiten(shaper, [NAN, NAN]) == close([NAN, NAN])
    assert whiten(shaper, [0.3, 0.3]) == [0.0, 0.0]


def test_whiten_without_centering_only_scales():
    assert whiten(load_shaper("whiten", center=False), [1.0, 3.0]) == close([1.0, 3.0])
    assert whiten(load_shaper("whiten", center=False, eps=1.0), [1.0, 3.0]) == close([0.5, 1.5])


def test_whiten_goes_on_from_its_state():
    whole, first = load_shaper("whiten"), load_shaper("whiten")
    for shaper in (whole, first):
        whiten(shaper, [0.5, -2.0, 7.0])
    second = load_shaper("whiten")
    second.load_state_dict(first.state_dict())
    assert whiten(second, [1.0, 2.0]) == whiten(whole, [1.0, 2.0])


# --- advantages ------------------------------------------------------------------------------------------------------


def advantages(name: str, rewards, group_size: int, **options) -> list[float]:
    return load_advantage(name, **options)(make_batch(rewards, group_size)).tolist()


@pytest.mark.parametrize(
    ("name", "options", "rewards", "wanted"),
    [
        # mean 1, sample variance 2/3, population variance 1/2
        ("group_norm", {"eps": 0.0}, [0.0, 1.0, 1.0, 2.0], [-math.sqrt(1.5), 0.0, 0.0, math.sqrt(1.5)]),
        ("group_norm", {"eps": 0.0, "ddof": 0}, [0.0, 1.0, 1.0, 2.0], [-math.sqrt(2), 0.0, 0.0, math.sqrt(2)]),
        (
            "group_norm",
            {},
            [0.0, 1.0, 1.0, 2.0],
            [-1 / (math.sqrt(2 / 3) + 1e-4), 0.0, 0.0, 1 / (math.sqrt(2 / 3) + 1e-4)],
        ),
        ("group_norm", {"eps": 0.0}, [0.0, None, 2.0, None], [-math.sqrt(0.5), 0.0, math.sqrt(0.5), 0.0]),
        ("center", {}, [0.0, 1.0, 1.0, 2.0], [-1.0, 0.0, 0.0, 1.0]),
        ("center", {}, [0.0, None, 1.0, 2.0], [-1.0, 0.0, 0.0, 1.0]),
        ("leave_one_out", {}, [0.0, 1.0, 1.0, 2.0], [-4 / 3, 0.0, 0.0, 4 / 3]),
        ("leave_one_out", {}, [0.0, None, 1.0, 2.0], [-1.5, 0.0, 0.0, 1.5]),
        ("leave_one_out", {}, [None, None, 1.0, None], [0.0, 0.0, 0.0, 0.0]),
    ],
    ids=str,
)
def test_advantages_of_a_group_by_hand(name, options, rewards, wanted):
    assert advantages(name, rewards, 4, **options) == close(wanted)


def test_batch_norm_divides_by_the_deviation_of_raw_rewards_over_the_batch():
    # Groups [0, 2] and [4, 4]: centred ∓1, 0; all four: mean 2.5, sample variance 11/3.
    std = math.sqrt(11 / 3)
    assert advantages("batch_norm", [0.0, 2.0, 4.0, 4.0], 2, eps=0.0) == close([-1 / std, 1 / std, 0.0, 0.0])


@pytest.mark.parametrize("name", ["group_norm", "center", "batch_norm", "leave_one_out"])
def test_a_group_of_one_and_equal_rewards_give_exactly_0(name):
    assert advantages(name, [0.1, 0.7, None], 1) == [0.0, 0.0, 0.0]
    assert advantages(name, [0.1] * 6 + [0.7] * 6, 6) == [0.0] * 12


@pytest.mark.parametrize("name", ["group_norm", "center", "leave_one_out"])
def test_a_constant_added_to_a_group_changes_nothing(name):
    plain = advantages(name, [0.25, 0.5, 1.0, 0.0], 4)
    assert advantages(name, [1000.25, 1000.5, 1001.0, 1000.0], 4) == close(plain, abs=1e-5)


# --- length ----------------------------------------------------------------------------------------------------------


def test_length_is_dapos_eq_13_at_its_boundaries():
    samples = make_samples([" ".join(["w"] * count) for count in (0, 4, 5, 6, 8, 9, 100)])
    assert load_reward("length", soft_limit=4, hard_limit=8).score(samples) == [
        0.0,
        0.0,
        -0.25,
        -0.5,
        -1.0,
        -1.0,
        -1.0,
    ]


def test_length_may_start_at_0():
    assert load_reward("length", soft_limit=0, hard_limit=2).score(make_samples(["", "a", "a b"])) == [0.0, -0.5, -1.0]


@pytest.mark.parametrize("limits", [(8, 8), (9, 8), (-1, 8)])
def test_length_refuses_limits_in_the_wrong_order(limits):
    with pytest.raises(RecipeError, match=r"soft_limit must be in \[0, hard_limit\)"):
        load_reward("length", soft_limit=limits[0], hard_limit=limits[1])


# --- regex_format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("  <think>\na\n\nb</think>\n\n<answer>\nb\n</answer> \n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<think>a</think><answer>b</answer>.", 0.0),
        ("So: <think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("a</think><answer>b</answer>", 0.0),
        ("<THINK>a</THINK><answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_regex_format_by_default_wants_think_then_answer(text, wanted):
    assert load_reward("regex_format").score(make_samples([text])) == [wanted]


def test_regex_format_with_a_prefix_reads_what_the_template_began():
    reward = load_reward("regex_format", prefix="<think>")
    assert reward.score(make_samples(["a</think><answer>b</answer>", "<think>a"])) == [1.0, 0.0]


def test_regex_format_matches_the_whole_completion():
    reward = load_reward("regex_format", pattern=r"\d+")
    assert reward.score(make_samples(["12", " 12\n", "12a", "1\n2"])) == [1.0, 1.0, 0.0, 0.0]


def test_regex_format_refuses_a_pattern_that_is_none():
    with pytest.raises(RecipeError, match=r"pattern '\(' is not a regular expression"):
        load_reward("regex_format", pattern="(")


# --- exact_match -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("take", "text", "answer", "wanted"),
    [
        ("all", "Paris", "paris", 1.0),
        ("all", " 'Paris.' \n", "Paris", 1.0),
        ("all", "New   York", "new york", 1.0),
        ("all", "It is Paris", "Paris", 0.0),
        ("all", "x <answer>London</answer> y <answer> Paris! </answer> z", "Paris", 1.0),
        ("all", "<answer>Paris", "Paris", 1.0),
        ("all", "", "Paris", 0.0),
        ("all", "STRASSE", "straße", 1.0),
        ("all", "42", 42, 1.0),
        ("all", "anything", None, None),
        ("all", "anything", " ", None),
        ("last_word", "It is Paris.", "paris", 1.0),
        ("last_word", "Paris it is", "paris", 0.0),
        ("last_word", "", "paris", 0.0),
        ("last_word", "<answer>I say Paris</answer> truly", "paris", 1.0),
        ("last_number", "17 + 5 = 22.", "22", 1.0),
        ("last_number", "It is 1,234", "1234", 1.0),
        ("last_number", "It is 1234, I think", "1,234", 1.0),
        ("last_number", "-3.50 degrees", "-3.50", 1.0),
        ("last_number", "3 or 4", "3", 0.0),
        ("last_number", "none", "3", 0.0),
        ("last_number", "$22", 22, 1.0),
    ],
)
def test_exact_match(take, text, answer, wanted):
    assert load_reward("exact_match", take=take).score(make_samples([text], answer=[answer])) == [wanted]


def test_exact_match_reads_the_last_message_and_another_column():
    samples = make_samples(["Paris"], chat=True, solution=["paris"])
    reward = load_reward("exact_match", answer="solution")
    assert reward.reads() == ("solution",)
    assert reward.score(samples) == [1.0]


# --- accuracy --------------------------------------------------------------------------------------------------------


def test_answers_are_found_in_solutions_and_tags():
    assert final_answer("3 * 14 = 42\n#### 42 ") == "42"
    assert final_answer(" 42 ") == "42"
    assert inner_answer("<answer>1</answer> no: <answer>\n2</answer>.") == "\n2"
    assert inner_answer("just 3") == "just 3"


def test_accuracy_refuses_times_and_numbers_that_make_no_sense():
    with pytest.raises(RecipeError, match=r"seconds and processes must be above 0, got 0.0 and 2"):
        load_reward("accuracy", seconds=0.0)


ACCURACY = [  # completion, reference, score
    ("The answer is 0.5", "\\frac{1}{2}", 1.0),
    ("so $\\frac{2}{4}$", "1/2", 1.0),
    ("<answer>\\boxed{7}</answer>", "7", 1.0),
    ("It is \\boxed{42}", "We add 40 and 2.\n#### 42", 1.0),
    ("It is 43", "We add 40 and 2.\n#### 42", 0.0),
    ("$x = 2\\sqrt{2}$", "$\\sqrt{8}$", 1.0),
    ("no number at all", "7", 0.0),
    ("", "7", 0.0),
    ("7", None, None),
    ("7", "", None),
    ("$(1, 3]$", "$(1,3]$", 1.0),
]


@pytest.mark.slow
def test_accuracy_is_mathematical_equality():
    reward = load_reward("accuracy", seconds=30.0)
    completions, references, wanted = zip(*ACCURACY, strict=True)
    try:
        found = reward.score(make_samples(list(completions), answer=list(references)))
    finally:
        reward.close()
    assert dict(zip(completions, found, strict=True)) == dict(zip(completions, wanted, strict=True))


@pytest.mark.slow
def test_accuracy_on_an_answer_that_hangs_fails_that_row_and_scores_the_others():
    reward = load_reward("accuracy", seconds=3.0)
    tower = "$9^{9^{9^{9}}}$"
    try:
        before, hang, after = reward.score(make_samples(["1", tower, "3"], answer=["1", tower.replace("9", "8"), "3"]))
        again = reward.score(make_samples(["4"], answer=["4"]))
    finally:
        reward.close()
    assert (before, after, again) == (1.0, 1.0, [1.0])
    assert (hang.status, hang.reason) == ("timeout", "took longer than 3 s")


# --- model -----------------------------------------------------------------------------------------------------------

TEXTS = ["the cat sat 3 times", "no", "the sky ran 1 times the dog sat 2 times the cat ran", "dog", "the"]


@pytest.fixture(scope="module")
def by_hand(reward_model_path):
    """score(text): one forward pass of one text, the head read at the last token."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(reward_model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_model_path)

    def score(text: str, last: int = 10**6) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"][-last:]])
        with torch.no_grad():
            hidden = model.model(input_ids=ids).last_hidden_state
            return model.score(hidden[0, -1]).item()

    return score


def model(path: str, **options):
    return load_reward("model", path=path, **({"dtype": "float32"} | options))


@pytest.mark.slow
@pytest.mark.parametrize("token_budget", [1, 20, None])
def test_model_gives_each_text_its_own_score_whatever_the_batch(token_budget, reward_model_path, by_hand):
    reward = model(reward_model_path, token_budget=token_budget)
    samples = make_samples(TEXTS, prompts=["the dog "] * len(TEXTS))
    wanted = [by_hand("the dog " + text) for text in TEXTS]
    assert reward.score(samples) == close(wanted, abs=1e-5)
    assert max(wanted) - min(wanted) > 1e-3  # texts differ, so that something was compared


@pytest.mark.slow
def test_model_reads_the_last_token_even_if_it_is_the_pad_token(reward_model_path, by_hand):
    texts = ["the cat<|pad|>", "the cat", "the cat sat<|pad|><|pad|>"]
    scores = model(reward_model_path).score(make_samples(texts, prompts=[""] * 3))
    assert scores == close([by_hand(text) for text in texts], abs=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-4


@pytest.mark.slow
def test_model_cuts_the_beginning_of_a_text_that_is_too_long(reward_model_path, by_hand):
    text = "the cat sat 3 times the dog ran"
    reward = model(reward_model_path, max_length=4)
    assert reward.score(make_samples([text], prompts=["the sky "])) == close([by_hand(text, last=4)], abs=1e-5)
    longest = "the " * 200  # the model has 128 positions
    (score,) = model(reward_model_path).score(make_samples([longest], prompts=[""]))
    assert score == close(by_hand(longest, last=128), abs=1e-5)


@pytest.mark.slow
def test_model_uses_its_own_chat_template_for_chat(reward_model_path, by_hand):
    samples = make_samples(["the cat"], prompts=["dog"], chat=True)
    wanted = by_hand("<|im_start|>user\ndog<|im_end|>\n<|im_start|>assistant\nthe cat<|im_end|>\n")
    assert model(reward_model_path).score(samples) == close([wanted], abs=1e-5)
    plain = Samples(samples.prompts, ["the cat"])  # offline: the completions as text
    assert model(reward_model_path).score(plain) == close([wanted], abs=1e-5)


@pytest.mark.slow
def test_model_cuts_a_chat_prompt_before_the_answer(reward_model_path, by_hand):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reward_model_path)
    answer = "the cat sat<|im_end|>\n"
    head, tail = "<|im_start|>user\ndog dog", " dog<|im_end|>\n<|im_start|>assistant\n"
    lengths = [len(tokenizer(part)["input_ids"]) for part in (head, tail, answer)]
    samples = make_samples(["the cat sat"], prompts=["dog dog dog"], chat=True)

    def score(**options):
        return model(reward_model_path, **options).score(samples)

    assert score(max_length=lengths[1] + lengths[2]) == close([by_hand(tail + answer)], abs=1e-5)
    kept_head = score(max_length=lengths[0] + lengths[2], truncate="prompt_tail")
    assert kept_head == close([by_hand(head + answer)], abs=1e-5)
    assert score(max_length=lengths[2], truncate="prompt_tail") == close([by_hand(answer)], abs=1e-5)
    (refused,) = score(max_length=lengths[2], truncate="refuse")
    assert refused.reason == f"the text has {sum(lengths)} tokens, limit {lengths[2]}"


@pytest.mark.slow
def test_model_without_a_chat_template_says_what_to_do(reward_model_path, tmp_path):
    shutil.copytree(reward_model_path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    reward = model(str(tmp_path))
    assert len(reward.score(make_samples(["a"], prompts=["b"]))) == 1
    with pytest.raises(RewardError, match=r"has no chat template, and the prompts are chat messages: save its tokeni"):
        reward.score(make_samples(["a"], prompts=["b"], chat=True))


@pytest.mark.slow
def test_model_logs_what_its_scoring_took(reward_model_path):
    from trl_rewards.loading import build

    logged: dict[str, float] = {}
    reward, _ = build("reward", "model", {"path": reward_model_path, "dtype": "float32", "max_length": 80})
    reward.__name__ = "skywork"
    reward.setup(Context(log_metric=logged.__setitem__))
    prompt = "the cat sat " * 15  # 60 tokens
    reward.score(make_samples(["dog", "sky ran", "the " * 40], prompts=[prompt] * 3))
    assert set(logged) == {"skywork/tokens_per_second", "skywork/prefix_saved", "skywork/truncated"}
    assert logged["skywork/truncated"] == pytest.approx(1 / 3)
    assert logged["skywork/prefix_saved"] == pytest.approx(60 / 200, abs=0.02)  # two rows share a prompt; one is cut
    assert logged["skywork/tokens_per_second"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_model_asks_a_causal_lm_for_yes_or_no(chat, policy_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "2 + 2 = 4\nTrue?\n"
    if chat:
        turns = [("user", "2 + 2 ="), ("assistant", " 4"), ("user", "True?")]
        text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns) + "<|im_start|>assistant\n"
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    policy = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    with torch.no_grad():
        logits = policy(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    yes, no = tokenizer("the")["input_ids"] + tokenizer(" cat")["input_ids"]
    words = {"question": "True?", "yes_token": "the", "no_token": " cat"}
    samples = make_samples([" 4"], prompts=["2 + 2 ="], chat=chat)
    reward = model(policy_path, head="yes", **words)
    scores = reward.score(samples)
    assert scores == close([(logits[yes] - logits[no]).item()], abs=1e-5)
    assert pickle.loads(pickle.dumps(reward)).score(samples) == scores


@pytest.mark.slow
def test_model_path_is_relative_to_the_recipe(reward_model_path, tmp_path):
    (tmp_path / "rm").symlink_to(reward_model_path)
    from trl_rewards.loading import build

    reward, _ = build("reward", "model", {"path": "./rm"})
    reward.setup(Context(base_dir=str(tmp_path)))
    assert len(reward.score(make_samples(["a"]))) == 1
    reward.close()
    assert reward._scorer is None


@pytest.mark.slow
def test_a_model_without_a_trained_head_is_refused(policy_path):
    with pytest.raises(RewardError, match=r"is not a reward model: its checkpoint has no weights for score.weight"):
        model(policy_path)


@pytest.mark.slow
def test_a_model_with_several_outputs_wants_to_know_which(reward_model_path, tmp_path):
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    config = Qwen2Config.from_pretrained(reward_model_path, num_labels=3)
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(reward_model_path).save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"has 3 outputs: 0 \(LABEL_0\), .*; say with `output` which is the score"):
        model(str(tmp_path))
    parts = [model(str(tmp_path), output=index).score(make_samples(["a"]))[0] for index in range(3)]
    (mixed,) = model(str(tmp_path), output={0: 1, "LABEL_2": -0.5}).score(make_samples(["a"]))
    assert mixed == pytest.approx(parts[0] - 0.5 * parts[2], abs=1e-5)


def test_a_wrong_path_of_a_model_is_refused(tmp_path):
    with pytest.raises(RewardError, match=f"no reward model at '{tmp_path}'"):
        model(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"token_budget": 0}, "token_budget must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"truncate": "tail"}, "with.truncate: must be 'prompt_head' or 'prompt_tail' or 'refuse', got 'tail'"),
        ({"output": 1.5}, "with.output: must be .* got 1.5"),
        ({"head": "yes", "output": 0}, "output chooses among a classifier's outputs; head 'yes' has one"),
        ({"offload": True, "load_in_8bit": True}, "offload moves weights, and bitsandbytes int8 weights cannot be"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "set load_in_4bit or load_in_8bit, not both"),
        ({"dtype": "int8"}, "with.dtype: must be 'float32' or 'bfloat16' or 'float16', got 'int8'"),
    ],
)
def test_model_refuses_options_that_make_no_sense(options, complaint):
    with pytest.raises(RecipeError, match=complaint):
        model("nowhere", **options)


@pytest.mark.slow
def test_model_in_4_bit_scores_by_its_rounded_weights(reward_model_path, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(2)
    wide = {"hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.2}  # a block of nf4 is 64 weights
    classifier = Qwen2ForSequenceClassification(Qwen2Config.from_pretrained(reward_model_path, **wide))
    full, rounded = str(tmp_path / "full"), str(tmp_path / "rounded")
    classifier.save_pretrained(full)
    round_to_4_bits(classifier)
    classifier.save_pretrained(rounded)
    for folder in (full, rounded):
        AutoTokenizer.from_pretrained(reward_model_path).save_pretrained(folder)
    samples = make_samples(TEXTS, prompts=["the dog "] * len(TEXTS))
    reward = model(full, load_in_4bit=True)
    scores = reward.score(samples)
    assert type(reward._scorer.head.backbone.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert scores == pytest.approx(model(rounded).score(samples), abs=1e-4)
    assert scores != pytest.approx(model(full).score(samples), abs=1e-2)


@pytest.mark.slow
def test_an_encoder_gets_the_special_tokens_that_it_was_trained_with(tmp_path):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "why", "because", "so"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    fast.save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    bert = BertForSequenceClassification(BertConfig(vocab_size=7, num_labels=1, **sizes)).eval()
    bert.save_pretrained(tmp_path)
    texts = ["why because so", "why so"]
    with torch.no_grad():
        expected = [
            bert(**fast([text], return_tensors="pt", return_token_type_ids=False)).logits.item() for text in texts
        ]
    reward = model(str(tmp_path))
    scores = reward.score(make_samples(["because so", "so"], prompts=["why ", "why "]))
    assert scores == pytest.approx(expected, abs=1e-5)
