"""Reward-model training with an objective."""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl_rewards.components import Objective, Preferences
from trl_rewards.errors import RewardError
from trl_rewards.maths import shared_prefix
from trl_rewards.models.pretrained import without_loading_report
from trl_rewards.scoring import World
from trl_rewards.trainers.objectives import COLUMNS, ObjectiveMixin, WithColumns
from trl_rewards.trainers.seam import default_folder

logger = logging.getLogger(__name__)

_LABELS = "objective_labels"  # key of a batch under which travels what the objective says of each token
_TOKEN_LABELS = ("chosen_labels", "rejected_labels")


class RewardTrainer(ObjectiveMixin, trl.RewardTrainer):
    """`trl.RewardTrainer` with one more argument, `objective=`; without it, TRL's own to the last bit.

    With an objective a model given by name is loaded here, as TRL would, so that the objective can make it ready
    before LoRA is put on.
    """

    own_objective: Objective | None
    _own_columns = _TOKEN_LABELS

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *more: Any,
        objective: Objective | None = None,
        signature: str = "",
        base_dir: str = ".",
        quantization_config: Any = None,
        peft_config: Any = None,
        **options: Any,
    ):
        if objective is not None:
            args = args or trl.RewardConfig(default_folder(model, "Reward"))
            _check(objective, args, train_dataset)
        self._take(objective, args, signature, base_dir)
        if objective is None:
            super().__init__(
                model,
                args,
                data_collator,
                train_dataset,
                eval_dataset,
                processing_class,
                *more,
                quantization_config=quantization_config,
                peft_config=peft_config,
                **options,
            )
            return
        names = list(objective.outputs())
        fresh: list[str] = []
        if named := isinstance(model, str):
            path = model
            model, fresh = _load(path, args, quantization_config, len(names))
            processing_class = processing_class or _load_tokenizer(path, args)
            quantization_config = None
        elif model.config.num_labels != len(names):
            raise ValueError(
                f"the model has {model.config.num_labels} outputs, and objective {objective.display_name!r} needs "
                f"{len(names)} ({', '.join(names)}); give its name, or load it with num_labels={len(names)}"
            )
        tokenizer: Any = processing_class or AutoTokenizer.from_pretrained(model.config.name_or_path)
        parts = set(dict(model.named_children()))
        added = objective.attach(model, tokenizer, fresh)
        if peft_config is not None:
            peft_config = copy.deepcopy(peft_config)
            if added:
                peft_config.trainable_token_indices = added
            new = set(dict(model.named_children())) - parts
            if "v_head" in parts:  # PEFT knows heads by the names `score` and `classifier`
                new.add("v_head")
            if new:
                peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), *new})
        with _as_trl_wants_it(model, args, named):
            super().__init__(
                model,
                args,
                data_collator,
                train_dataset,
                eval_dataset,
                tokenizer,
                *more,
                quantization_config=quantization_config,
                peft_config=peft_config,
                **options,
            )
        if len(names) > 1:
            model.config.id2label = dict(enumerate(names))
            model.config.label2id = {name: index for index, name in enumerate(names)}
        self._begin()
        self.data_collator = _WithLabels(self.data_collator, objective.reads())
        self._pad = tokenizer.pad_token_id
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            logger.warning(
                "pad_token %r also ends texts: in training the score is read before it, by `use: model` at it; set "
                "pad_token to a token that no text holds",
                tokenizer.pad_token,
            )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if self.own_objective is not None and type(self.own_objective).tokenize is not Objective.tokenize:
            given = {"objective": self.own_objective, "tokenizer": processing_class}
            # An objective's state may not be hashable, and a cache that misses its options would be worse than none.
            mapping: dict[str, Any] = {}
            if isinstance(dataset, Dataset):
                mapping = {"load_from_cache_file": False, "num_proc": args.dataset_num_proc}
            dataset = dataset.map(_tokenized, fn_kwargs=given, **mapping)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        objective = self.own_objective
        if objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        columns, labels = inputs.pop(COLUMNS, {}), inputs.pop(_LABELS, None)
        passes: list[Preferences] = []

        def scored(**given: Any) -> Any:
            """What TRL calls as its model: of several outputs, it gets the objective's reward."""
            outputs, batch = self._run(model, given, columns)
            passes.append(batch._replace(labels=labels))
            return outputs

        def again() -> Preferences:
            return self._run(model, dict(inputs), columns)[1]._replace(loss=loss, labels=labels)

        loss, outputs = super().compute_loss(scored, inputs, True, num_items_in_batch)
        found = objective.loss(passes[0]._replace(loss=loss, again=again))
        return (found, outputs) if return_outputs else found

    def _run(self, model: Any, inputs: dict[str, Any], columns: dict[str, Any]) -> tuple[Any, Preferences]:
        """The model's output as TRL wants it, and all that the objective may see but TRL's loss."""
        objective = self.own_objective
        assert objective is not None
        assert self.model is not None
        training = self.model.training
        seen: list[torch.Tensor] = []
        hook = None
        if objective.needs & {"hidden", "prompt_hidden", "token_hidden"}:
            hook = _score_head(self.accelerator.unwrap_model(model)).register_forward_pre_hook(
                lambda module, arguments: seen.append(arguments[0])
            )
        try:
            outputs = model(**inputs)
        finally:
            if hook is not None:
                hook.remove()
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        hidden = prompt_hidden = None
        if "token_hidden" in objective.needs and seen[0].dim() != 3:
            raise RewardError(f"{type(self.model).__name__} shows its head the scored position alone, not every token")
        if "hidden" in objective.needs:
            hidden = _at(seen[0], _scored_positions(ids, self._pad))
        if "prompt_hidden" in objective.needs:
            prompt_hidden = _at(seen[0], (shared_prefix(ids, mask) - 1).clamp(min=0).repeat(2), self.model)
        raw = outputs.logits.reshape(len(ids), -1).float()  # (2B, K)
        if raw.shape[1] == 1:
            rewards = raw[:, 0]
        else:
            rewards = objective.reward(raw, prompt_hidden)
            outputs.logits = rewards[:, None]
        chosen, rejected = rewards.chunk(2)
        batch = Preferences(
            chosen,
            rejected,
            rewards.new_zeros(()),
            columns,
            hidden,
            prompt_hidden,
            raw,
            ids,
            mask,
            self.state.global_step,
            max(self.state.max_steps, 0),
            training,
            # An evaluation draws the same numbers each time, and leaves no trace.
            self._generator if training else torch.Generator().manual_seed(self.args.seed),
            _gather_with_gradient,
            token_hidden=seen[0] if "token_hidden" in objective.needs else None,
        )
        return outputs, batch


