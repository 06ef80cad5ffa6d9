"""The reward `prime` is what its formula says, learns from outcomes, and keeps nothing but its adapter's state."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_rewards import Context, Pipeline, Reward, RewardError, Samples, load_reward, load_shaper
from trl_rewards.scoring import Source
from trl_rewards.testing import check_reward

WORDS = ["the cat ran", "a dog sat on the mat", "cats", "the dog ran and ran"]


class Even(Reward):
    """1 where a completion's first token id is even."""

    def score(self, samples):
        return [float(ids[0] % 2 == 0) if ids else None for ids in samples.completion_ids]


def samples_of(path, completions=WORDS, copies=2):
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [text for text in completions for _ in range(copies)]
    return Samples(
        prompts=["say something"] * len(texts),
        completions=texts,
        completion_ids=[tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        columns={},
    )


def prime_of(path, **options):
    reward = load_reward("prime", path=path, dtype="float32", lora_r=4, lora_alpha=8, **options)
    reward.setup(Context(seed=3))
    return reward


def pipeline_of(path, **options):
    return Pipeline([Source("prime", prime_of(path, **options)), Source("even", Even())])


def test_it_keeps_the_contract_of_a_reward(policy_path):
    check_reward(load_reward("prime", path=policy_path, dtype="float32"), samples_of(policy_path))


def test_rewards_start_at_0(policy_path):
    assert all(value == 0 for row in prime_of(policy_path).score_tokens(samples_of(policy_path)) for value in row)


@pytest.mark.parametrize("compat", ["paper", "verl", "original"])
def test_rewards_are_the_log_ratio_of_the_trained_model_and_its_base(policy_path, compat):
    samples = samples_of(policy_path, copies=1)
    pipeline = pipeline_of(policy_path, compat=compat, beta=0.5, learning_rate=0.05)
    reward = pipeline.sources[0].reward
    pipeline.update(pipeline.score(samples, group_size=2))
    found = reward.score_tokens(samples)
    base = AutoModelForCausalLM.from_pretrained(policy_path)
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    prompt = tokenizer("say something")["input_ids"]
    trained = reward._model.model
    for row, ids in enumerate(samples.completion_ids):
        logps = []
        for model in (trained, base):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
            logps.append(logits.log_softmax(dim=-1)[range(len(ids)), ids])
        wanted = (logps[0] - logps[1]) * (1.0 if compat == "original" else 0.5)
        if compat == "verl":
            wanted[-1] = 0.0
        torch.testing.assert_close(torch.tensor(found[row]), wanted, atol=1e-5, rtol=1e-4)
        assert wanted.abs().sum() > 0 or len(ids) == 1


@pytest.mark.parametrize("loss", ["ce", "dpo", "bon_acc", "bon_rm"])
def test_it_learns_to_tell_right_from_wrong(policy_path, loss):
    samples = samples_of(policy_path)
    pipeline = pipeline_of(policy_path, loss=loss, beta=1.0, learning_rate=0.02, micro_batch=3)
    assert len(set(Even().score(samples))) == 2
    metrics = []
    for _ in range(15):
        batch = pipeline.score(samples, group_size=4)
        metrics.append(pipeline.update(batch))
    right = batch.scores.values[:, 1] == 1
    sums = batch.scores.values[:, 0]
    assert sums[right].min() > sums[~right].max()
    assert metrics[-1]["rewards/prime/loss"] < 0.7 * metrics[0]["rewards/prime/loss"]
    assert metrics[-1]["rewards/prime/accuracy"] == 1.0


def test_the_first_loss_is_that_of_no_opinion_and_small_batches_make_one_step(policy_path):
    samples = samples_of(policy_path)
    after = []
    for micro in (1, 8):
        pipeline = pipeline_of(policy_path, micro_batch=micro)
        metrics = pipeline.update(pipeline.score(samples, group_size=4))
        assert metrics["rewards/prime/loss"] == pytest.approx(math.log(2), abs=1e-6)
        after.append(pipeline.sources[0].reward.state_dict()["weights"])
    for name, weight in after[0].items():
        torch.testing.assert_close(weight, after[1][name], atol=1e-6, rtol=1e-3)


def test_rows_without_an_outcome_teach_nothing(policy_path):
    samples = samples_of(policy_path)
    pipeline = pipeline_of(policy_path)
    batch = pipeline.score(samples, group_size=4)
    values = batch.scores.values.clone()
    values[:, 1] = float("nan")
    assert pipeline.update(batch._replace(scores=batch.scores._replace(values=values))) == {}


def test_its_state_comes_back(policy_path):
    samples = samples_of(policy_path)
    one, other = pipeline_of(policy_path, learning_rate=0.05), pipeline_of(policy_path, learning_rate=0.05)
    one.update(one.score(samples, group_size=4))
    other.load_state_dict(one.state_dict())
    for pipeline in (one, other):
        pipeline.update(pipeline.score(samples, group_size=4))
    assert one.sources[0].reward.score_tokens(samples) == other.sources[0].reward.score_tokens(samples)


def test_outcomes_must_be_there_and_between_0_and_1(policy_path):
    class Ten(Reward):
        def score(self, samples):
            return [10.0] * len(samples)

    samples = samples_of(policy_path)
    for sources, options, message in (
        ([Source("ten", Ten())], {}, r"outcomes of 'ten' must be in \[0, 1\], got 10 to 10"),
        ([], {}, "there is no other source"),
        ([Source("even", Even()), Source("ten", Ten())], {}, "set outcome to one of even, ten"),
        ([Source("even", Even())], {"outcome": "odd"}, "set outcome to one of even; got 'odd'"),
    ):
        pipeline = Pipeline([Source("prime", prime_of(policy_path, **options)), *sources])
        with pytest.raises(RewardError, match=message):
            pipeline.update(pipeline.score(samples, group_size=4))


def test_prime_norm_divides_by_the_largest_return_of_the_batch(policy_path):
    samples = samples_of(policy_path)
    pipeline = pipeline_of(policy_path, learning_rate=0.05)
    pipeline.update(pipeline.score(samples, group_size=4))
    pipeline.sources[0].shape = [load_shaper("prime_norm")]
    process = pipeline.score(samples, group_size=4).process_rewards
    assert process.flip(1).cumsum(dim=1).abs().max().item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta": 0}, "beta must be"), ({"lam": 0.5}, "compat: verl"), ({"adapter": "x"}, "merge yours"),
     ({"offload": True}, "offload moves"), ({"mini_batch": 0}, "mini_batch must be"), ({"lam": 1.0}, "lam must be")],
)  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_reward("prime", path="x", **options)


