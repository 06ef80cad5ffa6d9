"""The command line: every command, its exit status, and errors in a line instead of a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from trl_rewards import cli
from trl_rewards.plugins import discover


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command as the console script does; returns (status, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trl-rewards", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "160")
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- looking around --------------------------------------------------------------------------------------------------


def test_without_a_command_the_help_lists_them(command):
    _, out, err = command()
    for name in ("train", "validate", "plugins", "list", "show", "score", "index", "new", "report"):
        assert name in out + err


def test_plugins_lists_what_is_installed(command):
    status, out, _ = command("plugins")
    assert status == 0
    assert out.splitlines()[0].split() == ["plugin", "from", "what"]
    (line,) = [line for line in out.splitlines() if line.startswith("defaults")]
    assert "trl-rewards 0.1.0" in line
    assert "10 rewards, 8 combiners, 6 shapers, 5 advantages, 2 objectives (register_" in line


def test_plugins_shows_a_broken_one_and_fails(command, tmp_path, monkeypatch):
    (tmp_path / "broken_for_cli.py").write_text("raise RuntimeError('no [red]licence')")
    info = tmp_path / "broken_for_cli-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-for-cli\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trl_rewards]\nbroken = broken_for_cli\n")
    monkeypatch.syspath_prepend(tmp_path)
    discover.cache_clear()
    try:
        status, out, _ = command("plugins")
    finally:
        discover.cache_clear()
    assert status == 1
    assert "broken: RuntimeError: no [red]licence" in out
    assert "defaults" in out


def test_plugins_without_any_says_what_to_do(command, monkeypatch):
    monkeypatch.setenv("TRL_REWARDS_PLUGINS", "")
    discover.cache_clear()
    try:
        assert command("plugins")[:2] == (
            1,
            "no plugins found; TRL_REWARDS_PLUGINS='' leaves none; unset it or name others\n",
        )
    finally:
        discover.cache_clear()


@pytest.mark.parametrize("word", ["shaper", "shapers"])
def test_list_of_one_kind(word, command):
    status, out, _ = command("list", word)
    assert status == 0
    assert {line.split()[0] for line in out.splitlines()[1:]} == {"shaper"}
    assert "Limits rewards to [low, high]." in out


def test_list_of_an_unknown_kind_fails(command):
    assert command("list", "rewords") == (
        1,
        "",
        "error: unknown kind 'rewords'; it is one of reward, combiner, shaper, advantage, objective, selector, tool\n",
    )


def test_show_tells_options_defaults_columns_paper_and_recipe(command):
    status, out, _ = command("show", "bleuberi")
    assert status == 0
    for part in (
        "bleuberi · reward",
        "max_order: int = 4",
        "Longest n-gram.",
        "Reads dataset columns: references",
        "Paper: https://huggingface.co/papers/2505.11080",
        "- {use: bleuberi}",
    ):
        assert part in out


def test_show_writes_required_options_into_the_example(command):
    assert "{use: length, with: {soft_limit: <soft_limit>, hard_limit: <hard_limit>}}" in command("show", "length")[1]


def test_show_of_a_function_in_a_file(command, write):
    path = write("mine.py", 'def close(completions, **kwargs):\n    """How close."""\n')
    out = command("show", f"{path}:close")[1]
    assert out.startswith(f"{path}:close · reward · a TRL reward function\n\nHow close.\n\nNo options.\n")
    assert out.endswith(f"    - {{use: {path}:close}}\n")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["show", "bluberi"], "error: no component 'bluberi', did you mean 'bleuberi'"),
        (["show", "length", "--kind", "shaper"], "error: unknown shaper 'length'"),
        (["show", "length", "--kind", "rewards"], "error: unknown kind 'rewards'; it is one of reward,"),
        (["show", "length", "--kind", "spoon"], "error: unknown kind 'spoon'; it is one of reward,"),
        (["show", "./none.py:x", "--kind", "spoon"], "error: unknown kind 'spoon'; it is one of reward,"),
        (["show", "./none.py:x"], "error: no file './none.py'"),
        (["validate", "nowhere.yaml"], "error: nowhere.yaml: 1 problem\n  - no such file, nor a bundled recipe"),
        (["score", "--config", "nowhere.yaml", "--data", "d", "--out", "o"], "error: nowhere.yaml: 1 problem"),
        (["new", "Bad Name"], "error: a plugin's name is lower-case letters"),
        (["new", "class"], "error: a plugin's name is lower-case letters"),
        (["new", "idea", "--kind", "spoon"], "error: new: --kind is one of reward, selector, tool, got 'spoon'"),
        (["new", "../up"], "error: a plugin's name is lower-case letters"),
        (["report", "no_such_folder"], "error: "),
        (["train", "nowhere.yaml"], "error: nowhere.yaml: 1 problem"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_a_message_and_status_1(words, wanted, command):
    status, _, err = command(*words)
    assert status == 1
    assert err.startswith(wanted)


def test_an_unknown_command_or_missing_option_is_status_2(command):
    assert command("trian")[0] == 2
    assert command("score", "--config", "x")[0] == 2


def test_kind_may_be_said_where_a_name_is_clear_already(command):
    assert command("show", "clip", "--kind", "shaper")[0] == 0


# --- validate --------------------------------------------------------------------------------------------------------

RECIPE = """
model_name_or_path: nobody/nothing
bf16: false
use_cpu: true
report_to: none
rewards:
  - use: exact_match
  - use: regex_format
    weight: 0.5
    with: {pattern: "a.*"}