class _WithLabels(WithColumns):
    """And what the objective says of the tokens."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        if _TOKEN_LABELS[0] in rows[0]:
            labels = torch.full_like(batch["input_ids"], -100)
            for place, own in enumerate(row[side] for side in _TOKEN_LABELS for row in rows):
                labels[place, : len(own)] = torch.tensor(own)
            batch[_LABELS] = labels
        return batch


def _tokenized(row: dict[str, Any], objective: Objective, tokenizer: Any) -> dict[str, Any]:
    found = objective.tokenize(row, tokenizer)
    if not found or not {"chosen_ids", "rejected_ids"} <= set(found):
        raise RewardError(
            f"objective {objective.display_name!r}: tokenize must return chosen_ids and rejected_ids, got {found!r}"
        )
    for ids, labels in zip(("chosen_ids", "rejected_ids"), _TOKEN_LABELS, strict=True):
        if labels in found and len(found[labels]) != len(found[ids]):
            raise RewardError(
                f"objective {objective.display_name!r}: tokenize gave {len(found[labels])} {labels} for "
                f"{len(found[ids])} {ids}"
            )
    return found


def _check(objective: Objective, args: Any, dataset: Any) -> None:
    """ValueError for what the objective would pass over in silence."""
    if objective.own_loss and args.center_rewards_coefficient is not None:
        raise ValueError(f"center_rewards_coefficient is TRL's loss's, which {objective.display_name!r} does not use")
    wanted = vars(objective).get("max_length")
    if wanted and args.max_length is not None and args.max_length < wanted:
        raise ValueError(
            f"max_length {args.max_length} would drop rows that objective {objective.display_name!r} makes of up to "
            f"{wanted} tokens; set max_length to {wanted}, or the objective's lower"
        )
    columns = getattr(dataset, "column_names", None) or ()
    if objective.own_loss and "margin" in columns and "margin" not in objective.reads():
        raise ValueError(f"column 'margin' is TRL's loss's, which {objective.display_name!r} does not use; remove it")


def _load_tokenizer(path: str, args: Any) -> Any:
    revision = (args.model_init_kwargs or {}).get("revision")
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise RewardError(f"model_name_or_path: no tokenizer at {path!r}: {str(error).splitlines()[0]}") from error


def _load(path: str, args: Any, quantization_config: Any, outputs: int) -> tuple[Any, list[str]]:
    """The model as TRL's trainer would load it, and the names of weights that its checkpoint lacks."""
    options = dict(args.model_init_kwargs or {})
    if options.pop("num_labels", outputs) != outputs:
        raise ValueError(
            f"model_init_kwargs: num_labels {args.model_init_kwargs['num_labels']} is not the objective's number of "
            f"outputs, {outputs}; leave it out"
        )
    dtype = options.pop("dtype", None) or "float32"
    options.setdefault("trust_remote_code", args.trust_remote_code)
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    torch.manual_seed(args.seed)  # a new score head is drawn
    try:
        with without_loading_report():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path,
                num_labels=outputs,
                dtype=getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError) as error:
        raise RewardError(f"model_name_or_path: no model {path!r}: {str(error).splitlines()[0]}") from error
    return model, sorted(info["missing_keys"])


