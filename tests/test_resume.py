"""A run that is interrupted and resumed is the run that was not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

import trl_rewards
from trl_rewards import Pipeline, Reward, RewardError, load_shaper

RUN = """
import json, random, sys
import trl
from datasets import Dataset
from transformers import TrainerCallback
import trl_rewards
from trl_rewards import Pipeline, Reward, load_advantage, load_shaper

policy, folder, steps, resume = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "resume"


class Noisy(Reward):
    deterministic = False

    def score(self, samples):
        return [len(str(text)) / 20 + random.random() for text in samples.completions]


class Seen(Reward):
    '''Counts what it has seen: a source with a state.'''

    deterministic = False

    def __post_init__(self):
        self.seen = 0

    def score(self, samples):
        self.seen += len(samples)
        return [self.seen / 100] * len(samples)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


args = trl.GRPOConfig(
    output_dir=folder, per_device_train_batch_size=8, num_generations=4, max_completion_length=8, max_steps=10,
    save_steps=5, logging_steps=1, learning_rate=1e-2, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True)
pipeline = Pipeline([Noisy(), Seen()], shape=[load_shaper("whiten")], advantage=load_advantage("center"))
data = Dataset.from_dict({"prompt": [f"the cat ran {number} times" for number in range(16)]})
trainer = trl_rewards.GRPOTrainer(policy, args=args, train_dataset=data, pipeline=pipeline)


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= steps


trainer.add_callback(StopAt())
trainer.train(resume_from_checkpoint=resume or None)
logs = [log for log in trainer.state.log_history if "loss" in log]
print("RESULT" + json.dumps([[log["loss"], log["grad_norm"], log["reward"]] for log in logs]))
print("STATE" + json.dumps(pipeline.state_dict()))
"""


def run(policy: str, folder, steps: int, resume: bool) -> tuple[list, dict]:
    command = [sys.executable, "-c", RUN, policy, str(folder), str(steps), "resume" if resume else "fresh"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {line[:5]: line for line in done.stdout.splitlines() if line.startswith(("RESULT", "STATE"))}
    return json.loads(found["RESUL"][6:]), json.loads(found["STATE"][5:])


@pytest.mark.slow
def test_ten_steps_equal_five_a_new_process_and_five_more(policy_path, tmp_path):
    straight, state = run(policy_path, tmp_path / "straight", 10, resume=False)
    first, _ = run(policy_path, tmp_path / "resumed", 5, resume=False)
    both, resumed_state = run(policy_path, tmp_path / "resumed", 10, resume=True)
    assert len(straight) == len(both) == 10
    assert first == straight[:5]
    assert both == straight
    assert resumed_state == state
    assert state["rewards.seen"] == {"seen": 80}


def make_trainer(policy_path, folder, pipeline, **options):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    data = Dataset.from_dict({"prompt": [f"the dog sat {number} times" for number in range(8)]})
    args = trl.GRPOConfig(**(defaults | options))
    return trl_rewards.GRPOTrainer(policy_path, args=args, train_dataset=data, eval_dataset=data, pipeline=pipeline)


class BreaksAt(Reward):
    """Right for some batches, then one score short."""

    deterministic = False
    batches: int = 3

    def __post_init__(self):
        self.seen = 0

    def score(self, samples):
        self.seen += 1
        return [1.0] * (len(samples) - (self.seen > self.batches))


@pytest.mark.slow
def test_a_broken_reward_saves_what_was_trained_before_it_stops_the_run(policy_path, tmp_path):
    trainer = make_trainer(policy_path, tmp_path, Pipeline([BreaksAt()]), save_strategy="steps", save_steps=100)
    with pytest.raises(RewardError, match="returned 3 scores for 4 completions"):
        trainer.train()
    saved = tmp_path / "checkpoint-3"
    assert (saved / "model.safetensors").is_file()
    assert (saved / "trl_rewards_rank0.pt").is_file()
    assert trainer.pipeline.sources[0].reward.seen == 4
    # and it goes on from there
    again = make_trainer(policy_path, tmp_path, Pipeline([BreaksAt(batches=100)]), save_strategy="no")
    again.train(resume_from_checkpoint=str(saved))
    assert again.state.global_step == 6


@pytest.mark.slow
def test_a_reward_that_breaks_in_evaluation_saves_what_was_trained_too(policy_path, tmp_path):
    options = {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    trainer = make_trainer(policy_path, tmp_path, Pipeline([BreaksAt(batches=2)]), **options)
    with pytest.raises(RewardError, match="returned 3 scores for 4 completions"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_checkpoint_holds_the_state_of_the_last_finished_step(policy_path, tmp_path):
    """As on SIGTERM, which may come after a step's rewards and before its end."""
    pipeline = Pipeline([BreaksAt(batches=100)], shape=[load_shaper("whiten")])
    trainer = make_trainer(policy_path, tmp_path, pipeline, save_strategy="no", max_steps=2)
    counts = []

    def save_in_the_middle(*arguments, **options):
        if trainer.state.global_step == 1:
            trainer._save_checkpoint(trainer.model_wrapped, None)
            counts.append(pipeline.state_dict()["shape.0"]["count"])
        return original(*arguments, **options)

    original = trainer.compute_loss
    trainer.compute_loss = save_in_the_middle
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-1" / "trl_rewards_rank0.pt", weights_only=True)
    assert counts == [8]  # the second step's rewards were in already
    assert saved["state"]["shape.0"]["count"] == 4


