"""The weights of several reward models averaged, from file to file, and whether the average is worth having."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trl_rewards import RewardError
from trl_rewards.commands.agree import Recorded
from trl_rewards.commands.merge import Check, merge, report
from trl_rewards.models import Loading, average, load_scorer
from trl_rewards.models.pretrained import with_base


@pytest.fixture
def model(tmp_path):
    """Writes a folder with a config and tensors, and returns its path."""

    def write(name: str, config: dict | None = None, **tensors: torch.Tensor) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"hidden_size": 2} | (config or {})))
        save_file(tensors, folder / "model.safetensors")
        return str(folder)

    return write


def test_every_parameter_is_averaged_which_is_not_the_mean_of_predictions(model, tmp_path):
    """Cases 02 of the paper's specification: r = v · relu(A φ), φ = (1, 2)."""
    features = torch.tensor([1.0, 2.0])
    one = {"a": torch.tensor([[1.0, -1.0], [0.5, 0.5]]), "v": torch.tensor([1.0, 2.0])}
    two = {"a": torch.tensor([[-1.0, 1.0], [0.5, 1.5]]), "v": torch.tensor([3.0, 0.0])}

    def reward(a, v):
        return (v @ torch.relu(a @ features)).item()

    mean = load_file(average(tmp_path / "out", [model("one", **one), model("two", **two)]) / "model.safetensors")
    assert [reward(**each) for each in (one, two, mean)] == [3.0, 3.0, 2.5]
    linear = [
        {"w": torch.tensor([0.5, 1.0]), "b": torch.tensor(0.1)},
        {"w": torch.tensor([0.3, 1.4]), "b": -torch.tensor(0.1)},
    ]
    folders = [model(f"linear{index}", **each) for index, each in enumerate(linear)]
    mean = load_file(average(tmp_path / "linear", folders) / "model.safetensors")
    assert (mean["w"] @ features + mean["b"]).item() == pytest.approx(2.8)


def test_sums_are_float32_dtypes_stay_and_integers_are_the_first_members(model, tmp_path):
    values = [torch.full((3,), value, dtype=torch.bfloat16) for value in (1.0, 1.0078125, 1.0078125)]
    folders = [model(f"m{i}", w=value, places=torch.tensor([i, 7])) for i, value in enumerate(values)]
    mean = load_file(average(tmp_path / "out", folders) / "model.safetensors")
    assert mean["w"].dtype == torch.bfloat16
    assert mean["w"].tolist() == [1.0078125] * 3  # 1.0052, whose nearest bfloat16 it is
    assert mean["places"].tolist() == [0, 7]
    mean = load_file(average(tmp_path / "third", folders, [0, 0, 5]) / "model.safetensors")
    assert torch.equal(mean["w"], values[2])


def test_files_are_cut_to_size_and_read_whatever_their_cut(model, tmp_path):
    tensors = {name: torch.randn(4) for name in "abc"}
    whole = model("whole", **tensors)
    cut = average(tmp_path / "cut", [whole], file_bytes=32)
    assert sorted(file.name for file in cut.glob("*.safetensors")) == [
        f"model-0000{number}-of-00002.safetensors" for number in (1, 2)
    ]
    again = load_file(average(tmp_path / "again", [str(cut), whole]) / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_members_that_differ_are_refused_by_file_and_tensor(model, tmp_path):
    one = model("one", w=torch.zeros(2), only=torch.zeros(1))
    other = model("other", {"hidden_size": 3, "transformers_version": "9"}, w=torch.zeros(3))
    with pytest.raises(RewardError) as error:
        average(tmp_path / "out", [one, other])
    said = str(error.value)
    assert f"hidden_size is 2 in {one}, and 3 in {other}" in said
    assert f"{other} has no tensor only" in said
    assert f"w is F32 [2] in {one}/model.safetensors, and F32 [3] in {other}/model.safetensors" in said
    assert "transformers_version" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "problem"),
    [([1.0], "1 weights for 2 members"), ([0.0, 0.0], "nor all 0"), ([2.0, -1.0], "must not be negative")],
)
def test_weights_that_cannot_be_are_refused(model, tmp_path, weights, problem):
    with pytest.raises(RewardError, match=problem):
        average(tmp_path / "out", [model("a", w=torch.zeros(1)), model("b", w=torch.zeros(1))], weights)


