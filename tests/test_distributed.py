"""The same rewards and advantages on 1, 2 and 3 processes, whether ranks hold whole groups or not."""

from __future__ import annotations

import json
import re

import pytest

pytestmark = pytest.mark.slow

PIPELINE = """
import json, sys
import torch
from trl_rewards import Pipeline, Reward, Failed, load_advantage, load_combiner, load_shaper
from trl_rewards.schedules import Schedule
from trl_rewards.scoring import Gate, Source, World
from trl_rewards.testing import make_samples

world_size, rows, group_size = map(int, sys.argv[1:4])
if world_size > 1:
    torch.distributed.init_process_group("gloo")
    from accelerate import PartialState
    PartialState(cpu=True)
world = World.current()
assert world.size == world_size, (world.size, world_size)


class Words(Reward):
    def score(self, samples):
        special = {"w5": None, "w7": Failed("down")}
        return [special.get(text, int(text[1:]) * 0.37 % 1) for text in samples.texts]


class Rank(Reward):
    scope = "group"

    def score(self, samples):
        assert samples.group_size == group_size and len(samples) % group_size == 0
        numbers = [int(text[1:]) * 7 % 11 for text in samples.texts]
        groups = [numbers[i : i + group_size] for i in range(0, len(numbers), group_size)]
        return [sorted(group).index(number) / group_size for group in groups for number in group]


def pipeline(combine, advantage):
    return Pipeline(
        [
            Source("words", Words(), Schedule.parse({"linear": [1.0, 0.5]}), on_missing="group_mean", shape=[
                load_shaper("running_clip"), load_shaper("running_minmax"),
            ]),
            Source("rank", Rank(), Schedule.parse(0.5), shape=[load_shaper("par", references="refs")]),
            Source("gated", Words(), Schedule.parse(0.1), only_if=Gate("rank", 0.5)),
        ],
        combine=load_combiner(combine, **OPTIONS.get(combine, {})),
        shape=[load_shaper("whiten"), load_shaper("sigmoid")],
        advantage=load_advantage(advantage, **OPTIONS.get(advantage, {})),
    )


OPTIONS = {
    "lagrangian": {"thresholds": {"words": 0.9, "rank": 0.2}},
    "armorm": {"verbosity": "words", "rows": 30},  # full in the second step
    "dler": {"filter_by": "words", "weighting": "token"},
    "grpo_s": {"hardness": "hard", "category": "kind"},
}


result = {}
for combine, advantage in [("weighted_sum", "group_norm"), ("normalize_then_sum", "center"), ("min", "bnpo"),
                           ("mean", "leave_one_out"), ("median", "batch_norm"),
                           ("lagrangian", "dler"), ("armorm", "grpo_s")]:
    made = pipeline(combine, advantage)
    for step in range(2):  # twice, for the state
        everyone = make_samples(
            [f"w{row + step}" for row in range(rows)], prompts=[f"p{row // group_size}" for row in range(rows)],
            refs=[[row / rows, 0.5] for row in range(rows)], hard=[row % 5 / 5 for row in range(rows)],
            kind=["ab"[row // 12] for row in range(rows)], step=step, max_steps=2)
        local = rows // world.size
        mine = everyone.take(range(world.rank * local, (world.rank + 1) * local))
        batch = made.score(mine, group_size, world)
    advantages = made.advantages(batch)
    result[advantage] = [batch.rewards.tolist(), advantages.tolist(), made.state_dict()]
    every = world.gather_objects(result[advantage])
    assert all(other == every[0] for other in every), "ranks disagree"
if world.rank == 0:
    print("RESULT" + json.dumps(result))
if world_size > 1:
    torch.distributed.destroy_process_group()
"""


def _close(first, second) -> None:
    assert first.keys() == second.keys()
    for name in first:
        for mine, theirs in zip(first[name][:2], second[name][:2], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-6, nan_ok=True), name
        assert all(first[name][2][path] == second[name][2][path] for path in ("combine", "advantage")), name
        assert first[name][2].keys() == second[name][2].keys()
        for path in ("shape.0", "rewards.words.shape.0", "rewards.words.shape.1"):
            assert first[name][2][path] == pytest.approx(second[name][2][path]), (name, path)


