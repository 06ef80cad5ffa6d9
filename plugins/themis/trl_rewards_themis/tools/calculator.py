"""The calculator of Themis, which checks worked-out arithmetic.  https://huggingface.co/papers/2310.01045"""

from __future__ import annotations

import re

from trl_rewards import Tool, ToolCall
from trl_rewards_themis.tools.arithmetic import evaluate

_UNEXPECTED = "An unexpected error occurred during the calculation."


class Calculator(Tool):
    """Checks the sums of a worked answer, and whether the last one is the answer's result.

    The answer's result is the first number after `####`, as in GSM8K. As in the released code, results are compared
    exactly, so that 3.33 is wrong for 10/3; `2,000` is read as 2, and a negative result or one with a currency sign is
    no valid answer. Expressions are evaluated here, not by numexpr, which computes 9**9**9 for hours.
    """

    description = (
        "Checks calculations against the final answer, which stands after '####'. Input: the calculations in the form "
        "<<expression=value>>value, separated by a comma and a space, such as <<2*3=6>>6, <<6+1=7>>7"
    )

    def call(self, input: str, call: ToolCall) -> str:
        results = re.findall(r"####[ *]\d.*", call.answer or call.text)
        if not results:
            return "No valid answer."
        predicted = float(re.findall(r"\d+[.]*\d*", results[0])[0])
        correct, calculated = check_steps(input.split(", "))
        if correct and calculated == predicted:
            return "Both the calculation and the answer are correct."
        if correct:
            return (
                f"The calculation process is correct, but the resulting answer {calculated} does not match the "
                f"predicted answer {predicted}."
            )
        if calculated == predicted:
            return (
                "The calculation process is incorrect, but the answer matches the predicted answer. "
                f"Details: {_UNEXPECTED}"
            )
        return (
            f"Both the calculation and the answer are incorrect. Details: {_UNEXPECTED} "
            f"The calculated answer {calculated} does not match the predicted answer {predicted}."
        )


def check_steps(steps: list[str]) -> tuple[bool, int | float | None]:
    """Whether each `<<expression=…>>value` is right, and what the last one that can be computed comes to.

    An expression that cannot be computed is passed over; a value that is no number ends the check.
    """
    correct, calculated = True, None
    for step in steps:
        claimed = re.sub(r"<<.*>>", "", step)
        try:
            value = evaluate(re.sub(r"<<|=.*", "", step))
        except (ValueError, ArithmeticError):
            correct = False
            continue
        try:
            correct = correct and (claimed == "" or value == float(claimed))
        except ValueError:
            return False, calculated
        calculated = value
    return correct, calculated