"""


def rows(write, *lines: dict, name: str = "data.jsonl") -> str:
    return write(name, "".join(json.dumps(line) + "\n" for line in lines))


def test_validate_says_what_it_checked(command, write):
    data = rows(write, {"prompt": "p", "answer": "a"}, {"prompt": "q", "answer": "b"})
    recipe = write("recipe.yaml", RECIPE + f"dataset_name: {data}\n")
    status, out, _ = command("validate", recipe, "--learning_rate", "2e-6")
    assert status == 0
    first, second, third, last = out.splitlines()
    assert first == f"{recipe}: trainer grpo, 2 sources (exact_match, regex_format)"
    assert second == f"dataset {data}: train 2 rows"
    assert third.startswith("signature: trainer:grpo  rewards:1*exact_match")
    assert last == "ok"


def test_validate_looks_for_the_columns_that_rewards_read(command, write):
    data = rows(write, {"prompt": "p", "solution": "a"})
    recipe = write("recipe.yaml", RECIPE + f"dataset_name: {data}\n")
    status, _, err = command("validate", recipe)
    assert status == 1
    assert "rewards.exact_match needs dataset column 'answer'; the dataset has prompt, solution" in err
    assert command("validate", recipe, "--dataset.columns.answer", "solution")[0] == 0


def test_validate_reports_data_and_policy_together(command, write):
    recipe = write("recipe.yaml", RECIPE.replace("model_name_or_path", "#") + "dataset_name: ./none.jsonl\n")
    status, _, err = command("validate", recipe)
    assert status == 1
    assert "2 problems" in err
    assert "model_name_or_path: a policy is needed" in err
    assert "dataset_name: no file './none.jsonl'" in err


def test_validate_reports_a_missing_dataset_beside_wrong_options(command, write):
    recipe = write("recipe.yaml", RECIPE + "dataset_name: bundled:tinny\nmax_steps: many\n")
    status, _, err = command("validate", recipe)
    assert status == 1
    assert "2 problems" in err
    assert "max_steps: must be" in err
    assert "dataset_name: no bundled model or data called 'tinny'; there is tiny" in err


def test_validate_says_that_a_hub_dataset_was_not_looked_at(command, write):
    recipe = write("recipe.yaml", RECIPE + "dataset_name: trl-lib/tldr\n")
    status, out, _ = command("validate", recipe)
    assert status == 0
    assert "dataset trl-lib/tldr: not looked at (it is on the Hub)" in out


# --- score -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def score(command, write, tmp_path):
    """Scores rows with a recipe; returns (status, lines of the file, stdout, stderr)."""

    def run(*data: dict, recipe: str = RECIPE, words: tuple = (), out: str = "out.jsonl"):
        file = tmp_path / out
        options = ["--config", write("recipe.yaml", recipe), "--data", rows(write, *data), "--out", file]
        status, printed, err = command("score", *options, *words)
        return status, lines_of(file) if file.exists() and status == 0 else [], printed, err

    return run


def test_traces_of_texts_with_every_separator_are_kept_when_scoring_goes_on(score, tmp_path):
    texts = [{"prompt": "p", "completion": f"a\u2028\x85{row}", "answer": "a"} for row in range(4)]
    words = ("--batch-size", "2", "--trace", tmp_path / "trace.jsonl")
    _, whole, _, _ = score(*texts, words=words)
    told = (tmp_path / "trace.jsonl").read_bytes()
    scores = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text("".join(scores[:4]))  # the header, a batch of two, and a row of the next
    status, again, _, err = score(*texts, words=words)
    assert status == 0, err
    assert again == whole
    assert (tmp_path / "trace.jsonl").read_bytes() == told


def test_an_option_that_is_spelt_wrong_is_no_override(score):
    status, _, _, err = score(*ROWS, words=("--batchsize", "3"))
    assert status == 1
    assert "--batchsize: no option of this command and no key of a recipe, did you mean 'batch-size'" in err
    assert score(*ROWS, words=("--seed", "3", "--rewards.0.weight", "2"))[0] == 0  # TRL's, and ours


ROWS = (
    {"prompt": "p", "completion": "a", "answer": "A"},
    {"prompt": "p", "completion": "b", "answer": "a"},
    {"prompt": "p", "completion": "ab", "answer": None},
)


def test_score_writes_a_line_per_completion_with_every_source_and_holes_as_null(score):
    status, lines, printed, _ = score(*ROWS)
    assert status == 0
    assert lines[0]["signature"].startswith("trainer:grpo")
    assert lines[1:] == [
        {"row": 0, "completion": 0, "total": 1.5, "scores": {"exact_match": 1.0, "regex_format": 1.0}, "status": {}},
        {"row": 1, "completion": 0, "total": 0.0, "scores": {"exact_match": 0.0, "regex_format": 0.0}, "status": {}},
        {
            "row": 2,
            "completion": 0,
            "total": 1.5,  # 0.5 · 1.0, renormalised over a hole of weight 1: · 1.5 / 0.5
            "scores": {"exact_match": None, "regex_format": 1.0},
            "status": {"exact_match": "abstained"},
        },
    ]
    assert "3 completions scored -> " in printed
    assert "  total: mean 1.0000, std 0.7071, min 0.0000, max 1.5000\n" in printed
    assert "  exact_match: mean 0.5000, std 0.5000, min 0.0000, max 1.0000, 1 without a score\n" in printed


def test_score_says_of_which_rows_a_source_was_not_asked(score):
    recipe = (
        "rewards:\n  - use: exact_match\n  - use: regex_format\n    with: {pattern: 'a.*'}\n"
        "    only_if: {source: exact_match, at_least: 0.5}\n"
    )
    status, lines, _, err = score(*ROWS[:2], recipe=recipe)
    assert status == 0, err
    assert [line["status"] for line in lines[1:]] == [{}, {"regex_format": "not asked"}]


def test_score_takes_chat_data(score):
    user, assistant = ({"role": role, "content": "a"} for role in ("user", "assistant"))
    status, lines, _, _ = score(
        {"prompt": [user], "completion": [assistant], "answer": "a"},
        {"prompt": [user], "completion": [assistant], "answer": "b"},
    )
    assert status == 0
    assert [line["total"] for line in lines[1:]] == [1.5, 0.5]


def test_score_makes_a_chat_message_of_text_under_chat_prompts(score):
    status, lines, _, _ = score({"prompt": [{"role": "user", "content": "p"}], "completion": "a", "answer": "a"})
    assert (status, lines[1]["total"]) == (0, 1.5)


def test_score_takes_a_list_of_completions_as_a_group(score):
    data = [
        {"prompt": "p", "completion": ["a", "b", "c"], "answer": "a"},
        {"prompt": "q", "completion": [], "answer": "a"},
        {"prompt": "r", "completion": ["a"], "answer": "a"},
        {"prompt": "s", "completion": ["b", "c", "a"], "answer": "a"},
    ]
    status, lines, _, _ = score(*data)
    assert status == 0
    assert [(line["row"], line["completion"], line["scores"]["exact_match"]) for line in lines[1:]] == [
        (0, 0, 1.0),
        (0, 1, 0.0),
        (0, 2, 0.0),
        (2, 0, 1.0),
        (3, 0, 0.0),
        (3, 1, 0.0),
        (3, 2, 1.0),
    ]


def test_score_gives_a_completion_that_is_not_there_no_score(score):
    data = [
        {"prompt": "p", "completion": ["a", None, "b"], "answer": "a"},
        {"prompt": "q", "completion": [None], "answer": "a"},
        {"prompt": "r", "completion": ["a"], "answer": "a"},
    ]
    status, lines, printed, _ = score(*data)
    assert status == 0
    assert [line["scores"]["exact_match"] for line in lines[1:]] == [1.0, None, 0.0, None, 1.0]
    assert [line["status"].get("exact_match") for line in lines[1:]] == [None, "missing", None, "missing", None]
    assert "exact_match: mean 0.6667" in printed


def test_score_gives_group_rewards_whole_groups(score, write):
    code = (
        "from trl_rewards import Reward\n"
        "class Rank(Reward):\n"
        "    scope = 'group'\n"
        "    def score(self, samples):\n"
        "        g = samples.group_size\n"
        "        return [float(sorted(samples.texts[r // g * g:r // g * g + g]).index(t))"
        " for r, t in enumerate(samples.texts)]\n"
    )
    data = [{"prompt": "p", "completion": ["c", "a", "b"]}, {"prompt": "q", "completion": ["z", "y", "x"]}]
    status, lines, _, _ = score(*data, recipe=f"rewards: ['{write('rank.py', code)}:Rank']")
    assert status == 0
    assert [line["total"] for line in lines[1:]] == [2.0, 0.0, 1.0, 2.0, 1.0, 0.0]


def test_score_may_read_another_column_and_split_size(score):
    data = [{"prompt": "p", "reply": "a", "answer": "a"}] * 5
    status, lines, _, _ = score(*data, words=("--completion", "reply", "--batch-size", "2"))
    assert (status, len(lines)) == (0, 6)


@pytest.mark.parametrize("cut", [0, 10, 3000])
def test_score_goes_on_where_a_file_was_cut_off(cut, score, tmp_path):
    data = [{"prompt": "p", "completion": ["a", "b"], "answer": answer} for answer in "abab"]
    _, whole, _, _ = score(*data)
    file = tmp_path / "out.jsonl"
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    # The header alone cut short, the first rows and a torn line, or all but the very end.
    kept = lines[0][:20] if cut == 0 else "".join(lines[:4]) + lines[4][:cut] if cut == 10 else text[:-3]
    file.write_text(kept)
    status, again, _, _ = score(*data)
    assert status == 0
    assert again == whole


def test_score_of_a_finished_file_changes_nothing(score):
    _, whole, _, _ = score(*ROWS)
    assert score(*ROWS)[1] == whole


def test_score_does_not_score_again_what_a_file_holds(score, write, tmp_path):
    code = "import pathlib\ndef f(completions, **kwargs):\n    log = pathlib.Path(__file__).with_suffix('.log')\n"
    code += "    log.open('a').write(''.join(completions))\n    return [0.0] * len(completions)\n"
    recipe = f"rewards: ['{write('counts.py', code)}:f']"
    data = [{"prompt": "p", "completion": letter} for letter in "abcd"]
    words = ("--batch-size", "1")
    score(*data, recipe=recipe, words=words)
    score(*data, recipe=recipe, words=words)  # finished: nothing to do
    assert (tmp_path / "counts.log").read_text() == "abcd"
    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text("".join(lines[:4]))
    score(*data, recipe=recipe, words=words)
    assert (tmp_path / "counts.log").read_text() == "abcd" + "cd"  # the last batch that is there may be incomplete


def test_score_refuses_a_file_of_another_dataset(score, tmp_path):
    score(*ROWS)
    before = (tmp_path / "out.jsonl").read_text()
    status, _, _, err = score(*reversed(ROWS))
    assert status == 1
    assert "holds scores of another dataset" in err
    assert (tmp_path / "out.jsonl").read_text() == before


def test_score_refuses_a_file_of_another_pipeline(score, tmp_path):
    score(*ROWS)
    before = (tmp_path / "out.jsonl").read_text()
    status, _, _, err = score(*ROWS, words=("--rewards.0.weight", "2"))
    assert status == 1
    assert "holds scores of another pipeline" in err
    assert (tmp_path / "out.jsonl").read_text() == before


@pytest.mark.parametrize("content", ["my notes\nof today\n", "[1, 2]\n", '{"a": 1}\n3\n', '"text"\n'])
def test_score_refuses_a_file_of_something_else_and_leaves_it_alone(content, score, tmp_path):
    (tmp_path / "notes.txt").write_text(content)
    status, _, _, err = score(*ROWS, out="notes.txt")
    assert status == 1
    assert "notes.txt" in err
    assert (tmp_path / "notes.txt").read_text() == content


def test_score_does_not_delete_a_one_line_file_of_something_else(score, tmp_path):
    (tmp_path / "notes.txt").write_text("a line without an end")
    assert score(*ROWS, out="notes.txt")[0] == 1
    assert (tmp_path / "notes.txt").read_text() == "a line without an end"


@pytest.mark.parametrize(
    ("data", "words", "wanted"),
    [
        ({"prompt": "p", "answer": "a"}, (), "--completion: no column 'completion' in"),
        ({"prompt": "p", "completion": "a"}, (), "rewards.exact_match needs dataset column 'answer'"),
        ({"question": "p", "completion": "a"}, (), "the dataset has no column 'prompt' but question, completion"),
        (ROWS[0], ("--split", "test"), "--split: no split 'test' in"),
        (ROWS[0], ("--rewards.0.use", "exact_mtch"), "unknown reward 'exact_mtch', did you mean 'exact_match'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_score_says_what_is_missing(data, words, wanted, score):
    status, _, _, err = score(data, words=words)
    assert status == 1
    assert wanted in err


def test_score_of_lengths_without_a_tokenizer_says_what_to_give(score):
    recipe = "rewards: [{use: length, with: {soft_limit: 1, hard_limit: 2}}]"
    status, _, _, err = score(*ROWS, recipe=recipe)
    assert status == 1
    assert "give a tokenizer (model_name_or_path)" in err


@pytest.mark.slow
def test_score_counts_tokens_of_the_policy(score, policy_path):
    from transformers import AutoTokenizer

    count = len(AutoTokenizer.from_pretrained(policy_path)("the cat ran")["input_ids"])
    limits = f"{{soft_limit: 0, hard_limit: {2 * count}}}"
    recipe = f"model_name_or_path: {policy_path}\nrewards: [{{use: length, with: {limits}}}]"
    assert score({"prompt": "p", "completion": "the cat ran"}, recipe=recipe)[1][1]["total"] == -0.5


# --- new -------------------------------------------------------------------------------------------------------------


def test_index_makes_a_corpus_searchable(command, write, tmp_path):
    from trl_rewards.passages import PassageIndex

    corpus = write("corpus.jsonl", '{"name": "Oslo", "body": "The capital of Norway"}\n')
    out = tmp_path / "wiki.sqlite"
    words = ("index", corpus, "--out", out, "--title", "name", "--text", "body", "--words", 3)
    assert command(*words) == (0, f"{out}: 2 passages\n", "")
    assert PassageIndex(str(out)).search("Norway")[0] == ("Oslo", "Norway")
    status, _, err = command(*words)
    assert (status, err) == (1, f"error: {out} exists; delete it, or name another with --out\n")


def test_show_of_a_tool_says_what_a_model_is_told(command):
    out = command("show", "weather")[1]
    assert "weather · tool · answers to history_weather" in out
    assert "A model is told: Tells the weather of a city on a past day. Input: city, YYYY-MM-DD" in out
    assert "with: {tools: [{use: weather}]}" in out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reward", "selector", "tool"])
def test_new_writes_a_plugin_whose_test_passes(kind, command, tmp_path):
    status, out, _ = command("new", "my-idea", "--folder", tmp_path / "there", "--kind", kind)
    assert status == 0
    assert f"wrote {tmp_path / 'there'}" in out
    assert "trl-rewards show my_idea" in out
    written = sorted(
        str(file.relative_to(tmp_path / "there")) for file in (tmp_path / "there").rglob("*") if file.is_file()
    )
    assert written == ["README.md", "pyproject.toml", "tests/test_my_idea.py", "trl_rewards_my_idea.py"]
    paths = [str(tmp_path / "there"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path / "there",
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


@pytest.mark.parametrize("name", ["reward", "samples", "x", "a_1"])
def test_new_takes_any_name_that_python_takes(name, command, tmp_path):
    from trl_rewards.plugins import load_target

    assert command("new", name, "--folder", tmp_path / name)[0] == 0
    cls = "".join(part.capitalize() for part in name.split("_"))
    made = load_target(f"{tmp_path / name}/trl_rewards_{name}.py:{cls}")
    assert made().lower is True


def test_new_is_found_as_a_plugin_by_its_pyproject(command, tmp_path):
    import tomllib

    command("new", "my_idea", "--folder", tmp_path / "p")
    project = tomllib.loads((tmp_path / "p" / "pyproject.toml").read_text())["project"]
    assert project["name"] == "trl-rewards-my-idea"
    assert project["entry-points"]["trl_rewards"] == {"my_idea": "trl_rewards_my_idea"}


def test_new_refuses_a_folder_that_is_not_empty(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "idea").mkdir()
    assert command("new", "idea")[0] == 0  # empty is fine
    status, _, err = command("new", "idea")
    assert status == 1
    assert "idea exists and is not an empty folder" in err


def test_new_refuses_a_file_in_the_way(command, write):
    path = write("idea", "not a folder")
    status, _, err = command("new", "idea", "--folder", path)
    assert status == 1
    assert "idea" in err


# --- averaging -------------------------------------------------------------------------------------------------------


def test_merge_writes_an_average_into_an_empty_folder(command, reward_model_path, tmp_path):
    words = ("merge", tmp_path / "out", reward_model_path, reward_model_path, "--weight", 1, "--weight", 3)
    assert command(*words)[:2] == (0, f"average of 2 -> {tmp_path / 'out'}\n")
    assert [made["weight"] for made in json.loads((tmp_path / "out" / "average.json").read_text())] == [0.25, 0.75]
    status, _, err = command(*words)
    assert status == 1
    assert "exists already; give another folder" in err
