"""One recipe that trains several reward models: what it may say, what members share, and going on where it stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_rewards import Recipe, RecipeError
from trl_rewards.commands.validate import validate
from trl_rewards.train import train

ROWS = [
    {"prompt": f"the {noun} ", "chosen": f"sat {count} times", "rejected": f"ran {count} times"}
    for noun in ("cat", "dog", "sky")
    for count in range(8)
]


@pytest.fixture
def recipe(write, policy_path, tmp_path):
    def make(members: str, more: str = "") -> str:
        pairs = write("pairs.jsonl", "\n".join(map(json.dumps, ROWS)))
        return write(
            "recipe.yaml",
            f"trainer: reward\nmodel_name_or_path: {policy_path}\ndataset_name: {pairs}\nmax_steps: 2\n"
            f"per_device_train_batch_size: 4\nlogging_steps: 1\nreport_to: none\noutput_dir: {tmp_path / 'out'}\n"
            f"save_strategy: no\nbf16: false\nlearning_rate: 0.01\nmembers: {members}\n{more}",
        )

    return make


def weights_of(out: Path, member: int) -> dict[str, torch.Tensor]:
    folder = out / f"member{member}"
    (file,) = [*folder.glob("model.safetensors"), *folder.glob("adapter_model.safetensors")]
    return load_file(file)


@pytest.mark.parametrize(
    ("members", "more", "problem"),
    [
        ("4", "", "members: must be a mapping of options"),
        ("{count: 1}", "", "members: two members or more"),
        ("{}", "", "members: count is needed, or lists under vary"),
        ("{count: 3, vary: {seed: [1, 2]}}", "", "got count 3, 2 of seed"),
        ("{cuont: 3}", "", "members: unknown option 'cuont', did you mean 'count'"),
        ("{count: 2, head: probe}", "", "members.head: must be 'own' or 'shared' or 'probed'"),
        ("{count: 2, probe: {max_steps: 5}}", "", "members: probe: goes with head: probed"),
        ("{vary: {output_dir: [a, b]}}", "", "members: vary: output_dir is the whole recipe's"),
        (
            "{vary: {learning_rat: [0.1, 0.2]}}",
            "",
            "members.vary: learning_rat: unknown key, did you mean 'learning_rate'",
        ),
        (
            "{count: 2, head: probed, probe: {max_steps: many}}",
            "",
            "members.probe: max_steps: must be int, got 'many'",
        ),
        ("{count: 2}", "data_seed: 3\n", "members: data_seed would give all of them the same order"),
        ("{count: 2}", "push_to_hub: true\n", "members: push_to_hub would push them all to one place"),
        ("{count: 2}", "trainer: grpo\nrewards: [length]\n", "members: trainer 'grpo' does not take it"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(recipe, members, more, problem):
    path = recipe(members, more)
    if "trainer: grpo" in more:
        text = Path(path).read_text(encoding="utf-8")
        Path(path).write_text(
            text.replace("trainer: reward\n", "").replace("max_steps: 2\n", ""),
            encoding="utf-8",
        )
    with pytest.raises(RecipeError) as error:
        Recipe.load(path)
    assert problem in str(error.value)


def test_members_are_in_the_signature_and_in_what_validate_says(recipe):
    path = recipe("{count: 3, head: probed}")
    assert validate(path)[0].endswith("objective of TRL, 3 members")
    assert "members:count:3,head:probed" in Recipe.load(path).signature


@pytest.mark.slow
def test_members_begin_with_one_probed_head_and_one_that_is_there_is_not_trained_again(
    recipe, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("trl_rewards.report.write_report", lambda folder: "")  # plots take longer than the training
    probe = "{max_steps: 6, learning_rate: 0.1}"
    path, out = recipe(f"{{count: 2, head: probed, probe: {probe}}}"), tmp_path / "out"
    folders = train(path)
    assert folders == [str(out / "member0"), str(out / "member1")]
    first, second = (weights_of(out, index) for index in (0, 1))
    head = load_file(out / "head.safetensors")["score.weight"]
    assert head.abs().max() > 0.2  # what is drawn has a deviation of 0.02
    # Adam's first steps are at most the learning rate: both come from one head, and have seen other rows.
    assert all((trained["score.weight"] - head).abs().max() <= 0.021 for trained in (first, second))
    assert not torch.equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])

    shutil.rmtree(out / "member1")
    (out / "member0" / "model.safetensors").unlink()  # it is not looked at again
    train(path)
    assert "member0 is trained already" in capsys.readouterr().out
    assert not (out / "member0" / "model.safetensors").exists()
    again = weights_of(out, 1)
    assert all(torch.equal(again[name], tensor) for name, tensor in second.items())

    with pytest.raises(RecipeError, match="member0 was made with another learning_rate; delete that folder"):
        train(path, ["--learning_rate", "0.02"])


RANKS = """
import sys
from trl_rewards import report
from trl_rewards.train import train

report.write_report = lambda folder: ""  # its plots take longer than the training
train(sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_train_adapters_from_one_head(recipe, tmp_path, run_ranks):
    lora = "use_peft: true\nlora_r: 2\nlora_target_modules: [q_proj, v_proj]\n"
    done = run_ranks(RANKS, 2, recipe("{count: 2, head: shared}", lora))
    out = tmp_path / "out"
    assert done.stdout.count("done: 2 of 2 steps") == 2
    head = load_file(out / "head.safetensors")["score.weight"]
    first, second = (weights_of(out, index)["base_model.model.score.weight"] for index in (0, 1))
    assert all((trained - head).abs().max() <= 0.021 for trained in (first, second))
    assert not torch.equal(first, second)
