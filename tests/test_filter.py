"""The filter of groups: which stay, what is trained on, and where the others' places are filled from."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from trl_rewards import (
    Pipeline,
    PPOConfig,
    PPOTrainer,
    Recipe,
    RecipeError,
    Reward,
    Samples,
    TokenReward,
    load_shaper,
)
from trl_rewards.filtering import GroupFilter, fill
from trl_rewards.maths import staying_groups
from trl_rewards.scoring import Source

# Six prompts, four answers each. Means 0, 1/4, 1/2, 3/4, 1 and 3/16; recorded from the authors' code and from verl's.
ACCURACY = [0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0.5, 0.25, 0, 0]
LENGTHS = [3] * 8 + [6] + [3] * 15


def staying(limit=None, low=0.2, high=0.8, outcomes=ACCURACY):
    return staying_groups(torch.tensor(outcomes), torch.tensor(LENGTHS), 4, low, high, limit).tolist()


def test_groups_between_the_bounds_stay_as_in_the_release():
    assert staying() == [False, True, True, True, False, False]
    assert staying(limit=6) == [False, True, False, True, False, False]  # with a cut completion in the third


def test_bounds_are_inclusive():
    assert staying(low=0.25, high=0.75) == [False, True, True, True, False, False]
    assert staying(low=0.26, high=0.74) == [False, False, True, False, False, False]


def test_holes_do_not_count_and_a_group_of_holes_does_not_stay():
    hole = math.nan
    outcomes = [hole] * 4 + [1, 0, hole, hole] + [1, hole, hole, hole] + [0] * 12
    assert staying(outcomes=outcomes) == [False, True, False, False, False, False]


def test_places_are_filled_with_groups_that_stay_and_then_with_others():
    assert fill(staying(limit=6), 2) == [1, 3]  # a third of what was generated, as with verl's factor of 3
    assert fill(staying(limit=6), 3) == [1, 3, 0]
    assert fill([True] * 4, 2) == [0, 1]


class Column(Reward):
    columns = ("value",)

    def score(self, samples):
        return samples["value"]


def test_what_is_left_out_has_no_reward_and_no_place_in_a_shapers_statistics():
    samples = Samples(prompts=["p"] * 8, completions=["c"] * 8, columns={"value": [1, 1, 1, 1, 0, 1, 0, 1.0]})
    made = Pipeline([Source("right", Column())], shape=[load_shaper("whiten")], filter=GroupFilter(source="right"))
    batch = made.score(samples, 4, training=True)
    assert batch.left_out.tolist() == [True] * 4 + [False] * 4
    assert batch.rewards[:4].isnan().all()
    assert batch.rewards[4:].mean().item() == pytest.approx(0, abs=1e-6)  # whitened among themselves
    assert batch.scores.values[:, 0].tolist() == samples["value"]  # raw scores are all there
    assert not made.score(samples, 4).rewards.isnan().any()  # an evaluation leaves nothing out


class Tokens(TokenReward):
    """Each token earns the row's value."""

    columns = ("value",)

    def score_tokens(self, samples):
        return [[value] * len(ids) for value, ids in zip(samples["value"], samples.completion_ids, strict=True)]


def test_shapers_of_tokens_see_nothing_of_what_is_left_out():
    values = [1, 1, 1, 1, 0, 0.5, 0, 0.5]
    samples = Samples(prompts=["p"] * 8, completions=["c"] * 8, completion_ids=[[1, 2]] * 8, columns={"value": values})
    source = Source("right", Tokens(), shape=[load_shaper("prime_norm", eps=0.0)])
    made = Pipeline([source], filter=GroupFilter(source="right", high=0.8))
    batch = made.score(samples, 4, training=True)
    assert batch.left_out.tolist() == [True] * 4 + [False] * 4
    assert batch.process_rewards[4:].max().item() == pytest.approx(0.5)  # over the largest sum that stays, 1


def test_ppo_refuses_a_filter(tmp_path):
    args = PPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="PPO does not leave groups out"):
        PPOTrainer("no/such", None, args, pipeline=Pipeline([Source("a", Column())], filter=GroupFilter(source="a")))


def test_a_recipe_reports_a_wrong_filter(write):
    text = "model_name_or_path: x\ndataset_name: y\nrewards: [{use: exact_match}]\n"
    with pytest.raises(RecipeError) as caught:
        Recipe.load(write("a.yaml", text + "filter: {source: exact_mach, lo: 1, high: a}\n"))
    said = str(caught.value)
    assert "filter.source: no source 'exact_mach', did you mean 'exact_match'?" in said
    assert "filter: unknown option 'lo'" in said
    assert "filter.high" in said
    with pytest.raises(RecipeError, match="low must be at most high"):
        Recipe.load(write("b.yaml", text + "filter: {source: exact_match, low: 1, high: 0}\n"))
    with pytest.raises(RecipeError, match="filter: trainer 'ppo' does not take it"):
        Recipe.load(write("c.yaml", "trainer: ppo\n" + text + "filter: {source: exact_match}\n"))
    recipe = Recipe.load(write("d.yaml", text + "filter: {source: exact_match, truncated: drop}\n"))
    assert recipe.filter == GroupFilter(source="exact_match", truncated="drop")
    assert "truncated:drop" in recipe.signature


