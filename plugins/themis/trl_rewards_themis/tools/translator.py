"""Translation into English, as Themis looks it up.  https://huggingface.co/papers/2310.01045"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

from trl_rewards import Context, RewardError, ToolCall
from trl_rewards.models import HttpClient, HttpFailure, WebTool, api_key
from trl_rewards_themis.tools.recorded import read_history

_salts = random.Random()  # of its own: the run's random numbers stay as they are


class Translator(WebTool):
    """Translates text, from any language into English, by Baidu's translation API or from a recorded history.

    With `replay` alone nothing is asked online; with both, only what is not in the history.
    """

    description = "Translates text into English. Input: the text"
    answers_to = ("translate",)
    key_header = None

    endpoint: str = "https://fanyi-api.baidu.com/api/trans/vip"
    """Address of an API of Baidu's form; `/translate` is asked."""
    app_id_env: str | None = None
    """Name of the environment variable that holds the app's id; goes with `api_key_env`, that of its secret."""
    language: str = "en"
    """Language to translate into, in the API's code."""
    replay: str | None = None
    """JSON file of recorded translations, `{"example's id": {"question": text, "answer": translation}}`, such as
    TARA's translate_history.json. An input is looked for among the texts."""
    id_column: str | None = None
    """Dataset column of the example's id. With it the recorded translation is the example's, whatever the model wrote,
    as in the released code."""

    def __post_init__(self):
        super().__post_init__()
        if self.replay is None and self.api_key_env is None:
            raise ValueError("translator needs replay (a recorded history), api_key_env with app_id_env, or both")
        if (self.api_key_env is None) != (self.app_id_env is None):
            raise ValueError("app_id_env and api_key_env go together: the app's id and its secret")
        if self.id_column is not None and self.replay is None:
            raise ValueError("id_column is for replay, which is not set")
        self._by_id: dict[str, str] = {}
        self._by_text: dict[str, str] = {}

    def reads(self) -> tuple[str, ...]:
        return (self.id_column,) if self.id_column is not None else ()

    def setup(self, context: Context) -> None:
        super().setup(context)
        if self.app_id_env is not None:
            api_key(self.app_id_env)
        if self.replay is not None:
            try:
                for id, entry in read_history(self.replay, context).items():
                    self._by_id[id] = entry["answer"]
                    self._by_text[entry["question"].strip()] = entry["answer"]
            except (KeyError, TypeError, AttributeError):
                wanted = '{"id": {"question": text, "answer": text}}'
                raise RewardError(f"replay: {self.replay!r} must be of the form {wanted}") from None

    def call(self, input: str, call: ToolCall) -> str:
        id = str(call.row[self.id_column]) if self.id_column is not None else ""
        recorded = self._by_id.get(id.removesuffix("_pos").removesuffix("_neg"), self._by_text.get(input.strip()))
        if recorded is not None:
            return recorded
        if self.api_key_env is None:
            raise LookupError(f"{input!r} is not in {self.replay}")
        return self.look_up({"q": input, "from": "auto", "to": self.language})

    async def fetch(self, client: HttpClient, question: Mapping[str, Any]) -> str:
        assert self.app_id_env is not None
        assert self.api_key_env is not None
        app, secret, salt = api_key(self.app_id_env), api_key(self.api_key_env), str(_salts.randrange(2**15, 2**16))
        signature = hashlib.md5(f"{app}{question['q']}{salt}{secret}".encode("utf-8", "replace")).hexdigest()
        signed = {"appid": app, **question, "salt": salt, "sign": signature}
        found = await client.get("/translate", signed, secrets=[app, secret, signature])
        if "error_code" in found:  # with status 200
            raise HttpFailure(f"the API says {found['error_code']}: {found.get('error_msg')}")
        return found["trans_result"][0]["dst"]