def result_of(done) -> dict:
    return json.loads(re.search(r"RESULT(.*)", done.stdout).group(1))


def test_1_2_and_3_processes_agree_on_split_and_whole_groups(run_ranks):
    """24 rows: groups of 8 are split on 2 ranks (12 rows each) and whole on 3; groups of 6 the other way round."""
    for group_size in (8, 6):
        one, two, three = (
            result_of(run_ranks(PIPELINE, ranks, str(ranks), "24", str(group_size))) for ranks in (1, 2, 3)
        )
        assert any(value != 0 for value in one["group_norm"][1])
        assert one["dler"][2]["combine"]["raw"]["rank"] < 0 < one["dler"][2]["combine"]["raw"]["words"]
        assert one["grpo_s"][2]["combine"]["found"]
        assert one["grpo_s"][2]["advantage"]["seen"]["a"][0] == 12
        _close(one, two)
        _close(one, three)


RAISING = """
import sys
import torch
from trl_rewards import Pipeline, Reward, RewardError
from trl_rewards.scoring import World
from trl_rewards.testing import make_samples

torch.distributed.init_process_group("gloo")
from accelerate import PartialState
PartialState(cpu=True)
world = World.current()
assert world.size == 2


class Broken(Reward):
    deterministic = False

    def score(self, samples):
        return [1.0] if world.rank == 1 else [1.0] * len(samples)


class Failing(Reward):
    def score(self, samples):
        if world.rank == 1:
            raise ConnectionError("judge is down")
        return [1.0] * len(samples)


for reward in (Broken(), Failing()):
    try:
        pipeline = Pipeline([reward])
        pipeline.sources[0].max_failures = 0.2
        pipeline.score(make_samples(["a", "b", "c", "d"]), 4, world)
    except RewardError as error:
        sys.stdout.write(f"CAUGHT {type(reward).__name__} {world.rank} {error}\\n")
        sys.stdout.flush()
torch.distributed.destroy_process_group()
"""


def test_one_ranks_exception_is_raised_on_all_with_the_same_words(run_ranks):
    output = run_ranks(RAISING, 2).stdout
    for reward, words in [("Broken", "returned 1 scores for 4 completions"), ("Failing", "judge is down")]:
        said = dict(re.findall(rf"CAUGHT {reward} (\d) (.*)", output))
        assert set(said) == {"0", "1"}, output
        assert said["0"] == said["1"]
        assert words in said["0"]


TRAINERS = """
import json, sys
import accelerate, trl, trl_rewards
from datasets import Dataset
from trl_rewards import Pipeline, Reward, load_advantage
from trl_rewards.schedules import Schedule
from trl_rewards.scoring import Source

policy, folder, split = sys.argv[1], sys.argv[2], sys.argv[3] == "split"


def length_reward(completions, **kwargs):
    return [len(str(text)) / 50 for text in completions]


class LengthReward(Reward):
    def score(self, samples):
        return length_reward(samples.completions)


class GroupLength(Reward):
    scope = "group"

    def score(self, samples):
        assert samples.group_size == 4
        return length_reward(samples.completions)


def train(trainer_class, config_class, reward_funcs=None, pipeline=None, **options):
    args = config_class(
        output_dir=folder, per_device_train_batch_size=2 if split else 4, num_generations=4, max_completion_length=8,
        max_steps=3, logging_steps=1, learning_rate=1e-2, optim="sgd", bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, seed=3, **options)
    data = Dataset.from_dict({"prompt": [f"the cat ran {number} times" for number in range(12)]})
    more = {"pipeline": pipeline} if pipeline else {}
    trainer = trainer_class(policy, reward_funcs, args, train_dataset=data, **more)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    return [[log["loss"], log["grad_norm"], log["reward"]] for log in trainer.state.log_history if "loss" in log]


result = {}
for name, options in [("GRPO", {}), ("RLOO", {"beta": 0.1})]:
    stock_class, config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    ours_class = getattr(trl_rewards, f"{name}Trainer")
    result[name] = [
        train(stock_class, config, [length_reward], **options),
        train(ours_class, config, pipeline=Pipeline([LengthReward()]), **options),
        train(ours_class, config, pipeline=Pipeline([GroupLength()]), **options),
    ]
result["advantage"] = [
    train(trl.GRPOTrainer, trl.GRPOConfig, [length_reward]),
    train(trl_rewards.GRPOTrainer, trl.GRPOConfig,
          pipeline=Pipeline([LengthReward()], advantage=load_advantage("group_norm")), scale_rewards="none"),
]


class Tokens(trl_rewards.Advantage):
    level = "token"

    def __call__(self, batch):
        return load_advantage("group_norm")(batch)[:, None] * batch.mask


result["advantage"].append(
    train(trl_rewards.GRPOTrainer, trl.GRPOConfig, pipeline=Pipeline([LengthReward()], advantage=Tokens())))
if accelerate.PartialState().is_main_process:
    print("RESULT" + json.dumps(result))
"""


