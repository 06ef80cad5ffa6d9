"""Records, the objective `themis` inside TRL's trainer, and what it leaves: a folder that writes and scores."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from trl_rewards_themis.objective import ThemisObjective
from trl_rewards_themis.tara import main, rows_of

from trl_rewards import RewardTrainer, Samples, load_objective, load_reward
from trl_rewards.models import Loading, load_tokenizer

DATA = Path(os.environ.get("TRL_REWARDS_TEST_DATA", "no data")) / "tara"
RECORD = {
    "id": "sum_0",
    "question": "What is 3 plus 4?",
    "pos_answer": {
        "answer": "7",
        "score": 1,
        "actions": {
            "Thought": "I compute it.",
            "Action": "arithmetic",
            "Action Input": "3+4",
            "Observation": "7",
        },
        "score_agent": {"explanation": "They agree.", "score": "1"},
    },
    "neg_answer": {
        "answer": "9",
        "score": -1,
        "actions": "Thought: I compute it.\n\nAction: arithmetic\nAction Input: 3+4\nObservation: 7\nThought: \n"
        "Do I need to use a tool? No\nFinished.\n\n",
        "score_agent": {"explanation": "It differs.", "score": "-1"},
    },
}


def test_records_of_both_forms_become_rows():
    (row,) = rows_of([RECORD])
    assert row == {
        "id": "sum_0",
        "prompt": "What is 3 plus 4?",
        "chosen": "7",
        "chosen_trace": "<start_tool> Thought: I compute it.\nAction: arithmetic\nAction Input: 3+4\n"
        "<start_observation> Observation: 7\n<start_work> Work: They agree.",
        "rejected": "9",
        "rejected_trace": "<start_tool> Thought: I compute it.\nAction: arithmetic\nAction Input: 3+4\n"
        "<start_observation> Observation: 7\n<start_tool> Thought: Do I need to use a tool? No\nFinished.\n"
        "<start_work> Work: It differs.",
    }
    (silent,) = rows_of([RECORD], observation_dropout=1.0)
    assert silent["chosen_trace"] == row["chosen_trace"].replace("Observation: 7", "Observation: ")
    assert silent["rejected_trace"] == row["rejected_trace"].replace("Observation: 7", "Observation: ")
    assert rows_of([RECORD | {"neg_answer": RECORD["pos_answer"]}]) == []
    with pytest.raises(ValueError, match="record sum_0: neg_answer has no answer"):
        rows_of([{**RECORD, "neg_answer": {}}])
    broken = {**RECORD["pos_answer"], "actions": {"Thought": "t"}}
    with pytest.raises(ValueError, match="pos_answer: actions lack Action, Action Input, Observation"):
        rows_of([{**RECORD, "pos_answer": broken}])


def test_the_command_writes_a_dataset(tmp_path, capsys):
    file = tmp_path / "records.json"
    file.write_text(json.dumps(RECORD) + "\n")
    main([str(file), "--test", str(file), "--out", str(tmp_path / "pairs"), "--observation-dropout", "0"])
    assert capsys.readouterr().out == f"1 train, 1 test pairs -> {tmp_path / 'pairs'}\n"
    assert [json.loads(line) for line in (tmp_path / "pairs" / "test.jsonl").open()] == rows_of([RECORD])
    file.write_text("[]\n")
    with pytest.raises(SystemExit):
        main([str(file), "--out", str(tmp_path / "pairs")])
    assert "line 1: not a JSON object" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_dir(), reason="TRL_REWARDS_TEST_DATA has no tara")
def test_all_of_tara_with_traces_becomes_rows():
    files = [file for file in sorted(DATA.glob("*/*.json")) if file.parent.name not in ("truthful_qa", "retarded_bar")]
    counts = {}
    for file in files:
        if "history" not in file.name:
            records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            counts[file.parent.name] = counts.get(file.parent.name, 0) + len(rows_of(records))
    # 3088 + 1626 as counted in the folder's README, less the 45 rows that have no traces.
    assert sum(counts.values()) == 3088 + 1626 - 45
    assert counts["calculator"] == 877 + 154


def labelled(objective, tokenizer, row, side):
    found = objective.tokenize(row, tokenizer)
    ids, labels = found[f"{side}_ids"], found[f"{side}_labels"]
    return ["".join(tokenizer.decode([i]) for i, k in zip(ids, labels, strict=True) if k == kind) for kind in range(4)]


def test_tokens_are_told_apart_by_what_they_are_of(base_path):
    tokenizer = load_tokenizer(Loading(path=base_path))
    (row,) = rows_of([RECORD])
    given, acted, seen, reason = labelled(ThemisObjective(), tokenizer, row, "chosen")
    assert given == "### USER:\nQuestion: What is 3 plus 4?\nAnswer: 7\n### ASSISTANT:\n<start_tool>"
    assert acted == " Thought: I compute it.\nAction: arithmetic\nAction Input: 3+4\n<start_observation>"
    assert seen == " Observation: 7\n"
    assert reason == "<start_work> Work: They agree.</s>"
    assert labelled(ThemisObjective(omega=0.0), tokenizer, row, "chosen")[3] == ""
    released = ThemisObjective(compat="release")
    assert labelled(released, tokenizer, row, "chosen")[0] == "### USER:\nQuestion: What is 3 plus 4?\n"
    assert labelled(released, tokenizer, row, "rejected")[0].endswith("Answer: 9\n")


def train(base, out, objective, peft=None, steps=12, **options):
    """Train on the one record, over and over."""
    from datasets import Dataset
    from trl import RewardConfig

    given = {
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 200,
    }
    plain = {**RECORD["neg_answer"], "actions": RECORD["pos_answer"]["actions"]}
    rows = Dataset.from_list(rows_of([RECORD | {"neg_answer": plain}]) * 4)
    args = RewardConfig(str(out), **given | options)
    trainer = RewardTrainer(model=base, args=args, train_dataset=rows, objective=objective, peft_config=peft)
    trainer.train()
    trainer.save_model(str(out))
    return trainer


def losses(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_is_trained_writes_and_scores(base_path, tmp_path, kind):
    """It learns the record by heart, so that the reward has to write it."""
    from peft import LoraConfig

    lora = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    peft = lora if kind == "lora" else None
    trainer = train(base_path, tmp_path / "out", load_objective("themis"), peft, steps=60, learning_rate=1e-2)
    assert losses(trainer, "language_loss")[-1] < 0.05 < 2 < losses(trainer, "language_loss")[0]
    samples = Samples(["What is 3 plus 4?"] * 2, ["7", "9"])
    options = {"path": str(tmp_path / "out"), "dtype": "float32", "max_length": 200, "max_new_tokens": 40}
    better, worse = load_reward("themis", tools=["arithmetic"], **options).score(samples)
    assert better.trace["rationale"] == "They agree."
    assert better.trace["steps"][0]["input"] == "3+4"
    assert better.trace["steps"][0]["observation"] == "7"
    assert worse.trace["rationale"] == "It differs."
    assert better > worse + 1
    # The same numbers as the trained model gives for the same text, here and as a plain reward model.
    row = rows_of([RECORD])[0]
    ids = torch.tensor([ThemisObjective().tokenize(row, trainer.processing_class)["chosen_ids"]])
    with torch.no_grad():
        wanted = trainer.model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
    assert better == pytest.approx(wanted, abs=1e-3)
    text = trainer.processing_class.decode(ids[0], clean_up_tokenization_spaces=False)
    (read,) = load_reward("model", path=str(tmp_path / "out"), dtype="float32").score(Samples([""], [text]))
    assert read == pytest.approx(wanted, abs=1e-3)


def test_a_model_of_its_own_output_layer_keeps_it_and_gets_the_marks(tmp_path, themis_path):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(themis_path, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(themis_path)
    objective = load_objective("themis")
    assert objective.attach(model, tokenizer, []) == []
    original = AutoModelForCausalLM.from_pretrained(themis_path)
    torch.testing.assert_close(model.lm_head.weight, original.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(themis_path)
    tokenizer.add_special_tokens({"additional_special_tokens": []})
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("<start_tool>", "<start_observation>", "<start_work>"):
        vocabulary["model"]["vocab"][f"other {name}"] = vocabulary["model"]["vocab"].pop(name)
    vocabulary["added_tokens"] = [each for each in vocabulary["added_tokens"] if "start" not in each["content"]]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(vocabulary)), pad_token="<pad>", eos_token="</s>"
    )
    added = objective.attach(model, bare, [])
    assert bare.convert_ids_to_tokens(added) == ["<start_tool>", "<start_observation>", "<start_work>"]
    assert model.lm_head.weight.shape[0] == model.get_input_embeddings().num_embeddings == len(bare)
    torch.testing.assert_close(model.lm_head.weight[: len(tokenizer)], original.lm_head.weight)


def test_the_release_counts_the_ranking_by_half(base_path, tmp_path):
    for compat, share in (("paper", 1.0), ("release", 0.5)):
        objective = load_objective("themis", compat=compat, alpha=2.0)
        trainer = train(base_path, tmp_path / compat, objective, steps=1)
        parts = [losses(trainer, name)[0] for name in ("loss", "ranking_loss", "language_loss")]
        assert parts[0] == pytest.approx(share * parts[1] + 2.0 * parts[2], abs=2e-3)
