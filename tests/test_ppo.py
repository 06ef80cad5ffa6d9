"""PPO's trainer: it learns what can be learnt, its losses are the formulae's, and runs resume and agree."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
)

from trl_rewards import Pipeline, PPOConfig, PPOTrainer, Reward, TokenReward, load_advantage, load_combiner
from trl_rewards.components import Advantage
from trl_rewards.maths import whiten_masked

pytestmark = pytest.mark.slow

PROMPTS = Dataset.from_dict({"prompt": [f"the cat ran {number} times" for number in range(64)]})


def arguments(folder, **options):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "max_completion_length": 6,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "kl_coef": 0.0,
        "num_ppo_epochs": 2,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 5,
    }
    return PPOConfig(**(defaults | options))


def even(completions, completion_ids, **kwargs):
    """A plain TRL reward function: the share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


class EvenTokens(TokenReward):
    """Each even token id earns 1."""

    def score_tokens(self, samples):
        return [[float(token % 2 == 0) for token in ids] for ids in samples.completion_ids]


class Gradients(TrainerCallback):
    """Keeps the policy's gradients, weights and batch of every optimiser step."""

    def __init__(self):
        self.steps: list[dict] = []
        self.trainer: PPOTrainer | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        self.steps.append({"weights": weights, "gradients": gradients, "batch": dict(self.trainer._batch)})


def test_a_two_armed_bandit_is_solved_with_a_plain_reward_function(policy_path, tmp_path):
    args = arguments(tmp_path, max_completion_length=1, max_steps=30, per_device_train_batch_size=32)
    trainer = PPOTrainer(policy_path, even, args, train_dataset=PROMPTS)
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert rewards[0] < 0.75
    assert rewards[-1] > 0.95


def test_in_a_game_of_tokens_policy_and_critic_reach_the_known_optimum(policy_path, tmp_path):
    """Four tokens, one point for each even one: all even is best, and the values are then what is still to come."""
    args = arguments(
        tmp_path,
        max_completion_length=4,
        generation_kwargs={"min_new_tokens": 4},
        max_steps=60,
        per_device_train_batch_size=32,
        cliprange_value=None,
    )
    trainer = PPOTrainer(policy_path, args=args, train_dataset=PROMPTS, pipeline=Pipeline([EvenTokens()]))
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert rewards[0] < 3
    assert rewards[-1] > 3.8
    assert trainer.last_batch.values.mean(dim=0).tolist() == pytest.approx([4, 3, 2, 1], abs=0.4)


def test_policy_and_value_gradients_equal_a_float64_reference(policy_path, tmp_path):
    """Two passes over a batch of two micro-batches: the second pass has ratios and values that moved."""
    seen, critics = Gradients(), []
    args = arguments(
        tmp_path, kl_coef=0.1, gradient_accumulation_steps=2, max_grad_norm=1e9, cliprange=0.02, max_steps=2,
        cliprange_value=0.02,
    )  # fmt: skip
    trainer = PPOTrainer(policy_path, even, args, train_dataset=PROMPTS, callbacks=[seen])
    seen.trainer = trainer
    keep = trainer._set_gradients_aside

    def watched(critic):
        weights = {name: weight.detach().clone() for name, weight in critic.trained.items()}
        critics.append((weights, {name: weight.grad.clone() for name, weight in critic.trained.items()}))
        return keep(critic)

    trainer._set_gradients_aside = watched
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float64)
    whole = {name: torch.cat([part[name] for part in trainer._buffered_inputs]) for name in trainer._buffered_inputs[0]
             if trainer._buffered_inputs[0][name].dim() > 1}  # fmt: skip
    mask = whole["completion_mask"]
    for step, (value_weights, value_gradients) in zip(seen.steps, critics, strict=True):
        model.load_state_dict({name: weight.double() for name, weight in step["weights"].items()}, strict=False)
        model.zero_grad()
        ids = torch.cat([whole["prompt_ids"], whole["completion_ids"]], dim=1)
        attention = torch.cat([whole["prompt_mask"], mask], dim=1)
        width = mask.shape[1]
        logits = model(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1]
        logps = logits.log_softmax(-1).gather(2, whole["completion_ids"][..., None]).squeeze(2)
        old = whole["old_per_token_logps"].double()
        ratio, advantages = (logps - old).exp(), whole["advantages"].double()
        loss = -torch.min(ratio * advantages, ratio.clamp(0.98, 1.02) * advantages)
        ((loss * mask).sum() / mask.sum()).backward()
        for name, gradient in step["gradients"].items():
            wanted = model.get_parameter(name).grad
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())

        trunk = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float64).model
        trunk.load_state_dict({n: w.double() for n, w in value_weights.items() if not n.startswith("value_head")})
        head = [value_weights[f"value_head.{part}"].double().requires_grad_() for part in ("weight", "bias")]
        hidden = trunk(input_ids=ids, attention_mask=attention).last_hidden_state[:, -width - 1 : -1]
        values = torch.nn.functional.linear(hidden, *head).squeeze(2)
        before, targets = whole["old_values"].double(), whole["value_targets"].double()
        held = before + (values - before).clamp(-0.02, 0.02)
        loss = torch.maximum((values - targets) ** 2, (held - targets) ** 2) / 2
        ((loss * mask).sum() / mask.sum()).backward()
        torch.testing.assert_close(value_gradients["value_head.weight"].double(), head[0].grad, rtol=1e-3, atol=1e-5)
        for name, weight in trunk.named_parameters():
            largest = weight.grad.abs().max().item()
            torch.testing.assert_close(
                value_gradients[name].double(), weight.grad, rtol=1e-3, atol=1e-5 * largest + 1e-12
            )


