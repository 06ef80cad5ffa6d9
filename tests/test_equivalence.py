"""With the default pipeline our trainers are TRL's: same loss, same gradients, same logs."""

from __future__ import annotations

import pytest
import torch
import trl
from datasets import Dataset

import trl_rewards
from trl_rewards import Failed, Pipeline, Reward
from trl_rewards.schedules import Schedule
from trl_rewards.scoring import Source
from trl_rewards.trainers.mixin import PipelineMixin

pytestmark = pytest.mark.slow
STEPS = 4


def length_reward(completions, **kwargs):
    return [len(str(completion)) / 50 for completion in completions]


def vowel_reward(completions, **kwargs):
    return [str(completion).count("a") / 3 for completion in completions]


class LengthReward(Reward):
    def score(self, samples):
        return length_reward(samples.completions)


class VowelReward(Reward):
    def score(self, samples):
        return vowel_reward(samples.completions)


def default_pipeline(**options) -> Pipeline:
    weights = [Schedule.parse(1.0), Schedule.parse(0.5)]
    rewards = [Source("length_reward", LengthReward(), weights[0]), Source("vowel_reward", VowelReward(), weights[1])]
    return Pipeline(rewards, **options)


def prompts(count: int = 16) -> Dataset:
    return Dataset.from_dict({"prompt": [f"the cat ran {number} times" for number in range(count)]})


def arguments(config_class, folder, **options):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return config_class(**(defaults | options))


def history(trainer) -> list[dict]:
    """Logs of a run. Train a trainer before making the next: building one sets the global seed."""
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def assert_same(stock: list[dict], ours: list[dict]) -> None:
    assert len(stock) == len(ours) == STEPS
    assert any(abs(log["grad_norm"]) > 1e-4 for log in stock), "nothing was learnt, so nothing was compared"
    for theirs, mine in zip(stock, ours, strict=True):
        for key in ("loss", "grad_norm", "reward", "reward_std", "frac_reward_zero_std"):
            if key in theirs:  # steps that reuse a generation log no reward
                assert mine[key] == pytest.approx(theirs[key], abs=1e-6), key
        for name in ("rewards/length_reward/mean", "rewards/vowel_reward/std"):
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], abs=1e-6)


