"""Reward-model training: stock TRL without an objective, and what an objective may see, change and keep."""

from __future__ import annotations

import json

import pytest
import torch

from trl_rewards import Objective, Recipe, RecipeError, RewardError
from trl_rewards.commands.validate import validate
from trl_rewards.testing import check_objective
from trl_rewards.train import train

ROWS = [
    {"prompt": f"the {noun} ", "chosen": f"sat {count} times", "rejected": f"ran {count}", "strength": float(count)}
    for noun in ("cat", "dog", "sky")
    for count in range(4)
]


class Plain(Objective):
    """TRL's own loss."""

    def loss(self, batch):
        return batch.loss


class Weighted(Objective):
    """Bradley-Terry, each pair times its strength."""

    columns = ("strength",)
    own_loss = True

    scale: float = 1.0

    def loss(self, batch):
        terms = torch.nn.functional.logsigmoid(batch.chosen - batch.rejected)
        return -(self.scale * batch.columns["strength"] * terms).mean()


class Counting(Objective):
    """Counts the batches that it has seen, and looks at hidden states."""

    needs = frozenset({"hidden"})

    def __post_init__(self):
        self.seen = torch.zeros(())
        self.shapes = []

    def setup(self, context):
        self.log_metric = context.log_metric

    def loss(self, batch):
        assert batch.hidden is not None
        self.shapes.append(tuple(batch.hidden.shape))
        self.seen = self.seen + batch.training
        self.log_metric("seen", float(self.seen))
        return batch.loss + 0.0 * batch.hidden.float().pow(2).mean()

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Marked(Plain):
    """Puts a token of its own at the end of every answer."""

    def attach(self, model, tokenizer, fresh):
        self.fresh = list(fresh)
        tokenizer.add_tokens(["<|mark|>"], special_tokens=True)
        model.resize_token_embeddings(len(tokenizer))
        return [tokenizer.convert_tokens_to_ids("<|mark|>")]

    def tokenize(self, row, tokenizer):
        mark = tokenizer.convert_tokens_to_ids("<|mark|>")
        return {
            f"{which}_ids": [*tokenizer(row["prompt"] + row[which])["input_ids"], mark]
            for which in ("chosen", "rejected")
        }


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    return str(file)


@pytest.fixture
def arguments(tmp_path):
    import trl

    def make(**options):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "save_strategy": "no",
            "bf16": False,
            "disable_tqdm": True,
        }
        return trl.RewardConfig(**(defaults | options))

    return make


def fit(cls, model, arguments, resume=None, **options):
    from datasets import Dataset

    trainer = cls(model=model, args=arguments, train_dataset=Dataset.from_list(ROWS), **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("objective", [None, Plain()])
@pytest.mark.parametrize("options", [{}, {"center_rewards_coefficient": 0.1, "gradient_accumulation_steps": 2}])
def test_trainer_equals_trl_without_an_objective_and_with_one_that_keeps_its_loss(
    reward_model_path, arguments, objective, options
):
    import trl

    from trl_rewards import RewardTrainer

    _, wanted = fit(trl.RewardTrainer, reward_model_path, arguments(**options))
    _, found = fit(RewardTrainer, reward_model_path, arguments(**options), objective=objective)
    for key in ("loss", "grad_norm", "accuracy", "margin"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in wanted], abs=1e-6), key
    assert len({line["loss"] for line in found}) > 1


def test_objective_sees_its_columns_in_the_batch_s_order(reward_model_path, arguments):
    from trl_rewards import RewardTrainer

    trainer, lines = fit(RewardTrainer, reward_model_path, arguments(max_steps=1), objective=Weighted())
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["objective_columns"]["strength"].shape == (3,)
    _, more = fit(RewardTrainer, reward_model_path, arguments(max_steps=1), objective=Weighted(scale=2.0))
    assert more[0]["loss"] == pytest.approx(2 * lines[0]["loss"], rel=1e-5)


def test_hidden_states_are_those_the_head_scores(reward_model_path, arguments):
    from trl_rewards import RewardTrainer

    class Scored(Objective):
        """Recomputes the scores from the hidden states."""

        needs = frozenset({"hidden"})

        def attach(self, model, tokenizer, fresh):
            self.model = model
            return []

        def loss(self, batch):
            assert batch.hidden is not None
            scores = self.model.score(batch.hidden)[:, 0].float()
            torch.testing.assert_close(scores, torch.cat([batch.chosen, batch.rejected]))
            return batch.loss

    fit(RewardTrainer, reward_model_path, arguments(max_steps=2), objective=Scored())