def test_a_batch_holds_what_the_formulae_make_of_it(policy_path, tmp_path):
    """Token rewards = total at the last token - kl_coef · k1; the loss sees GAE of these, whitened."""
    args = arguments(tmp_path, kl_coef=0.3, max_steps=4, missing_eos_penalty=2.0, num_ppo_epochs=1)
    trainer = PPOTrainer(policy_path, even, args, train_dataset=PROMPTS)
    seen = []
    finished = trainer._finished

    def watched(advantages, batch, output):
        result = finished(advantages, batch, output)
        seen.append((advantages, batch, result))
        return result

    trainer._finished = watched
    trainer.train()
    advantages, batch, trained_on = seen[-1]
    mask = batch.mask
    ended = torch.tensor([ids[-1] == trainer._tokenizer.eos_token_id for ids in batch.samples.completion_ids])
    raw = batch.scores.values[:, 0]
    assert (~ended).any()
    torch.testing.assert_close(batch.rewards, raw - 2.0 * ~ended)
    kl = (batch.logps - batch.ref_logps) * mask
    assert kl.abs().max() > 1e-3, "the policy has not moved, so nothing was compared"
    at_last = torch.zeros_like(batch.token_rewards)
    at_last[torch.arange(len(mask)), mask.sum(dim=1) - 1] = batch.rewards
    torch.testing.assert_close(batch.token_rewards, at_last - 0.3 * kl)
    wanted = torch.zeros_like(advantages)
    for row in range(len(mask)):
        running, following = 0.0, 0.0
        for t in reversed(range(int(mask[row].sum()))):
            value = batch.values[row, t].item()
            running = batch.token_rewards[row, t].item() + following - value + 0.95 * running
            following = value
            wanted[row, t] = running
    torch.testing.assert_close(advantages, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained_on, whiten_masked(advantages, mask).float())
    log = trainer.state.log_history[-2]
    assert log["kl/sequence"] == pytest.approx(kl.sum(dim=1).mean().item(), rel=1e-4)


def test_a_row_without_a_score_moves_neither_policy_nor_critic(policy_path, tmp_path):
    class Silent(Reward):
        def score(self, samples):
            return [None] * len(samples)

    args = arguments(tmp_path, kl_coef=0.0, max_steps=2)
    trainer = PPOTrainer(policy_path, args=args, train_dataset=PROMPTS, pipeline=Pipeline([Silent()]))
    policy = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    critic = {name: weight.clone() for name, weight in trainer.critic.state_dict().items()}
    trainer.train()
    assert all(torch.equal(policy[name], weight) for name, weight in trainer.model.named_parameters())
    assert all(torch.equal(critic[name], weight) for name, weight in trainer.critic.state_dict().items())


