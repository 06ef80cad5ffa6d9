"""Cooper's reward reads what VerifyRM reads, learns from verified pairs, and nothing else stops or starts it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl_rewards_cotraining.cooper import verify_text
from trl_rewards_cotraining.losses import policy_reward, preference_loss

from trl_rewards import Context, Pipeline, Reward, RewardError, TrainableReward, World, load_reward
from trl_rewards.models.scripted_judge import ScriptedJudge
from trl_rewards.scoring import Source
from trl_rewards.testing import check_reward, make_samples

CASES = json.loads((Path(__file__).parent / "cotraining_cases.json").read_text())
ASSISTANT = {"model": "writer", "endpoint": "http://localhost:9/v1"}
WORDS = ["the cat ran 3 times", "the dog sat", "the cat ran 3", "a dog sat"]


class Has3(Reward):
    """The rule: 1 where a completion has the digit of the answer, no opinion on an empty one."""

    columns = ("answer",)

    def score(self, samples):
        pairs = zip(samples.texts, samples["answer"], strict=True)
        return [None if not text else float(str(answer) in text) for text, answer in pairs]


def samples_of(groups=2, answers=None):
    rows = len(WORDS) * groups
    return make_samples(WORDS * groups, answer=answers or ["3"] * rows)


def cooper_of(path, **options):
    options = {"negatives": "group", "micro_batch": 3} | options
    return load_reward("cooper", path=path, **options)


def pipeline_of(path, setup=True, **options):
    pipeline = Pipeline([Source("cooper", cooper_of(path, **options)), Source("rule", Has3())], seed=1)
    if setup:
        pipeline.setup(Context(seed=3))
    return pipeline


def test_it_keeps_the_contract_of_a_reward(reward_model_path):
    check_reward(load_reward("cooper", path=reward_model_path, negatives="group"), samples_of(1))


def test_the_policys_reward_is_the_recorded_one():
    case = CASES["20_cooper.policy_reward"]
    logits, outputs = case["inputs"]["logits"], case["outputs"]
    assert [policy_reward(logit, None) for logit in logits] == pytest.approx(outputs["sigmoid"], abs=1e-9)
    assert [policy_reward(logit, 0.5) for logit in logits] == outputs["binary_threshold_.5(>)"]
    assert policy_reward(-1000.0, None) == 0.0


def test_the_loss_of_a_pair_by_hand():
    found = preference_loss(torch.tensor([1.0, 0.0, -300.0]), torch.tensor([0.0, 0.0, 0.0]))
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2), 300.0])


def test_the_text_is_verifyrms_and_a_long_completion_keeps_its_end():
    text = verify_text("1 + 1?", "2", "It is 2.")
    assert text == (
        "<question>1 + 1?</question>\n<reference_answer>2</reference_answer>\n<completion>It is 2.</completion>"
    )
    assert verify_text("1 + 1?", "2", "It is 2.", len(text)) == text
    assert verify_text("1 + 1?", "2", "It is 2.", len(text) - 3).endswith("\n<completion>is 2.</completion>")
    assert verify_text("1 + 1?", "2", "It is 2.", 1).endswith("<completion></completion>")


def test_rewards_are_the_models_and_rows_without_a_reference_have_none(reward_model_path):
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "how often?"}]
    samples = make_samples(["the cat ran 3 times", "no"], prompts=[prompt, prompt], answer=["so\n#### 3", None])
    found = cooper_of(reward_model_path).score(samples)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_path, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(reward_model_path)
    text = verify_text("how often?", "3", "the cat ran 3 times")
    logit = model(**tokenizer(text, return_tensors="pt")).logits.item()
    assert found == [pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-5), None]


@pytest.mark.parametrize("train", ["all", "lora", "head"])
def test_it_learns_to_prefer_what_the_rule_finds_right(reward_model_path, train):
    pipeline = pipeline_of(reward_model_path, train=train, learning_rate={"head": 0.5}.get(train, 0.01))
    frozen = {name: weight.clone() for name, weight in _model(pipeline).named_parameters() if not weight.requires_grad}
    metrics = []
    for _ in range(12):
        batch = pipeline.score(samples_of(), group_size=4)
        metrics.append(pipeline.update(batch))
    rewards = pipeline.score(samples_of(), group_size=4).scores.values[:, 0].view(2, 4)
    assert rewards[:, [0, 2]].min() > rewards[:, [1, 3]].max()
    assert metrics[-1]["rewards/cooper/loss"] < 0.5 * metrics[0]["rewards/cooper/loss"]
    assert metrics[-1]["rewards/cooper/margin"] > 0
    assert metrics[-1]["rewards/cooper/pairs"] == 1.0
    assert bool(frozen) == (train != "all")
    assert all(torch.equal(weight, dict(_model(pipeline).named_parameters())[name]) for name, weight in frozen.items())


def _model(pipeline):
    return pipeline.sources[0].reward._scorer.head.model


def test_groups_without_a_right_or_a_wrong_rollout_and_holes_teach_nothing(reward_model_path):
    pipeline = pipeline_of(reward_model_path)
    before = pipeline.state_dict()
    completions = ["3", "the 3", "3 times", "33", "cat", "dog", "sky", "", "3", "", "", ""]
    batch = pipeline.score(make_samples(completions, answer=["3"] * 12), group_size=4)
    assert pipeline.update(batch)["rewards/cooper/pairs"] == 0.0
    for name, weight in before["rewards.cooper"]["weights"].items():
        assert torch.equal(weight, pipeline.state_dict()["rewards.cooper"]["weights"][name])
    mixed = make_samples(["3", "cat", "3", "cat"] * 2, answer=["3"] * 4 + [None] * 4)
    metrics = pipeline.update(pipeline.score(mixed, group_size=4))
    assert metrics["rewards/cooper/pairs"] == 0.5  # the second group has no reference answer


def test_the_release_takes_the_first_right_rollout_and_the_paper_a_random_one(reward_model_path):
    samples = make_samples([f"{n} of 3" for n in range(15)] + ["none"], answer=["3"] * 16)
    batch = pipeline_of(reward_model_path).score(samples, group_size=16)
    outcomes = batch.scores.values[:, 1].tolist()
    chosen = {}
    for compat in ("paper", "release"):
        reward = cooper_of(reward_model_path, compat=compat)
        chosen[compat] = [reward._pairs(batch, outcomes, World())[0][0].row for _ in range(20)]
    assert set(chosen["release"]) == {0}
    assert len(set(chosen["paper"])) > 3


def test_without_updates_the_model_stays_as_it_is(reward_model_path):
    pipeline = pipeline_of(reward_model_path, update_mode="none", negatives="assistant")
    assert pipeline.update(pipeline.score(samples_of(), group_size=4)) == {}


def test_its_state_comes_back(reward_model_path):
    one, other = (pipeline_of(reward_model_path, learning_rate=0.01) for _ in range(2))
    one.update(one.score(samples_of(), group_size=4))
    other.load_state_dict(one.state_dict())
    for pipeline in (one, other):
        pipeline.update(pipeline.score(samples_of(), group_size=4))
    found = [pipeline.score(samples_of(), group_size=4).scores.values[:, 0].tolist() for pipeline in (one, other)]
    assert found[0] == found[1]


def test_a_model_without_a_head_starts_at_one_half_and_only_if_that_is_asked_for(policy_path):
    assert cooper_of(policy_path, fresh_head=True).score(samples_of(1)) == [0.5] * 4
    with pytest.raises(RewardError, match="no weights for score"):
        cooper_of(policy_path)


def test_an_adapter_that_trainer_reward_left_is_trained_further(reward_model_path, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForSequenceClassification.from_pretrained(reward_model_path, num_labels=1)
    model = get_peft_model(base, LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="train: lora"):
        cooper_of(str(tmp_path))
    pipeline = pipeline_of(str(tmp_path), train="lora", learning_rate=0.01)
    before = pipeline.score(samples_of(), group_size=4)
    for _ in range(6):
        metrics = pipeline.update(pipeline.score(samples_of(), group_size=4))
    assert metrics["rewards/cooper/loss"] < 0.6
    changed = pipeline.state_dict()["rewards.cooper"]["weights"]
    assert sum("lora_" in name for name in changed) == 14
    assert [name for name in changed if "lora_" not in name] == ["score.modules_to_save.default.weight"]
    assert not torch.equal(before.scores.values, pipeline.score(samples_of(), group_size=4).scores.values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": "assistant"}, "assistant is required"),
        ({"assistant": ASSISTANT}, "negatives: group asks no assistant"),
        ({"negatives": "assistant", "assistant": {"modle": "x"}}, "assistant: unknown option 'modle', did you mean"),
        ({"negatives": "assistant", "assistant": ASSISTANT | {"tries": 0}}, "assistant: tries must be at least 1"),
        ({"train": "all", "dtype": "bfloat16"}, "needs dtype float32"),
        ({"load_in_4bit": True}, "use train: lora"),
        ({"offload": True}, "offload moves"),
        ({"threshold": 1.5}, "threshold must be"),
        ({"mini_batch": 0}, "mini_batch must be"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_reward("cooper", **({"path": "x", "negatives": "group"} | options))


def test_a_device_apart_from_the_policys_is_refused_with_several_processes(reward_model_path, monkeypatch):
    cooper_of(reward_model_path, device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    cooper_of(reward_model_path)
    with pytest.raises(ValueError, match="device: with several processes"):
        cooper_of(reward_model_path, device="cpu")


def test_processes_of_its_own_are_refused():
    with pytest.raises(ValueError, match="which do not learn"):
        TrainableReward().check_running({"isolate": True})


# --- the assistant


class Writer(ScriptedJudge):
    """A server that gives these replies in turn: a text, a text with its finish reason, or None for an error."""

    def __init__(self, *replies):
        self.replies = list(replies)
        super().__init__()

    def reply(self, request, fate):
        said = self.replies.pop(0)
        if said is None:
            self.requests.append(request)
            raise ValueError("no")
        text, finish = said if isinstance(said, tuple) else (said, "stop")
        return {"choices": [{"message": {"content": text}, "finish_reason": finish}]}


def assisted(path, server, **options):
    assistant = {"model": "scripted", "endpoint": server.url, "in_flight": 1}
    return pipeline_of(path, negatives="assistant", assistant=assistant | options, compat="release")


def test_a_rewrite_is_taken_once_the_rule_finds_it_wrong(reward_model_path):
    """First it is right again, then cut off, then wrong."""
    with Writer("it is 3", ("the dog", "length"), "<think>hm</think>the dog sat 7 times") as server:
        pipeline = assisted(reward_model_path, server, seed=5)
        batch = pipeline.score(samples_of(1), group_size=4)
        reward = pipeline.sources[0].reward
        pairs, counts = reward._pairs(batch, batch.scores.values[:, 1].tolist(), World())
        assert pairs == [(0, "the dog sat 7 times")]
        assert counts == {"rewrites_no_reply": 0.0, "rewrites_cut": 1.0, "rewrites_not_wrong": 1.0}
        assert [(request["temperature"], request["seed"]) for request in server.requests] == [
            (0.7, 5), (0.7, 6), (0.7, 7),
        ]  # fmt: skip
        said = server.requests[0]["messages"][-1]["content"]
        assert said == f"Problem:\n{batch.samples.prompts[0]}\n\nRight solution:\n{WORDS[0]}"
        server.replies = ["the dog sat 7 times"]
        learnt = pipeline.update(batch)
        pipeline.close()
    shown = [verify_text(batch.samples.prompts[0], "3", text) for text in (WORDS[0], "the dog sat 7 times")]
    right, wrong = cooper_of(reward_model_path)._scores(shown, True)
    assert learnt["rewards/cooper/loss"] == pytest.approx(math.log(1 + math.exp(wrong - right)), abs=1e-5)
    assert learnt["rewards/cooper/margin"] == pytest.approx(right - wrong, abs=1e-5)


class Logging(Has3):
    """The rule, which says how many it was asked about."""

    def setup(self, context):
        self.context = context

    def score(self, samples):
        if self.context.log_metric:
            self.context.log_metric("rule/asked", len(samples))
        return super().score(samples)


def test_what_the_rule_logs_is_of_the_policys_answers_alone(reward_model_path):
    logged = []
    with Writer("the dog sat 7 times") as server:
        assistant = {"model": "scripted", "endpoint": server.url}
        cooper = cooper_of(reward_model_path, negatives="assistant", assistant=assistant)
        pipeline = Pipeline([Source("cooper", cooper), Source("rule", Logging())], seed=1)
        context = Context(log_metric=lambda name, value: logged.append(value))
        pipeline.setup(context)
        metrics = pipeline.update(pipeline.score(samples_of(1), group_size=4))
        pipeline.close()
    assert metrics["rewards/cooper/pairs"] == 1.0
    assert logged == [4]
    context.log_metric("rule/asked", 0)
    assert logged == [4, 0]


def test_an_assistant_that_fails_costs_its_pairs_alone(reward_model_path):
    with Writer(None, "a dog 8") as server:
        pipeline = assisted(reward_model_path, server)
        metrics = pipeline.update(pipeline.score(samples_of(2), group_size=4))
        assert metrics["rewards/cooper/pairs"] == 0.5
        assert metrics["rewards/cooper/rewrites_no_reply"] == 1.0
        assert "rewards/cooper/loss" in metrics
        server.replies = [None, None]
        metrics = pipeline.update(pipeline.score(samples_of(2), group_size=4))
        assert metrics["rewards/cooper/pairs"] == 0.0
        assert "rewards/cooper/loss" not in metrics
        pipeline.close()


def test_a_budget_leaves_the_rest_without_pairs_or_stops_the_run(reward_model_path):
    for on_budget in ("abstain", "stop"):
        with Writer(*["a dog 8"] * 4) as server:
            pipeline = assisted(reward_model_path, server, max_total_tokens=1, on_budget=on_budget)
            assert pipeline.update(pipeline.score(samples_of(1), group_size=4))["rewards/cooper/pairs"] == 1.0
            batch = pipeline.score(samples_of(1), group_size=4)
            if on_budget == "abstain":
                assert pipeline.update(batch)["rewards/cooper/pairs"] == 0.0
            else:
                with pytest.raises(RewardError, match="budget is spent"):
                    pipeline.update(batch)
            pipeline.close()
