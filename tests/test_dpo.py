"""DPO from rewards: stock TRL without a pipeline and on the same pairs, rounds, resume, processes, recipe, bon."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from trl_rewards import PairOptions, Pipeline, Recipe, RecipeError, Reward, RewardError
from trl_rewards.cli import app
from trl_rewards.pairs import Group

PROMPTS = [f"the cat ran {number} times" for number in range(8)]
SMALL = {"candidates": 3, "max_new_tokens": 6, "choose_truncated": True, "held_out_candidates": 1}


class Short(Reward):
    """One over the length; counts the batches it saw."""

    columns = ("bonus",)

    def __post_init__(self):
        self.seen = 0

    def score(self, samples):
        self.seen += 1
        return [1 / max(len(text), 1) + bonus for text, bonus in zip(samples.texts, samples["bonus"], strict=True)]

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def prompts(rows=PROMPTS):
    from datasets import Dataset

    return Dataset.from_dict({"prompt": rows, "bonus": [0.0] * len(rows)})


@pytest.fixture
def arguments(tmp_path):
    import trl

    def make(**options):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "save_strategy": "no",
            "bf16": False,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
        }
        return trl.DPOConfig(**(defaults | options))

    return make


def losses(trainer) -> list[list[float]]:
    return [[line["loss"], line["grad_norm"]] for line in trainer.state.log_history if "loss" in line]


def pairs_in(folder) -> list[dict]:
    from pyarrow import parquet

    return parquet.read_table(Path(folder, "pairs.parquet")).to_pylist()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_without_a_pipeline_and_on_the_same_pairs_it_is_trl_s_to_the_last_bit(policy_path, arguments, tmp_path, loss):
    import trl
    from datasets import Dataset

    from trl_rewards import DPOTrainer

    ours = DPOTrainer(
        policy_path,
        args=arguments(loss_type=[loss]),
        train_dataset=prompts(),
        pipeline=Pipeline([Short()]),
        pairs=PairOptions(**SMALL),
    )
    ours.train()
    rows = pairs_in(tmp_path / "run" / "round-1")
    given = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    found = []
    for cls in (trl.DPOTrainer, DPOTrainer):
        trainer = cls(policy_path, args=arguments(loss_type=[loss]), train_dataset=given)
        trainer.train()
        found.append(losses(trainer))
    assert len(found[0]) == 2
    assert found[0] == found[1] == losses(ours)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["previous", "initial"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_is_the_policy_of_the_round_s_beginning_or_the_first_one(
    policy_path, arguments, reference, lora, monkeypatch
):
    """At the first step of a round the policy is its reference, so the loss is log 2; not if that is the first one."""
    from peft import LoraConfig

    from trl_rewards import DPOTrainer

    trainer = DPOTrainer(
        policy_path,
        args=arguments(),
        train_dataset=prompts(),
        pipeline=Pipeline([Short()]),
        pairs=PairOptions(**SMALL, rounds=2, reference=reference),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )
    first = []
    logged = trainer.log
    monkeypatch.setattr(trainer, "log", lambda logs, *more: (first.append(logs.get("loss")), logged(logs, *more)))
    trainer.train()
    rounds = [loss for loss in first if loss is not None]
    assert len(rounds) == 4
    assert rounds[0] == pytest.approx(0.6931, abs=1e-4)
    assert (rounds[2] == pytest.approx(0.6931, abs=1e-4)) == (reference == "previous")
    assert not list(Path(trainer.args.output_dir).glob("round-*/policy/ref"))


@pytest.mark.slow
def test_a_run_that_stops_in_its_second_round_goes_on_as_if_it_had_not(policy_path, arguments, tmp_path, monkeypatch):
    from trl_rewards import DPOTrainer

    options = {"save_strategy": "steps", "save_steps": 1}

    def make(name):
        return DPOTrainer(
            policy_path,
            args=arguments(output_dir=str(tmp_path / name), **options),
            train_dataset=prompts(),
            eval_dataset=prompts(["the sky", "the dog"]),
            pipeline=Pipeline([Short()]),
            pairs=PairOptions(**SMALL, rounds=2, score_prompts=2),
        )

    whole = make("whole")
    whole.train()
    stopped = make("stopped")
    step = type(stopped).training_step
    calls = []

    def stops(self, *words):
        calls.append(words)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *words)

    monkeypatch.setattr(type(stopped), "training_step", stops)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    calls.clear()
    sampled = make("stopped")
    with pytest.raises(
        RewardError, match="round-1 is of an earlier run: go on with it by resume_from_checkpoint true"
    ):
        sampled.train()
    monkeypatch.setattr("trl_rewards.trainers.dpo.sample_candidates", _only_held_out(monkeypatch))
    sampled.train(resume_from_checkpoint=True)
    assert len(calls) == 1  # the last step of round 2 alone
    for name in ("round-1", "round-2"):
        assert pairs_in(tmp_path / "stopped" / name) == pairs_in(tmp_path / "whole" / name)
    assert (
        sampled.pipeline.state_dict() == whole.pipeline.state_dict() == {"combine": {}, "rewards.short": {"seen": 4}}
    )
    held_out = [json.loads((tmp_path / name / "held_out.json").read_text()) for name in ("whole", "stopped")]
    assert [list(each) for each in held_out] == [["0", "1", "2"]] * 2
    for number in "012":
        assert held_out[1][number]["eval_reward"] == held_out[0][number]["eval_reward"]
    assert losses(sampled) == losses(whole)


def _only_held_out(monkeypatch):
    from trl_rewards.trainers import dpo

    sample = dpo.sample_candidates

    def refuse(sampler, given, *more, **options):
        assert list(given) == ["the sky", "the dog"], "a finished round was sampled again"
        return sample(sampler, given, *more, **options)

    return refuse


@pytest.mark.slow
def test_candidates_of_a_dataset_make_the_pairs_by_hand_and_a_card_says_what_was_left_out(
    policy_path, arguments, tmp_path
):
    from datasets import Dataset

    from trl_rewards import DPOTrainer

    data = {"prompt": PROMPTS[:3], "bonus": [0.0] * 3}
    data |= {"answers": [["e", "ae", "aae"], ["a", "b", "c"], ["ee", "e", "eeee"]]}  # 1, 1/2, 1/3; ties; 1/2, 1, 1/4
    trainer = DPOTrainer(
        policy_path,
        args=arguments(),
        train_dataset=Dataset.from_dict(data),
        pipeline=Pipeline([Short()]),
        pairs=PairOptions(source="dataset", columns=["answers"]),
    )
    trainer.train()
    folder = tmp_path / "run" / "round-1"
    rows = {row["prompt"]: row for row in pairs_in(folder)}
    assert {prompt: (row["chosen"], row["rejected"]) for prompt, row in rows.items()} == {
        PROMPTS[0]: ("e", "aae"),
        PROMPTS[2]: ("e", "eeee"),
    }
    assert rows[PROMPTS[0]]["margin"] == pytest.approx(2 / 3)
    assert rows[PROMPTS[2]]["short/rejected"] == 0.25
    card = (folder / "README.md").read_text()
    assert "2 pairs. Candidates: columns answers of the dataset." in card
    assert "| candidates | 9 |" in card
    assert "| ties | 1 |" in card
    assert yaml.safe_load(card.split("---")[1])["configs"][0]["data_files"] == "pairs.parquet"


def test_what_cannot_work_is_said_before_a_model_is_loaded(arguments):
    from trl_rewards import DPOTrainer

    def refused(says, pipeline=None, **options):
        options = {"args": arguments(), "train_dataset": prompts()} | options
        with pytest.raises(ValueError, match=says):
            DPOTrainer("no/such-model", pipeline=pipeline, **options)

    refused("pairs are made by a pipeline", pairs=PairOptions())
    pipeline = Pipeline([Short()])
    refused("precompute_ref_log_probs", pipeline, args=arguments(precompute_ref_log_probs=True))
    refused("prompts_per_round 9 is more than the 8 prompts", pipeline, pairs=PairOptions(prompts_per_round=9))
    refused(
        "pairs.columns: the dataset has no column 'bonis', did you mean 'bonus'",
        pipeline,
        pairs=PairOptions(source="dataset", columns=["bonis"]),
    )
    refused("must be a datasets.Dataset, got dict", pipeline, train_dataset={})


@pytest.mark.parametrize(
    ("columns", "given", "left"),
    [
        (["one", "other"], {"one": ["a", None, "", "d"], "other": ["A", "B", "C", None]}, [0, 2]),
        (["both"], {"both": [["a", "A"], ["b", None], ["", "C"], [None, None]]}, [0, 2]),
    ],
    ids=["columns", "list"],
)
def test_rows_that_lack_a_completion_are_left_out_and_counted(columns, given, left, arguments, caplog):
    from datasets import Dataset

    from trl_rewards import DPOTrainer
    from trl_rewards.trainers.dpo import with_every_completion

    data = Dataset.from_dict({"prompt": PROMPTS[:4], "bonus": [0.0] * 4, **given})
    options = {"source": "dataset", "columns": columns}
    kept = with_every_completion(data, PairOptions(**options))
    assert kept["prompt"] == [PROMPTS[row] for row in left]
    caplog.clear()
    pipeline = Pipeline([Short()])
    with pytest.raises(OSError, match=r"\./none"):
        DPOTrainer("./none", args=arguments(), train_dataset=data, pipeline=pipeline, pairs=PairOptions(**options))
    assert "pairs.columns: 2 of 4 rows lack a completion (None) and are left out" in caplog.text
    with pytest.raises(RecipeError, match=r"2 of 4 rows lack a completion .*; too few are left, 2"):
        with_every_completion(data, PairOptions(**options, prompts_per_round=3))
    whole = data.select(left)
    assert with_every_completion(whole, PairOptions(**options)) is whole


def test_rounds_take_different_prompts_until_all_were_taken():
    from trl_rewards.trainers.dpo import round_rows

    options = PairOptions(rounds=3, prompts_per_round=4)
    first, second, third = (round_rows(10, number, options, 0) for number in (1, 2, 3))
    assert len({*first, *second}) == 8
    assert len({*first, *second, *third[:2]}) == 10
    assert third[2:] == first[:2]
    assert [len(round_rows(10, 1, PairOptions(rounds=rounds), 0)) for rounds in (1, 3)] == [10, 3]


def test_metrics_leave_holes_out():
    from trl_rewards.pairs import Candidate
    from trl_rewards.trainers.dpo import reward_metrics

    nan = float("nan")
    group = Group("p", [Candidate("a", 1.0, {"s": nan}, 2), Candidate("b", nan, {"s": 4.0}, 4, False)])
    metrics = reward_metrics([group])
    assert metrics["reward"] == 1.0
    assert metrics["rewards/s/mean"] == 4.0
    assert metrics["completions/mean_length"] == 3.0
    assert metrics["completions/clipped_ratio"] == 0.5


RANKS = """
import sys
import trl
from datasets import Dataset
from trl_rewards import DPOTrainer, PairOptions, Pipeline, Reward


