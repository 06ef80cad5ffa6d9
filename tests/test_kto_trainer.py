"""Training on labelled answers: stock TRL without an objective, and what an objective sees, changes and keeps."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

from trl_rewards import OutcomeObjective, Recipe, RecipeError
from trl_rewards.commands.validate import validate
from trl_rewards.testing import check_outcome_objective
from trl_rewards.train import train

ROWS = [
    {"prompt": f"the {noun}", "completion": f" {verb} {count} times", "label": verb == "sat", "weight": float(count)}
    for noun in ("cat", "dog", "sky")
    for count in range(3)
    for verb in ("sat", "ran")
]


class Apo(OutcomeObjective):
    """TRL's `apo_zero_unpaired`, which needs no KL term."""

    def loss(self, batch):
        wins = torch.sigmoid(self.beta * batch.log_ratios)
        return torch.where(batch.labels > 0.5, 1 - wins, wins).mean()


class Weighted(OutcomeObjective):
    """Squared error of the log-ratio to the label, each row times its weight; counts the batches it has seen."""

    columns = ("weight",)

    def __post_init__(self):
        super().__post_init__()
        self.seen, self.labels = 0, []

    def setup(self, context):
        self.log_metric = context.log_metric

    def loss(self, batch):
        self.seen += batch.training
        self.labels += batch.labels.tolist()
        self.log_metric("seen", self.seen)
        return (batch.columns["weight"] * (batch.log_ratios - batch.labels).square()).mean()

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


@pytest.fixture
def arguments(tmp_path):
    import trl

    def make(**options):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 3,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "save_strategy": "no",
            "bf16": False,
            "disable_tqdm": True,
        }
        return trl.KTOConfig(**(defaults | options))

    return make


def fit(cls, model, arguments, resume=None, rows=ROWS, **options):
    from datasets import Dataset

    torch.manual_seed(arguments.seed)  # TRL 1.14 draws LoRA's weights from wherever the stream is
    trainer = cls(model=model, args=arguments, train_dataset=Dataset.from_list(rows), **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [line for line in trainer.state.log_history if "loss" in line]


SHARED = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins")


def test_trainer_equals_trl_without_an_objective(policy_path, arguments):
    import trl

    from trl_rewards import KTOTrainer

    _, wanted = fit(trl.KTOTrainer, policy_path, arguments())
    _, found = fit(KTOTrainer, policy_path, arguments())
    for key in (*SHARED, "kl"):
        assert [line[key] for line in found] == [line[key] for line in wanted], key
    assert len({line["loss"] for line in found}) == 3


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 2, "precompute_ref_log_probs": True}, {"lora": True}]
)
def test_an_objective_with_trls_loss_trains_as_trl_does(policy_path, arguments, options):
    import trl
    from peft import LoraConfig

    from trl_rewards import KTOTrainer

    options = dict(options)
    lora = options.pop("lora", False)
    peft = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")} if lora else {}
    stock = arguments(loss_type="apo_zero_unpaired", beta=0.5, **options)
    _, wanted = fit(trl.KTOTrainer, policy_path, stock, **peft)
    _, found = fit(KTOTrainer, policy_path, arguments(**options), objective=Apo(beta=0.5), **peft)
    for key in SHARED:
        assert [line[key] for line in found] == pytest.approx([line[key] for line in wanted], abs=1e-6), key
    assert found[-1]["loss"] != found[0]["loss"]


def test_an_objective_sees_columns_and_fractions_and_is_resumed(policy_path, arguments, tmp_path, caplog):
    from trl_rewards import KTOTrainer

    rows = [row | {"label": 0.25 if row["label"] else 0.0} for row in ROWS]
    options = {"per_device_train_batch_size": 1, "train_sampling_strategy": "random", "max_steps": 4}
    whole = Weighted()
    with caplog.at_level(logging.WARNING):
        _, straight = fit(KTOTrainer, policy_path, arguments(**options), rows=rows, objective=whole)
    assert "desirable_weight" not in caplog.text  # TRL's advice, which would change nothing here
    assert set(whole.labels) == {0.0, 0.25}
    assert {line["loss"] for line in straight[:1]} <= {row["weight"] * row["label"] ** 2 for row in rows}
    options |= {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "halves")}
    fit(KTOTrainer, policy_path, arguments(**options), rows=rows, objective=Weighted())
    checkpoint = str(tmp_path / "halves" / "checkpoint-2")
    _, resumed = fit(KTOTrainer, policy_path, arguments(**options), checkpoint, rows=rows, objective=Weighted())
    assert [line["seen"] for line in resumed[-2:]] == [3, 4]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in resumed[-2:]] == [line[key] for line in straight[-2:]], key


