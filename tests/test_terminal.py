"""Lines are as wide as whoever reads them can take."""

from __future__ import annotations

import pytest

from trl_rewards.terminal import PLAIN_WIDTH, output_console

LINE = "word " * 60


def lines(capsys, **options) -> list[str]:
    output_console(**options).print(LINE)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "variables",
    [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1", "TERM": "dumb"}, {"COLUMNS": ""}, {"COLUMNS": "wide"}],
)
def test_without_a_terminal_a_line_is_as_wide_as_asked_whatever_is_said_of_colours(capsys, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert len(lines(capsys, width=1000)) == 1
    assert len(lines(capsys)) == -(-len(LINE) // PLAIN_WIDTH)


def test_columns_says_how_wide_a_line_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    assert max(map(len, lines(capsys, width=1000))) <= 50


def test_a_terminal_says_how_wide_it_is(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("os.get_terminal_size", lambda *_: (60, 25))
    assert max(map(len, lines(capsys, width=1000))) <= 60
