"""A recipe runs end to end, on any local data, and what is wrong with it is said before a model is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from trl_rewards import RecipeError, RewardError
from trl_rewards.recipe import Recipe
from trl_rewards.train import build_trainer, main, train

ROWS = [
    {"question": f"the cat ran {n} times", "answer": str(n), "references": [f"it ran {n} times"]} for n in range(16)
]


@pytest.fixture
def make_recipe(policy_path, tmp_path, write):
    """Writes a small recipe over a JSONL file; keywords replace keys, None takes one out."""

    def make(rows=ROWS, **keys) -> str:
        data = write("data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        recipe = {
            "model_name_or_path": policy_path,
            "dataset_name": data,
            "dataset": {"columns": {"prompt": "question"}},
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "rewards": ["bleuberi", {"use": "exact_match", "weight": 0.5}],
        }
        recipe = {key: value for key, value in (recipe | keys).items() if value is not None}
        return write("recipe.yaml", yaml.safe_dump(recipe))

    return make


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", refuse)


def problems_of(path: str) -> str:
    with pytest.raises(RecipeError) as caught:
        build_trainer(Recipe.load(path))
    return "\n".join(caught.value.problems)


# --- refused before a model is loaded --------------------------------------------------------------------------------


def test_a_missing_column_is_named_with_the_columns_there_are(make_recipe, no_model_is_loaded):
    bleuberi = {"use": "bleuberi", "with": {"references": "refs"}}
    said = problems_of(make_recipe(rewards=[bleuberi, {"use": "exact_match", "as": "e"}]))
    assert "rewards.bleuberi needs dataset column 'refs'; the dataset has prompt, answer, references" in said
    assert "rewards.e" not in said


def test_a_mapped_column_that_is_not_there_is_named(make_recipe, no_model_is_loaded):
    said = problems_of(make_recipe(dataset={"columns": {"prompt": "questoin"}}))
    assert "dataset.columns.prompt: the dataset has no column 'questoin', did you mean 'question'?" in said


def test_a_dataset_without_prompts_says_how_to_map_one(make_recipe, no_model_is_loaded):
    assert "map one: dataset: {columns: {prompt: …}}" in problems_of(make_recipe(dataset=None))


def test_an_empty_dataset_is_refused(make_recipe, no_model_is_loaded, write):
    path = make_recipe(dataset_name=write("empty.csv", "question,answer,references\n"))
    assert "has no rows" in problems_of(path)


def test_a_dataset_file_that_is_not_there_is_refused(make_recipe, no_model_is_loaded):
    assert "no file './nowhere.jsonl'" in problems_of(make_recipe(dataset_name="./nowhere.jsonl"))


def test_evaluation_without_its_split_is_refused(make_recipe, no_model_is_loaded):
    said = problems_of(make_recipe(eval_strategy="steps", eval_steps=1))
    assert "dataset_test_split: no split 'test' to evaluate on (there is train)" in said


def test_a_policy_that_is_not_there_is_refused(make_recipe, no_model_is_loaded):
    said = problems_of(make_recipe(model_name_or_path="./no_policy"))
    assert "model_name_or_path: no model './no_policy'" in said


def test_a_recipe_without_policy_or_dataset_is_refused(make_recipe, no_model_is_loaded):
    assert "model_name_or_path: a policy is needed" in problems_of(make_recipe(model_name_or_path=None))
    assert "dataset_name: a dataset is needed" in problems_of(make_recipe(dataset_name=None))


def test_a_reward_model_that_is_not_there_is_refused(make_recipe, no_model_is_loaded):
    path = make_recipe(rewards=[{"use": "model", "with": {"path": "./no_reward_model"}}])
    with pytest.raises(RewardError, match=r"no reward model at './no_reward_model'"):
        build_trainer(Recipe.load(path))


def test_the_command_prints_problems_and_fails_without_a_traceback(make_recipe, capsys):
    assert main(["--config", make_recipe(rewards=["bluberi"], learnin_rate=1)]) == 1
    said = capsys.readouterr().err
    assert "2 problems" in said
    assert "did you mean 'bleuberi'" in said
    assert "did you mean 'learning_rate'" in said
    assert "Traceback" not in said
    assert main(["--learning_rate", "1"]) == 2
    assert "usage:" in capsys.readouterr().err


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
def test_a_recipe_trains_and_leaves_its_record(trainer, make_recipe, tmp_path):
    made = train(make_recipe(trainer=trainer), ["--rewards.exact_match.weight", "0.25", "--max_steps", "3"])
    assert made.state.global_step == 3
    out = tmp_path / "out"
    saved = yaml.safe_load((out / "recipe.yaml").read_text())
    assert saved["rewards"][1]["weight"] == 0.25
    assert saved["max_steps"] == 3
    assert "0.25*exact_match" in (out / "signature.txt").read_text()
    logs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert logs[0]["rewards/exact_match/weight"] == 0.25
    assert {"rewards/bleuberi/mean", "rewards/total/mean"} <= set(logs[0])
    assert (out / "report.html").is_file()
    assert (out / "model.safetensors").is_file()
    again = Recipe.load(out / "recipe.yaml")
    assert again.signature == Recipe.load(make_recipe(trainer=trainer), {"rewards.1.weight": 0.25}).signature


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["group_norm", "center", "batch_norm", "leave_one_out", "bnpo"])
def test_every_advantage_trains(advantage, make_recipe):
    trainer = train(make_recipe(advantage={"use": advantage}))
    assert trainer.last_advantages.shape == (8,)


@pytest.mark.slow
def test_chat_prompts_and_a_system_prompt_reach_policy_and_rewards(make_recipe, write):
    reward = write(
        "look.py",
        "def look(prompts, completions, **kwargs):\n"
        "    assert [message['role'] for message in prompts[0]] == ['system', 'user'], prompts[0]\n"
        "    assert completions[0][0]['role'] == 'assistant'\n"
        "    return [0.0] * len(prompts)\n",
    )
    dataset = {"columns": {"prompt": "question"}, "system_prompt": "Be brief."}
    train(make_recipe(rewards=["bleuberi", f"{reward}:look"], dataset=dataset, max_steps=1))


@pytest.mark.slow
def test_a_local_function_beside_the_recipe_sees_what_trl_gives(make_recipe, write):
    write(
        "my_reward.py",
        "def close_enough(prompts, completions, completion_ids, answer, trainer_state, log_metric, log_extra,\n"
        "                 **kwargs):\n"
        "    assert kwargs['tolerance'] == 2\n"
        "    assert trainer_state.max_steps == 2\n"
        "    assert len(completion_ids) == len(answer) == len(prompts)\n"
        "    log_metric('tries', float(trainer_state.global_step))\n"
        "    log_extra('gold', answer)\n"
        "    return [float(len(text)) for text in completions]\n",
    )
    source = {"use": "./my_reward.py:close_enough", "with": {"tolerance": 2}}
    trainer = train(make_recipe(rewards=[source], log_completions=True))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["tries"] for log in logs] == [0.0, 1.0]
    assert "rewards/close_enough/mean" in logs[0]
    assert set(trainer._logs["extra"]["gold"]) <= {row["answer"] for row in ROWS}


@pytest.mark.slow
def test_hooks_are_told_of_the_trainer_and_of_every_training_batch(make_recipe):
    from trl_rewards import hookimpl
    from trl_rewards.testing import plugin_manager

    class Watcher:
        def __init__(self):
            self.ready, self.batches = [], []

        @hookimpl
        def trainer_ready(self, trainer, recipe):
            self.ready.append((type(trainer).__name__, recipe.trainer))

        @hookimpl
        def batch_scored(self, batch, step):
            self.batches.append((step, tuple(batch.rewards.shape), batch.scores.names))

    watcher = Watcher()
    with plugin_manager({"watcher": watcher}):
        train(make_recipe(eval_strategy="no"))
    assert watcher.ready == [("GRPOTrainer", "grpo")]
    assert watcher.batches == [(step, (8,), ("bleuberi", "exact_match")) for step in (0, 1)]


@pytest.mark.slow
def test_a_reward_that_learns_is_updated_with_every_training_batch_and_resumes(make_recipe, write):
    path = write(
        "learns.py",
        "import torch\n"
        "from trl_rewards import TrainableReward\n"
        "class Learns(TrainableReward):\n"
        "    deterministic = False\n"
        "    def __post_init__(self):\n"
        "        self.bias = torch.nn.Parameter(torch.zeros(()))\n"
        "        self.optimizer = torch.optim.SGD([self.bias], lr=0.5)\n"
        "    def score(self, samples):\n"
        "        return [self.bias.item()] * len(samples)\n"
        "    def update(self, batch):\n"
        "        loss = (self.bias - 1) ** 2\n"
        "        loss.backward()\n"
        "        self.optimizer.step(), self.optimizer.zero_grad()\n"
        "        return {'loss': loss.item(), 'rows': float(len(batch.rewards))}\n"
        "    def state_dict(self):\n"
        "        return {'bias': self.bias.detach(), 'optimizer': self.optimizer.state_dict()}\n"
        "    def load_state_dict(self, state):\n"
        "        self.bias.data.copy_(state['bias'])\n"
        "        self.optimizer.load_state_dict(state['optimizer'])\n",
    )
    rewards = ["bleuberi", {"use": f"{path}:Learns", "as": "learns"}]
    recipe = make_recipe(rewards=rewards, save_strategy="steps", save_steps=1)
    logs = [log for log in train(recipe).state.log_history if "loss" in log]
    assert [log["rewards/learns/loss"] for log in logs] == [1.0, 0.0]
    assert [log["rewards/learns/mean"] for log in logs] == [0.0, 1.0]
    assert logs[0]["rewards/learns/rows"] == 8
    again = train(recipe, ["--max_steps", "3", "--resume_from_checkpoint", "true"])
    assert again.state.log_history[-2]["rewards/learns/mean"] == 1.0


@pytest.mark.slow
def test_a_plugin_that_fails_in_a_hook_is_a_warning(make_recipe, caplog):
    from trl_rewards import hookimpl
    from trl_rewards.testing import plugin_manager

    class Fails:
        @hookimpl
        def batch_scored(self, batch):
            raise ValueError("not today")

    with plugin_manager({"fails": Fails()}):
        assert train(make_recipe()).state.global_step == 2
    assert "plugin 'fails' failed in batch_scored" in caplog.text


@pytest.mark.slow
def test_extra_columns_of_rows_that_were_scored_apart_are_left_out_and_said(make_recipe, write, caplog):
    path = write(
        "extra.py",
        "def extra(completions, log_extra, **kwargs):\n"
        "    log_extra('words', [len(str(text).split()) for text in completions])\n"
        "    return [0.0] * len(completions)\n",
    )
    trainer = train(
        make_recipe(rewards=["bleuberi", {"use": f"{path}:extra", "concurrency": 4}], log_completions=True)
    )
    assert "words" not in trainer._logs["extra"]
    assert "log_extra 'words' came with 1 values for 8 rows" in caplog.text


@pytest.mark.slow
def test_resume_true_goes_on_from_the_newest_checkpoint(make_recipe):
    path = make_recipe(shape=["whiten"], save_strategy="steps", save_steps=1)
    train(path)
    trainer = train(path, ["--max_steps", "4", "--resume_from_checkpoint", "true"])
    assert trainer.state.global_step == 4
    assert trainer.pipeline.state_dict()["shape.0"]["count"] == 4 * 8


@pytest.mark.slow
def test_lora_on_a_4_bit_policy_trains_with_evaluation(make_recipe):
    keys = {"load_in_4bit": True, "use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
    length = {"use": "length", "with": {"soft_limit": 2, "hard_limit": 6}}
    trainer = train(make_recipe(rewards=["bleuberi", length], **keys))
    assert trainer.state.global_step == 2


def test_every_local_format_and_a_folder_of_splits_are_read(tmp_path, write):
    from datasets import Dataset

    from trl_rewards.data import load_splits

    data = Dataset.from_list([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}])
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "test"):
        data.to_json(folder / f"{split}.jsonl")
    data.to_csv(tmp_path / "data.csv", index=False)
    data.to_parquet(tmp_path / "data.parquet")
    data.to_json(tmp_path / "data.json")
    for name in ("data.csv", "data.parquet", "data.json"):
        assert load_splits(name, str(tmp_path))["train"]["prompt"][:] == ["a", "b"]
    assert set(load_splits(str(folder))) == {"train", "test"}
    with pytest.raises(RecipeError, match=r"'data.txt' is not one of .json"):
        load_splits(write("data.txt", "no"))


DATA = Path(os.environ.get("TRL_REWARDS_TEST_DATA", "no data"))


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="TRL_REWARDS_TEST_DATA has no gsm8k")
def test_gsm8k_goes_through_the_whole_path(make_recipe):
    """Nobody here made the data, and the bundled policy solves none of it; nothing may break."""
    path = make_recipe(
        model_name_or_path="bundled:tiny",
        dataset_name=str(DATA / "gsm8k" / "train.jsonl"),
        dataset={"columns": {"prompt": "question"}, "chat": True},
        max_completion_length=32,
        rewards=["accuracy", "regex_format", {"use": "length", "with": {"soft_limit": 16, "hard_limit": 32}}],
    )
    trainer = train(path)
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["rewards/accuracy/mean"] is not None
    assert log["rewards/accuracy/failed"] == 0
    assert -1 <= log["rewards/length/mean"] <= 0
    assert "frac_reward_zero_std" in log


def test_two_names_for_one_column_are_refused(make_recipe, no_model_is_loaded):
    said = problems_of(make_recipe(dataset={"columns": {"prompt": "question", "answer": "question"}}))
    assert "two names for one column" in said


def test_a_negative_weight_is_refused_where_the_combiner_has_no_use_for_it(make_recipe, no_model_is_loaded):
    path = make_recipe(combine="min", rewards=["bleuberi", {"use": "exact_match", "weight": -1}])
    said = problems_of(path)
    assert "combine: 'min' knows no negative weight (got -1)" in said


def test_a_checkpoint_that_is_not_there_is_refused(make_recipe, no_model_is_loaded):
    with pytest.raises(RecipeError, match="'runs/nope' is not a checkpoint folder"):
        train(make_recipe(), ["--resume_from_checkpoint", "runs/nope"])


def test_a_flag_without_its_number_is_refused(make_recipe):
    with pytest.raises(RecipeError, match="max_steps: must be int, got True"):
        Recipe.load(make_recipe(), ["--max_steps"])
