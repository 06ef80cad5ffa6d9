"""A model trained on outcomes alone: its objective, and its rewards of tokens, steps and completions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_rewards_prime.implicit import at_steps

from trl_rewards import (
    Context,
    Failed,
    Outcomes,
    Pipeline,
    RewardError,
    Samples,
    load_advantage,
    load_objective,
    load_reward,
)
from trl_rewards.scoring import Source
from trl_rewards.testing import check_reward

CASES = json.loads((Path(__file__).parent / "implicit_prm_cases.json").read_text())
RIGHT, WRONG = "sat", "ran"
PROMPT = "the cat"


def test_the_loss_is_the_authors():
    case = CASES["32_implicitprm.ce_loss"]
    given = case["inputs"]
    batch = Outcomes(torch.tensor(given["sum_logratio"]), torch.tensor(given["labels"]), {})
    loss = load_objective("implicit_prm_ce", beta=given["beta"]).loss(batch)
    assert loss.item() == pytest.approx(case["outputs"]["loss"], abs=1e-6)


def test_steps_are_worth_what_the_authors_code_says():
    case = CASES["32_implicitprm.get_reward"]
    given = case["inputs"]
    q = [given["coef"] * (a - b) for a, b in zip(given["logp_policy"], given["logp_ref"], strict=True)]
    ends = given["special_tokens"][1:-1]  # the first is the prompt's end, the last is padding
    for cumulative, name in ((False, "single"), (True, "accumulative")):
        wanted = case["outputs"][name][0][:-1]
        assert at_steps(q, ends, cumulative) == pytest.approx(wanted, abs=1e-9)
    assert at_steps([1.0, 2.0], [1, 1]) == [3.0, 0.0]
    assert at_steps([1.0], []) == []


@pytest.fixture(scope="module")
def trained(policy_path, tmp_path_factory):
    """{"adapter" or "whole": folder}: models that learned from outcomes that `sat` is right and `ran` is wrong."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    from trl_rewards import KTOTrainer

    rows = [
        {"prompt": f"the {noun}", "completion": f" {verb} {count} times", "label": verb == RIGHT}
        for noun in ("cat", "dog", "sky")
        for count in range(0, 9, 2)
        for verb in (RIGHT, WRONG)
    ]
    folders = {}
    for name, peft in (
        ("adapter", LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")),
        ("whole", None),
    ):
        folders[name] = str(tmp_path_factory.mktemp(name))
        args = trl.KTOConfig(
            folders[name],
            max_steps=12,
            per_device_train_batch_size=15,
            learning_rate=2e-2,
            train_sampling_strategy="random",
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        )
        objective = load_objective("implicit_prm_ce")
        trainer = KTOTrainer(
            policy_path, args=args, train_dataset=Dataset.from_list(rows), objective=objective, peft_config=peft
        )
        trainer.train()
        trainer.save_model()
    return folders


def options_of(trained, policy_path, kind):
    reference = {} if kind == "adapter" else {"reference": policy_path}
    return {"path": trained[kind], "dtype": "float32"} | reference


def reward_of(trained, policy_path, kind="adapter", tokenizer=None, **options):
    reward = load_reward("implicit_prm", **options_of(trained, policy_path, kind) | options)
    reward.setup(Context(tokenizer=tokenizer))
    return reward


def samples_of(path, *completions, prompt=PROMPT):
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in completions]
    return tokenizer, Samples([prompt] * len(completions), list(completions), ids)