def test_state_of_an_objective_is_resumed_and_its_metrics_are_logged(reward_model_path, arguments, tmp_path):
    from trl_rewards import RewardTrainer

    _, straight = fit(RewardTrainer, reward_model_path, arguments(), objective=Counting())
    halves = arguments(save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "halves"))
    halves.max_steps = 4
    fit(RewardTrainer, reward_model_path, halves, objective=Counting())
    again = Counting()
    _, resumed = fit(
        RewardTrainer, reward_model_path, halves, resume=str(tmp_path / "halves" / "checkpoint-2"), objective=again
    )
    assert [line["seen"] for line in straight] == [1, 2, 3, 4]
    assert [line["seen"] for line in resumed][-2:] == [3, 4]
    assert [line["loss"] for line in resumed][-2:] == pytest.approx([line["loss"] for line in straight][-2:])
    assert set(again.shapes) == {(6, 32)}


def test_objective_may_add_tokens_and_tokenise_also_with_lora(policy_path, arguments, tmp_path):
    from peft import LoraConfig

    from trl_rewards import RewardTrainer

    objective = Marked()
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    trainer, _ = fit(RewardTrainer, policy_path, arguments(max_steps=2), objective=objective, peft_config=lora)
    assert objective.fresh == ["score.weight"]  # a causal language model has no score head
    mark = trainer.processing_class.convert_tokens_to_ids("<|mark|>")
    assert all(row["chosen_ids"][-1] == mark for row in trainer.train_dataset)
    trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert any("trainable_tokens" in name for name in trained)
    assert any("score" in name for name in trained)


def test_arguments_that_an_objective_would_pass_over_are_refused(reward_model_path, arguments):
    from datasets import Dataset

    from trl_rewards import RewardTrainer

    with pytest.raises(ValueError, match="center_rewards_coefficient"):
        fit(RewardTrainer, reward_model_path, arguments(center_rewards_coefficient=0.1), objective=Weighted())
    rows = Dataset.from_list([row | {"margin": 1.0} for row in ROWS])
    with pytest.raises(ValueError, match="margin"):
        RewardTrainer(reward_model_path, arguments(), train_dataset=rows, objective=Weighted())


def test_rows_longer_than_trl_keeps_are_not_dropped_in_silence(reward_model_path, arguments):
    from trl_rewards import RewardTrainer

    class Long(Plain):
        """Makes rows of up to `max_length` tokens."""

        max_length: int = 2048

    with pytest.raises(ValueError, match="max_length 1024 would drop rows"):
        fit(RewardTrainer, reward_model_path, arguments(), objective=Long())


def test_streamed_data_and_a_torch_dtype_work_as_in_trl(policy_path, arguments):
    from datasets import Dataset

    from trl_rewards import RewardTrainer

    rows = Dataset.from_list(ROWS).to_iterable_dataset()
    options = {"model_init_kwargs": {"dtype": torch.float32}, "max_steps": 1}
    trainer = RewardTrainer(policy_path, arguments(**options), train_dataset=rows, objective=Marked())
    trainer.train()
    assert trainer.state.global_step == 1


class Seeing(Plain):
    """Keeps what it is shown, and draws a number."""

    needs = frozenset({"hidden", "prompt_hidden"})

    def __post_init__(self):
        self.batches, self.drawn = [], []

    def attach(self, model, tokenizer, fresh):
        self.model, self.tokenizer = model, tokenizer
        return []

    def loss(self, batch):
        self.batches.append(batch)
        self.drawn.append(torch.rand(1, generator=batch.generator).item())
        return batch.loss