TRAIN = """
import json, sys
import torch, trl, trl_rewards
from datasets import Dataset
from trl_rewards import Pipeline, Reward, load_advantage
from trl_rewards.filtering import GroupFilter
from trl_rewards.scoring import Source, World

policy, folder, name = sys.argv[1:4]
ranks = int(sys.argv[4])


class Kind(Reward):
    '''Half of the answers to "mixed" prompts are right, all of those to "easy" ones and none of the rest.'''

    columns, scope = ("kind",), "group"

    def score(self, samples):
        mixed = [1.0, 0.0] * (len(samples) // 2)
        return [{"easy": 1.0, "hard": 0.0}.get(kind, half) for kind, half in zip(samples["kind"], mixed, strict=True)]


kinds = ["easy", "hard", "easy", "mixed", "hard", "easy"] * 4
data = Dataset.from_dict({"prompt": [f"{kind} cat ran {number}" for number, kind in enumerate(kinds)], "kind": kinds})
options = {"beta": 0.05} if name == "GRPO" else {"beta": 0.0}
args = getattr(trl, f"{name}Config")(
    output_dir=folder, per_device_train_batch_size=8 // ranks, num_generations=4, max_completion_length=8, max_steps=2,
    steps_per_generation=1, logging_steps=1, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
    disable_tqdm=True, seed=3, **options)
made = Pipeline(
    [Source("kind", Kind())], advantage=load_advantage("center"),
    filter=GroupFilter(source="kind", oversample=2, refill=6),
)
trained = []


class Watched(getattr(trl_rewards, f"{name}Trainer")):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        batch, world = self.last_batch, World.current()
        rows = len(output["advantages"])
        for row in range(rows):  # this rank's tensors are those of its rows of the batch
            mine = batch.samples.take([world.rank * rows + row])
            ids = output["prompt_ids"][row][output["prompt_mask"][row].bool()]
            assert self.processing_class.decode(ids) == mine.prompts[0]
            kept = output["completion_ids"][row][output["completion_mask"][row].bool()].tolist()
            assert kept == ([] if batch.left_out[world.rank * rows + row] else mine.completion_ids[0])
        shared = self._gathered(output["advantages"][:, None])[:, 0].tolist()
        trained.append([batch.samples.prompts, batch.left_out.tolist(), shared, list(self._logs["prompt"]),
                        list(self._logs["advantages"])])
        return output


trainer = Watched(policy, None, args, train_dataset=data, pipeline=made)
assert trainer.accelerator.num_processes == ranks
trainer.train()
logs = [log for log in trainer.state.log_history if "filter/batches" in log]
if World.current().rank == 0:
    print("RESULT" + json.dumps([trained, [[log["filter/staying"], log["filter/trained"], log["filter/batches"],
          log["rewards/kind/mean"], log["loss"]] for log in logs]]))
"""


def results_of(done) -> list:
    return [json.loads(found) for found in re.findall(r"RESULT(.*)", done.stdout)]


def check(trained, logs):
    for prompts, left_out, advantages, logged, logged_advantages in trained:
        assert len(prompts) == 8
        assert not any(left_out)
        assert all(prompt.startswith("mixed") for prompt in prompts)
        assert advantages == pytest.approx([0.5, -0.5] * 4)
        assert logged == prompts
        assert logged_advantages == pytest.approx(advantages)
    for staying_share, trained_share, batches, accuracy, loss in logs:
        assert trained_share == 1
        assert 2 <= batches <= 8
        assert staying_share * batches * 2 >= 2  # two groups a batch
        assert 0 < accuracy < 1
        assert math.isfinite(loss)


MASK = TRAIN.replace(", oversample=2, refill=6", "").replace(
    "assert kept == ([] if batch.left_out[world.rank * rows + row] else mine.completion_ids[0])",
    "assert kept == ([] if batch.left_out[world.rank * rows + row] else mine.completion_ids[0])\n"
    '            if "old_logps" in output and batch.left_out[row]:\n'
    '                output["old_logps"][row] *= 50  # as of a long completion, whose ratio to nothing is infinite',
)


@pytest.mark.slow
def test_rloo_trains_on_other_prompts_and_without_them_on_fewer_rows(policy_path, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN + MASK)
    done = subprocess.run(
        [sys.executable, str(script), policy_path, str(tmp_path), "RLOO", "1"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    filled, masked = results_of(done)
    check(*filled)
    trained, logs = masked
    assert any(any(left_out) for _, left_out, *_ in trained)
    for _, left_out, advantages, *_ in trained:
        assert all(advantage == 0 for gone, advantage in zip(left_out, advantages, strict=True) if gone)
    assert all(math.isfinite(loss) for *_, loss in logs)


@pytest.mark.slow
def test_two_processes_that_hold_half_of_every_group_do_it_too(policy_path, tmp_path, run_ranks):
    (found,) = results_of(run_ranks(TRAIN, 2, policy_path, str(tmp_path), "GRPO", "2"))
    check(*found)
