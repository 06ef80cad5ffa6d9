"""Files are written whole, and to where their name leads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from trl_rewards.files import write_rows, write_whole


def test_a_file_that_cannot_be_written_keeps_what_it_had(tmp_path):
    file = tmp_path / "rows.jsonl"
    write_rows(file, [{"text": "é \ud800"}])
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "\ud800")
    assert file.read_bytes() == '{"text": "é \ud800"}\n'.encode("utf-8", "surrogatepass")


def test_rows_make_the_folders_above_them_and_go_through_a_link(tmp_path):
    target, link = tmp_path / "deep" / "er" / "rows.jsonl", tmp_path / "link.jsonl"
    write_rows(target, [{"a": 1}])
    link.symlink_to(target)
    write_rows(link, [{"a": 2}, {"a": 3}])
    assert link.is_symlink()
    assert target.read_text() == '{"a": 2}\n{"a": 3}\n'


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "text")
    reader.join(timeout=10)
    assert found == ["text"]
    assert pipe.is_fifo()


def test_standard_output_is_written_to():
    code = (
        "from pathlib import Path; from trl_rewards.files import write_whole; write_whole(Path('/dev/stdout'), 'text')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("text", 0), done.stderr
