"""A tool that works out an expression."""

from __future__ import annotations

from trl_rewards import Tool, ToolCall, ToolError
from trl_rewards_themis.tools.arithmetic import evaluate


class Arithmetic(Tool):
    """The value of an expression, such as 19 for `5+2*7`; the `calculator` checks worked solutions instead.

    None of the paper's tools, but the plainest there is: for short answers, which have no working to check.
    """

    description = "Works out an expression. Input: the expression, such as 5+2*7"

    def call(self, input: str, call: ToolCall) -> str:
        try:
            value = evaluate(input)
        except (ValueError, ArithmeticError):
            raise ToolError("That expression has no value.") from None
        return str(int(value) if value == int(value) else value)