def test_an_objective_sees_tokens_prompts_steps_and_its_own_random_numbers(reward_model_path, arguments, tmp_path):
    from trl_rewards import RewardTrainer
    from trl_rewards.maths import shared_prefix

    args = arguments(save_strategy="steps", save_steps=2, disable_dropout=True)
    whole = Seeing()
    fit(RewardTrainer, reward_model_path, args, objective=whole)
    first = whole.batches[0]
    assert [(batch.step, batch.max_steps, batch.training) for batch in whole.batches[:2]] == [
        (0, 4, True),
        (1, 4, True),
    ]
    assert first.mask.sum(dim=1).tolist() == [(row != whole.tokenizer.pad_token_id).sum() for row in first.ids]
    texts = whole.tokenizer.batch_decode(first.ids, skip_special_tokens=True)
    assert all("sat" in text for text in texts[:3])
    assert all("ran" in text for text in texts[3:])
    torch.testing.assert_close(first.outputs[:, 0], torch.cat([first.chosen, first.rejected]))
    prompt = whole.tokenizer.decode(first.ids[0, : shared_prefix(first.ids, first.mask)[0]])
    assert texts[0].startswith(prompt)
    assert prompt.startswith("the ")
    torch.testing.assert_close(first.prompt_hidden[:3], first.prompt_hidden[3:])  # of the same prompts
    assert (first.prompt_hidden - first.hidden).abs().max() > 1e-3
    resumed = Seeing()
    fit(RewardTrainer, reward_model_path, args, resume=str(tmp_path / "run" / "checkpoint-2"), objective=resumed)
    assert resumed.drawn[-2:] == whole.drawn[-2:]
    assert len(set(whole.drawn)) == 4


def test_the_scored_position_is_the_model_s_also_where_the_end_is_the_padding(reward_model_path, arguments, caplog):
    from trl_rewards import RewardTrainer

    objective = Seeing()
    args = arguments(max_steps=1, pad_token="<|im_end|>", learning_rate=0.0)
    fit(RewardTrainer, reward_model_path, args, objective=objective)
    (batch,) = objective.batches
    assert "also ends texts" in caplog.text
    scores = objective.model.score(batch.hidden)[:, 0]
    torch.testing.assert_close(scores, torch.cat([batch.chosen, batch.rejected]))


def test_an_evaluation_leaves_the_random_numbers_of_training_alone(reward_model_path, arguments):
    from datasets import Dataset

    from trl_rewards import RewardTrainer

    drawn = []
    for strategy in ("no", "steps"):
        objective = Seeing()
        args = arguments(max_steps=2, eval_strategy=strategy, eval_steps=1)
        fit(RewardTrainer, reward_model_path, args, objective=objective, eval_dataset=Dataset.from_list(ROWS))
        drawn.append(
            [number for number, batch in zip(objective.drawn, objective.batches, strict=True) if batch.training]
        )
    assert drawn[0] == drawn[1]
    assert (
        len({number for number, batch in zip(objective.drawn, objective.batches, strict=True) if not batch.training})
        == 1
    )


def test_the_model_can_be_run_again_with_another_dropout(reward_model_path, arguments):
    from trl_rewards import RewardTrainer

    class Twice(Objective):
        """Looks at how far two runs differ."""

        def loss(self, batch):
            second = batch.again()
            self.apart = (second.chosen - batch.chosen).abs().max().item()
            assert second.loss is batch.loss
            return batch.loss + 0.1 * (second.chosen - batch.chosen).square().mean()

    for dropout in (0.0, 0.5):
        objective = Twice()
        args = arguments(max_steps=1, disable_dropout=False, model_init_kwargs={"attention_dropout": dropout})
        fit(RewardTrainer, reward_model_path, args, objective=objective)
        assert (objective.apart > 1e-4) == (dropout > 0)


