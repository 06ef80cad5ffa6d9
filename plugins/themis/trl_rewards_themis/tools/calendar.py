"""The calendar of Themis.  https://huggingface.co/papers/2310.01045"""

from __future__ import annotations

from datetime import date, datetime, timedelta

from trl_rewards import Tool, ToolCall

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class Calendar(Tool):
    """Computes with dates: the day of the week, the date some days away, the days between two dates.

    Which of them is said by the name that the model writes: any with "calendar" in it, followed by the function. In
    the released code the function is looked for in the whole text, so that the first kind that a text speaks of wins;
    here it is looked for in the name.
    """

    description = (
        "Computes with dates (YYYY-MM-DD). Calendar.week_day: the weekday of a date. Calendar.target_day: the date so "
        "many days after a date (negative: before it); input: date, days. Calendar.day_difference: the days between "
        "two dates; input: date, date"
    )
    answers_to = ("Calendar.week_day", "Calendar.target_day", "Calendar.day_difference")

    def answers(self, name: str) -> bool:
        return "calendar" in name.lower()

    def call(self, input: str, call: ToolCall) -> str:
        if "week_day" in call.name:
            return _DAYS[_date(input).weekday()]
        if "target_day" in call.name:
            day, distance = input.split(",")
            return (_date(day) + timedelta(int(distance))).isoformat()
        if "day_difference" in call.name:
            one, other = input.split(",")
            return str(abs((_date(one) - _date(other)).days))
        return "None"


def _date(text: str) -> date:
    return datetime.strptime(text.strip(), "%Y-%m-%d").date()
