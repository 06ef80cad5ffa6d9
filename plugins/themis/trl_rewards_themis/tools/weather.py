"""The weather of the past, as Themis looks it up.  https://huggingface.co/papers/2310.01045"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_rewards import Context, RewardError, ToolCall, ToolError
from trl_rewards.models import HttpClient, HttpFailure, WebTool, api_key
from trl_rewards_themis.tools.recorded import read_history

NOTHING = "None"
"""What the released code says where there is no weather."""


class Weather(WebTool):
    """Tells the weather of a city on a day that is past, from weatherapi.com or from a recorded history.

    With `replay` alone nothing is asked online; with both, only what is not in the history.
    """

    description = "Tells the weather of a city on a past day. Input: city, YYYY-MM-DD"
    answers_to = ("history_weather",)
    key_header = None

    endpoint: str = "https://api.weatherapi.com/v1"
    """Address of the API; `/history.json` is asked."""
    replay: str | None = None
    """JSON file of recorded answers by input, `{"City, YYYY-MM-DD": text}`, such as TARA's weather_history.json."""

    def __post_init__(self):
        super().__post_init__()
        if self.replay is None and self.api_key_env is None:
            raise ValueError("weather needs replay (a recorded history), api_key_env (to ask weatherapi.com), or both")
        self._history: dict[str, str] = {}

    def setup(self, context: Context) -> None:
        super().setup(context)
        if self.replay is not None:
            self._history = read_history(self.replay, context)
            if not all(isinstance(text, str) for text in self._history.values()):
                raise RewardError(f'replay: {self.replay!r} must be an object of texts, {{"City, YYYY-MM-DD": text}}')

    def call(self, input: str, call: ToolCall) -> str:
        city, comma, day = (part.strip() for part in input.rpartition(","))
        recorded = self._history.get(input, self._history.get(f"{city}, {day}"))
        if recorded is not None:
            return recorded
        if self.api_key_env is None:
            raise ToolError(NOTHING) from LookupError(f"{input!r} is not in {self.replay}")
        if not comma:
            raise ToolError(NOTHING) from ValueError(f"{input!r} is not of the form 'city, YYYY-MM-DD'")
        try:
            return self.look_up({"q": city, "dt": day, "hour": "12"})
        except (HttpFailure, TimeoutError, LookupError, TypeError) as error:
            raise ToolError(NOTHING) from error

    async def fetch(self, client: HttpClient, question: Mapping[str, Any]) -> str:
        assert self.api_key_env is not None
        key = api_key(self.api_key_env)
        found = await client.get("/history.json", {"key": key, **question}, secrets=[key])
        day = found["forecast"]["forecastday"][0]["day"]
        return describe_day(question["q"], question["dt"], day)


def describe_day(city: str, date: str, day: Mapping[str, Any]) -> str:
    """A day of weatherapi.com's history in TARA's words."""
    return (
        f"The weather for {city} on {date} is: \n"
        f"overall weather: {day['condition']['text']}; "
        f"temperature: {day['avgtemp_c']}(C); "
        f"wind speed: {day['maxwind_kph']}(kph), {day['maxwind_mph']}(mph); "
        f"precipitation: {day['totalprecip_mm']}(mm), {day['totalprecip_in']}(inch); "
        f"visibility: {day['avgvis_km']}(km), {day['avgvis_miles']}(miles); "
        f"humidity: {day['avghumidity']}; "
        f"UV index: {day['uv']}."
    )