def test_missing_numbers_of_a_column_are_nan(reward_model_path, arguments):
    from datasets import Dataset

    from trl_rewards import RewardTrainer

    rows = [row | {"strength": None if row["prompt"] == "the cat " else row["strength"]} for row in ROWS]
    trainer = RewardTrainer(
        model=reward_model_path, args=arguments(), train_dataset=Dataset.from_list(rows), objective=Weighted()
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["objective_columns"]["strength"].isnan().tolist() == [True] * 4 + [False] * 8


class TwoHeads(Objective):
    """Two outputs, of which the reward is a mixture; the first learns the pairs, the second their opposite."""

    def outputs(self):
        return ("help", "harm")

    def reward(self, outputs, prompt_hidden):
        return outputs[:, 0] - 0.5 * outputs[:, 1]

    def loss(self, batch):
        mixture = batch.outputs[:, 0] - 0.5 * batch.outputs[:, 1]
        torch.testing.assert_close(mixture, torch.cat([batch.chosen, batch.rejected]))
        wanted = -torch.nn.functional.logsigmoid(batch.chosen - batch.rejected).mean()
        torch.testing.assert_close(batch.loss, wanted)
        return batch.loss + batch.outputs[:, 1].square().mean()


@pytest.mark.parametrize("lora", [False, True])
def test_several_outputs_are_trained_and_read_by_model(policy_path, arguments, tmp_path, lora):
    from peft import LoraConfig

    from trl_rewards import RewardTrainer, load_reward

    adapter = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]) if lora else None
    args = arguments(learning_rate=0.01)
    trainer, lines = fit(RewardTrainer, policy_path, args, objective=TwoHeads(), peft_config=adapter)
    assert lines[-1]["accuracy"] > lines[0]["accuracy"] or lines[-1]["margin"] > lines[0]["margin"]
    trainer.save_model(str(tmp_path / "run"))
    trainer.model.eval()
    text = "the cat sat 2 times"
    with torch.no_grad():
        wanted = trainer.model(**trainer.processing_class(text, return_tensors="pt")).logits[0].tolist()
    assert abs(wanted[0] - wanted[1]) > 0.01
    for index, name in enumerate([0, 1] if lora else ["help", "harm"]):
        reward = load_reward("model", path=str(tmp_path / "run"), dtype="float32", output=name)
        assert reward(prompts=["the cat "], completions=["sat 2 times"]) == pytest.approx([wanted[index]], abs=1e-4)
    with pytest.raises(RewardError, match="has 2 outputs"):
        load_reward("model", path=str(tmp_path / "run"), dtype="float32")(prompts=["a"], completions=["b"])


def test_what_the_caller_gave_stays_as_it_is(policy_path, arguments):
    from peft import LoraConfig

    from trl_rewards import RewardTrainer

    given = {"dtype": "float32", "attn_implementation": "eager"}
    args = arguments(max_steps=1, model_init_kwargs=given)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    before = lora.to_dict()
    trainer, _ = fit(RewardTrainer, policy_path, args, objective=Marked(), peft_config=lora)
    assert args.model_init_kwargs == {"dtype": "float32", "attn_implementation": "eager"}
    assert trainer.args is args
    assert trainer.model.config._attn_implementation == "eager"
    assert lora.to_dict() == before


def test_num_labels_is_the_objective_s(reward_model_path, arguments):
    from transformers import AutoModelForSequenceClassification

    from trl_rewards import RewardTrainer

    with pytest.raises(ValueError, match="num_labels 2 is not the objective's number of outputs, 1"):
        fit(RewardTrainer, reward_model_path, arguments(model_init_kwargs={"num_labels": 2}), objective=Plain())
    fit(
        RewardTrainer,
        reward_model_path,
        arguments(max_steps=1, model_init_kwargs={"num_labels": 1}),
        objective=Plain(),
    )
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_path)
    with pytest.raises(ValueError, match="the model has 1 outputs, and objective 'twoheads' needs 2"):
        fit(RewardTrainer, model, arguments(), objective=TwoHeads())


def test_tokenising_uses_as_many_processes_as_trl_s(policy_path, arguments, monkeypatch):
    from datasets import Dataset

    from trl_rewards import RewardTrainer

    seen, plain_map = [], Dataset.map

    def counted(self, function, *rest, num_proc=None, **options):
        seen.append((function, num_proc))
        return plain_map(self, function, *rest, **options)

    monkeypatch.setattr(Dataset, "map", counted)
    rows = Dataset.from_list(ROWS)
    RewardTrainer(policy_path, arguments(dataset_num_proc=3), train_dataset=rows, objective=Marked())
    assert [num_proc for function, num_proc in seen if getattr(function, "__name__", "") == "_tokenized"] == [3]


class Gated(Objective):
    """A gate of its own on the model, which weighs two outputs by the prompt."""

    needs = frozenset({"prompt_hidden"})

    def outputs(self):
        return ("one", "other")

    def attach(self, model, tokenizer, fresh):
        torch.manual_seed(0)
        model.gate = torch.nn.Linear(model.config.hidden_size, 2)
        self.model = model
        return []

    def reward(self, outputs, prompt_hidden):
        return (self.model.gate(prompt_hidden.float()).softmax(dim=1) * outputs).sum(dim=1)

    def loss(self, batch):
        return batch.loss


