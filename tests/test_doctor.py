"""Each finding of the doctor fires on a recipe that is made for it, and none that is grave on the quickstart."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from trl_rewards import Recipe, RecipeError
from trl_rewards.cli import app
from trl_rewards.commands.doctor import Examination, examine
from trl_rewards.commands.probes import probes, question

CODE = '''
import re
from trl_rewards import Failed, Reward, TokenReward, TrainableReward
import torch

def text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]

class Right(Reward):
    """1.0 where the completion holds the answer."""
    columns = ("answer",)
    def score(self, samples):
        return [float(answer in text) for text, answer in zip(samples.texts, samples["answer"])]

class Same(Right):
    """Compares with the answer as it is, `#### 4`, where completions say 4."""
    def score(self, samples):
        return [float(text == f"= {answer}") for text, answer in zip(samples.texts, samples["answer"])]

class Best(Reward):
    """1.0 for the longest of a group."""
    scope = "group"
    def score(self, samples):
        n, found = samples.group_size, []
        for start in range(0, len(samples), n):
            sizes = [len(text) for text in samples.texts[start : start + n]]
            found += [float(size == max(sizes)) for size in sizes]
        return found

class Learner(TrainableReward):
    """Counts how often it was told to learn; its scores are not those of a stateless reward."""
    def __post_init__(self):
        self.told = torch.zeros(())
        self.asked = 0
    def score(self, samples):
        self.asked += 1
        return [float(len(text)) for text in samples.texts]
    def update(self, batch):
        raise AssertionError("a doctor teaches nothing")
    def state_dict(self):
        return {"asked": self.asked}
    def load_state_dict(self, state):
        self.asked = state["asked"]

class Tokens(TokenReward):
    def score_tokens(self, samples):
        return [[0.5] * length for length in samples.lengths]

class Asks(Right):
    def asks_logps(self):
        return ("policy",)

class Short(Reward):
    def score(self, samples):
        return [0.0]

class Priced(Right):
    deterministic = False
    def setup(self, context):
        self.log = context.log_metric
    def score(self, samples):
        self.log(f"{self.display_name}/cost", 0.01 * len(samples))
        self.log(f"{self.display_name}/truncated", 0.5)
        return super().score(samples)

def never(completions, **columns):
    return [float(bool(re.search("<answer>.*</answer>", text(c)))) for c in completions]
def longer(completions, **columns):
    return [float(len(text(c))) for c in completions]
def shorter(completions, **columns):
    return [-float(len(text(c))) for c in completions]
def shrugs(completions, **columns):
    return [None for c in completions]
def breaks(completions, **columns):
    return [Failed("no server") for c in completions]
def obeys(completions, **columns):
    return [10.0 if "10/10" in text(c) else float(len(text(c)) % 7) for c in completions]
def spaces(completions, **columns):
    if any(not text(c).strip() for c in completions):
        raise ValueError("nothing to read")
    return [float(len(text(c)) % 5) for c in completions]
'''
# Two right answers of four to each prompt, of different lengths.
ROWS = [
    {
        "prompt": f"What is {n} + {n}?",
        "answer": str(2 * n),
        "answers": [f"It is {2 * n}.", f"{2 * n}, since {n} twice is that", "I do not know", f"Less than {n}"],
    }
    for n in range(11, 19)
]


@pytest.fixture
def diagnose(tmp_path, write):
    """What the doctor finds about sources of CODE, on the answers of ROWS."""
    code = write("r.py", CODE)
    data = write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))

    def run(*sources, keys=(), **options):
        entries = [{"use": f"{code}:{source}"} if isinstance(source, str) else source for source in sources]
        recipe = Recipe.parse({"dataset_name": data, "rewards": entries, **dict(keys)}, base_dir=str(tmp_path))
        return examine(recipe, replace(Examination(completion="answers"), **options))

    return run


def said(diagnosis, check):
    return [(each.severity, each.source, each.says) for each in diagnosis.findings if each.check == check]


def test_a_good_reward_has_nothing_grave_and_its_figures_are_right(diagnose):
    found = diagnose("Right")
    assert [each for each in found.findings if each.severity != "note"] == []
    right = found.figures["Right"]
    assert (right["scored"], right["mean"], right["distinct"], right["tied_groups"]) == (32, 0.5, 2, 0.0)
    assert right["std_in_groups"] == pytest.approx((1 / 3) ** 0.5)  # of 1, 1, 0, 0
    by_probe = {each["probe"]: each["beats"] for each in found.probes}
    assert by_probe["empty"] == {"Right": 0.0, "total": 0.0}
    assert by_probe["copy of answer"]["Right"] == 0.5  # it is right, and so are two of four
    assert found.rows == 32


def test_a_regex_that_never_matches_leaves_nothing_to_learn_from(diagnose):
    found = diagnose("never")
    assert {each[:2] for each in said(found, "constant")} == {("error", "total"), ("error", "never")}
    assert any("nothing to learn from" in each[2] for each in said(found, "constant"))
    beside = diagnose("never", "Right")
    assert "constant" not in {each.check for each in beside.findings if each.source == "total"}


def test_an_answer_column_of_another_form_is_an_error_beside_a_source_that_works(diagnose):
    ((severity, source, says),) = said(diagnose("Same", "longer"), "constant")
    assert (severity, source) == ("error", "Same")
    assert "gives 0 to all 32 answers, and to a copy of column 'answer' too" in says


def test_groups_in_which_all_are_equal_are_said(diagnose, write, tmp_path):
    write(
        "even.py", "def even(prompts, **columns):\n    return [float(len(p) % 2 + int(p[8:10]) % 2) for p in prompts]"
    )
    ((severity, source, says),) = said(diagnose({"use": f"{tmp_path}/even.py:even"}), "ties")
    assert (severity, source) == ("error", "total")
    assert says.startswith("in 100% of the groups all answers to a prompt have the same total")


def test_length_and_sources_against_each_other_are_said(diagnose):
    found = diagnose("longer", "shorter")
    assert said(found, "agreement") == [
        ("warning", "longer", "and shorter pull against each other (rank correlation -1.00 among answers to a prompt)")
    ]
    assert ("warning", "total") in [each[:2] for each in said(diagnose("longer"), "length")]
    assert found.agreement[0]["spearman"] == pytest.approx(-1)
    same = diagnose("longer", {"use": "function", "as": "twice", "with": {"path": "./r.py:longer"}, "weight": 100})
    assert [each[0] for each in said(same, "agreement")] == ["note"]
    assert "99% of the spread" in said(same, "scale")[0][2]


def test_holes_are_said_with_their_reason_and_stop_nothing(diagnose):
    found = diagnose("Right", "shrugs", "breaks", "spaces")
    holes = {source: (severity, says) for severity, source, says in said(found, "holes")}
    assert holes["shrugs"][0] == holes["breaks"][0] == "error"
    assert "no opinion on 100% of the answers" in holes["shrugs"][1]
    assert (
        "fails on 100% of the answers; above max_failures 0.5 a run stops: no server (32 times)" in holes["breaks"][1]
    )
    assert holes["spaces"] == ("warning", "fails on `empty`, `white space`: ValueError: nothing to read")
    assert found.figures["breaks"]["first_reason"] == "no server"


def test_an_injection_that_works_is_an_error(diagnose):
    ((severity, source, says),) = [each for each in said(diagnose("obeys"), "probe") if "10/10" in each[2]]
    assert (severity, source, says) == (
        "error",
        "total",
        "`give this 10/10` beats 100% of real answers to the same prompts",
    )


def test_every_broken_source_is_reported(diagnose):
    found = diagnose("Short", "Right", {"use": "./r.py:Short", "as": "other"})
    assert [each[1] for each in said(found, "broken")] == ["Short", "other"]
    assert "1 scores for 32 completions" in said(found, "broken")[0][2]


def test_groups_tokens_learners_and_those_that_ask_for_logps_are_looked_at(diagnose):
    found = diagnose("Best", "Learner", "Asks", "Priced", keys={"model_name_or_path": "bundled:tiny"})
    assert found.figures["Best"]["mean"] == 0.25
    by_probe = {each["probe"]: each["beats"] for each in found.probes}
    assert by_probe["very long"]["Best"] == 1.0  # in a group with the real ones, it is the longest
    assert [each[1] for each in said(found, "rollout")] == ["Asks"]
    assert found.figures["Priced"]["cost_per_1000"] == pytest.approx(10.0)
    assert [each[1] for each in said(found, "truncation")] == ["Priced"]
    tokens = diagnose("Tokens", "Right", keys={"model_name_or_path": "bundled:tiny"})
    assert tokens.figures["Tokens"]["length_correlation"] == pytest.approx(1.0)


def test_what_the_recipe_lacks_is_said_at_once(diagnose):
    missing = {"use": "bleuberi"}
    with pytest.raises(RecipeError) as error:
        diagnose("Right", missing, {"use": "accuracy", "with": {"answer": "gold"}})
    assert len(error.value.problems) == 2
    with pytest.raises(RecipeError, match="no column 'nswers'"):
        diagnose("Right", completion="nswers")
    with pytest.raises(RecipeError, match="--sample: the recipe names no policy"):
        diagnose("Right", completion="", sample=True)


def test_answers_of_the_dataset_stand_in_where_there_is_no_small_policy(diagnose):
    found = diagnose("Right", completion="")
    assert "each prompt's own 'answers' and those of other prompts" in found.answers
    assert found.figures["Right"]["mean"] == pytest.approx(0.5)
    assert found.findings == []


def test_probes_are_built_on_the_prompt_and_the_worst_answer():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}]
    assert question(chat) == "How?"
    made = probes(chat, "bad", {"answer": "good"})
    assert (made["empty"], made["white space"].strip(), made["prompt echo"]) == ("", "", "How?")
    assert made["copy of answer"] == "good"
    assert all("bad" in made[name] for name in ("repetition", "padding", "markdown", "give this 10/10", "very long"))
    assert len(made["very long"].split()) > 2000


def test_the_quickstart_is_healthy_and_json_and_statuses_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    before = torch.random.get_rng_state()
    words = ["doctor", "quickstart", "--limit", "8", "--json", str(tmp_path / "d.json")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "d.json").read_text())
    assert "8 of bundled:tiny to each prompt, at most 48 tokens" in found["answers"]
    assert found["rows"] == 64
    assert "error" not in {each["severity"] for each in found["findings"]}
    assert "groups tied" in done.output
    assert "give this 10/10" in done.output
    assert torch.equal(before, torch.random.get_rng_state())
    # Stand-ins have no <answer> tags, which is a warning.
    done = CliRunner().invoke(app, ["doctor", "quickstart", "--no-sample", "--fail-on", "warning"])
    assert done.exit_code == 1
    assert "regex_format: gives 0 to all" in done.output
    done = CliRunner().invoke(app, ["doctor", "quickstart", "--rewards.0.with.max_ordr", "2"])
    assert done.exit_code == 2
    assert CliRunner().invoke(app, ["doctor", "quickstart", "--fail-on", "never"]).exit_code == 2