def test_what_is_no_member_or_no_new_folder_is_refused(model, tmp_path):
    there = model("there", w=torch.zeros(1))
    with pytest.raises(RewardError, match="exists already"):
        average(there, [there])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RewardError, match="neither a model"):
        average(tmp_path / "out", [str(tmp_path / "empty")])
    with pytest.raises(RewardError, match="quantised weights have no mean"):
        average(tmp_path / "out", [model("small", {"quantization_config": {}}, w=torch.zeros(1))])


# --- real models -----------------------------------------------------------------------------------------------------

TEXTS = ["the cat sat 3 times", "the dog ran"]


def save_adapter(folder: Path, base: str, seed: int, **options) -> str:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, **options))
    for name, weight in adapted.named_parameters():
        if "lora_" in name or "score" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def test_adapters_are_merged_into_their_base_as_peft_would(policy_path, tmp_path):
    from transformers import AutoModelForSequenceClassification

    targets = ["q_proj", "up_proj"]
    one = save_adapter(tmp_path / "one", policy_path, 1, target_modules=targets, alpha_pattern={"q_proj": 3})
    two = save_adapter(tmp_path / "two", policy_path, 2, target_modules=targets, use_rslora=True)

    def scorer(path):
        return load_scorer(with_base(Loading(path=str(path), dtype="float32", device="cpu"), lambda base: base))

    for member in (one, two):
        merged = average(f"{member}-merged", [member])
        assert scorer(merged).score_texts(TEXTS, True) == pytest.approx(
            scorer(member).score_texts(TEXTS, True), abs=1e-5
        )
    mean = load_file(average(tmp_path / "mean", [one, two]) / "model.safetensors")
    both = [load_file(Path(f"{member}-merged", "model.safetensors")) for member in (one, two)]
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (both[0][name] + both[1][name]) / 2)
    assert "lm_head.weight" not in mean
    # A merged adapter is a model like another, and goes with whole models of its base.
    model = AutoModelForSequenceClassification.from_pretrained(f"{one}-merged", dtype=torch.float32)
    model.save_pretrained(tmp_path / "whole")
    again = load_file(average(tmp_path / "mixed", [tmp_path / "whole", two]) / "model.safetensors")
    for name, tensor in mean.items():
        torch.testing.assert_close(again[name], tensor)
    dora = save_adapter(tmp_path / "dora", policy_path, 3, target_modules=targets, use_dora=True)
    with pytest.raises(RewardError, match="more than plain LoRA"):
        average(tmp_path / "out", [dora])


def test_twins_whose_average_knows_nothing_are_said_not_to_be_connected(reward_model_path, tmp_path):
    """A model, and one that says the same with the signs of its last norm and of its head turned: between them both
    are 0, and all answers alike."""
    twin = tmp_path / "twin"
    shutil.copytree(reward_model_path, twin)
    weights = load_file(twin / "model.safetensors")
    for name in ("model.norm.weight", "score.weight"):
        weights[name] = -weights[name]
    save_file(weights, twin / "model.safetensors", metadata={"format": "pt"})
    texts = [f"{verb} {count} times" for verb in ("sat", "ran") for count in range(8)]
    scored = load_scorer(Loading(path=reward_model_path, dtype="float32", device="cpu"))
    ranked = [
        text for _, text in sorted(zip(scored.score_texts([f"the cat {t}" for t in texts], True), texts, strict=True))
    ]
    rows = [{"prompt": "the cat ", "chosen": good, "rejected": bad} for bad, good in itertools.pairwise(ranked)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, rows)))
    check = Check(recorded=Recorded(data=str(pairs)), options={"dtype": "float32", "device": "cpu"}, points=1)
    points = merge(tmp_path / "out", [reward_model_path, str(twin)], None, check)
    assert [round(point.found.share or 0.0, 2) for point in points] == [1.0, 1.0, 1.0, 0.5, 0.5]
    assert [point.wanted for point in points] == [None, None, None, 1.0, 1.0]
    said = report(points)
    assert "average of their weights" in said
    assert "not linearly connected" in said
    assert "head: probed" in said
    connected = [point._replace(wanted=0.5) for point in points]
    assert report(connected).endswith("every average is at least as accurate as what it is made of.")
    noisy = [point._replace(wanted=0.6, found=point.found._replace(high=0.7)) for point in points]
    assert report(noisy).endswith("by more than these pairs can tell.")