def _score_head(model: Any) -> torch.nn.Module:
    """The module that turns hidden states into a score."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's wrapper
    for name in ("score", "v_head", "classifier"):
        if name in dict(base.named_children()):
            return base.get_submodule(name)
    raise RewardError(f"{type(base).__name__} has no score head that an objective could look at")


def _scored_positions(ids: torch.Tensor, pad: int) -> torch.Tensor:
    """(2B, T) -> (2B,) where transformers' classifiers read the score: at the last token that is not the pad token,
    whatever the mask says."""
    places = torch.arange(ids.shape[1], device=ids.device)
    return (places * (ids != pad)).argmax(dim=1)


def _at(hidden: torch.Tensor, positions: torch.Tensor, model: Any = None) -> torch.Tensor:
    """(2B, T, H), (2B,) -> (2B, H). A head that sees one position per row sees the scored one: with `model`, where
    that is not what is wanted, RewardError."""
    if hidden.dim() == 3:
        return hidden[torch.arange(len(hidden), device=hidden.device), positions]
    if model is not None:
        raise RewardError(f"{type(model).__name__} shows its head the scored position alone, and no prompt_hidden")
    return hidden


def _gather_with_gradient(rows: torch.Tensor) -> torch.Tensor:
    """All processes' rows. Backward sums what every process's loss says of a row, which DDP's mean makes right."""
    if World.current().size == 1:
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows))


@contextmanager
def _as_trl_wants_it(model: Any, args: Any, named: bool) -> Generator[None]:
    """While TRL looks at them: a config with one label, since TRL refuses a model with several outputs, and no
    `model_init_kwargs` for a model that is loaded."""
    labels, given = model.config.num_labels, args.model_init_kwargs
    model.config.num_labels = 1
    if named:
        args.model_init_kwargs = None
    try:
        yield
    finally:
        model.config.num_labels, args.model_init_kwargs = labels, given
