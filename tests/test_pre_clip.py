"""StableReinforce's Pre-CLIP in GRPO: extreme ratios give finite gradients, ordinary ones are TRL's."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import trl
from datasets import Dataset

from trl_rewards import GRPOTrainer, Recipe, RecipeError
from trl_rewards.preclip import LOSSES, PreClip
from trl_rewards.train import build_trainer
from trl_rewards.trainers.grpo import nearer


def arguments(**options):
    defaults = {"bf16": False, "use_cpu": True, "report_to": "none", "num_generations": 2, "num_iterations": 2}
    return trl.GRPOConfig("out", **(defaults | {"per_device_train_batch_size": 2, "disable_tqdm": True} | options))


def letters(completions, **_):
    return [len(str(text)) / 50 for text in completions]


@pytest.fixture(scope="module")
def trainer(policy_path):
    data = Dataset.from_dict({"prompt": ["the cat ran"] * 4})
    made = GRPOTrainer(policy_path, letters, arguments(beta=0.1), train_dataset=data, pre_clip=PreClip())
    made.current_gradient_accumulation_steps = 1
    made.model.eval()  # a loss outside the training loop
    return made


def loss_and_gradient(trainer, loss_type: str, pre_clip, log_ratios: torch.Tensor):
    """Of two completions of four tokens, whose log-ratios are as given; with a KL term."""
    trainer.loss_type, trainer.pre_clip = loss_type, pre_clip
    ids = torch.tensor([[9, 10, 11, 12], [12, 13, 9, 15]])
    ones = torch.ones_like(ids)
    together = torch.cat([ids[:, :2], ids], dim=1)
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, together, torch.ones_like(together), 4)[0]
    inputs = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": ones[:, :2],
        "completion_ids": ids,
        "completion_mask": ones,
        "advantages": torch.tensor([1.0, -1.0]),
        "old_per_token_logps": logps - log_ratios,
        "ref_per_token_logps": logps - 0.1,
        "num_items_in_batch": torch.tensor(8.0),
    }
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradient = torch.cat([weight.grad.flatten() for weight in trainer.model.parameters() if weight.grad is not None])
    return loss.detach(), gradient


ORDINARY = torch.tensor([[0.1, -0.3, 0.0, 0.5], [-0.2, 0.4, 1.5, -2.0]])
EXTREME = torch.tensor([[0.1, -100.0, 0.0, 100.0], [-0.2, 100.0, 0.3, -100.0]])


@pytest.mark.parametrize("loss_type", LOSSES)
def test_ordinary_ratios_have_trls_loss_and_extreme_ones_a_finite_gradient(trainer, loss_type):
    wanted, wanted_gradient = loss_and_gradient(trainer, loss_type, None, ORDINARY)
    loss, gradient = loss_and_gradient(trainer, loss_type, PreClip(), ORDINARY)
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    assert (gradient - wanted_gradient).abs().max() <= 1e-6 < wanted_gradient.abs().max()
    assert not loss_and_gradient(trainer, loss_type, None, EXTREME)[1].isfinite().all()
    loss, gradient = loss_and_gradient(trainer, loss_type, PreClip(), EXTREME)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 1e-6  # of the ordinary tokens, and of the KL term


def test_a_token_outside_counts_with_its_limit_and_has_no_gradient():
    old = torch.tensor([0.0, 0.0, 0.0, 0.0])
    logps = torch.tensor([0.5, 100.0, -100.0, -0.5], requires_grad=True)
    ratio = (logps - nearer(old, logps, PreClip())).exp()
    assert ratio.tolist() == pytest.approx([math.exp(0.5), 1e3, 1e-3, math.exp(-0.5)], rel=1e-4)
    ratio.sum().backward()
    assert logps.grad.tolist() == pytest.approx([math.exp(0.5), 0.0, 0.0, math.exp(-0.5)], rel=1e-6)


def test_what_it_cannot_go_with_is_refused_before_a_model_loads(policy_path):
    for options, said in [
        ({"loss_type": "cispo"}, "goes with a loss_type of grpo, bnpo, dr_grpo, dapo, sapo, got 'cispo'"),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, "set importance_sampling_level: token"),
        ({"off_policy_mask_threshold": 0.5}, "leave one of the two out"),
    ]:
        with pytest.raises(ValueError, match=said):
            GRPOTrainer("no/model", letters, arguments(**options), pre_clip=PreClip())
        recipe = {"rewards": ["exact_match"], "pre_clip": True, **options}
        with pytest.raises(RecipeError, match=said):
            Recipe.parse(recipe)


def test_the_recipes_key_is_checked_and_part_of_the_signature():
    recipe = Recipe.parse({"rewards": ["exact_match"], "pre_clip": {"high": 100.0}}, check_trl=False)
    assert recipe.pre_clip == PreClip(high=100.0)
    assert "pre_clip:high:100.0,low:0.001" in recipe.signature
    assert Recipe.parse({"rewards": ["exact_match"], "pre_clip": False}, check_trl=False).pre_clip is None
    for entry, said in [
        (3, "pre_clip: must be a mapping of options, such as {low: 0.001, high: 1000.0}, or true"),
        ({"hihg": 2.0}, "pre_clip: unknown option 'hihg', did you mean 'high'"),
        ({"low": 2.0}, "pre_clip: low must be between 0 and 1"),
    ]:
        with pytest.raises(RecipeError, match=said):
            Recipe.parse({"rewards": ["exact_match"], "pre_clip": entry}, check_trl=False)
    with pytest.raises(RecipeError, match="pre_clip: trainer 'rloo' does not take it"):
        Recipe.parse({"trainer": "rloo", "rewards": ["exact_match"], "pre_clip": True}, check_trl=False)


def test_updates_by_the_policy_that_wrote_the_batch_have_nothing_to_limit(caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(OSError):
        GRPOTrainer("./none", letters, arguments(num_iterations=1), pre_clip=PreClip())
    assert "pre_clip changes nothing" in caplog.text


@pytest.mark.slow
def test_a_recipes_limits_reach_the_loss_of_a_run(policy_path, write, tmp_path):
    code = "def vowels(completions, **_):\n    return [sum(c in 'aeiou' for c in text) / 9 for text in completions]\n"
    recipe = {
        "model_name_or_path": policy_path,
        "dataset_name": write("rows.jsonl", "".join(f'{{"prompt": "the cat ran {row} times"}}\n' for row in range(8))),
        "rewards": [{"use": f"{write('reward.py', code)}:vowels"}],
        "output_dir": str(tmp_path / "out"),
        "num_generations": 8,
        "per_device_train_batch_size": 8,
        "max_completion_length": 16,
        "max_steps": 2,
        "num_iterations": 2,
        "learning_rate": 0.1,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
    }
    norms = []
    for more in ({}, {"pre_clip": {"low": 1 - 1e-6, "high": 1 + 1e-6}}):
        trainer, _ = build_trainer(Recipe.parse(recipe | more))
        trainer.train()
        norms.append([log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log])
    plain, narrow = norms
    assert narrow[0] == plain[0] > 1e-4  # the first update of a batch is by the policy that wrote it
    assert narrow[1] < 0.1 * plain[1]  # at the second all tokens that moved are outside
