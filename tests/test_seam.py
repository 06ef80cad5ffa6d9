"""Where our trainers meet TRL's: arguments that nobody gave, and a TRL that does not fit."""

from __future__ import annotations

import logging
import re

import pytest
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM

import trl_rewards
from trl_rewards import Pipeline, Reward
from trl_rewards.preclip import PreClip
from trl_rewards.trainers.seam import LOGPS, check_seam


class Lengths(Reward):
    def setup(self, context):
        self.context = context

    def score(self, samples):
        return [len(text) / 50 for text in samples.texts]


def prompts(count: int = 16) -> Dataset:
    return Dataset.from_dict({"prompt": [f"the cat ran {number} times" for number in range(count)]})


@pytest.fixture
def without_arguments(tmp_path, monkeypatch):
    """Where TRL's default arguments will do: they ask for bfloat16, which transformers allows on a GPU alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.parametrize("loaded", [False, True], ids=["name", "model"])
def test_trls_defaults_are_checked_as_if_they_were_given(loaded, policy_path, without_arguments):
    policy = AutoModelForCausalLM.from_pretrained(policy_path) if loaded else policy_path
    pipeline = Pipeline([Lengths()], advantage=trl_rewards.load_advantage("group_norm"))
    with pytest.raises(ValueError, match=re.escape("set beta=0.0 (got 0.05)")):
        trl_rewards.RLOOTrainer(policy, train_dataset=prompts(), pipeline=pipeline)
    with pytest.raises(ValueError, match="train_dataset has 0 prompts, and a generation batch takes 1 different"):
        trl_rewards.GRPOTrainer(policy, train_dataset=prompts(0), pipeline=Pipeline([Lengths()]))


def test_without_arguments_components_are_told_trls_seed_and_the_device(policy_path, without_arguments):
    stock = trl.GRPOTrainer(policy_path, lambda completions, **_: [0.0], train_dataset=prompts())
    reward = Lengths()
    ours = trl_rewards.GRPOTrainer(policy_path, train_dataset=prompts(), pipeline=Pipeline([reward]))
    assert (reward.context.seed, reward.context.device) == (stock.args.seed, stock.args.device)
    assert ours.args.output_dir == stock.args.output_dir


def test_without_arguments_pre_clip_says_that_it_changes_nothing(without_arguments, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(OSError):
        trl_rewards.GRPOTrainer("./none", Lengths(), pre_clip=PreClip())
    assert "pre_clip changes nothing" in caplog.text


def of_another_trl(name, method):
    """GRPOTrainer on a TRL whose trainer has this method under this name."""
    theirs = type("Theirs", (trl.GRPOTrainer,), {name: method, "__module__": "trl.trainer.grpo_trainer"})
    return type("Ours", (trl_rewards.GRPOTrainer, theirs), {})


@pytest.mark.parametrize("options", [{"pipeline": Pipeline([Lengths()])}, {"pre_clip": PreClip()}], ids=list)
def test_a_trl_whose_log_probabilities_take_other_inputs_is_refused_before_a_model_loads(options, without_arguments):
    def packed(self, model, inputs, logits_to_keep): ...

    name = "_get_per_token_logps_and_entropies"
    with pytest.raises(ImportError, match=rf"{name}\(self, model, inputs, logits_to_keep\).*known to work: trl 1.14"):
        of_another_trl(name, packed)("./none", train_dataset=prompts(), **options)


@pytest.mark.parametrize("trainer", [trl.GRPOTrainer, trl.RLOOTrainer])
def test_log_probabilities_of_trls_that_are_known_fit(trainer):
    def of_1_14(self, model, *args, batch_size=None, compute_aux_loss=False, **kwargs): ...

    name = "_get_per_token_logps_and_entropies"
    check_seam(trainer, LOGPS)
    check_seam(of_another_trl(name, of_1_14), LOGPS)
    with pytest.raises(ImportError, match="does not fit"):
        check_seam(of_another_trl(name, lambda self, model, input_ids: ...), LOGPS)