def test_an_advantage_without_values_builds_no_critic(policy_path, tmp_path):
    pipeline = Pipeline([EvenTokens()], advantage=load_advantage("group_norm"))
    trainer = PPOTrainer(
        policy_path, args=arguments(tmp_path, num_generations=4), train_dataset=PROMPTS, pipeline=pipeline
    )
    trainer.train()
    assert trainer.critic is None
    assert trainer.state.log_history[0]["reward"] > 0


def test_an_advantage_may_say_what_the_critic_is_trained_on(policy_path, tmp_path):
    class Whole(Advantage):
        level = "token"
        needs = frozenset({"mask", "values"})

        def __call__(self, batch):
            return (batch.rewards[:, None] - batch.values) * batch.mask

        def value_targets(self, batch, advantages):
            return batch.mask * 7.0

    args = arguments(tmp_path, max_steps=40, cliprange_value=None)
    trainer = PPOTrainer(
        policy_path, args=args, train_dataset=PROMPTS, pipeline=Pipeline([EvenTokens()], advantage=Whole())
    )
    trainer.train()
    batch = trainer.last_batch
    assert batch.values[batch.mask.bool()].mean().item() == pytest.approx(7.0, abs=0.7)


LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("critic", ["adapter", "model"])
def test_a_4bit_policy_with_lora_trains_with_either_critic(policy_path, tmp_path, critic):
    """Policy and critic learn apart from each other, through evaluations, on one base or on two."""
    args = arguments(
        tmp_path, critic=critic, critic_warmup_steps=2, max_steps=4, kl_coef=0.05, num_ppo_epochs=1,
        eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8, save_strategy="steps", save_steps=4,
        gradient_checkpointing=True, critic_learning_rate=3e-2,
    )  # fmt: skip
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    seen = Gradients()
    trainer = PPOTrainer(
        policy_path, even, args, train_dataset=PROMPTS, eval_dataset=PROMPTS, quantization_config=quantised,
        peft_config=LoraConfig(**LORA), callbacks=[seen],
    )  # fmt: skip
    seen.trainer = trainer
    frozen = {name: weight.clone() for name, weight in trainer.model.named_parameters() if "lora" not in name}
    untrained = {name: weight.clone() for name, weight in trainer.critic.state_dict().items()}
    first = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if ".default." in name}
    trainer.train()
    held = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert not held & {id(weight) for weight in trainer.critic.trained.values()}
    assert held == {id(weight) for name, weight in trainer.model.named_parameters() if ".default." in name}
    for name, weight in first.items():
        assert torch.equal(seen.steps[2]["weights"][name], weight), f"{name} moved while the critic warmed up"
    assert any(
        not torch.equal(weight, first[name]) for name, weight in trainer.model.named_parameters() if name in first
    )
    assert all(torch.equal(weight, frozen[n]) for n, weight in trainer.model.named_parameters() if n in frozen)
    changed = [
        name for name, weight in trainer.critic.state_dict().items() if not torch.equal(weight, untrained[name])
    ]
    assert "value_head.weight" in changed
    assert any("lora_B" in name for name in changed)
    assert not any("critic" in name for step in seen.steps for name in step["gradients"])
    checkpoint = tmp_path / "checkpoint-4"
    assert {"critic.safetensors", "critic.pt"} <= {file.name for file in checkpoint.iterdir()}
    assert math.isfinite(trainer.state.log_history[-2]["eval_reward"])


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_repeats_the_straight_one_to_the_last_bit(policy_path, tmp_path, lora):
    def make(folder, steps):
        args = arguments(
            folder, max_steps=6, kl_coef=0.2, kl_target=0.1, kl_horizon=100, save_strategy="steps", save_steps=steps,
            lr_scheduler_type="linear",
        )  # fmt: skip
        peft = LoraConfig(**LORA) if lora else None
        return PPOTrainer(policy_path, even, args, train_dataset=PROMPTS, peft_config=peft)

    straight = make(tmp_path / "straight", 6)
    straight.train()
    stopped = make(tmp_path / "stopped", 2)
    stopped.train()
    resumed = make(tmp_path / "stopped", 2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-4"))
    assert resumed.kl.coefficient == straight.kl.coefficient != 0.2
    for name, weight in straight.critic.state_dict().items():
        assert torch.equal(resumed.critic.state_dict()[name], weight), name
    for name, weight in straight.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), weight), name