JIT = "max_steps=60, save_strategy='no', enable_jit_checkpoint=True,"
SIGTERM = RUN.replace("max_steps=10,\n    save_steps=5,", JIT).replace(
    "control.should_training_stop = state.global_step >= steps",
    "print('STEP', state.global_step, flush=True); import time; time.sleep(0.4)",
)


@pytest.mark.slow
def test_a_checkpoint_on_sigterm_resumes_like_any_other(policy_path, tmp_path):
    import signal

    assert "enable_jit_checkpoint" in SIGTERM
    command = [sys.executable, "-c", SIGTERM, policy_path, str(tmp_path), "60", "fresh"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("STEP 2"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=120)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    step = int(checkpoint.name.rpartition("-")[2])
    assert 2 <= step < 60
    saved = torch.load(checkpoint / "trl_rewards_rank0.pt", weights_only=True)["state"]
    assert saved["rewards.seen"] == {"seen": 8 * step}
    assert saved["shape.0"]["count"] == 8 * step


class AsksToSave(TrainerCallback):
    """What SIGTERM sets off, at a moment of the second step; and what PPO had learnt after each step."""

    def __init__(self, moment):
        self.moment, self.learnt = moment, {}

    def follow(self, trainer):
        self.trainer = trainer
        (jit,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, JITCheckpointCallback)]
        self.manager = jit.jit_manager

    def ask(self, moment):
        if moment == self.moment and self.trainer.state.global_step == 1:
            self.manager.is_checkpoint_requested = True

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.ask("after the optimiser's step")

    def on_step_end(self, args, state, control, **kwargs):
        critic = {name: weight.clone() for name, weight in self.trainer.critic.state_dict().items()}
        self.learnt[state.global_step] = critic, self.trainer.kl.coefficient


