"""Several reward models as one source: members' scores, their holes, and what is said of their disagreement."""

from __future__ import annotations

import json

import pytest
import torch

from trl_rewards import Context, RecipeError, load_objective, load_reward
from trl_rewards.commands.score import score_file
from trl_rewards.testing import check_reward

PROMPTS, COMPLETIONS = ["the cat ", "the dog "], ["sat 3 times", "ran"]


def save_model(folder, policy: str, seed: int, outputs: int = 1, scale: float = 1.0) -> str:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=outputs, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight)
    model.score.weight.data *= scale
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    return str(folder)


def save_adapter(folder, policy: str, seed: int) -> str:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "up_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_" in name or "score" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def saved(policy_path, tmp_path_factory):
    """Folders of two models, a model with two heads, one that gives no numbers, and two adapters."""
    folder = tmp_path_factory.mktemp("members")
    return {
        "one": save_model(folder / "one", policy_path, 1),
        "two": save_model(folder / "two", policy_path, 2),
        "heads": save_model(folder / "heads", policy_path, 3, outputs=2),
        "broken": save_model(folder / "broken", policy_path, 4, scale=float("nan")),
        "lora1": save_adapter(folder / "lora1", policy_path, 5),
        "lora2": save_adapter(folder / "lora2", policy_path, 6),
    }


def scores(use: str, **options) -> list[float]:
    reward = load_reward(use, dtype="float32", device="cpu", **options)
    return reward(prompts=PROMPTS, completions=COMPLETIONS)


@pytest.mark.parametrize(
    ("combine", "wanted"),
    [
        ("mean", lambda a, b: (a + b) / 2),
        ("min", min),
        ({"use": "uwo", "with": {"coef": 2.0}}, lambda a, b: (a + b) / 2 - 2 * ((a - b) / 2) ** 2),
    ],
)
def test_members_are_combined_row_by_row(saved, combine, wanted):
    members = [saved["one"], saved["two"]]
    alone = [scores("model", path=member) for member in members]
    found = scores("ensemble", members=members, combine=combine)
    assert found == pytest.approx([wanted(a, b) for a, b in zip(*alone, strict=True)], abs=1e-5)
    assert min(abs(a - b) for a, b in zip(*alone, strict=True)) > 0.01


def test_adapters_of_one_base_share_it_and_score_as_alone(saved):
    members = [saved["lora1"], saved["lora2"]]
    alone = [scores("model", path=member) for member in members]
    reward = load_reward("ensemble", members=members, dtype="float32", device="cpu")
    assert reward._scorers[0].head.model is reward._scorers[1].head.model
    found = reward(prompts=PROMPTS, completions=COMPLETIONS)
    assert [score.trace["members"] for score in found] == [
        {"lora1": pytest.approx(a, abs=1e-4), "lora2": pytest.approx(b, abs=1e-4)} for a, b in zip(*alone, strict=True)
    ]


def test_each_output_of_a_model_with_several_is_a_member(saved):
    heads = [scores("model", path=saved["heads"], output=index) for index in (0, 1)]
    found = scores("ensemble", members=[saved["heads"]], combine="min")
    assert found == pytest.approx([min(pair) for pair in zip(*heads, strict=True)], abs=1e-5)


def test_a_member_without_a_score_is_a_hole_and_no_zero(saved):
    (alone,) = [scores("model", path=saved["one"])]
    members = [saved["broken"], saved["one"]]
    for combine in ("mean", "min", "uwo"):
        assert scores("ensemble", members=members, combine=combine) == pytest.approx(alone, abs=1e-5)
    assert scores("ensemble", members=[saved["broken"]]) == [None, None]


