"""Adv-GRPO's reward: its losses, its gate, when it learns and when the policy waits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig
from trl_rewards_cotraining.adversarial import gate_opens
from trl_rewards_cotraining.losses import hinge_loss, logistic_loss

from trl_rewards import GRPOTrainer, Pipeline, Reward, RewardBatch, load_advantage, load_reward
from trl_rewards.components import Scores
from trl_rewards.scoring import Source
from trl_rewards.testing import check_reward, make_samples

CASES = json.loads((Path(__file__).parent / "cotraining_cases.json").read_text())["19_AdvGRPO"]
WORDS = ["the cat sat 1 times", "the cat sat 2 times", "the cat sat 3 times", "the cat sat"]
REFERENCES = [["the dog ran", "a dog ran"]] * 4 + ["the sky ran"] * 4


def samples_of(references=REFERENCES, chat=False):
    return make_samples(WORDS * 2, prompts=["who?"] * 4 + ["what?"] * 4, chat=chat, references=references)


def adversarial_of(path, **options):
    options = {"learning_rate": 0.005, "micro_batch": 3} | options
    return load_reward("adversarial", path=path, **options)


def pipeline_of(path, **options):
    return Pipeline([Source("adversarial", adversarial_of(path, **options))], seed=1)


def step(pipeline, samples=None):
    """A batch, whether it is held back, and what update says."""
    batch = pipeline.score(samples or samples_of(), group_size=4)
    held = pipeline.holds_back(batch)
    metrics = {name.removeprefix("rewards/adversarial/"): value for name, value in pipeline.update(batch).items()}
    return batch, held, metrics


def weights(pipeline):
    return pipeline.state_dict()["rewards.adversarial"]["weights"]


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_it_keeps_the_contract_of_a_reward(reward_model_path):
    check_reward(load_reward("adversarial", path=reward_model_path), samples_of())


def test_recorded_cases():
    advantage, hinge, gate = CASES
    rewards = torch.tensor(advantage["inputs"]["rewards"])
    scores = Scores(("a",), rewards[:, None], torch.zeros(4, 1, dtype=torch.uint8), torch.ones(1), 2)
    batch = RewardBatch(rewards, scores, make_samples(["x"] * 4))
    found = load_advantage("group_norm", ddof=0)(batch)
    assert found.tolist() == pytest.approx(advantage["outputs"]["adv"], abs=1e-6)
    logits = {name: torch.tensor(values) for name, values in hinge["inputs"].items()}
    loss = hinge_loss(logits["real_logits"], logits["fake_logits"]).mean()
    assert loss.item() == pytest.approx(hinge["outputs"]["loss"], abs=1e-6)
    means = zip(gate["inputs"]["ref_mean"], gate["inputs"]["gen_mean"], strict=True)
    opened = [gate_opens(torch.tensor([real]), torch.tensor([fake])) for real, fake in means]
    assert opened == gate["outputs"]["update_rm"]


def test_losses_by_hand_and_a_saturated_hinge_has_no_gradient():
    real, fake = torch.tensor([0.0, 2.0], requires_grad=True), torch.tensor([0.0, -2.0], requires_grad=True)
    assert hinge_loss(real, fake).tolist() == [1.0, 0.0]
    hinge_loss(real, fake).sum().backward()
    assert real.grad.tolist() == [-0.5, 0.0]
    assert logistic_loss(real, fake).tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-2))])


@pytest.mark.parametrize("loss", ["softmax", "hinge", "logistic"])
def test_it_learns_to_put_references_above_the_policys(reward_model_path, loss):
    pipeline = pipeline_of(reward_model_path, loss=loss, update_mode="always", alternate=False)
    metrics = [step(pipeline)[2] for _ in range(10)]
    assert metrics[-1]["accuracy"] == 1.0
    assert metrics[-1]["gap"] > metrics[0]["gap"] + 0.5
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_the_gap_and_the_first_loss_are_those_of_the_models_scores(reward_model_path):
    """Rows of a group take several references in turns; holes and rows without one count nowhere."""
    references = [["the dog ran", "a dog ran"]] * 4 + [None, [], "", "the sky ran"]
    pipeline = pipeline_of(reward_model_path, update_mode="always", alternate=False)
    reward = pipeline.sources[0].reward
    told = make_samples(["the dog ran", "a dog ran", "the sky ran"], prompts=["who?", "who?", "what?"])
    dog, other, sky = reward.score(told.take(range(3)))
    mine = reward.score(samples_of())
    gaps = [real - fake for real, fake in zip([dog, other, dog, other, sky], [*mine[:4], mine[7]], strict=True)]
    _, _, metrics = step(pipeline, samples_of(references))
    assert metrics["gap"] == pytest.approx(sum(gaps) / 5, abs=1e-5)
    assert metrics["references"] == pytest.approx((2 * dog + 2 * other + sky) / 5, abs=1e-5)
    assert metrics["accuracy"] == pytest.approx(sum(gap > 0 for gap in gaps) / 5)
    assert metrics["loss"] == pytest.approx(sum(math.log(1 + math.exp(-gap)) for gap in gaps) / 5, abs=1e-5)


def test_the_gate_opens_where_the_policy_is_scored_above_the_references_and_then_the_policy_waits(reward_model_path):
    pipeline = pipeline_of(reward_model_path)
    reward = pipeline.sources[0].reward
    turns = []
    for _ in range(8):
        before = weights(pipeline)
        _, held, metrics = step(pipeline)
        assert held == (metrics["gap"] < 0) == (metrics["learns"] == 1.0) == ("loss" in metrics)
        assert same(before, weights(pipeline)) != held
        turns.append(held)
        if not held:  # hacked: what the policy says is now said to be the best
            with torch.no_grad():
                reward._learner.parameters["score.weight"].neg_()
    assert len(set(turns)) == 2


def test_the_gate_opens_for_a_fresh_head_whose_scores_are_all_equal(policy_path):
    pipeline = pipeline_of(policy_path, fresh_head=True)
    _, held, metrics = step(pipeline)
    assert (held, metrics["gap"], metrics["learns"]) == (True, 0.0, 1.0)
    assert len(set(pipeline.score(samples_of(), group_size=4).rewards.tolist())) > 1


def test_references_may_be_chat_messages(reward_model_path):
    """One of messages, and several."""
    said = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the dog ran"}]
    other = [{"role": "assistant", "content": "a dog ran"}]
    texts = [["the dog ran"]] * 4 + [["the dog ran", "a dog ran"]] * 4
    _, *found = step(pipeline_of(reward_model_path), samples_of([said] * 4 + [[said, other]] * 4, chat=True))
    _, *wanted = step(pipeline_of(reward_model_path), samples_of(texts, chat=True))
    assert found == wanted
    assert "gap" in found[1]


def test_the_schedule_gives_the_policy_every_d_times_th_batch_also_after_a_restart(reward_model_path):
    first = pipeline_of(reward_model_path, update_mode="schedule", d_times=3)
    turns = [step(first)[1] for _ in range(4)]
    second = pipeline_of(reward_model_path, update_mode="schedule", d_times=3)
    second.load_state_dict(first.state_dict())
    assert turns + [step(second)[1] for _ in range(2)] == [True, True, False, True, True, False]
    [step(first) for _ in range(2)]
    assert same(weights(first), weights(second))


def test_without_references_nothing_is_learnt_and_nothing_held_back(reward_model_path):
    pipeline = pipeline_of(reward_model_path, update_mode="schedule")
    before = weights(pipeline)
    batch, held, metrics = step(pipeline, samples_of([None, "", [], [None], float("nan"), " ", [""], None]))
    assert (held, metrics) == (False, {"learns": 0.0})
    assert same(before, weights(pipeline))
    assert not batch.rewards.isnan().any()


def test_rewards_are_clamped_and_what_model_gives(reward_model_path):
    samples = samples_of(chat=True)
    wanted = load_reward("model", path=reward_model_path, dtype="float32").score(samples)
    limit = sorted(map(abs, wanted))[4]
    found = adversarial_of(reward_model_path, clamp=limit).score(samples)
    assert found == pytest.approx([max(-limit, min(limit, score)) for score in wanted], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_times": 1}, "d_times must be"),
        ({"clamp": 0.0}, "clamp must be"),
        ({"update_mode": "always"}, "leaves the policy no batch"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_reward("adversarial", path="x", **options)


class Even(Reward):
    """The rule: 1 where the number of tokens and the last one's id are both even, or both odd."""

    def score(self, samples):
        return [float((len(ids) + ids[-1]) % 2 == 0) for ids in samples.completion_ids]


