"""Process reward models as rewards: the probability that each step is right.  https://huggingface.co/papers/2501.07301

Read are token classifiers (Qwen2.5-Math-PRM, ReasonFlux-PRM, what TRL's PRMTrainer made) and causal language models
that say their verdict as the next token (Math-Shepherd, https://huggingface.co/papers/2312.08935, RLHFlow's, and any
that answers with one of two words).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trl_rewards import Context, Failed, RewardError, Samples, Score, StepReward
from trl_rewards.models import Held, InProcess, as_text
from trl_rewards_process.formats import LAYOUTS, Encoded, Format, encode_steps

if TYPE_CHECKING:
    from trl_rewards.models import Head, Loading, Scorer


class PRM(InProcess, StepReward):
    """The probability that a step is right, in [0, 1], as a process reward model sees it from the question and the
    steps so far.

    https://huggingface.co/papers/2501.07301. One forward pass per row scores all its steps. A step that ends beyond
    the model's context has no value, nor has then a row whose `take` needs all of them. Of a chat prompt the model
    reads what is not a system message.
    """

    path: str
    """Folder or Hub name of the model."""
    format: Format
    """What the model reads. `qwen`: Qwen2.5-Math-PRM, and others with its tag; `reasonflux`: the same without a system
    prompt; `shepherd`: Math-Shepherd; `rlhflow`: a conversation of steps; `trl`: a token classifier from TRL's
    PRMTrainer; `yes_no`: plain text with a tag that asks for one of two words."""
    tag: str | None = None
    """What follows a step; None: the format's own. TRL's PRMTrainer calls it `step_separator`."""
    words: list[str] | None = None
    """The words that mean right and wrong, a token each, of formats that read words; None: the format's own."""
    system_prompt: str | None = None
    """Of `qwen`; None: its own. Elsewhere there is none."""
    label: int = 1
    """Which output of a token classifier means right."""
    max_length: int | None = None
    """Tokens of question and steps together. None: what model and tokenizer allow (Qwen2.5-Math-PRM: 4096)."""
    token_budget: int | None = None
    """Tokens in one forward pass, padding included: what bounds memory. None: 16384, on a CPU 4096. Halved when memory
    runs out."""

    def __post_init__(self):
        InProcess.__post_init__(self)
        StepReward.__post_init__(self)
        layout = LAYOUTS[self.format]
        for name, value in (("max_length", self.max_length), ("token_budget", self.token_budget)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not (self.tag or layout.tag):
            raise ValueError(f"format {self.format} needs a tag: what is asked after each step")
        if self.words is not None and layout.words is None:
            raise ValueError(f"words: format {self.format} reads a classifier; leave it out")
        if self.words is not None and len(set(self.words)) != 2:
            raise ValueError(f"words: two different words, for right and wrong, got {self.words}")
        if self.system_prompt is not None and layout.system is None:
            raise ValueError(f"system_prompt: format {self.format} has none; leave it out")
        if self.label != 1 and layout.words is not None:
            raise ValueError(f"label: format {self.format} reads words; leave it out")
        self._layout = layout._replace(
            tag=self.tag or layout.tag,
            words=(self.words[0], self.words[1]) if self.words is not None else layout.words,
            system=self.system_prompt if self.system_prompt is not None else layout.system,
        )
        self._scorer: Scorer | None = None
        self._context = Context()

    def held(self) -> list[Held]:
        return [Held(self.path, self.token_budget)]

    def setup(self, context: Context) -> None:
        super().setup(context)
        self._context = context
        self._scorer = self._load(context)

    def close(self) -> None:
        self._scorer = None

    def score_steps(self, samples: Samples, steps: list[list[str]]) -> list[list[float | None] | Score]:
        if self._scorer is None:
            self.setup(Context())
        assert self._scorer is not None
        scorer, limit = self._scorer, self._scorer.max_length
        found: dict[int, list[float | None] | Score] = {}
        readable: dict[int, Encoded] = {}
        count = beyond = 0
        for row, parts in enumerate(steps):
            if not parts:
                found[row] = []
                continue
            encoded = encode_steps(scorer.tokenizer, self._layout, question_of(samples.prompts[row]), parts)
            if isinstance(encoded, Failed):
                found[row] = encoded
                continue
            places = [place for place in encoded.places if place < limit]
            count, beyond = count + len(parts), beyond + len(parts) - len(places)
            if not places:
                found[row] = Failed(f"the question and the first step have more than {limit} tokens")
            elif len(places) < len(parts) and self.take != "steps":
                found[row] = Failed(f"{len(parts) - len(places)} of {len(parts)} steps end beyond {limit} tokens")
            else:
                readable[row] = Encoded(encoded.ids[: places[-1] + 1], places)
        outputs = scorer.outputs_at([each.ids for each in readable.values()], [e.places for e in readable.values()])
        for (row, each), output in zip(readable.items(), outputs, strict=True):
            if output is None:
                found[row] = Failed(f"out of memory for its {len(each.ids)} tokens")
                continue
            values = [place[self._output] for place in output]
            if not all(map(math.isfinite, values)):
                found[row] = Failed(f"the model's scores are {values}")
            else:
                found[row] = [*values, *[None] * (len(steps[row]) - len(values))]
        if self._context.log_metric:
            for name, value in (scorer.metrics | {"beyond_context": beyond / max(count, 1)}).items():
                self._context.log_metric(f"{self.display_name}/{name}", value)
        return [found[row] for row in range(len(steps))]

    @property
    def _output(self) -> int:
        return self.label if self._layout.words is None else 0

    def _load(self, context: Context) -> Scorer:
        from trl_rewards.models import (
            Scorer,
            default_budget,
            load_config,
            load_scorer,
            load_tokenizer,
            longest_text,
        )

        loading = self.loading(self.path, context)
        config, tokenizer = load_config(loading, "process reward model"), load_tokenizer(loading)
        if self._layout.is_chat and tokenizer.chat_template is None:
            raise RewardError(f"format {self.format} needs a chat template, which {self.path!r} lacks")
        tag = tokenizer(self._layout.tag, add_special_tokens=False)["input_ids"]
        if self._layout.kind == "answer" and len(tag) != 1:
            raise RewardError(
                f"tag: {self._layout.tag!r} is {len(tag)} tokens to {self.path!r}, which knows another, "
                f"or in another format than {self.format}"
            )
        for word in self._layout.words or ():
            if len(ids := tokenizer(word, add_special_tokens=False)["input_ids"]) != 1:
                raise RewardError(f"words: {word!r} is {len(ids)} tokens to {self.path!r}; give one that is a token")
        # Where somebody runs it (a trainer, the command line) there is a bar already.
        progress = context.log_metric is None and context.device is None
        if self._layout.words is not None:
            right, wrong = self._layout.words
            return load_scorer(
                loading,
                tokenizer=tokenizer,
                head="yes",
                yes_token=right,
                no_token=wrong,
                yes_score="probability",
                max_length=self.max_length,
                token_budget=self.token_budget,
                progress=progress,
            )
        head = load_token_classifier(loading, config)
        if not 0 <= self.label < len(head.labels):
            raise RewardError(f"label: {self.path!r} has {len(head.labels)} outputs, so none of index {self.label}")
        return Scorer(
            head=head,
            weights=[float(index == self.label) for index in range(len(head.labels))],
            loading=loading,
            tokenizer=tokenizer,
            max_length=longest_text(self.max_length, config, tokenizer),
            truncate="refuse",
            token_budget=self.token_budget or default_budget(loading),
            prefix_reuse="off",
            progress=progress,
        )


def question_of(prompt: Any) -> str:
    """A prompt as a process reward model reads it: a system message is the policy's own business."""
    return prompt if isinstance(prompt, str) else as_text([m for m in prompt if m.get("role") != "system"])


def load_token_classifier(loading: Loading, config: Any) -> Head:
    """A decoder with a classifier at each token, whose outputs are probabilities.

    A head of two layers in a checkpoint (Qwen's, ReasonFlux's) is put onto the architecture that transformers has, so
    that code of the model's own is run only where `trust_remote_code` says so. RewardError if there is no head.
    """
    import torch
    from torch.nn import Sequential, Softmax
    from transformers import AutoModel, AutoModelForTokenClassification

    from trl_rewards.models import Head, checkpoint_weights, load_pretrained

    layers = checkpoint_weights(loading.path, "score.", loading.revision)
    own_code = loading.trust_remote_code and "AutoModel" in (config.to_dict().get("auto_map") or {})
    two_layers = not own_code and "0.weight" in layers
    if two_layers and loading.adapter:
        raise RewardError(f"adapter: {loading.path!r} takes one with its own code alone: trust_remote_code")
    model, missing = load_pretrained(AutoModel if own_code or two_layers else AutoModelForTokenClassification, loading)
    if two_layers:
        model.score = _perceptron(layers, loading.path).to(model.device)
    head = dict(model.named_children()).get("score")
    if missing or head is None:
        lacks = f"its checkpoint has no weights for {', '.join(missing)}" if missing else "it has no part `score`"
        raise RewardError(f"{loading.path!r} is no token classifier that scores steps: {lacks}")
    head.float().requires_grad_(False)  # in bfloat16 near probabilities would become equal
    outputs = head(torch.zeros(1, config.get_text_config().hidden_size, device=model.device)).shape[-1]
    labels = [str(config.id2label.get(index, index)) for index in range(outputs)]
    return Head(model, model if two_layers else model.base_model, Sequential(head, Softmax(dim=-1)), labels)


def _perceptron(weights: dict[str, Any], path: str) -> Any:
    """The head of Qwen2ForProcessRewardModel: linear, ReLU, linear."""
    from torch.nn import Linear, ReLU, Sequential

    if set(weights) != {"0.weight", "0.bias", "2.weight", "2.bias"}:
        raise RewardError(
            f"{path!r} has a head of an unknown shape (score.{', score.'.join(sorted(weights))}); its own code may "
            "know it: trust_remote_code"
        )
    (hidden, size), (outputs, _) = weights["0.weight"].shape, weights["2.weight"].shape
    head = Sequential(Linear(size, hidden), ReLU(), Linear(hidden, outputs))
    head.load_state_dict(weights)
    return head