def test_disagreement_is_logged_per_batch_and_shown_per_row(saved, write, tmp_path):
    logged: dict[str, float] = {}
    members = [saved["one"], saved["two"]]
    reward = load_reward("ensemble", members=members, dtype="float32", device="cpu")
    reward.setup(Context(log_metric=logged.__setitem__))
    found = reward(prompts=PROMPTS, completions=COMPLETIONS)
    apart = [abs(score.trace["members"]["one"] - score.trace["members"]["two"]) / 2 for score in found]
    assert [score.trace["disagreement"] for score in found] == pytest.approx(apart, abs=1e-5)
    assert logged["ensemble/disagreement"] == pytest.approx(sum(apart) / 2, abs=1e-5)
    assert {"ensemble/one", "ensemble/two", "ensemble/truncated"} < logged.keys()

    options = f"{{members: [{', '.join(members)}], dtype: float32, device: cpu}}"
    recipe = write("recipe.yaml", f"rewards: [{{use: ensemble, as: rm, with: {options}}}]\n")
    rows = [json.dumps({"prompt": p, "completion": c}) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    data = write("data.jsonl", "\n".join(rows))
    score_file(recipe, [], data, tmp_path / "out.jsonl", "train", "completion", 8, tmp_path / "trace.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [line["traces"]["rm"]["disagreement"] for line in lines] == pytest.approx(apart, abs=1e-5)


def test_ensemble_keeps_the_contract_of_rewards(saved):
    check_reward(load_reward("ensemble", members=[saved["one"], saved["two"]], dtype="float32", device="cpu"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"members": []}, "members must be different folders"),
        ({"members": ["a", "a"]}, "members must be different folders"),
        ({"members": ["a"], "combine": "weighted_sum"}, "'weighted_sum' is for sources that say different"),
        ({"members": ["a"], "combine": {"use": "uwo", "with": {"coeff": 1}}}, "did you mean 'coef'"),
        ({"members": ["a"], "combine": {"name": "uwo"}}, "combine must be a name or"),
        ({"members": ["a"], "combine": "minn"}, "unknown combiner 'minn'"),
        ({"members": ["a"], "adapter": "b"}, "members are models or adapters themselves"),
    ],
)
def test_wrong_options_are_said(options, problem):
    with pytest.raises(RecipeError) as error:
        load_reward("ensemble", **options)
    assert problem in str(error.value)


def test_loss_of_heads_by_hand():
    from trl_rewards_ensembles.heads import heads_loss

    outputs = torch.tensor([[1.0, 0.0], [2.0, 9.0], [0.0, 0.0], [2.0, 9.0]])  # differences [1, 0] and [0, 0]
    one, none = 0.3132617, 0.6931472  # -log σ(1), -log σ(0)
    assert heads_loss(outputs).item() == pytest.approx((one + 3 * none) / 4)
    learning = torch.tensor([[True, False], [False, False]])
    assert heads_loss(outputs, learning=learning).item() == pytest.approx(one)
    margin = torch.tensor([1.0, float("nan")])
    assert heads_loss(outputs, margin).item() == pytest.approx((none + 1.3132617) / 2)  # -log σ(-1)
    assert heads_loss(outputs, learning=torch.zeros(2, 2, dtype=torch.bool)).item() == 0


@pytest.mark.slow
def test_heads_that_are_trained_together_are_members(policy_path, tmp_path):
    import trl
    from datasets import Dataset

    from trl_rewards import RewardTrainer

    rows = [{"prompt": "the cat ", "chosen": f"sat {n} times", "rejected": f"ran {n}"} for n in range(4)]
    options = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    args = trl.RewardConfig(str(tmp_path / "rm"), max_steps=2, logging_steps=1, learning_rate=1e-2, **options)
    objective = load_objective("bradley_terry_heads", heads=3, share=0.5)
    trainer = RewardTrainer(policy_path, args, train_dataset=Dataset.from_list(rows), objective=objective)
    trainer.train()
    assert trainer.state.log_history[0]["disagreement"] > 0
    trainer.save_model()
    found = load_reward("ensemble", members=[args.output_dir], dtype="float32", device="cpu")(PROMPTS, COMPLETIONS)
    assert list(found[0].trace["members"]) == ["rm.0", "rm.1", "rm.2"]
    assert found[0].trace["disagreement"] > 0