@pytest.mark.parametrize("lora", [False, True])
def test_a_module_that_an_objective_puts_on_the_model_is_trained_and_saved(policy_path, arguments, tmp_path, lora):
    from peft import LoraConfig
    from safetensors.torch import load_file

    from trl_rewards import RewardTrainer

    adapter = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]) if lora else None
    trainer, _ = fit(RewardTrainer, policy_path, arguments(learning_rate=0.01), objective=Gated(), peft_config=adapter)
    trainer.save_model(str(tmp_path / "run"))
    file, prefix = ("adapter_model", "base_model.model.") if lora else ("model", "")
    saved = load_file(tmp_path / "run" / f"{file}.safetensors")[f"{prefix}gate.weight"]
    torch.manual_seed(0)
    assert (saved - torch.nn.Linear(32, 2).weight).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "lora", "lora bf16", "4bit"])
def test_a_trained_score_head_is_reloaded_bit_for_bit(policy_path, arguments, tmp_path, how):
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from trl_rewards import RewardTrainer, load_reward

    dtype = "float32" if how in ("full", "lora") else "bfloat16"
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    trainer, _ = fit(
        RewardTrainer,
        policy_path,
        arguments(learning_rate=0.01, model_init_kwargs={"dtype": dtype}),
        objective=Plain(),
        peft_config=None if how == "full" else LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]),
        quantization_config=quantized if how == "4bit" else None,
    )
    trainer.save_model(str(tmp_path / "run"))
    (head,) = [weight for name, weight in trainer.model.named_parameters() if "score" in name and weight.requires_grad]
    texts = [row["prompt"] + row["chosen"] for row in ROWS]
    trainer.model.eval()
    with torch.no_grad():
        wanted = [trainer.model(**trainer.processing_class(text, return_tensors="pt")).logits.item() for text in texts]
    reward = load_reward("model", path=str(tmp_path / "run"), dtype=dtype, load_in_4bit=how == "4bit")
    found = reward(prompts=[""] * len(texts), completions=texts)
    assert torch.equal(reward._scorer.head.read.weight, head.float())
    spread = max(wanted) - min(wanted)
    assert spread > 0.02
    assert found == pytest.approx(wanted, abs=1e-4 if dtype == "float32" else 0.1 * spread)


def test_a_wrong_model_is_named(arguments, tmp_path):
    from trl_rewards import RewardTrainer

    with pytest.raises(RewardError, match="model_name_or_path: no model"):
        fit(RewardTrainer, str(tmp_path / "nothing"), arguments(), objective=Plain())


@pytest.fixture
def recipe(write, pairs, policy_path, tmp_path):
    def make(text="", **overrides):
        return write(
            "recipe.yaml",
            f"trainer: reward\nmodel_name_or_path: {policy_path}\ndataset_name: {pairs}\nmax_steps: 2\n"
            f"per_device_train_batch_size: 3\nlogging_steps: 1\nreport_to: none\noutput_dir: {tmp_path / 'out'}\n"
            f"save_strategy: no\n{text}",
        )

    return make


OBJECTIVE = f"objective: {{use: '{__file__}:Weighted', with: {{scale: 0.5}}}}\n"


def test_a_recipe_trains_a_reward_model_that_model_then_scores_with(recipe, tmp_path, capsys):
    from trl_rewards import load_reward

    path = recipe(OBJECTIVE)
    assert validate(path)[0].endswith(f"trainer reward, objective {__file__}:Weighted(scale:0.5)")
    train(path)
    out = tmp_path / "out"
    assert "trainer:reward  objective:" in (out / "signature.txt").read_text()
    assert (out / "report.html").is_file()
    assert "accuracy" in capsys.readouterr().out
    scores = load_reward("model", path=str(out), dtype="float32")(prompts=["the cat "], completions=["sat 2 times"])
    assert isinstance(scores[0], float)
    assert (out / "recipe.yaml").is_file()
    Recipe.load(out / "recipe.yaml")


def test_a_recipe_without_an_objective_is_trl_s_own(recipe):
    trainer = train(recipe())
    assert trainer.own_objective is None
    assert "objective:trl" in Recipe.load(recipe()).signature