def both(path, **options):
    """Both rewards that learn, and the rule."""
    learning = {"path": path, "learning_rate": 0.003, "micro_batch": 2}
    return Pipeline(
        [
            Source("cooper", load_reward("cooper", **learning, train="lora", negatives="group", outcome="even")),
            Source("adversarial", load_reward("adversarial", **learning, **options)),
            Source("even", Even()),
        ],
        seed=5,
    )


def sums(pipeline):
    state = pipeline.state_dict()
    return {
        f"{path} {name}": weight.double().abs().sum().item()
        for path in ("rewards.cooper", "rewards.adversarial")
        for name, weight in state[path]["weights"].items()
    }


def trained(policy, model, folder, checkpoint=None):
    """Weights of policy and reward models after four steps, the advantages of each batch, and the logs."""
    torch.manual_seed(5)
    args = GRPOConfig(
        folder, per_device_train_batch_size=8, num_generations=4, max_completion_length=6, max_steps=4,
        learning_rate=1e-2, beta=0.0, logging_steps=1, bf16=False, use_cpu=True, report_to="none", save_steps=2,
        gradient_checkpointing=False, seed=5, lr_scheduler_type="constant", remove_unused_columns=False,
    )  # fmt: skip
    rows = {"prompt": [f"the cat ran {number} times" for number in range(16)], "answer": ["3"] * 16}
    rows["references"] = ["the dog ran"] * 15 + [None]
    pipeline = both(model, update_mode="schedule", d_times=2)
    trainer = GRPOTrainer(policy, None, args, pipeline=pipeline, train_dataset=Dataset.from_dict(rows))
    advantages = []

    class Looks(TrainerCallback):
        def on_step_end(self, *_, **__):
            advantages.append(trainer.last_advantages.abs().sum().item())

    trainer.add_callback(Looks())
    trainer.train(resume_from_checkpoint=checkpoint)
    policy_sums = {name: weight.double().abs().sum().item() for name, weight in trainer.model.state_dict().items()}
    return sums(pipeline) | policy_sums, advantages, trainer.state.log_history


