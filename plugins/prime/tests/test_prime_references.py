"""What `prime` compares its model with, when it learns, and which log-probabilities are made once."""

from __future__ import annotations

import math

import pytest
import torch
import trl
from datasets import Dataset

from trl_rewards import Context, GRPOTrainer, Pipeline, Reward, RewardError, Samples, load_advantage, load_reward
from trl_rewards.filtering import GroupFilter
from trl_rewards.scoring import Gate, Source
from trl_rewards.trainers.rollout import RolloutLogps


class Even(Reward):
    def score(self, samples):
        return [float(ids[0] % 2 == 0) for ids in samples.completion_ids]


def prime_of(path, **options):
    reward = load_reward("prime", path=path, dtype="float32", lora_r=4, lora_alpha=8, learning_rate=0.05, **options)
    reward.setup(Context(seed=3))
    return reward


def samples():
    ids = [[5, 6, 7], [8, 9], [11, 12, 13], [14], [15, 16], [16, 4], [18, 9], [20]]
    return Samples(prompts=["the cat"] * 8, completions=["x"] * 8, completion_ids=ids)


def pipeline_of(prime, **options):
    return Pipeline([Source("prime", prime), Source("even", Even())], **options)


def test_before_is_to_learn_and_to_score_again(policy_path):
    after = pipeline_of(prime_of(policy_path))
    after.update(after.score(samples(), 4, training=True))
    wanted = after.score(samples(), 4).scores.values[:, 0]
    assert wanted.abs().max() > 0.01

    before = pipeline_of(prime_of(policy_path, update_mode="before"))
    found = before.score(samples(), 4, training=True)
    torch.testing.assert_close(found.scores.values[:, 0], wanted)
    torch.testing.assert_close(found.process_rewards.sum(dim=1), wanted)
    assert before.metrics["rewards/prime/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before.update(found) == {}  # it has learned from this batch
    assert before.sources[0].reward.learns_first()


def test_an_evaluation_does_not_learn_first(policy_path):
    made = pipeline_of(prime_of(policy_path, update_mode="before"))
    assert made.score(samples(), 4).scores.values[:, 0].abs().max() == 0


@pytest.mark.parametrize("update_mode", ["after", "before"])
def test_it_learns_nothing_from_groups_that_the_filter_leaves_out(policy_path, update_mode):
    """Both groups have both kinds of outcome, and the bounds let the second one stay."""
    weights = []
    for rows in (range(8), range(4, 8)):  # with the group that is left out, and without it
        some = samples().take(rows)
        filter = GroupFilter(source="even", low=0.7, high=1)
        made = pipeline_of(prime_of(policy_path, update_mode=update_mode), filter=filter)
        assert sum(Even().score(some)[-4:]) == 3
        assert len(some) == 4 or sum(Even().score(some)[:4]) == 2
        made.update(made.score(some, 4, training=True))
        weights.append(made.sources[0].reward.state_dict()["weights"])
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name])


def test_what_learns_first_is_asked_about_all_rows(policy_path):
    prime = Source("prime", prime_of(policy_path, update_mode="before"), only_if=Gate("even", 1.0))
    with pytest.raises(ValueError, match="cannot have an only_if"):
        Pipeline([prime, Source("even", Even())])


def test_learning_uses_the_references_of_scoring_again(policy_path):
    prime = prime_of(policy_path)
    made = pipeline_of(prime)
    calls = []
    model = prime._ready()
    plain = model.reference_logps
    model.reference_logps = lambda prompts, completions: calls.append(len(prompts)) or plain(prompts, completions)
    batch = made.score(samples(), 4)
    assert sum(calls) == 8
    made.update(batch)
    assert sum(calls) == 8


def test_without_a_trainer_there_is_no_old_policy(policy_path):
    made = pipeline_of(prime_of(policy_path, reference="old_policy"))
    with pytest.raises(RewardError, match="set reference: frozen"):
        made.score(samples(), 4)


def arguments(tmp_path, **options):
    given = {"beta": 0.0, "steps_per_generation": 2, "gradient_accumulation_steps": 1} | options
    return trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
        max_steps=3, learning_rate=0.05, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, seed=3, **given,
    )  # fmt: skip


class Watched(GRPOTrainer):
    """Keeps the rewards and TRL's log-probabilities of each batch, and how many it had to make beside TRL's."""

    seen: list

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.seen.append((output, self.last_batch))
        return output


@pytest.mark.parametrize(
    ("reference", "key", "options"),
    [("old_policy", "old_per_token_logps", {}), ("trainer", "ref_per_token_logps", {"beta": 0.1})],
)
def test_tokens_are_compared_with_what_trl_has_computed(policy_path, tmp_path, monkeypatch, reference, key, options):
    monkeypatch.setattr(RolloutLogps, "_compute", None)  # nothing beside TRL's own
    prime = prime_of(policy_path, reference=reference, beta=1.0)
    made = pipeline_of(prime, advantage=load_advantage("prime_rloo"))
    data = Dataset.from_dict({"prompt": [f"the cat ran {number}" for number in range(8)]})
    trainer = Watched(policy_path, None, arguments(tmp_path, **options), train_dataset=data, pipeline=made)
    trainer.seen = []
    trainer.train()
    assert len(trainer.seen) == 2
    output, batch = trainer.seen[-1]
    assert batch.process_rewards.abs().max() > 1e-4
    # log π_φ is what is left when TRL's numbers are added again.
    logps = batch.process_rewards + output[key] * output["completion_mask"]
    assert (logps[output["completion_mask"].bool()] < 0).all()


def test_a_policy_that_trl_asks_nothing_of_is_asked_once(policy_path, tmp_path):
    prime = prime_of(policy_path, reference="old_policy", beta=1.0)
    made = pipeline_of(prime, advantage=load_advantage("prime_rloo"))
    data = Dataset.from_dict({"prompt": [f"the cat ran {number}" for number in range(8)]})
    options = {"steps_per_generation": 1, "max_steps": 1}
    args = arguments(tmp_path, **{name: value for name, value in options.items() if name != "max_steps"})
    args.max_steps = 1
    trainer = Watched(policy_path, None, args, train_dataset=data, pipeline=made)
    trainer.seen = []
    trainer.train()
    output, batch = trainer.seen[0]
    assert "old_per_token_logps" not in output
    assert batch.process_rewards.abs().max() < 1e-5  # the policy, like π_φ, has learned nothing yet


@pytest.mark.parametrize(
    ("reference", "options", "said"),
    [
        ("trainer", {}, "beta 0 has none"),
        ("old_policy", {"temperature": 0.9}, "set temperature to 1.0, got 0.9"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_model_is_loaded(tmp_path, reference, options, said):
    reward = load_reward("prime", reference=reference)
    with pytest.raises(ValueError, match=said):
        GRPOTrainer("no/such-model", None, arguments(tmp_path, **options), pipeline=pipeline_of(reward))