@pytest.mark.slow
def test_a_recipe_trains_a_4bit_reward_model_with_evaluations(recipe, tmp_path):
    import bitsandbytes
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    path = recipe(OBJECTIVE + "load_in_4bit: true\nuse_peft: true\nlora_r: 2\nlora_target_modules: [q_proj, v_proj]\n")
    overrides = ["--model_name_or_path", str(tmp_path / "llama"), "--eval_strategy", "steps", "--eval_steps", "1"]
    trainer = train(path, [*overrides, "--dataset_test_split", "train"])
    modules = [module for module in trainer.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert modules
    assert not any(module.support_avx512bf16_for_cpu for module in modules)
    assert [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]


@pytest.mark.slow
def test_a_lora_reward_model_scores_from_its_folder_as_it_did_in_training(recipe, tmp_path):
    from trl_rewards import load_reward

    lora = "use_peft: true\nlora_r: 2\nlora_target_modules: [q_proj, v_proj]\nlearning_rate: 0.01\nbf16: false\n"
    marked = f"objective: '{__file__}:Marked'\n"
    trainer = train(recipe(marked + lora))
    trainer.model.eval()
    text = "the cat sat 2 times<|mark|>"
    with torch.no_grad():
        wanted = trainer.model(**trainer.processing_class(text, return_tensors="pt")).logits.item()
    assert not (tmp_path / "out" / "config.json").exists()  # an adapter, and the tokenizer with its own token
    for options in (
        {"path": str(tmp_path / "out")},
        {"adapter": str(tmp_path / "out"), "path": trainer_base(trainer)},
    ):
        reward = load_reward("model", dtype="float32", **options)
        assert reward(prompts=["the cat "], completions=["sat 2 times<|mark|>"]) == pytest.approx([wanted], abs=1e-4)


def trainer_base(trainer) -> str:
    return trainer.model.peft_config["default"].base_model_name_or_path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rewards: [length]\n", "rewards: trainer 'reward' does not take it (it takes objective, members, alarms)"),
        ("combine: mean\n", "combine: trainer 'reward' does not take it"),
        ("objective: no_such\n", "objective.use: unknown objective 'no_such'"),
        (f"objective: {{use: '{__file__}:Weighted', with: {{scal: 1.0}}}}\n", "did you mean 'scale'"),
        ("dataset: {chat: true}\n", "preference pairs must be chats already"),
        ("num_generations: 4\n", "num_generations: unknown key"),
    ],
)
def test_a_reward_recipe_s_mistakes_are_said(recipe, text, problem):
    with pytest.raises(RecipeError) as error:
        validate(recipe(text))
    assert problem in str(error.value)


def test_a_policy_recipe_with_an_objective_is_refused(write):
    path = write("r.yaml", "rewards: [length]\nobjective: polar\n")
    with pytest.raises(RecipeError, match="objective: trainer 'grpo' does not take it"):
        Recipe.load(path, check_trl=False)


def test_missing_columns_are_said_before_the_model_is_loaded(recipe):
    path = recipe(OBJECTIVE + "dataset: {columns: {strong: strength}}\n")
    with pytest.raises(RecipeError, match="objective needs dataset column 'strength'"):
        train(path)
    path = recipe("dataset: {columns: {winner: chosen}}\n")
    with pytest.raises(RecipeError, match="the dataset has no column 'chosen'"):
        train(path)


def test_the_kit_checks_objectives():
    check_objective(Weighted(), strength=[1.0, 2.0, 0.5])
    check_objective(TwoHeads())

    class Sign(Objective):
        """Wrong way round."""

        def loss(self, batch):
            return (batch.chosen - batch.rejected).mean()

    class NoGradient(Objective):
        """Detached."""

        def loss(self, batch):
            return batch.loss.detach()

    class Remembering(Objective):
        """Counts evaluations too."""

        def __post_init__(self):
            self.seen = 0

        def loss(self, batch):
            self.seen += 1
            return batch.loss

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    with pytest.raises(AssertionError, match="changes its state"):
        check_objective(Remembering())
    with pytest.raises(AssertionError, match="raise the chosen"):
        check_objective(Sign())
    with pytest.raises(AssertionError, match="gradient"):
        check_objective(NoGradient())