@pytest.mark.parametrize(("moment", "step"), [("at its rewards", 1), ("after the optimiser's step", 2)])
def test_ppos_checkpoint_on_sigterm_is_that_of_a_finished_step(moment, step, policy_path, tmp_path):
    asks = AsksToSave(moment)

    def longer(completions, **kwargs):
        asks.ask("at its rewards")
        return [len(str(text)) / 20 for text in completions]

    args = trl_rewards.PPOConfig(
        str(tmp_path), per_device_train_batch_size=4, max_completion_length=4, max_steps=2, num_ppo_epochs=1,
        kl_coef=0.2, kl_target=0.1, kl_horizon=10, learning_rate=1e-2, lr_scheduler_type="constant", seed=5,
        save_strategy="no", enable_jit_checkpoint=True, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": [f"the dog sat {number} times" for number in range(8)]})
    pipeline = Pipeline([longer], shape=[load_shaper("whiten")])
    trainer = trl_rewards.PPOTrainer(policy_path, None, args, train_dataset=data, pipeline=pipeline, callbacks=[asks])
    asks.follow(trainer)
    trainer.train()
    saved = tmp_path / f"checkpoint-{step}"
    (critic, coefficient), learner = asks.learnt[step], torch.load(saved / "critic.pt", weights_only=True)
    assert asks.learnt[1][1] != asks.learnt[2][1], "the coefficient stood still, so nothing was compared"
    assert learner["kl"] == {"coefficient": coefficient}
    assert {int(state["step"]) for state in learner["optimizer"]["state"].values()} == {step}
    found = load_file(saved / "critic.safetensors")
    assert any(not torch.equal(weight, asks.learnt[3 - step][0][name]) for name, weight in critic.items())
    assert all(torch.equal(found[name], weight) for name, weight in critic.items())
    state = torch.load(saved / "trl_rewards_rank0.pt", weights_only=True)["state"]
    assert state["shape.0"]["count"] == 4 * step


@pytest.mark.slow
def test_evaluation_leaves_no_trace_in_the_state(policy_path, tmp_path):
    class Counts(trl_rewards.Advantage):
        def __post_init__(self):
            self.rows: dict = {}  # filled when first used

        def __call__(self, batch):
            self.rows["seen"] = self.rows.get("seen", 0) + len(batch.rewards)
            return torch.zeros(len(batch.rewards))

        def state_dict(self):
            return dict(self.rows)

        def load_state_dict(self, state):
            self.rows = dict(state)

    pipeline = Pipeline([BreaksAt(batches=100)], shape=[load_shaper("whiten")], advantage=Counts())
    options = {"save_strategy": "no", "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    options["eval_on_start"] = True
    trainer = make_trainer(policy_path, tmp_path, pipeline, per_device_eval_batch_size=4, **options)
    trainer.train()
    assert pipeline.state_dict()["shape.0"]["count"] == 8
    assert pipeline.state_dict()["advantage"] == {"seen": 8}
    evaluations = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert len(evaluations) == 3
    assert "eval_rewards/breaksat/mean" in evaluations[0]


@pytest.mark.slow
def test_save_steps_inside_a_generation_batch_is_warned_of(policy_path, tmp_path, caplog):
    options = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "save_strategy": "steps"}
    make_trainer(policy_path, tmp_path, Pipeline([BreaksAt()]), save_steps=3, **options)
    assert "save_steps 3 falls inside a generation batch" in caplog.text
    caplog.clear()
    make_trainer(policy_path, tmp_path, Pipeline([BreaksAt()]), save_steps=4, **options)
    assert "falls inside" not in caplog.text


@pytest.mark.slow
def test_a_stock_trl_checkpoint_resumes_unless_the_pipeline_needs_a_state(policy_path, tmp_path):
    stateless = Pipeline([BreaksAt(batches=100)])
    make_trainer(policy_path, tmp_path, stateless, save_strategy="steps", save_steps=2, max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "trl_rewards_rank0.pt").unlink()  # as TRL's own trainer leaves it
    again = make_trainer(policy_path, tmp_path, stateless, save_strategy="no", max_steps=3)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == 3
    whitened = Pipeline([BreaksAt(batches=100)], shape=[load_shaper("whiten")])
    with pytest.raises(ValueError, match=r"no state of shape\.0"):
        make_trainer(policy_path, tmp_path, whitened, save_strategy="no").train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.slow
def test_a_checkpoint_without_the_state_it_needs_is_refused(policy_path, tmp_path):
    make = lambda shape: Pipeline([BreaksAt(batches=100)], shape=shape)  # noqa: E731
    trainer = make_trainer(policy_path, tmp_path, make([]), save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    again = make_trainer(policy_path, tmp_path, make([load_shaper("whiten")]), save_strategy="no")
    with pytest.raises(ValueError, match=r"no state of shape\.0"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
