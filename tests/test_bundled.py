"""The bundled policy and data: there, small, offline, and worth training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from trl_rewards import bundled


def test_an_unknown_bundle_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="tiny"):
        bundled.model_path("huge")


def test_the_bundle_is_a_few_megabytes():
    assert sum(file.stat().st_size for file in bundled.model_path().iterdir()) < 5_000_000


def test_train_and_test_prompts_are_disjoint_and_complete():
    data = bundled.load_data("tiny")
    questions = {split: {json.dumps(row["prompt"]) for row in data[split]} for split in ("train", "test")}
    assert not questions["train"] & questions["test"]
    assert len(questions["test"]) >= 200
    for row in data["test"]:
        assert row["prompt"][-1]["role"] == "user"
        assert len(set(row["references"])) == 5
        assert all(reference.rstrip(".!").endswith(row["answer"]) for reference in row["references"])


def test_every_reference_is_a_right_answer_to_its_prompt():
    from trl_rewards import Samples, load_reward

    rows = bundled.load_data("tiny")["test"]
    exact = load_reward("exact_match", take="last_word")
    for index in range(5):
        completions = [f"<think>x</think><answer>{row['references'][index]}</answer>" for row in rows]
        samples = Samples(rows["prompt"][:], completions, columns={"answer": rows["answer"][:]})
        assert exact.score(samples) == [1.0] * len(rows)


def test_the_policy_answers_in_its_format():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_rewards import Samples, load_reward

    model = AutoModelForCausalLM.from_pretrained(bundled.model_path())
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = bundled.load_data("tiny")["test"].select(range(32))
    inputs = tokenizer.apply_chat_template(
        rows["prompt"][:],
        add_generation_prompt=True,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = load_reward("regex_format").score(Samples([""] * 32, texts))
    assert sum(scores) >= 24, texts


@pytest.mark.slow
def test_the_quickstart_learns(tmp_path):
    """The recipe as shipped, from its own command: held-out exact answers go up by a lot."""
    import subprocess
    import sys

    root = Path(__file__).parent.parent
    command = [sys.executable, "recipes/train.py", "--config", "recipes/quickstart.yaml"]
    command += ["--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    logs = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    exact = [log["eval_rewards/exact_match/mean"] for log in logs if "eval_reward" in log]
    assert exact[0] < 0.65, exact
    assert exact[-1] > 0.8, exact
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "recipe.yaml").is_file()
    assert "bleuberi" in (tmp_path / "signature.txt").read_text()


def test_more_questions_are_none_that_were_taken_before():
    from trl_rewards.bundled import quiz

    taken = {row["prompt"][0]["content"] for row in bundled.load_data()["train"]}
    before = set(taken)
    texts = [question.text for question in quiz.more_questions(random.Random(0), 50, taken)]
    assert len(set(texts)) == 50
    assert not before & set(texts)
    assert taken == before | set(texts)