RANKS = """
import json, sys
import torch
from datasets import Dataset
from peft import LoraConfig
from trl_rewards import PPOConfig, PPOTrainer

policy, folder, world = sys.argv[1], sys.argv[2], int(sys.argv[3])
prompts = Dataset.from_dict({"prompt": [f"the cat ran {number} times" for number in range(8)]})


def even(completions, completion_ids, **kwargs):
    return [sum(token % 2 == 0 for token in ids) / len(ids) + len(ids) for ids in completion_ids]


results = []
for peft in (None, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")):
    args = PPOConfig(
        folder, per_device_train_batch_size=8 // world, max_completion_length=6, max_steps=4, learning_rate=1e-2,
        kl_coef=0.1, kl_target=0.5, num_ppo_epochs=2, logging_steps=1, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", gradient_checkpointing=False, generation_kwargs={"do_sample": False},
        shuffle_dataset=False, seed=5)
    torch.manual_seed(5)  # TRL 1.14 draws an adapter's start from whatever the run before left
    trainer = PPOTrainer(policy, even, args, train_dataset=prompts, peft_config=peft)
    assert trainer.accelerator.num_processes == world
    trainer.train()
    sums = {name: weight.double().abs().sum().item() for name, weight in trainer.critic.state_dict().items()}
    sums |= {name: weight.detach().double().abs().sum().item() for name, weight in trainer.model.named_parameters()}
    every = [sums] * world
    if world > 1:
        torch.distributed.all_gather_object(every, sums)
    assert every[0] == every[-1], "processes ended with different weights"
    names = ("reward", "kl", "kl/coefficient")
    results.append([sums, [{k: log[k] for k in names if k in log} for log in trainer.state.log_history]])
if trainer.accelerator.process_index == 0:
    print("RESULT" + json.dumps(results))
if world > 1:
    torch.distributed.destroy_process_group()
"""


def test_two_processes_learn_what_one_does_with_a_critic_of_either_kind(policy_path, tmp_path, run_ranks):
    results = []
    for world in (1, 2):
        done = run_ranks(RANKS, world, policy_path, str(tmp_path / str(world)), str(world))
        line = next(line for line in done.stdout.splitlines() if "RESULT" in line)
        results.append(json.loads(line.partition("RESULT")[2]))
    for (one, one_log), (two, two_log) in zip(*results, strict=True):
        assert one.keys() == two.keys()
        for name, total in one.items():
            assert two[name] == pytest.approx(total, rel=1e-3, abs=1e-5), name
        for first, second in zip(one_log, two_log, strict=True):
            assert second == pytest.approx(first, rel=1e-3, abs=1e-6)


def test_several_reward_functions_add_up_by_their_weights_under_their_own_names(policy_path, tmp_path):
    def one(completions, **kwargs):
        return [1.0] * len(completions)

    args = arguments(tmp_path, max_steps=1, reward_weights=[1.0, 0.5, 0.25])
    trainer = PPOTrainer(policy_path, [even, one, one], args, train_dataset=PROMPTS)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/one_1/mean"] == log["rewards/one_2/mean"] == 1.0
    assert log["reward"] == pytest.approx(log["rewards/even/mean"] + 0.75)
    assert args.reward_weights == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("warmup", [0, 1])
def test_the_critics_gradients_are_those_of_all_micro_batches_also_while_it_warms_up(policy_path, tmp_path, warmup):
    """Of an optimiser step of two micro-batches, against one of the whole batch."""
    norms = []
    for size, accumulated in ((16, 1), (8, 2)):
        args = arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, max_steps=2,
            critic_warmup_steps=warmup, generation_kwargs={"do_sample": False}, shuffle_dataset=False,
            num_ppo_epochs=1,
        )  # fmt: skip
        trainer = PPOTrainer(policy_path, even, args, train_dataset=PROMPTS, peft_config=LoraConfig(**LORA))
        keep, seen = trainer._set_gradients_aside, []

        def watched(critic, keep=keep, seen=seen):
            seen.append({name: weight.grad.clone() for name, weight in critic.trained.items()})
            return keep(critic)

        trainer._set_gradients_aside = watched
        trainer.critic.trained["value_head.weight"].data.fill_(0.1)  # a head of zeros gives LoRA no gradient
        trainer.train()
        norms.append(seen[0])
    whole, parts = norms
    assert any(gradient.abs().max() > 1e-6 for name, gradient in whole.items() if "lora_B" in name)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-7)