GRPO_CASES = {
    "group": {},
    "batch": {"scale_rewards": "batch"},
    "none": {"scale_rewards": "none"},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo"},
    "beta": {"beta": 0.1},
    "num_iterations": {"num_iterations": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
}


def rollout_with_foreign_tokens(prompts, trainer):
    """Completions of changing length, a stretch of which an environment wrote; half of them end properly."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    tokenizer = trainer.processing_class
    draw = [torch.randint(3, 250, (6 + row % 3,), generator=generator).tolist() for row in range(len(prompts))]
    ids = [[*tokens, tokenizer.eos_token_id] if row % 2 else tokens for row, tokens in enumerate(draw)]
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": ids,
        "logprobs": [[-1.0] * len(tokens) for tokens in ids],
        "env_mask": [[1, 1, 0, 0] + [1] * (len(tokens) - 4) for tokens in ids],
    }


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_tool_tokens_are_masked_as_in_stock_grpo(mask_truncated, policy_path, tmp_path):
    options = {"mask_truncated_completions": mask_truncated, "optim": "sgd"}
    stock_args = arguments(trl.GRPOConfig, tmp_path, reward_weights=[1.0, 0.5], **options)
    rewards = [length_reward, vowel_reward]
    rollout = rollout_with_foreign_tokens
    stock = history(trl.GRPOTrainer(policy_path, rewards, stock_args, train_dataset=prompts(), rollout_func=rollout))
    args = arguments(trl.GRPOConfig, tmp_path, **options)
    ours = trl_rewards.GRPOTrainer(
        policy_path, args=args, train_dataset=prompts(), rollout_func=rollout, pipeline=default_pipeline()
    )
    assert_same(stock, history(ours))


@pytest.mark.parametrize("case", GRPO_CASES)
def test_default_pipeline_equals_stock_grpo(case, policy_path, tmp_path):
    args = [arguments(trl.GRPOConfig, tmp_path, **GRPO_CASES[case]) for _ in range(2)]
    args[0].reward_weights = [1.0, 0.5]
    stock = history(trl.GRPOTrainer(policy_path, [length_reward, vowel_reward], args[0], train_dataset=prompts()))
    ours = history(
        trl_rewards.GRPOTrainer(policy_path, args=args[1], train_dataset=prompts(), pipeline=default_pipeline())
    )
    assert_same(stock, ours)


@pytest.mark.parametrize(
    ("scale_rewards", "advantage"), [("group", "group_norm"), ("batch", "batch_norm"), ("none", "center")]
)
def test_our_advantages_equal_trls(scale_rewards, advantage, policy_path, tmp_path):
    stock_args = arguments(
        trl.GRPOConfig, tmp_path, scale_rewards=scale_rewards, optim="sgd", reward_weights=[1.0, 0.5]
    )
    stock_trainer = trl.GRPOTrainer(policy_path, [length_reward, vowel_reward], stock_args, train_dataset=prompts())
    stock = history(stock_trainer)
    # The argument that TRL would use is another one, so equality is the plugin's doing. (SGD, because Adam's first
    # steps make much of the last bit of a gradient.)
    args = arguments(
        trl.GRPOConfig, tmp_path, optim="sgd", scale_rewards="none" if scale_rewards == "group" else "group"
    )
    pipeline = default_pipeline(advantage=trl_rewards.load_advantage(advantage))
    trainer = trl_rewards.GRPOTrainer(policy_path, args=args, train_dataset=prompts(), pipeline=pipeline)
    assert_same(stock, history(trainer))
    assert list(trainer._logs["advantages"]) == pytest.approx(list(stock_trainer._logs["advantages"]), abs=1e-5)


@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"beta": 0.1}, {"normalize_advantages": True}, {"num_iterations": 2}]
)
def test_default_pipeline_equals_stock_rloo(options, policy_path, tmp_path):
    args = [arguments(trl.RLOOConfig, tmp_path, **options) for _ in range(2)]
    args[0].reward_weights = [1.0, 0.5]
    stock = history(trl.RLOOTrainer(policy_path, [length_reward, vowel_reward], args[0], train_dataset=prompts()))
    ours = history(
        trl_rewards.RLOOTrainer(policy_path, args=args[1], train_dataset=prompts(), pipeline=default_pipeline())
    )
    assert_same(stock, ours)


def test_leave_one_out_equals_stock_rloo_without_kl(policy_path, tmp_path):
    stock_args = arguments(trl.RLOOConfig, tmp_path, beta=0.0, optim="sgd", reward_weights=[1.0, 0.5])
    stock = history(trl.RLOOTrainer(policy_path, [length_reward, vowel_reward], stock_args, train_dataset=prompts()))
    args = arguments(trl.RLOOConfig, tmp_path, beta=0.0, optim="sgd", normalize_advantages=True)
    pipeline = default_pipeline(advantage=trl_rewards.load_advantage("leave_one_out"))
    ours = history(trl_rewards.RLOOTrainer(policy_path, args=args, train_dataset=prompts(), pipeline=pipeline))
    assert_same(stock, ours)


def test_normalize_then_sum_with_center_equals_stock_gdpo(policy_path, tmp_path):
    options = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5]}
    stock_args = arguments(trl.GRPOConfig, tmp_path, **options)
    stock = history(trl.GRPOTrainer(policy_path, [length_reward, vowel_reward], stock_args, train_dataset=prompts()))
    pipeline = default_pipeline(
        combine=trl_rewards.load_combiner("normalize_then_sum"), advantage=trl_rewards.load_advantage("center")
    )
    args = arguments(trl.GRPOConfig, tmp_path)
    ours = history(trl_rewards.GRPOTrainer(policy_path, args=args, train_dataset=prompts(), pipeline=pipeline))
    for theirs, mine in zip(stock, ours, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-4)


@pytest.mark.parametrize("trainer", ["GRPO", "RLOO"])
def test_without_a_pipeline_nothing_changes(trainer, policy_path, tmp_path):
    config = getattr(trl, f"{trainer}Config")
    args = [arguments(config, tmp_path, reward_weights=[1.0, 0.5]) for _ in range(2)]
    rewards = [length_reward, vowel_reward]
    stock = history(getattr(trl, f"{trainer}Trainer")(policy_path, list(rewards), args[0], train_dataset=prompts()))
    ours = history(
        getattr(trl_rewards, f"{trainer}Trainer")(policy_path, list(rewards), args[1], train_dataset=prompts())
    )
    assert_same(stock, ours)


def test_a_noisy_reward_of_weight_0_changes_no_completion(policy_path, tmp_path):
    class Noisy(Reward):
        deterministic = False

        def score(self, samples):
            import random

            torch.manual_seed(len(samples))
            return [torch.rand(()).item() + random.random() for _ in range(len(samples))]

    def completions(pipeline) -> list:
        args = arguments(trl.GRPOConfig, tmp_path, log_completions=True)
        trainer = trl_rewards.GRPOTrainer(policy_path, args=args, train_dataset=prompts(), pipeline=pipeline)
        trainer.train()
        return list(trainer._logs["completion"])

    quiet = default_pipeline()
    noisy = default_pipeline()
    noisy.sources.append(Source("noise", Noisy(), Schedule.parse(0.0)))
    assert completions(quiet) == completions(noisy)


def test_rows_without_a_score_get_no_gradient_as_in_stock_trl(policy_path, tmp_path):
    def sometimes(completions, **kwargs):
        return [None if index % 4 == 1 else len(str(text)) for index, text in enumerate(completions)]

    class Sometimes(Reward):
        deterministic = False

        def score(self, samples):
            return [
                Failed("down") if index % 4 == 1 else float(len(str(text)))
                for index, text in enumerate(samples.completions)
            ]

    stock_args = arguments(trl.GRPOConfig, tmp_path)
    stock = history(trl.GRPOTrainer(policy_path, [sometimes], stock_args, train_dataset=prompts()))
    args = arguments(trl.GRPOConfig, tmp_path)
    ours = history(
        trl_rewards.GRPOTrainer(policy_path, args=args, train_dataset=prompts(), pipeline=Pipeline([Sometimes()]))
    )
    for theirs, mine in zip(stock, ours, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-6)
        assert mine["rewards/sometimes/missing"] == 0.25


class PositionAdvantage(trl_rewards.Advantage):
    """The centred reward, all of it on the first half of the tokens: a token-level advantage."""

    level = "token"

    def __call__(self, batch):
        centered = batch.rewards.view(-1, 4) - batch.rewards.view(-1, 4).mean(dim=1, keepdim=True)
        early = torch.arange(batch.mask.size(1)) < batch.mask.size(1) // 2
        return centered.view(-1, 1) * batch.mask * early


def test_token_level_advantages_train_in_grpo(policy_path, tmp_path):
    args = arguments(trl.GRPOConfig, tmp_path)
    pipeline = default_pipeline(advantage=PositionAdvantage())
    trainer = trl_rewards.GRPOTrainer(policy_path, args=args, train_dataset=prompts(), pipeline=pipeline)
    logs = history(trainer)
    assert all(log["grad_norm"] > 0 for log in logs)
    assert list(trainer._logs["advantages"])[-8:] == pytest.approx(trainer.last_advantages.tolist())


def test_a_token_level_advantage_that_is_constant_over_tokens_equals_the_sequence_level_one(policy_path, tmp_path):
    class Spread(trl_rewards.Advantage):
        level = "token"

        def __call__(self, batch):
            return trl_rewards.load_advantage("group_norm")(batch)[:, None] * batch.mask

    def run(advantage):
        args = arguments(trl.GRPOConfig, tmp_path, optim="sgd")
        pipeline = default_pipeline(advantage=advantage)
        return history(trl_rewards.GRPOTrainer(policy_path, args=args, train_dataset=prompts(), pipeline=pipeline))

    assert_same(run(trl_rewards.load_advantage("group_norm")), run(Spread()))


def test_rloo_refuses_a_token_level_advantage_and_a_replaced_one_with_kl(policy_path, tmp_path):
    for advantage, options, words in [
        (PositionAdvantage(), {"beta": 0.0}, "one advantage per sequence"),
        (trl_rewards.load_advantage("group_norm"), {"beta": 0.1}, "beta=0.0"),
    ]:
        args = arguments(trl.RLOOConfig, tmp_path, **options)
        with pytest.raises(ValueError, match=words):
            trl_rewards.RLOOTrainer(
                policy_path, args=args, train_dataset=prompts(), pipeline=default_pipeline(advantage=advantage)
            )


def test_a_trl_that_does_not_fit_is_refused_with_the_versions_that_do(policy_path, tmp_path):
    class Changed(trl.GRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions):
            raise NotImplementedError

    Changed.__module__ = "trl.trainer.grpo_trainer"

    class Ours(PipelineMixin, Changed):
        pass

    args = arguments(trl.GRPOConfig, tmp_path)
    with pytest.raises(ImportError, match=r"_calculate_rewards\(self, inputs.*known to work: trl 1.14 to 1.16"):
        Ours(policy_path, args=args, train_dataset=prompts(), pipeline=default_pipeline())


def test_report_to_works_as_in_trl(policy_path, tmp_path):
    pytest.importorskip("tensorboard")
    args = arguments(trl.GRPOConfig, tmp_path, report_to="tensorboard", max_steps=1)
    trainer = trl_rewards.GRPOTrainer(policy_path, args=args, train_dataset=prompts(), pipeline=default_pipeline())
    trainer.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = next(tmp_path.rglob("events.out.tfevents.*")).parent
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    assert {"train/rewards/length_reward/mean", "train/rewards/vowel_reward/weight"} <= set(tags["scalars"])


def test_reward_arguments_that_a_pipeline_replaces_are_refused(policy_path, tmp_path):
    make = trl_rewards.GRPOTrainer
    cases = [
        ({}, {"reward_funcs": [length_reward]}, "reward_funcs or pipeline, not both"),
        ({"reward_weights": [1.0, 1.0]}, {}, "each source has its own weight"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, {}, "combine='normalize_then_sum'"),
    ]
    for options, more, words in cases:
        args = arguments(trl.GRPOConfig, tmp_path, **options)
        with pytest.raises(ValueError, match=words):
            make(policy_path, args=args, train_dataset=prompts(), pipeline=default_pipeline(), **more)