class Letters(Reward):
    def score(self, samples):
        return [text.count("e") / max(len(text), 1) for text in samples.texts]


class Rank(Reward):
    scope = "group"

    def score(self, samples):
        assert samples.group_size == 3
        return [float(len(text)) for text in samples.texts]


policy, folder, batch = sys.argv[1:4]
args = trl.DPOConfig(
    output_dir=folder, max_steps=2, per_device_train_batch_size=int(batch), learning_rate=1e-2, optim="sgd",
    report_to="none", use_cpu=True, save_strategy="no", bf16=False, disable_tqdm=True, gradient_checkpointing=False)
data = Dataset.from_dict({"prompt": [f"the cat ran {number} times" for number in range(8)]})
options = PairOptions(candidates=3, max_new_tokens=6, choose_truncated=True, rounds=2, score_prompts=2,
                      held_out_candidates=3)
trainer = DPOTrainer(policy, args=args, train_dataset=data, eval_dataset=data.select(range(2)),
                     pipeline=Pipeline([Letters(), Rank()]), pairs=options)
trainer.train()
"""


@pytest.mark.slow
def test_two_processes_make_the_pairs_of_one_in_both_rounds(policy_path, run_ranks, tmp_path):
    for ranks in (1, 2):
        run_ranks(RANKS, ranks, policy_path, str(tmp_path / str(ranks)), str(4 // ranks))
    for name in ("round-1", "round-2"):
        one, two = (pairs_in(tmp_path / ranks / name) for ranks in "12")
        assert one == two
        assert one
    rewards = [
        [each["eval_reward"] for each in json.loads((tmp_path / ranks / "held_out.json").read_text()).values()]
        for ranks in "12"
    ]
    assert rewards[0] == pytest.approx(rewards[1])


# --- the recipe and the command line


@pytest.fixture
def make_recipe(policy_path, tmp_path, write):
    """Writes a small recipe; keywords replace keys, None takes one out."""

    def make(**keys) -> str:
        write("data/train.jsonl", "".join(json.dumps({"prompt": text, "answer": "ran"}) + "\n" for text in PROMPTS))
        write("data/test.jsonl", "".join(json.dumps({"prompt": t, "answer": "ran"}) + "\n" for t in ("the", "a sky")))
        recipe = {
            "trainer": "dpo",
            "model_name_or_path": policy_path,
            "dataset_name": str(tmp_path / "data"),
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "pairs": {**SMALL, "rounds": 2},
            "rewards": ["./shorter.py:shorter"],
        }
        write("shorter.py", "def shorter(completions, **_):\n    return [-float(len(text)) for text in completions]\n")
        recipe = {key: value for key, value in (recipe | keys).items() if value is not None}
        return write("recipe.yaml", yaml.safe_dump(recipe))

    return make


@pytest.mark.slow
def test_a_recipe_runs_end_to_end_and_its_report_has_the_held_out_reward(make_recipe, tmp_path, capsys):
    from trl_rewards.train import main

    assert main(["--config", make_recipe()]) == 0
    said = capsys.readouterr().out
    out = tmp_path / "out"
    assert re.search(r"round 1 of 2: \d+ pairs of 4 prompts and 12 candidates", said)
    assert re.search(r"held-out reward, before and after each round: -[\d.]+ -> -[\d.]+ -> -[\d.]+", said)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_reward" in line] == [0, 2, 4]
    assert [line["step"] for line in lines if "pairs/count" in line] == [0, 2]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    page = (out / "report.html").read_text()
    assert "Eval reward" in page
    assert "The same prompts early and late in the run" in page
    assert {path.name for path in out.glob("round-*")} == {"round-1", "round-2"}
    assert (out / "model.safetensors").is_file()
    assert main(["--config", make_recipe()]) == 1
    assert "round-1 is of an earlier run" in capsys.readouterr().err


@pytest.mark.slow
def test_an_alarm_ends_the_rounds_and_the_round_goes_on_where_it_was(make_recipe, tmp_path, capsys):
    from trl_rewards.train import STOPPED, main

    recipe, out = make_recipe(alarms=[{"metric": "loss", "above": -1, "then": "stop"}]), tmp_path / "out"
    assert main(["--config", recipe]) == STOPPED
    assert "alarm: loss above -1" in capsys.readouterr().err
    assert (out / "round-1" / "checkpoint-1").is_dir()
    assert not (out / "round-1" / "round.json").exists()
    assert not (out / "round-2").exists()
    assert (out / "report.html").is_file()
    assert main(["--config", recipe, "--alarms", "[]", "--resume_from_checkpoint", "true"]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_a_recipe_s_pairs_are_checked_strictly_and_all_at_once(make_recipe):
    path = make_recipe(
        pairs={"selct": "all", "candidates": "many", "rounds": 1.5}, advantage="bnpo", eval_strategy="steps"
    )
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    said = "\n".join(caught.value.problems)
    assert "advantage: trainer 'dpo' does not take it (it takes rewards, combine, shape, pairs, alarms)" in said
    assert "pairs: unknown option 'selct', did you mean 'select'?" in said
    assert "pairs.candidates: must be int, got 'many'" in said
    assert "pairs.rounds: must be int, got 1.5" in said
    assert "eval_strategy: the held-out reward is measured before and after each round" in said
    assert len(caught.value.problems) == 5
    with pytest.raises(RecipeError, match="pairs: rounds must be 1 with source: dataset, got 2"):
        Recipe.load(make_recipe(pairs={"source": "dataset", "columns": ["answer"], "rounds": 2}))
    with pytest.raises(RecipeError, match="pairs: trainer 'grpo' does not take it"):
        Recipe.load(make_recipe(trainer="grpo"))


def test_pairs_are_overridden_on_the_command_line_and_in_the_signature(make_recipe):
    recipe = Recipe.load(make_recipe(), ["--pairs.candidates", "5", "--pairs.select", "all"], check_trl=False)
    assert recipe.pairs.candidates == 5
    assert "pairs:candidates:5,choose_truncated:true" in recipe.signature
    assert "select:all" in recipe.signature
    assert "advantage" not in recipe.signature


def test_a_missing_column_of_completions_and_a_checkpoint_are_refused_before_a_model_is_loaded(
    make_recipe, monkeypatch
):
    from trl_rewards.train import build_trainer, train

    def refuse(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", refuse)
    with pytest.raises(RecipeError, match=r"pairs\.columns: the dataset has no column 'answers', did you mean"):
        build_trainer(Recipe.load(make_recipe(pairs={"source": "dataset", "columns": ["answers"]})))
    with pytest.raises(RecipeError, match="rounds go on from their own folders; give true"):
        train(make_recipe(), ["--resume_from_checkpoint", "run/checkpoint-3"])


@pytest.mark.slow
def test_bon_writes_every_format_of_the_same_candidates_and_goes_on_where_it_stopped(
    make_recipe, tmp_path, monkeypatch
):
    config, runner = make_recipe(), CliRunner()

    def bon(name, *words):
        command = ["bon", "--config", config, "--prompts", str(tmp_path / "data"), "--out", str(tmp_path / name)]
        small = ["--n", "3", "--max-new-tokens", "6", "--dtype", "float32", "--limit", "4"]
        return runner.invoke(app, [*command, *small, *words])

    assert "4 prompts x 3: mean total" in bon("bon.jsonl").output
    best = [json.loads(line) for line in (tmp_path / "bon.jsonl").read_text().splitlines()]
    for row in best:
        assert row["total"] == max(each["total"] for each in row["candidates"])
        assert row["total"] == -len(row["completion"]) == row["scores"]["shorter"]
    assert "pairs of 4 prompts" in bon("pairs.parquet", "--format", "pairs", "--choose-truncated").output
    from pyarrow import parquet

    pairs = parquet.read_table(tmp_path / "pairs.parquet").to_pylist()
    answers = {row["prompt"]: row["completion"] for row in best}
    assert len(pairs) >= 2  # a prompt whose answers are all of one length gives none
    assert all(row["chosen"] == answers[row["prompt"]] for row in pairs)
    middle = sorted(row["total"] for row in best)[1]
    bon("sft.jsonl", "--format", "sft", "--minimum", str(middle))
    kept = [json.loads(line)["total"] for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert kept == [row["total"] for row in best if row["total"] >= middle]
    bon("kto.jsonl", "--format", "kto")
    labels = [json.loads(line)["label"] for line in (tmp_path / "kto.jsonl").read_text().splitlines()]
    assert labels == [True, False] * len(pairs)

    again = bon("bon.jsonl")
    assert isinstance(again.exception, RecipeError)
    assert "exists; delete it" in str(again.exception)
    with monkeypatch.context() as patched:  # it dies when the scores are to be written
        patched.setattr(
            "trl_rewards.commands.bon.save_rows", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        bon("later.jsonl")
    assert {path.name for path in (tmp_path / "later.jsonl.unfinished").iterdir()} == {
        "candidates.jsonl",
        "scores.jsonl",
    }
    monkeypatch.setattr("trl_rewards.models.sampling.LocalSampler.draw", None)
    monkeypatch.setattr("trl_rewards.pipeline.Pipeline.score", None)
    assert bon("later.jsonl").exit_code == 0
    assert (tmp_path / "later.jsonl").read_text() == (tmp_path / "bon.jsonl").read_text()
    assert not (tmp_path / "later.jsonl.unfinished").exists()


def test_bon_says_what_is_wrong_before_it_samples(make_recipe, tmp_path):
    def said(*words):
        command = ["bon", "--config", make_recipe(), "--prompts", str(tmp_path / "data"), *words]
        return str(CliRunner().invoke(app, command).exception)

    assert "--out: must end in .jsonl or .parquet, got 'x.csv'" in said("--out", "x.csv")
    assert "--format: must be one of bon, pairs, sft, kto, got 'pair', did you mean 'pairs'?" in said(
        "--out", "x.jsonl", "--format", "pair"
    )
    assert "--split: no split 'dev'" in said("--out", "x.jsonl", "--split", "dev")
    assert "2 for pairs; got 1" in said("--out", "x.jsonl", "--format", "pairs", "--n", "1")
    assert "top_p in (0, 1]" in said("--out", "x.jsonl", "--top-p", "2")
