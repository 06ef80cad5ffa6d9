"""POLAR's objective: the recorded loss, the tokens it trains on, and a model that learns to tell policies apart."""

from __future__ import annotations

import json
import random

import pytest
import torch

from trl_rewards import Preferences, RecipeError, load_objective, load_reward
from trl_rewards.testing import check_objective
from trl_rewards.train import train

WORDS = {"warm": ["sat", "ran", "cat"], "cold": ["sky", "dog", "times"]}


def pairs_of(loss_type: str, chosen: list[float], rejected: list[float]) -> torch.Tensor:
    objective = load_objective("polar", loss_type=loss_type)
    return objective.loss(Preferences(torch.tensor(chosen), torch.tensor(rejected), torch.zeros(()), {}))


def test_loss_is_the_recorded_one():
    """polar-loss-01: chosen (1, 0, -2), rejected (0, 0, 1)."""
    assert pairs_of("ranking", [1, 0, -2], [0, 0, 1]).item() == pytest.approx(1.351665, abs=1e-6)
    assert pairs_of("focal", [1, 0, -2], [0, 0, 1]).item() == pytest.approx(1.277456, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["ranking", "focal"])
def test_objective_keeps_its_contract(loss_type):
    check_objective(load_objective("polar", loss_type=loss_type))


def test_lengths_without_room_for_a_prompt_are_refused():
    with pytest.raises(RecipeError, match="no room for a prompt"):
        load_objective("polar", max_length=100, max_response_length=50)


@pytest.fixture
def triples(tmp_path):
    """Rows whose reference and chosen answer come from one distribution of words and the rejected from another."""
    random.seed(0)

    def trajectory(policy: str) -> str:
        return " ".join(random.choices(WORDS[policy], k=6))

    rows = []
    for count in range(96):
        one, other = random.sample(list(WORDS), 2)
        prompt = f"the count is {count}"
        rows.append(
            {
                "prompt": prompt,
                "reference": trajectory(one),
                "chosen": trajectory(one),
                "rejected": trajectory(other),
                "wrapper": "sft" if count % 2 else "pretrain",
            }
        )
    file = tmp_path / "triples.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.fixture
def fit(write, triples, policy_path, tmp_path):
    def run(**overrides):
        path = write(
            "polar.yaml",
            "trainer: reward\nobjective: {use: polar, with: {max_length: 200, max_response_length: 40}}\n"
            f"model_name_or_path: {policy_path}\ndataset_name: {triples}\nmax_steps: 2\nlearning_rate: 3.0e-3\n"
            "per_device_train_batch_size: 16\nlogging_steps: 1\nreport_to: none\nsave_strategy: no\n"
            f"output_dir: {tmp_path / 'polar'}\n",
        )
        words = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
        trainer = train(path, words)
        return trainer, [line for line in trainer.state.log_history if "loss" in line]

    return run


def test_rows_end_in_the_reward_token_and_hold_the_separator_once(fit):
    trainer, _ = fit()
    tokenizer = trainer.processing_class
    separator, mark = tokenizer.convert_tokens_to_ids(["<|reward|>", "[UNUSED_TOKEN_130]"])
    assert trainer.model.config.reward_token_id == mark
    for row in trainer.train_dataset:
        for name in ("chosen_ids", "rejected_ids"):
            assert row[name][-1] == mark
            assert row[name].count(separator) == row[name].count(mark) == 1
    newlines = [tokenizer.decode(row["chosen_ids"]).count("\n") for row in trainer.train_dataset]
    assert newlines[:4] == [0, 2, 0, 2]  # the column `wrapper`: pretrain, sft, …


def test_a_new_score_head_starts_at_zero(fit):
    _, lines = fit()
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.slow
def test_a_model_learns_to_tell_policies_apart_and_scores_as_a_reward(fit, tmp_path):
    _, lines = fit(max_steps=60)
    assert lines[-1]["loss"] < 0.2
    assert lines[-1]["accuracy"] > 0.9
    reward = load_reward(
        "polar", path=str(tmp_path / "polar"), dtype="float32", max_length=200, max_response_length=40
    )
    warm, cold = "cat sat ran ran sat", "sky dog times sky"
    for reference, same, other in ((warm, "sat sat cat ran cat", cold), (cold, "dog dog sky", warm)):
        scores = reward(prompts=["the count is 5"] * 2, completions=[same, other], reference=[reference] * 2)
        assert scores[0] > scores[1]


@pytest.mark.slow
def test_lora_on_4bit_trains_the_marks_and_the_head(fit, tmp_path):
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path / "qwen3")
    tokenizer.save_pretrained(tmp_path / "qwen3")
    trainer, lines = fit(
        model_name_or_path=tmp_path / "qwen3",
        load_in_4bit="true",
        use_peft="true",
        lora_r=4,
        lora_target_modules="[q_proj, v_proj]",
        max_steps=3,
    )
    trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert any("score" in name for name in trained)
    assert any("trainable_tokens" in name for name in trained)
    assert len({line["loss"] for line in lines}) > 1


@pytest.mark.slow
def test_lora_trains_the_head_of_internlm2(fit, polar_path):
    trainer, _ = fit(
        model_name_or_path=polar_path, use_peft="true", lora_r=2, lora_target_modules="[wqkv, wo]", max_steps=2
    )
    trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert any("v_head" in name for name in trained)
