"""POLAR: a reward model that compares a completion with a reference.  https://huggingface.co/papers/2507.05197"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trl_rewards import Context, Failed, RewardError, Samples, Score
from trl_rewards.models import Held, InProcess, ServedScorer
from trl_rewards_polar.encoding import (
    Layout,
    Messages,
    Wrapper,
    encode_ids,
    encode_text,
    join_contents,
    strip_thinking,
)
from trl_rewards_polar.internlm2 import internlm2, register

if TYPE_CHECKING:
    from trl_rewards.models import Loading, Scorer

# The pair of the model card. POLAR-7B scores the first -0.57 and the second -11.03.
QUESTION, SAME, OTHER = "What is the capital of China?", "Beijing.", "Shanghai."
# Its ids in InternLM2's vocabulary, recorded from the authors' tokenizer.
SEPARATOR_ID, REWARD_ID = 92397, 92527
_ASKED = [3993, 505, 410, 6872, 446, 5772, 5426]
POLAR_IDS = [1, *_ASKED, 3591, 24004, 281, SEPARATOR_ID, *_ASKED, 2166, 30326, 281, REWARD_ID]


class Polar(InProcess):
    """How close a completion is to a reference, by POLAR's reward model: near 0 for the same text, about -12 at worst.

    Scores are raw: unbounded, and comparable only for the same prompt and reference, so use them with an advantage
    that looks at the group. One forward pass per completion and reference. Without a reference there is no opinion.

    The released models are `internlm/POLAR-1_8B` and `internlm/POLAR-7B`; the `-Base` ones are to be fine-tuned first.
    Any sequence classifier trained with objective `polar` works too. The text has no chat template: see
    `trl_rewards_polar.encoding`. Numbers of the paper (https://huggingface.co/papers/2507.05197) were had with PPO
    without KL, on raw scores.
    """

    path: str
    """Folder or Hub name of the reward model. With a server, only its tokenizer and config are read."""
    reference: str = "reference"
    """Dataset column: text, a list of messages, or a list of several references of either kind."""
    references: Literal["mean", "max"] = "mean"
    """What becomes of the scores where a row has several references."""
    backend: Literal["transformers", "sglang", "vllm", "vllm_sequence", "vllm_bare", "lmdeploy"] = "transformers"
    """`transformers` runs the model in this process; the others ask a server. `vllm` reads the last of every token's
    scores, as InternLM2 gives them; `vllm_sequence` is for models that vLLM knows as sequence classifiers, `vllm_bare`
    for servers that refuse the fields `task` and `use_activation`."""
    endpoint: str | None = None
    """The server's address without `/v1`, such as `http://localhost:30000`."""
    served_as: str | None = None
    """The model's name on the server. None: none is sent, but to SGLang the last part of `path`."""
    api_key_env: str | None = None
    """Name of the environment variable with the server's API key."""
    request_timeout: float = 120.0
    """Seconds for one request of `chunk_size` texts."""
    attempts: int = 8
    """How often a request is sent that meets a broken connection, a time-out or a busy server."""
    in_flight: int = 8
    """Requests at a time."""
    chunk_size: int = 64
    """Texts in one request."""
    wrapper: Wrapper = "sft"
    """`sft`: a newline between prompt and answer. `pretrain`: nothing, for `-Base` models and plain text."""
    max_length: int = 16384
    """Tokens of the whole text, in which the prompt stands twice; of a longer prompt the beginning is cut."""
    max_response_length: int = 4096
    """Tokens of the reference and of the completion, each."""
    cut_side: Literal["right", "left"] = "right"
    """Where a longer reference or completion is cut; training cut the right."""
    separator: str = "<|reward|>"
    """Token between the two halves of the text. Other tokenizers than POLAR's need it in their vocabulary."""
    reward_token: str = "[UNUSED_TOKEN_130]"
    """Token that the score is read at."""
    strip_thinking: bool = True
    """Score what follows the first closed `<think>` block alone, as in the authors' runs. One that the chat template
    opened has no `<think>` in the completion, and stays."""
    empty_score: float | None = None
    """Score of a completion without text. None: the model is asked, as in the authors' client."""
    token_budget: int | None = None
    """Padded tokens of one forward pass. None: what fits the device."""
    prefix_reuse: Literal["auto", "on", "off"] = "auto"
    """Compute what the completions of a prompt share, twice the prompt and the reference, once."""

    def __post_init__(self):
        super().__post_init__()
        self._layout = Layout(
            max_length=self.max_length,
            max_response_length=self.max_response_length,
            cut_side=self.cut_side,
            separator=self.separator,
            reward_token=self.reward_token,
        )
        for name in ("request_timeout", "attempts", "in_flight", "chunk_size"):
            if (value := vars(self)[name]) <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if (self.endpoint is None) != (self.backend == "transformers"):
            got = "no endpoint" if self.endpoint is None else f"endpoint {self.endpoint}"
            raise ValueError(f"a server needs backend and endpoint, got backend {self.backend!r} and {got}")
        if self.api_key_env is not None and self.endpoint is None:
            raise ValueError("api_key_env goes with endpoint; what it is is not shown, in case it is the key itself")
        if self.endpoint is not None:
            self._server(self.endpoint)  # refuses a wrong address or name of a key
        self._running: _Running | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_running": None}  # a copy loads its own model, or asks the server by itself

    def reads(self) -> tuple[str, ...]:
        return (self.reference,)

    def is_async(self) -> bool:
        return self.endpoint is not None

    def held(self) -> list[Held]:
        return [] if self.endpoint else [Held(self.path, self.token_budget)]

    def setup(self, context: Context) -> None:
        running = self._running = self._start(context)
        if running.server:
            running.server.check(*self._test_inputs(running))

    def close(self) -> None:
        if self._running and self._running.server:
            self._running.server.close()
        self._running = None

    def score(self, samples: Samples) -> list[Score]:
        running = self._running = self._running or self._start(Context())
        assert running.scorer is not None
        scores, asked = self._questions(samples, running)
        found = running.scorer.score_ids([ids for _, ids in asked])
        checked = [score if math.isfinite(score) else Failed(f"the model's score is {score}") for score in found]
        return self._answered(scores, asked, checked, running, running.scorer.metrics)

    async def ascore(self, samples: Samples) -> list[Score]:
        if self._running is None:
            running = self._start(Context())
            assert running.server is not None
            await running.server.acheck(*self._test_inputs(running))
            self._running = running
        running = self._running
        assert running.server is not None
        scores, asked = self._questions(samples, running)
        found = await running.server.score([question for _, question in asked])
        return self._answered(scores, asked, found, running, running.server.metrics())

    def _start(self, context: Context) -> _Running:
        """Load the tokenizer, and the model if it runs here. RewardError where they are not POLAR's or do not fit."""
        from trl_rewards.models import load_scorer

        loading = self.loading(self.path, context)
        config = _config(loading)
        native = config.get("model_type") == "internlm2" and not self.trust_remote_code
        if native:
            register()
        tokenizer = _tokenizer(loading, native)
        separator, reward = self._marks(tokenizer, config)
        running = _Running(tokenizer, separator, reward, context)
        self._check_ids(running, native)
        if self.endpoint is not None:
            return running._replace(server=self._server(self.endpoint))
        scorer = load_scorer(
            loading,
            model_class=internlm2().reward_model if native else None,
            tokenizer=tokenizer,
            token_budget=self.token_budget,
            prefix_reuse=self.prefix_reuse,
        )
        if self.max_length > scorer.max_length:
            raise RewardError(
                f"{self.path!r} reads at most {scorer.max_length} tokens; set max_length to that or less (it is "
                f"{self.max_length}), and max_response_length to fit in it twice"
            )
        return running._replace(scorer=scorer)

    def _server(self, endpoint: str) -> ServedScorer:
        name = os.path.basename(self.path.rstrip("/")) if self.backend == "sglang" else None
        return ServedScorer(
            endpoint,
            self.backend,
            model=self.served_as or name,
            chunk_size=self.chunk_size,
            api_key_env=self.api_key_env,
            timeout=self.request_timeout,
            attempts=self.attempts,
            in_flight=self.in_flight,
        )

    def _marks(self, tokenizer: Any, config: dict[str, Any]) -> tuple[int, int]:
        """Ids of separator and reward token. RewardError where tokenizer and config do not agree with the options."""
        vocabulary = tokenizer.get_vocab()
        for option, token in (("separator", self.separator), ("reward_token", self.reward_token)):
            if token not in vocabulary:
                raise RewardError(
                    f"{option}: the tokenizer of {self.path!r} has no token {token!r}; name its own, or take a model "
                    "that was trained with it"
                )
        separator, reward = vocabulary[self.separator], vocabulary[self.reward_token]
        if tokenizer.encode(self.separator, add_special_tokens=False) != [separator]:
            raise RewardError(
                f"separator: the tokenizer of {self.path!r} splits {self.separator!r}; register it there"
            )
        configured = config.get("reward_token_id")
        if configured is not None and configured != reward:
            raise RewardError(
                f"{self.path!r} reads its score at token {configured}, and {self.reward_token!r} is "
                f"token {reward}: is it another kind of reward model?"
            )
        return separator, reward

    def _check_ids(self, running: _Running, native: bool) -> None:
        """RewardError if a known text does not become the ids that it should."""
        layout = Layout(separator=self.separator, reward_token=self.reward_token)
        separator, reward = running.separator_id, running.reward_id
        try:
            ids = encode_ids(
                running.tokenizer, QUESTION, SAME, OTHER, layout=layout, separator_id=separator, reward_token_id=reward
            )
        except ValueError as error:
            raise RewardError(f"{self.path!r}: {error}") from None
        released = native and (separator, reward) == (SEPARATOR_ID, REWARD_ID)
        if released and ids != POLAR_IDS:
            raise RewardError(
                f"the tokenizer of {self.path!r} reads a known text as {ids}, where POLAR's authors have {POLAR_IDS}; "
                "set trust_remote_code to use the tokenizer that comes with the model"
            )

    def _test_inputs(self, running: _Running) -> tuple[Any, Any, int]:
        """Two texts whose scores differ, and the length of the first, for a server to be tried with."""
        first, second = (self._question(running, QUESTION, SAME, output) for output in (SAME, OTHER))
        return first, second, len(self._ids(running, QUESTION, SAME, SAME))

    def _questions(self, samples: Samples, running: _Running) -> tuple[list[Score], list[tuple[int, Any]]]:
        """The scores that need no model, and (row, input) for each score that does."""
        scores: list[Score] = [None] * len(samples)
        asked: list[tuple[int, Any]] = []
        prompts, columns = samples.prompt_texts, samples[self.reference]
        for row, (prompt, completion, column) in enumerate(zip(prompts, samples.completions, columns, strict=True)):
            references = self._references(column, row)
            output = _said(completion)
            if self.strip_thinking:
                output = strip_thinking(output)
            if references and self.empty_score is not None and not output.strip():
                scores[row] = self.empty_score
                continue
            try:
                asked += [(row, self._question(running, prompt, reference, output)) for reference in references]
            except ValueError as error:
                scores[row] = Failed(str(error))
        return scores, asked

    def _references(self, column: Any, row: int) -> list[Messages]:
        """The references of a row, those without text left out."""
        several = isinstance(column, list) and not all(isinstance(item, dict) for item in column)
        found = [item for item in (column if several else [column]) if not _is_missing(item)]
        for item in found:
            messages = isinstance(item, list) and all(isinstance(message, dict) for message in item)
            if not messages and not isinstance(item, str):
                raise TypeError(
                    f"column {self.reference!r}, row {row}: wanted text, messages or a list of them, got {column!r}"
                )
        return found

    def _question(self, running: _Running, prompt: Messages, reference: Messages, output: Messages) -> Any:
        """What the model or server is given; ValueError where it cannot be."""
        if running.server and not running.server.dialect.takes_ids:
            return encode_text(running.tokenizer, prompt, reference, output, self.wrapper, self._layout)
        ids = self._ids(running, prompt, reference, output)
        # Joined pieces are tokenised again, which may give some tokens more than they had apart.
        if running.scorer and len(ids) > running.scorer.max_length:
            raise ValueError(f"the text has {len(ids)} tokens, and the model reads {running.scorer.max_length}")
        return ids

    def _ids(self, running: _Running, prompt: Messages, reference: Messages, output: Messages) -> list[int]:
        return encode_ids(
            running.tokenizer,
            prompt,
            reference,
            output,
            self.wrapper,
            self._layout,
            reward_token_id=running.reward_id,
            separator_id=running.separator_id,
        )

    def _answered(
        self,
        scores: list[Score],
        asked: list[tuple[int, Any]],
        found: Sequence[float | Failed],
        running: _Running,
        metrics: dict[str, float],
    ) -> list[Score]:
        """The scores, with those of a row's references combined; one that failed fails the row."""
        of_row: dict[int, list[float | Failed]] = {}
        for (row, _), score in zip(asked, found, strict=True):
            of_row.setdefault(row, []).append(score)
        for row, several in of_row.items():
            numbers = [score for score in several if not isinstance(score, Failed)]
            failed = next((score for score in several if isinstance(score, Failed)), None)
            scores[row] = failed or (max(numbers) if self.references == "max" else sum(numbers) / len(numbers))
        if running.context.log_metric:
            for name, value in metrics.items():
                running.context.log_metric(f"{self.display_name}/{name}", value)
        return scores


class _Running(NamedTuple):
    """What `setup` takes."""

    tokenizer: Any
    separator_id: int
    reward_id: int
    context: Context
    scorer: Scorer | None = None
    server: ServedScorer | None = None


def _config(loading: Loading) -> dict[str, Any]:
    """The model's config as it is written, also of an architecture that transformers does not know."""
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(loading.path, revision=loading.revision)
    except (OSError, ValueError) as error:
        raise RewardError(f"no reward model at {loading.path!r}: {str(error).splitlines()[0]}") from error
    return config


def _tokenizer(loading: Loading, native: bool) -> Any:
    """The model's tokenizer, or its adapter's: training with LoRA may have added the marks there."""
    from transformers.utils import cached_file

    from trl_rewards.models import load_tokenizer

    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if loading.adapter and cached_file(loading.adapter, "tokenizer_config.json", **options):
        loading = replace(loading, path=loading.adapter, revision=None)
    try:
        return load_tokenizer(loading)
    except RewardError as error:
        if native and importlib.util.find_spec("sentencepiece") is None:
            raise RewardError(f"{error}; for InternLM2's, `pip install sentencepiece protobuf`") from error
        raise


def _said(completion: str | list[dict[str, Any]]) -> str:
    """A completion as text: all its messages but bare tool calls, which have no content."""
    if isinstance(completion, str):
        return completion
    return join_contents([message for message in completion if message.get("content")])


def _is_missing(reference: Any) -> bool:
    """None, NaN, or without text."""
    if isinstance(reference, list):
        return all(isinstance(message, dict) and not message.get("content") for message in reference)
    return reference is None or reference != reference or (isinstance(reference, str) and not reference.strip())