def log_probability(path, ids, start):
    """Of the tokens from `start` on, by transformers alone."""
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(path)(torch.tensor([ids])).logits[0, start - 1 : -1]
    return logits.log_softmax(dim=-1)[range(len(ids) - start), ids[start:]].sum().item()


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_it_ranks_right_above_wrong_that_it_was_not_trained_on(trained, policy_path, kind):
    texts = [f" {verb} {count} times" for count in (1, 3, 5) for verb in (RIGHT, WRONG)]
    scores = load_reward("implicit_prm", **options_of(trained, policy_path, kind), take="sum")(
        prompts=[PROMPT] * len(texts), completions=texts
    )
    assert min(scores[::2]) > 0 > max(scores[1::2])


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_tokens_are_worth_beta_times_their_log_ratio(trained, policy_path, kind):
    from peft import PeftModel

    tokenizer, samples = samples_of(policy_path, " sat 4 times", " ran")
    reward = reward_of(trained, policy_path, kind, tokenizer, beta=0.5, micro_batch=1)
    found = reward.score_tokens(samples)
    base = AutoModelForCausalLM.from_pretrained(policy_path)
    if kind == "adapter":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy_path), trained[kind])
    else:
        model = AutoModelForCausalLM.from_pretrained(trained[kind])
    prompt = tokenizer(PROMPT)["input_ids"]
    for row, ids in enumerate(samples.completion_ids):
        logps = []
        for each in (model, base):
            with torch.no_grad():
                logits = each(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logps.append(logits.log_softmax(dim=-1)[range(len(ids)), ids])
        torch.testing.assert_close(torch.tensor(found[row]), 0.5 * (logps[0] - logps[1]), atol=1e-5, rtol=1e-4)
        assert max(map(abs, found[row])) > 0.1
    alone = reward_of(trained, policy_path, "whole", reference=None, use_reference=False, beta=1.0, take="sum")
    wanted = log_probability(trained["whole"], prompt + samples.completion_ids[0], len(prompt))
    assert alone.score(samples)[0] == pytest.approx(wanted, abs=1e-4)


def test_steps_add_up_to_the_whole_and_cumulate(trained, policy_path):
    tokenizer, samples = samples_of(policy_path, " sat 4 times\n\n the dog ran\n\n the sky sat 3 times")

    def tokens(**options):
        return reward_of(trained, policy_path, "adapter", tokenizer, **options).score_tokens(samples)[0]

    whole, single, cumulative = tokens(), tokens(steps="blank_line"), tokens(steps="blank_line", value="cumulative")
    ends = [place for place, value in enumerate(single) if value is not None]
    assert len(ends) == 3
    values = [single[end] for end in ends]
    assert values[0] == pytest.approx(sum(whole[: ends[0] + 1]), abs=1e-5)
    assert sum(values) == pytest.approx(sum(whole), abs=1e-5)  # the end-of-sequence token belongs to the last step
    assert [cumulative[end] for end in ends] == pytest.approx(
        [values[0], values[0] + values[1], sum(values)], abs=1e-5
    )
    assert tokens(steps="blank_line", take="min") == pytest.approx(min(values), abs=1e-5)
    assert tokens(take="last") == pytest.approx(whole[-1], abs=1e-5)
    assert tokens(value="cumulative")[-1] == tokens(take="sum") == pytest.approx(sum(whole), abs=1e-5)


def test_it_keeps_the_contract_of_a_reward(trained, policy_path):
    check_reward(load_reward("implicit_prm", **options_of(trained, policy_path, "adapter")))


@pytest.fixture(scope="module")
def foreign():
    """A policy's tokenizer with other tokens."""
    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|tool|>"])
    return tokenizer


def test_a_policy_with_other_tokens_gets_numbers_of_texts_and_no_tokens(trained, policy_path, foreign):
    own, samples = samples_of(policy_path, " sat 4 times\n\n ran 3 times", " ran 3 times")
    with pytest.raises(RewardError, match=r"the policy has other tokens than .* set take: sum .* steps: blank_line"):
        reward_of(trained, policy_path, tokenizer=foreign).score_tokens(samples)
    for options in ({"take": "sum"}, {"steps": "blank_line"}):
        wanted = reward_of(trained, policy_path, tokenizer=own, **options).score_tokens(samples)
        assert reward_of(trained, policy_path, tokenizer=foreign, **options).score_tokens(samples) == wanted
    unknown = reward_of(trained, policy_path).score_tokens(samples)  # no policy: nobody asks for tokens
    assert unknown == reward_of(trained, policy_path, tokenizer=own, take="sum").score_tokens(samples)


def test_a_chat_is_read_as_in_training_and_what_cannot_be_read_is_a_hole(trained, policy_path):
    tokenizer, _ = samples_of(policy_path)
    options = {"take": "sum", "beta": 1.0, "use_reference": False, "reference": None}
    reward = reward_of(trained, policy_path, "whole", **options)
    prompt = [{"role": "user", "content": "the cat"}]
    answer = [{"role": "assistant", "content": "sat 4 times"}]
    (found,) = reward.score(Samples([prompt], [answer]))
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(prompt + answer, return_dict=False)
    assert found == pytest.approx(log_probability(trained["whole"], ids, len(before)), abs=1e-4)
    long, empty = reward.score(Samples(["the cat " * 300, ""], [" sat", " sat"]))
    assert isinstance(long, Failed)
    assert "context of 256 tokens" in long.reason
    assert isinstance(empty, Failed)
    (cut,) = reward.score(Samples(["the cat"], [" sat" * 400]))
    assert isinstance(cut, Failed)
    assert "the model reads 256" in cut.reason


def test_it_is_a_process_reward_of_grpo(trained, policy_path, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig

    from trl_rewards import GRPOTrainer

    reward = load_reward("implicit_prm", **options_of(trained, policy_path, "adapter"))
    pipeline = Pipeline([Source("prm", reward)], advantage=load_advantage("prime_rloo"))
    args = GRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=5,
        max_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        policy_path, args=args, pipeline=pipeline, train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 4})
    )
    trainer.train()
    process, samples = trainer.last_batch.process_rewards, trainer.last_batch.samples
    wanted = reward_of(trained, policy_path, tokenizer=trainer.processing_class).score_tokens(samples)
    for row, values in enumerate(wanted):
        assert process[row, : len(values)].tolist() == pytest.approx(values, abs=1e-5)
    assert trainer.last_advantages.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta": 0}, "beta must be"), ({"take": "product"}, "are logarithms"), ({"steps": "chapter"}, "unknown way"),
     ({"reference": "x", "use_reference": False}, "leave one out"), ({"micro_batch": 0}, "micro_batch must be"),
     ({"adapter": "x", "reference": "y"}, "leave one of them out")],
)  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_reward("implicit_prm", path="x", **options)


def test_a_model_without_an_adapter_needs_a_reference(trained, policy_path):
    with pytest.raises(RewardError, match="is a whole model, with no adapter to switch off"):
        load_reward("implicit_prm", path=trained["whole"])