RANKS = """
import json, sys
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig
from trl_rewards import GRPOTrainer, Pipeline, Reward, load_advantage, load_reward
from trl_rewards.scoring import Source
from trl_rewards.testing import check_reward

policy, folder, world = sys.argv[1], sys.argv[2], int(sys.argv[3])
checkpoint = sys.argv[4] if len(sys.argv) > 4 else None


class Even(Reward):
    def score(self, samples):
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in samples.completion_ids]


options = {"lora_r": 4, "lora_alpha": 8, "learning_rate": 0.01, "beta": 0.5, "outcome": "even"}
pipeline = Pipeline(
    [Source("prime", load_reward("prime", **options)), Source("even", Even())],
    advantage=load_advantage("prime_rloo"),
)
args = GRPOConfig(
    folder, per_device_train_batch_size=8 // world, num_generations=4, max_completion_length=6, max_steps=3,
    learning_rate=1e-2, beta=0.0, logging_steps=1, bf16=False, use_cpu=True, report_to="none", loss_type="grpo",
    save_strategy="steps", save_steps=1, gradient_checkpointing=False, generation_kwargs={"do_sample": False},
    shuffle_dataset=False, seed=5, temperature=1.0, lr_scheduler_type="constant", remove_unused_columns=False)
prompts = Dataset.from_dict({"prompt": [f"the cat ran {number} times" for number in range(16)]})
torch.manual_seed(5)
trainer = GRPOTrainer(
    policy, None, args, pipeline=pipeline, train_dataset=prompts,
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
trainer.train(resume_from_checkpoint=checkpoint)
model = trainer.accelerator.unwrap_model(trainer.model)
sums = {name: p.detach().double().abs().sum().item() for name, p in model.named_parameters() if "lora" in name}
if trainer.accelerator.process_index == 0:
    print("RESULT" + json.dumps(sums))
"""


def _result(done):
    import json

    line = next(line for line in done.stdout.splitlines() if "RESULT" in line)
    return json.loads(line.partition("RESULT")[2])


@pytest.mark.slow
def test_on_the_policys_base_runs_resume_to_the_last_bit_and_processes_agree(policy_path, tmp_path, run_ranks):
    straight = _result(run_ranks(RANKS, 1, policy_path, str(tmp_path / "one"), "1"))
    assert any("prime" in name and value > 0 for name, value in straight.items() if "lora_B" in name)
    saved = list((tmp_path / "one" / "checkpoint-3").rglob("adapter_model.safetensors"))
    assert [file.parent.name for file in saved] == ["checkpoint-3"]  # the policy's alone
    resumed = run_ranks(RANKS, 1, policy_path, str(tmp_path / "one"), "1", str(tmp_path / "one" / "checkpoint-1"))
    assert _result(resumed) == straight
    both = _result(run_ranks(RANKS, 2, policy_path, str(tmp_path / "two"), "2"))
    for name, total in straight.items():
        assert both[name] == pytest.approx(total, rel=1e-3, abs=1e-5), name