def test_what_an_objective_would_pass_over_is_refused(policy_path, arguments):
    from trl_rewards import KTOTrainer

    for options, rows, message in (
        ({"beta": 0.2}, ROWS, r"beta is of TRL's loss, which objective 'apo' replaces; write objective.with.beta"),
        ({"desirable_weight": 2.0}, ROWS, "desirable_weight is of TRL's loss.*leave it out"),
        ({}, [row | {"label": 2.0} for row in ROWS], "column 'label' must be true, false or a number from 0 to 1"),
        ({}, [*ROWS, ROWS[0] | {"label": None}], "a number from 0 to 1, got None"),
        ({}, [row | {"images": ["x"]} for row in ROWS], "is for text; the dataset has images"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(KTOTrainer, policy_path, arguments(**options), rows=rows, objective=Apo())


def test_a_contract_is_checked():
    check_outcome_objective(Apo())

    class Backwards(OutcomeObjective):
        """Likes wrong answers."""

        def loss(self, batch):
            return (batch.labels * batch.log_ratios).mean()

    with pytest.raises(AssertionError, match="must make right answers likelier"):
        check_outcome_objective(Backwards())


@pytest.fixture
def recipe(write, tmp_path, policy_path):
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))

    def make(extra="objective: {use: implicit_prm_ce}", data="data.jsonl"):
        return write(
            "recipe.yaml",
            f"trainer: kto\nmodel_name_or_path: {policy_path}\ndataset_name: {data}\n"
            f"output_dir: {tmp_path / 'out'}\nmax_steps: 2\nper_device_train_batch_size: 4\nlogging_steps: 1\n"
            f"bf16: false\nuse_cpu: true\nreport_to: none\nsave_strategy: 'no'\nlearning_rate: 0.01\n{extra}\n",
        )

    return make


def test_a_recipe_trains_with_an_objective_on_a_4_bit_base(recipe, tmp_path, capsys):
    path = recipe(
        "objective: {use: implicit_prm_ce}\nload_in_4bit: true\nuse_peft: true\nlora_target_modules: [q_proj, v_proj]"
    )
    assert validate(path)[0].endswith("trainer kto, objective implicit_prm_ce")
    trainer = train(path)
    first = next(line for line in trainer.state.log_history if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.ref_model is None
    assert trainer.model.get_base_model().is_loaded_in_4bit
    assert "accuracy" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").is_file()
    assert "trainer:kto  objective:implicit_prm_ce" in (tmp_path / "out" / "signature.txt").read_text()


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (
            "objective: {use: bradley_terry}",
            "objective: 'bradley_terry' learns from preference pairs (chosen, rejected); use trainer: reward",
        ),
        ("rewards: [{use: length}]", "rewards: trainer 'kto' does not take it (it takes objective, alarms)"),
        (
            "dataset: {chat: true}",
            "dataset: chat and system_prompt make chat prompts; labelled answers must be chats already",
        ),
        ("objective: {use: implicit_prm_ce, with: {beta: 0.0}}", "objective.with: beta must be above 0, got 0.0"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_loaded(recipe, extra, problem):
    with pytest.raises(RecipeError) as caught:
        Recipe.load(recipe(extra), check_trl=False)
    assert problem in caught.value.problems


def test_a_reward_model_does_not_learn_from_outcomes(write):
    text = "trainer: reward\nobjective: {use: implicit_prm_ce}\nmodel_name_or_path: x\ndataset_name: y\n"
    with pytest.raises(RecipeError, match=r"learns from answers with a label each .* use trainer: kto"):
        Recipe.load(write("recipe.yaml", text), check_trl=False)


def test_labels_must_be_there_but_pairs_have_their_own(recipe, tmp_path):
    (tmp_path / "bare.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(RecipeError, match="the dataset has no column 'label'"):
        validate(recipe(data="bare.jsonl"))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    assert validate(recipe(data="pairs.jsonl"))[-1] == "ok"