@pytest.mark.slow
def test_in_a_trainer_the_policy_waits_and_runs_resume_to_the_last_bit(policy_path, reward_model_path, tmp_path):
    straight, advantages, logs = trained(policy_path, reward_model_path, str(tmp_path))
    assert [total == 0 for total in advantages] == [True, False, True, False]
    assert [log["rewards/adversarial/learns"] for log in logs if "loss" in log] == [1.0, 0.0, 1.0, 0.0]
    assert [log["grad_norm"] == 0 for log in logs if "loss" in log] == [True, False, True, False]
    resumed = trained(policy_path, reward_model_path, str(tmp_path), str(tmp_path / "checkpoint-2"))
    assert resumed[0] == straight


RANKS = """
import json, sys
import torch
from trl_rewards import Pipeline, Reward, World, load_reward
from trl_rewards.scoring import Source
from trl_rewards.testing import make_samples


class Even(Reward):
    def score(self, samples):
        return [float((len(ids) + ids[-1]) % 2 == 0) for ids in samples.completion_ids]


def learnt(path, size):
    world, found = World.current(), []
    learning = {"path": path, "learning_rate": 0.003, "micro_batch": 2}
    rewards = [load_reward("cooper", **learning, train="lora", negatives="group", outcome="even"),
               load_reward("adversarial", **learning, mini_batch=3)]
    pipeline = Pipeline([*(Source(reward.display_name, reward) for reward in rewards), Source("even", Even())], seed=5)
    for step in range(3):
        rows = range(12)
        everyone = make_samples(
            [f"{'the ' * (row * 7 % 4)}cats sat {step}" for row in rows], answer=["2"] * 12,
            prompts=[f"what {row // 4}" for row in rows], step=step,
            references=[None if row < 4 else f"{row // 4} dogs" for row in rows])
        mine = everyone.take(range(world.rank * 12 // size, (world.rank + 1) * 12 // size))
        batch = pipeline.score(mine, 4, world)
        found.append({"held": float(pipeline.holds_back(batch))} | pipeline.update(batch))
    weights = {f"{reward.display_name} {name}": weight.double().abs().sum().item()
               for reward in rewards for name, weight in reward.state_dict()["weights"].items()}
    return [weights, found]


one = learnt(sys.argv[1], 1)
torch.distributed.init_process_group("gloo")
from accelerate import PartialState
PartialState(cpu=True)
assert World.current().size == 2
two = learnt(sys.argv[1], 2)
every = World.current().gather_objects(two)
assert all(other == every[0] for other in every), "processes disagree"
if World.current().rank == 0:
    print("RESULT" + json.dumps([one, two]))
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(reward_model_path, run_ranks):
    done = run_ranks(RANKS, 2, reward_model_path)
    line = next(line for line in done.stdout.splitlines() if "RESULT" in line)
    one, two = json.loads(line.partition("RESULT")[2])
    for name, total in one[0].items():
        assert two[0][name] == pytest.approx(total, rel=1e-4, abs=1e-6), name
    for mine, theirs in zip(one[1], two[1], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert {name for step in one[1] for name in step} >= {"rewards/cooper/loss", "rewards/adversarial/loss"}
