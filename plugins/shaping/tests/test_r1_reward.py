import json
from pathlib import Path

import pytest
from trl_rewards_shaping.r1_reward import well_formed

from trl_rewards import Failed, RecipeError, RewardError, Samples, load_combiner, load_reward
from trl_rewards.models.scripted_judge import ScriptedJudge
from trl_rewards.testing import make_samples, make_scores, run_reward

CASES = json.loads(Path(__file__).with_name("shaping_cases.json").read_text(encoding="utf-8"))["07_R1Reward"]


class Says(ScriptedJudge):
    """Keeps what it is asked, and answers with what `say` makes of the question."""

    def __init__(self, say):
        self.say, self.asked = say, []
        super().__init__()

    def reply(self, request, fate):
        question = request["messages"][-1]["content"]
        self.asked.append(question)
        message = {"role": "assistant", "content": self.say(question)}
        return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {}}


@pytest.mark.parametrize("case", [c for c in CASES if c["case"].startswith("format")], ids=lambda case: case["case"])
def test_the_form_equals_the_authors_code(case):
    assert well_formed(case["inputs"]["text"]) == case["outputs"]["ok"]


def test_each_tag_may_be_there_once():
    assert not well_formed("<think>a</think><answer>1</answer><answer>2</answer>")
    assert not well_formed("<think>a<think></think><answer>1</answer>")
    assert well_formed("<think>a\nb</think><answer>1</answer>")


def test_repetition_equals_the_authors_helper():
    (case,) = [case for case in CASES if "n-gram" in case["case"]]
    reward = load_reward("repetition", ngram_size=case["inputs"]["n"])
    samples = make_samples([case["inputs"]["text"], "A b a B", "a b", ""])
    assert reward.score(samples) == pytest.approx([case["outputs"]["penalty"], 0.0, 0.0, 0.0])
    assert load_reward("repetition", ngram_size=2, max_penalty=-3.0).score(samples)[1] == pytest.approx(-1.0)
    with pytest.raises(RecipeError, match="max_penalty at most 0, got 3 and 1"):
        load_reward("repetition", max_penalty=1.0)


def test_repetition_of_token_ids_is_trls_own():
    trls = load_reward("function", path="trl.rewards:get_repetition_penalty_reward", factory={"ngram_size": 2})
    samples = Samples(["q"] * 2, ["a b a b a", "x y"], [[1, 2, 1, 2, 1], [3, 4]])
    assert trls.score(samples) == load_reward("repetition", ngram_size=2).score(samples) == [-0.5, 0.0]


def test_the_reward_equals_the_authors_code():
    (case,) = [case for case in CASES if case["case"].startswith("reward")]
    rows = [[float(value) for value in row] for row in case["inputs"]["format_acc_cons"]]
    scores = make_scores(rows, group_size=1)
    reward = load_combiner("r1_reward", format="a", accuracy="b", consistency="c")
    assert reward(scores, make_samples(["t"] * len(rows))).tolist() == case["outputs"]["reward"]
    failed = make_scores([[1.0, 0.0, None], [1.0, 1.0, None], [1.0, None, 1.0], [None, 1.0, 1.0]], group_size=1)
    totals = reward(failed, make_samples(["t"] * 4))
    assert totals[0] == 0.5  # a wrong answer has no need of consistency
    assert totals[1:].isnan().all()


def test_a_source_that_is_not_there_and_weights_are_refused():
    with pytest.raises(RewardError, match="r1_reward: no source 'x'; there is a"):
        load_combiner("r1_reward", accuracy="x")(make_scores([[1.0]], group_size=1), make_samples(["t"]))
    with pytest.raises(ValueError, match="weights of its own"):
        load_combiner("r1_reward", accuracy="a").check_weights([1.0, 0.5])
    with pytest.raises(ValueError, match="no source 'x'; there is a, b"):
        load_combiner("r1_reward", accuracy="a", format="x").check_sources(["a", "b"])


@pytest.mark.parametrize(("compat", "inconsistent"), [("paper", 0.0), ("release", -1.0)])
def test_the_judge_sees_the_end_of_the_reasoning_and_the_answer(compat, inconsistent):
    def say(question):
        if "muddle" in question:
            return "I cannot tell."
        return '{"reason": "r", "consistent": ' + ("true" if '"4"' in question else "false") + "}"

    texts = [
        "<think>secret\none\n\ntwo\nso 4</think><answer>4</answer>",
        "<think>so 4</think>\n<answer>5</answer>",
        "<think>muddle</think><answer>4</answer>",
        "no tags",
        "<think>so 4 <answer>4</answer>",
        "<think></think><answer>4</answer>",
    ]
    with Says(say) as judge:
        reward = load_reward("r1_consistency", model="m", endpoint=judge.url, lines=3, parse_retries=0, compat=compat)
        scores = run_reward(reward, make_samples(texts, prompts=["What is 2 + 2?"] * 6))
        reward.close()
        asked = list(judge.asked)
    assert scores[:2] == [1.0, inconsistent]
    assert isinstance(scores[2], Failed)
    assert scores[3:] == [None] * 3
    assert len(asked) == 3
    first = next(question for question in asked if "two" in question)
    assert '"one\\ntwo\\nso 4"' in first
    assert "secret" not in first
    assert "2 + 2" not in first