@pytest.mark.parametrize("groups", ["split", "whole"])
def test_two_processes_equal_stock_trl(groups, run_ranks, policy_path, tmp_path):
    result = result_of(run_ranks(TRAINERS, 2, policy_path, str(tmp_path / "out"), groups))
    for name, (stock, *ours) in result.items():
        assert any(grad_norm > 1e-4 for _, grad_norm, _ in stock)
        for run in ours:
            for theirs, mine in zip(stock, run, strict=True):
                assert mine == pytest.approx(theirs, abs=1e-5), name


OBJECTIVES = """
import json, sys
import accelerate, torch, trl
from datasets import Dataset
from trl_rewards import Objective, RewardTrainer

model, folder = sys.argv[1:3]


class Centred(Objective):
    \"\"\"Not a mean over pairs: the batch's mean reward, squared.\"\"\"

    def setup(self, context):
        self.log_metric = context.log_metric

    def loss(self, batch):
        everyone = batch.gather(torch.cat([batch.chosen, batch.rejected]))
        self.log_metric("first_strength", batch.columns["strength"][0])
        return batch.loss + 10 * everyone.mean() ** 2

    def reads(self):
        return ("strength",)


state = accelerate.PartialState(cpu=True)
rows = [{"prompt": f"the {noun} ", "chosen": f"sat {i} times", "rejected": f"ran {i}", "strength": float(i)}
        for i, noun in enumerate(["cat", "dog", "sky", "cat"])]
args = trl.RewardConfig(
    folder, per_device_train_batch_size=4 // state.num_processes, max_steps=3, learning_rate=1e-2, logging_steps=1,
    report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, max_grad_norm=1e9,
    train_sampling_strategy="sequential",
)
trainer = RewardTrainer(model, args, train_dataset=Dataset.from_list(rows), objective=Centred())
trainer.train()
lines = [line for line in trainer.state.log_history if "loss" in line]
if state.is_main_process:
    print("RESULT" + json.dumps([[line[key] for key in ("loss", "grad_norm", "first_strength")] for line in lines]))
"""


def test_an_objective_gathers_rows_with_gradient_and_its_metrics_are_averaged(run_ranks, reward_model_path, tmp_path):
    one, two = (
        result_of(run_ranks(OBJECTIVES, ranks, reward_model_path, str(tmp_path / str(ranks)))) for ranks in (1, 2)
    )
    for alone, together in zip(one, two, strict=True):
        assert together[:2] == pytest.approx(alone[:2], rel=1e-4)
        assert alone[0] > 1e-3
    assert [line[2] for line in one] == [0.0] * 3  # of the first row
    assert [line[2] for line in two] == [1.0] * 3  # the mean of the first and the third row's