def test_making_a_critic_leaves_the_policys_random_stream_and_weights_alone(policy_path, tmp_path):
    from peft import get_peft_model

    from trl_rewards.trainers.critic import adapter_critic

    policy = AutoModelForCausalLM.from_pretrained(policy_path)
    policy = get_peft_model(policy, LoraConfig(**LORA, init_lora_weights="pissa"))
    ids = torch.arange(5, 25)[None]
    before, drawn = policy(ids).logits, torch.random.get_rng_state()
    critic = adapter_critic(policy, seed=3)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert torch.equal(policy(ids).logits, before)
    with torch.no_grad(), critic.working(False):
        assert critic.values(ids, torch.ones_like(ids), 4).tolist() == [[0.0] * 4]


def test_a_critic_begins_as_the_reward_model_it_is_given(policy_path, reward_model_path, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_path, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(policy_path).save_pretrained(tmp_path / "rm")
    args = arguments(tmp_path, critic="model", critic_model_name_or_path=str(tmp_path / "rm"))
    trainer = PPOTrainer(policy_path, even, args, train_dataset=PROMPTS)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), trainer.critic.working(False):
        found = trainer.critic.values(torch.cat([ids, ids[:, :1]], dim=1), torch.ones(1, 21, dtype=torch.long), 1)
        assert found.item() == pytest.approx(model(ids).logits.item(), abs=1e-5)


def test_a_critic_that_reads_other_token_ids_is_refused(policy_path, reward_model_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "policy")
    AutoModelForCausalLM.from_pretrained(policy_path).save_pretrained(tmp_path / "policy")
    args = arguments(tmp_path, critic="model", critic_model_name_or_path=reward_model_path)
    with pytest.raises(ValueError, match="has another vocabulary than the policy"):
        PPOTrainer(str(tmp_path / "policy"), even, args, train_dataset=PROMPTS)


def test_wrong_combinations_are_refused_before_a_model_is_loaded(tmp_path):
    nowhere = str(tmp_path / "no-model")
    with pytest.raises(ValueError, match="critic 'adapter' needs a policy with LoRA"):
        PPOTrainer(nowhere, even, arguments(tmp_path, critic="adapter"), train_dataset=PROMPTS)
    with pytest.raises(ValueError, match="PPO needs rewards"):
        PPOTrainer(nowhere, args=arguments(tmp_path), train_dataset=PROMPTS)
    with pytest.raises(ValueError, match="64 prompts, and a generation batch takes 65 different ones"):
        PPOTrainer(nowhere, even, arguments(tmp_path, per_device_train_batch_size=65), train_dataset=PROMPTS)
    args = arguments(tmp_path, reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="2 reward_weights for 1 reward_funcs"):
        PPOTrainer(nowhere, even, args, train_dataset=PROMPTS)
    blind = Pipeline([EvenTokens()], advantage=load_advantage("group_norm"))
    args = arguments(tmp_path, kl_coef=0.1, num_generations=4)
    with pytest.raises(ValueError, match="'group_norm' does not look at token rewards, where the KL penalty is"):
        PPOTrainer(nowhere, args=args, train_dataset=PROMPTS, pipeline=blind)
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="advantage 'group_norm' compares the completions of a prompt"):
        PPOTrainer(nowhere, args=args, train_dataset=PROMPTS, pipeline=blind)
    sums = Pipeline([EvenTokens()], combine=load_combiner("normalize_then_sum"))
    with pytest.raises(ValueError, match="combine 'normalize_then_sum' compares the completions of a prompt"):
        PPOTrainer(nowhere, args=args, train_dataset=PROMPTS, pipeline=sums)
    args = arguments(tmp_path, critic_model_name_or_path="elsewhere")
    with pytest.raises(ValueError, match="critic_model_name_or_path needs critic 'model'"):
        PPOTrainer(nowhere, even, args, train_dataset=PROMPTS, peft_config=LoraConfig(**LORA))
