"""No lock-in: our rewards work in unmodified TRL trainers, and TRL's reward functions work as ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from trl_rewards import Reward, RewardError, load_reward

PROMPTS = [f"the cat ran {number} times" for number in range(8)]
REFERENCES = [["the cat sat"]] * 8


class Ranked(Reward):
    scope = "group"

    def score(self, samples):
        return [0.0] * len(samples)


def grpo_arguments(folder, **options) -> dict:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 6,
        "max_steps": 2,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return defaults | options


# --- our rewards, called as TRL calls them ---------------------------------------------------------------------------


def test_a_reward_is_called_as_trl_calls_it_with_what_it_does_not_need():
    scores = load_reward("bleuberi")(
        prompts=["p", "p"],
        completions=["the cat sat", "dog"],
        completion_ids=[[1, 2], [3]],
        references=[["the cat sat"], ["the cat sat"]],
        trainer_state=None,
        log_extra=lambda column, values: None,
        log_metric=lambda name, value: None,
        environments=[None, None],
        other=["x", "y"],
    )
    assert scores[0] == 1.0
    assert scores[1] < 1.0


def test_a_missing_column_is_named_in_stock_trl_too():
    with pytest.raises(
        RewardError, match="reward 'Bleuberi' needs dataset column 'references'; the dataset has answer"
    ):
        load_reward("bleuberi")(prompts=["p"], completions=["c"], completion_ids=[[1]], answer=["a"])


def test_a_group_reward_says_that_stock_trl_hands_out_no_groups():
    with pytest.raises(RewardError, match=r"use trl_rewards.GRPOTrainer\(pipeline=…\)"):
        Ranked()(prompts=["p"], completions=["c"], completion_ids=[[1]])


@pytest.mark.slow
def test_our_rewards_train_in_an_unmodified_trl_trainer_under_their_own_names(policy_path, tmp_path):
    import trl
    from datasets import Dataset

    rewards = [load_reward("bleuberi"), load_reward("length", soft_limit=2, hard_limit=6), load_reward("exact_match")]
    trainer = trl.GRPOTrainer(
        policy_path,
        reward_funcs=rewards,
        args=trl.GRPOConfig(**grpo_arguments(tmp_path, reward_weights=[1.0, 0.5, 0.0])),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "references": REFERENCES, "answer": ["cat"] * 8}),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert 0.0 <= log["rewards/bleuberi/mean"] <= 1.0
        assert -1.0 <= log["rewards/length/mean"] <= 0.0
        total = log["rewards/bleuberi/mean"] + 0.5 * log["rewards/length/mean"]
        assert log["reward"] == pytest.approx(total, abs=1e-5)
        assert "rewards/exact_match/mean" in log


@pytest.mark.slow
def test_two_instances_of_one_reward_keep_metrics_apart_by_their_names(policy_path, tmp_path, write):
    import trl
    from datasets import Dataset

    path = write("mine.py", "async def half(completions, **kwargs):\n    return [0.5] * len(completions)\n")
    first, second = (
        load_reward("length", soft_limit=0, hard_limit=1),
        load_reward("length", soft_limit=90, hard_limit=99),
    )
    second.__name__ = "never_long"
    trainer = trl.RLOOTrainer(
        policy_path,
        reward_funcs=[first, second, load_reward(f"{path}:half")],
        args=trl.RLOOConfig(**grpo_arguments(tmp_path)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["rewards/length/mean"] == -1.0
    assert log["rewards/never_long/mean"] == 0.0
    assert log["rewards/half/mean"] == 0.5


@pytest.mark.slow
def test_our_reward_is_named_by_a_dotted_path_on_trls_own_command_line(policy_path, tmp_path):
    (tmp_path / "my_module.py").write_text(
        "from trl_rewards import load_reward\nmy_reward = load_reward('length', soft_limit=0, hard_limit=1)\n"
    )
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    words = ["--model_name_or_path", policy_path, "--dataset_name", str(data), "--reward_funcs", "my_module.my_reward"]
    for name, value in grpo_arguments(tmp_path / "out", max_steps=1).items():
        words += [f"--{name}", str(value)]
    done = subprocess.run(
        [sys.executable, "-m", "trl.scripts.grpo", *words],
        cwd=tmp_path,
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rewards/length/mean" in done.stdout
    # And the same words, less the trainer's name, are a recipe of ours.
    from trl_rewards import Recipe

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"reward_funcs: [my_module.my_reward]\nmodel_name_or_path: {policy_path}\n")
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        assert Recipe.load(recipe, check_trl=False).rewards[0].name == "my_reward"
    finally:
        os.chdir(here)


# --- TRL's reward functions as sources -------------------------------------------------------------------------------

SEEING = """
seen = []

def watcher(
    prompts, completions, completion_ids, answer, task, trainer_state, log_metric, log_extra, factor=1, **kwargs
):
    log_metric("watched", float(trainer_state.global_step))
    log_extra("answers", answer)
    seen.append((trainer_state.global_step, trainer_state.max_steps, len(prompts), sorted(set(task)), factor))
    assert len(completion_ids) == len(completions) == len(answer)
    return [float(len(ids)) for ids in completion_ids]
"""


@pytest.mark.slow
def test_a_plain_trl_function_sees_columns_trainer_state_and_the_two_logs(policy_path, tmp_path, write):
    import trl
    from datasets import Dataset

    import trl_rewards
    from trl_rewards.plugins import load_target

    path = write("seeing.py", SEEING)
    pipeline = trl_rewards.Pipeline([load_reward(f"{path}:watcher", factor=3)])
    trainer = trl_rewards.GRPOTrainer(
        policy_path,
        args=trl.GRPOConfig(**grpo_arguments(tmp_path)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "answer": list("abcdefgh"), "task": ["t"] * 8}),
        pipeline=pipeline,
    )
    trainer.train()
    assert load_target(f"{path}:seen") == [(0, 2, 4, ["t"], 3), (1, 2, 4, ["t"], 3)]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["watched"] for log in logs] == [0.0, 1.0]
    assert "rewards/watcher/mean" in logs[0]
    assert set(trainer._logs["extra"]["answers"]) <= set("abcdefgh")
    assert trainer._logs["extra"]["answers"]
