"""`trl-rewards reproduce`: claims run as arms over seeds, and say what came out."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from trl_rewards import RecipeError, RewardError
from trl_rewards.cli import app
from trl_rewards.commands.claims import Expectation, Measure, claims, load_claim
from trl_rewards.commands.outcome import (
    Interval,
    effects,
    interval,
    judge,
    keep,
    kept,
    measured,
    parts_reproduced,
    table,
)
from trl_rewards.commands.reproduce import reproduce
from trl_rewards.recipe import Recipe

# Logs a curve that rises to a seed's end, after it has read what the stage left.
ARM = """
import json, pathlib, sys
out, seed, end, stage = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), pathlib.Path(sys.argv[4])
assert json.loads((stage / "stage.json").read_text()) == {"seed": seed}
lines = [{"step": step, "right": end * step / 4 + seed / 100} for step in range(5)] + [{"step": 4, "loss": 0.0}]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""
STAGE = """
import json, pathlib, sys
(pathlib.Path(sys.argv[1]) / "stage.json").write_text(json.dumps({"seed": int(sys.argv[2])}))
"""


def claim_of(tmp_path, **changes) -> str:
    for name, text in (("arm.py", ARM), ("stage.py", STAGE)):
        (tmp_path / name).write_text(textwrap.dedent(text))

    def arm(end):
        return {"command": [f"{tmp_path}/arm.py", "{out}", "{seed}", str(end), "{model}"], "before": ["model"]}

    whole = {
        "paper": "https://huggingface.co/papers/2410.15115",
        "claim": "new is better than old",
        "miniature": "curves",
        "stages": {"model": {"command": [f"{tmp_path}/stage.py", "{out}", "{seed}"]}},
        "arms": {"old": arm(0.5), "new": arm(0.8)},
        "measures": {
            "right": {"key": "right"},
            "steps": {"key": "right", "take": "steps_to", "level": 0.4},
            "gain": {"key": "right", "take": "gain"},
        },
        "expect": [
            {"measure": "right", "arm": "new", "than": "old"},
            {"measure": "steps", "arm": "new", "than": "old", "direction": "lower"},
        ],
    } | changes
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(whole, sort_keys=False))
    return str(file)


def test_interval_is_students_t_over_seeds():
    # mean 2, standard deviation 1, three seeds: 4.303 / sqrt 3
    found = interval([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, 2.0 - 4.303 / math.sqrt(3), 2.0 + 4.303 / math.sqrt(3)))
    assert interval([5.0]) == Interval(5.0, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("direction", "by", "found", "verdict"),
    [
        ("higher", 0.0, (0.2, 0.1, 0.3), "reproduced"),
        ("higher", 0.0, (0.2, -0.1, 0.5), "direction only"),
        ("higher", 0.0, (-0.2, -0.3, -0.1), "not reproduced"),
        ("higher", 0.15, (0.2, 0.1, 0.3), "direction only"),
        ("lower", 0.0, (-0.2, -0.3, -0.1), "reproduced"),
        ("lower", 0.0, (0.2, -0.1, 0.5), "not reproduced"),
        ("not_lower", 0.03, (0.0, -0.02, 0.02), "reproduced"),
        ("not_lower", 0.03, (-0.02, -0.05, 0.01), "direction only"),
        ("not_lower", 0.03, (-0.1, -0.12, -0.08), "not reproduced"),
        ("not_higher", 0.03, (0.1, 0.05, 0.15), "not reproduced"),
        ("higher", 0.0, (0.2, -math.inf, math.inf), "direction only"),
        ("not_lower", 0.0, (0.0, 0.0, 0.0), "reproduced"),
        ("higher", 0.0, (0.0, 0.0, 0.0), "not reproduced"),
    ],
)
def test_a_verdict_needs_the_whole_interval(direction, by, found, verdict):
    assert judge(Expectation("right", "new", "old", direction, by), Interval(*found)) == verdict


def test_a_verdict_says_how_many_parts_are_reproduced_where_some_are():
    def said(*verdicts):
        return parts_reproduced({"expected": [{"verdict": verdict} for verdict in verdicts]})

    assert said("reproduced", "not reproduced", "direction only") == " (1 of 3 parts reproduced)"
    assert said("reproduced", "reproduced") == said("not reproduced", "direction only") == ""


def test_arms_run_over_seeds_after_their_stages_and_are_not_run_again(tmp_path):
    claim, out, said = load_claim(claim_of(tmp_path)), tmp_path / "runs", []
    result = reproduce(claim, out, seeds=3, jobs=1, tell=said.append)
    assert [each.ended.partition(":")[0] for each in said if each.ended] == [
        *(f"model, seed {seed}" for seed in range(3)),
        *(f"{arm}, seed {seed}" for seed in range(3) for arm in ("old", "new")),
    ]
    assert result["values"]["new"]["right"] == pytest.approx([0.80, 0.81, 0.82])
    assert result["values"]["old"]["steps"] == [4.0, 4.0, 4.0]
    assert result["values"]["new"]["steps"] == [2.0, 2.0, 2.0]
    assert result["values"]["old"]["gain"] == pytest.approx([0.5, 0.5, 0.5])
    assert [each["difference"][0] for each in result["expected"]] == pytest.approx([0.3, -2.0])
    assert result["verdict"] == "reproduced"
    assert json.loads((out / "result.json").read_text())["verdict"] == "reproduced"
    assert (said[-1].done, said[-1].total, said[-1].running) == (9, 9, ())
    assert (out / "plot.png").stat().st_size > 2000
    page = (out / "report.html").read_text()
    assert "right: new higher than old: +0.3 (+0.3 to +0.3), reproduced" in page
    assert '"data:image/png' in page

    (out / "new-1" / "done").unlink()
    kept_line = (out / "new-0" / "metrics.jsonl").stat().st_mtime_ns
    made_line = (out / "new-1" / "metrics.jsonl").stat().st_mtime_ns
    again = reproduce(claim, out, seeds=3, jobs=2)
    assert (out / "new-0" / "metrics.jsonl").stat().st_mtime_ns == kept_line
    assert (out / "new-1" / "metrics.jsonl").stat().st_mtime_ns > made_line
    assert again["values"] == result["values"]
    changed = load_claim(claim_of(tmp_path, arms=_with_end(claim_of(tmp_path), "new", "0.9")))
    assert reproduce(changed, out, seeds=1)["values"]["new"]["right"] == pytest.approx([0.9])


def test_arms_are_run_again_when_a_stage_before_them_was(tmp_path):
    claim, out = load_claim(claim_of(tmp_path)), tmp_path / "runs"
    reproduce(claim, out, seeds=1)
    made = (out / "new-0" / "metrics.jsonl").stat().st_mtime_ns
    claim.stages["model"].command.append("another model")
    reproduce(claim, out, seeds=1)
    assert (out / "new-0" / "metrics.jsonl").stat().st_mtime_ns > made


def test_a_stage_once_runs_for_all_seeds_and_scripts_beside_the_claim_are_found(tmp_path):
    stage = {"command": ["{claims}/stage.py", "{out}", "{seed}"], "once": True}
    (tmp_path / "same.py").write_text(ARM.replace('{"seed": seed}', '{"seed": 0}'))
    arm = {"command": ["{claims}/same.py", "{out}", "{seed}", "0.5", "{model}"], "before": ["model"]}
    claim = load_claim(claim_of(tmp_path, stages={"model": stage}, arms={"old": arm, "new": arm}))
    result = reproduce(claim, tmp_path / "runs", seeds=2)
    assert [folder.name for folder in sorted((tmp_path / "runs").iterdir()) if folder.is_dir()] == [
        *("model", "new-0", "new-1", "old-0", "old-1"),
    ]
    assert result["values"]["old"]["right"] == pytest.approx([0.5, 0.51])
    made = (tmp_path / "runs/model/done").stat().st_mtime_ns
    (tmp_path / "stage.py").write_text(textwrap.dedent(STAGE) + "\n# changed\n")
    reproduce(claim, tmp_path / "runs", seeds=2)
    assert (tmp_path / "runs/model/done").stat().st_mtime_ns > made
    with pytest.raises(RecipeError, match=r"arms\.old: an arm runs for each seed, not once"):
        load_claim(claim_of(tmp_path, arms={"old": {"command": ["x"], "once": True}, "new": arm}))
    with pytest.raises(RecipeError, match=r"arms\.model: a stage has that name"):
        load_claim(claim_of(tmp_path, arms={"old": arm, "new": arm, "model": arm}))


def test_seeds_on_which_settings_were_found_are_not_run(tmp_path):
    claim = load_claim(claim_of(tmp_path, tuned_on=[0, 2]))
    assert claim.fingerprint != load_claim(claim_of(tmp_path)).fingerprint
    result = reproduce(claim, tmp_path / "runs", seeds=2)
    assert result["values"]["new"]["right"] == pytest.approx([0.81, 0.83])
    assert sorted(folder.name for folder in (tmp_path / "runs").glob("new-*")) == ["new-1", "new-3"]
    assert "0.83" in (tmp_path / "runs/report.html").read_text()
    assert result["seeds"] == [1, 3]
    assert claim.fingerprint == load_claim(claim_of(tmp_path, tuned_on=[2, 0, 2])).fingerprint
    for wrong in ("zero", 0, [-1]):
        with pytest.raises(RecipeError, match=r"tuned_on: must be a list of seeds, such as \[0\], got "):
            load_claim(claim_of(tmp_path, tuned_on=wrong))
    with pytest.raises(RecipeError, match="expect: must be a list, got 3"):
        load_claim(claim_of(tmp_path, expect=3))


def test_a_measure_may_be_of_some_arms_and_stages_alone(tmp_path):
    measures = {
        "right": {"key": "right", "arms": ["new"]},
        "seed": {"key": "seed", "file": "stage.json", "arms": ["model"]},
    }
    expect = [{"measure": "right", "arm": "new", "than": 0.5}, {"measure": "seed", "arm": "model", "than": -1.0}]
    claim = load_claim(claim_of(tmp_path, measures=measures, expect=expect))
    result = reproduce(claim, tmp_path / "runs", seeds=2)
    assert result["values"] == {"model": {"seed": [0.0, 1.0]}, "new": {"right": pytest.approx([0.8, 0.81])}}
    assert table(claim, result)[1] == [
        ("right", "new", "0.805 (0.741 to 0.869)"),
        ("seed", "model", "0.5 (-5.85 to 6.85)"),
    ]
    page = (tmp_path / "runs/report.html").read_text()
    assert "<tr><td>model, seed 1</td><td></td><td>1.000</td></tr>" in page
    with pytest.raises(RecipeError, match=r"expect\[0\]: 'old' is no arm that has right \(new\)"):
        load_claim(claim_of(tmp_path, measures=measures, expect=[expect[0] | {"arm": "old"}]))
    with pytest.raises(RecipeError, match=r"measures.right.arms: 'older' is no arm"):
        load_claim(claim_of(tmp_path, measures={"right": measures["right"] | {"arms": ["older"]}}))


def test_what_is_no_number_where_it_counts_is_no_measure(tmp_path):
    lines = [{"step": 1, "a": 0.5, "b": None}, {"step": 2, "a": None, "b": None}, {"step": 3, "a": 0.7}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured(Measure("a"), tmp_path) == 0.7
    assert measured(Measure("a", take="first"), tmp_path) == 0.5
    assert measured(Measure("a", window=2), tmp_path) is None  # diverged: the mean of what is left would hide it
    assert measured(Measure("a", take="mean"), tmp_path) is None
    assert measured(Measure("b"), tmp_path) is None


def test_a_level_that_is_never_reached_counts_as_a_step_more_than_the_last(tmp_path):
    lines = [{"step": step, "a": step / 10} for step in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured(Measure("a", take="steps_to", level=0.4), tmp_path) == 4
    assert measured(Measure("a", take="steps_to", level=0.5, window=2), tmp_path) == 6
    assert measured(Measure("a", take="steps_to", level=0.9), tmp_path) == 7


def test_a_claim_that_is_taken_for_a_recipe_says_what_runs_it():
    with pytest.raises(RecipeError, match=r"a claim and not a recipe; `trl-rewards reproduce .*par\.yaml`"):
        Recipe.load(claims()["par"])


def test_variation_is_the_deviation_over_the_mean(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "a": 1.0, "b": null}\n{"step": 2, "a": 3.0, "b": 1.0}\n', encoding="utf-8"
    )
    assert measured(Measure("a", take="variation"), tmp_path) == pytest.approx(2**0.5 / 2)
    assert measured(Measure("b", take="variation"), tmp_path) is None


@pytest.mark.parametrize(
    ("direction", "sign", "line"),
    [("higher", 1, 0.1), ("lower", -1, -0.1), ("not_higher", -1, 0.1), ("not_lower", 1, -0.1)],
)
def test_a_margin_is_an_effect_that_is_needed_or_one_that_does_not_count(direction, sign, line):
    expectation = Expectation("right", "new", "old", direction, by=0.1)
    assert (expectation.sign, expectation.line) == (sign, pytest.approx(line))


def test_a_difference_that_lacks_some_seeds_is_no_more_than_the_direction(tmp_path):
    sooner = Expectation("steps", "new", "old", "lower")
    assert judge(sooner, Interval(-3.0, -4.0, -2.0)) == "reproduced"
    assert judge(sooner, Interval(-3.0, -4.0, -2.0), whole=False) == "direction only"
    diverging = ARM.replace('"loss": 0.0', '"loss": 0.0, "right": None if seed == 1 else end')
    file = claim_of(tmp_path, expect=[{"measure": "right", "arm": "new", "than": "old"}])
    (tmp_path / "arm.py").write_text(diverging)
    claim = load_claim(file)
    result = reproduce(claim, tmp_path / "runs", seeds=3)
    assert result["values"]["new"]["right"] == [0.8, None, 0.8]
    assert effects(result) == ["right: new higher than old: +0.3 (+0.3 to +0.3) (2 of 3 seeds), direction only"]
    assert table(claim, result)[1][1] == ("right", "new", "0.8 (0.8 to 0.8), 2 of 3 seeds")


def _with_end(file, arm, end):
    arms = yaml.safe_load(Path(file).read_text(encoding="utf-8"))["arms"]
    arms[arm]["command"][3] = end
    return arms


def test_a_measure_without_a_number_in_any_seed_is_not_reproduced_and_a_missing_metric_is_said(tmp_path):
    expect = [{"measure": "right", "arm": "new", "than": "old"}]
    (tmp_path / "none.py").write_text(ARM.replace('"right": end * step / 4 + seed / 100', '"right": None'))
    file = claim_of(tmp_path, expect=expect)
    arms = _with_end(file, "old", "0.5")
    arms["old"]["command"][0] = f"{tmp_path}/none.py"
    result = reproduce(load_claim(claim_of(tmp_path, expect=expect, arms=arms)), tmp_path / "runs", seeds=1)
    assert effects(result) == ["right: new higher than old: no seed has both (0 of 1 seeds), not reproduced"]
    claim = load_claim(claim_of(tmp_path, measures={"right": {"key": "wrong"}}, expect=expect))
    with pytest.raises(RewardError, match=r"metrics.jsonl has no 'wrong'; it has loss, right, step"):
        reproduce(claim, tmp_path / "runs", seeds=1)


def test_a_wrong_recipe_is_found_before_anything_runs(tmp_path):
    arms = yaml.safe_load(Path(claim_of(tmp_path)).read_text(encoding="utf-8"))["arms"]
    arms["new"] = {"recipe": "quickstrat"}
    claim = load_claim(claim_of(tmp_path, arms=arms))
    with pytest.raises(RecipeError, match="new: no such file, nor a bundled recipe, did you mean 'quickstart'"):
        reproduce(claim, tmp_path / "runs", seeds=1)
    assert not (tmp_path / "runs").exists()


def test_a_claims_recipe_is_looked_for_beside_it(tmp_path):
    (tmp_path / "mine_recipe.yaml").write_text("trainer: grpo\n")
    arms = yaml.safe_load(Path(claim_of(tmp_path)).read_text(encoding="utf-8"))["arms"]
    arms["new"] = {"recipe": "./mine_recipe.yaml"}
    claim = load_claim(claim_of(tmp_path, arms=arms))
    assert claim.arms["new"].recipe == str(tmp_path / "mine_recipe.yaml")


def test_a_call_that_is_ended_takes_its_runs_along_and_goes_on_when_called_again(tmp_path):
    waiting = ARM.replace("import json", "import time, json", 1).replace("lines = [", "time.sleep(end)\nlines = [", 1)
    file = claim_of(tmp_path, arms=_with_end(claim_of(tmp_path), "new", "60"))
    (tmp_path / "arm.py").write_text(waiting)
    words = ["reproduce", file, "--seeds", "1", "--jobs", "2", "--out", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "trl_rewards.cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done, log = tmp_path / "runs/mine/old-0/done", tmp_path / "runs/mine/new-0/log.txt"
    while not (done.is_file() and log.is_file()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.terminate()
    said, _ = process.communicate(timeout=30)  # in less than the minute that the arm takes
    assert process.returncode == 130, said
    assert "interrupted; the same command goes on" in said
    claim_of(tmp_path)  # the arms as they were, but for their script
    (tmp_path / "arm.py").write_text(waiting)
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.output
    assert "model, seed 0: there already" in again.output


def test_a_folder_that_no_run_made_is_left_alone(tmp_path):
    claim, out = load_claim(claim_of(tmp_path)), tmp_path / "runs"
    (out / "new-0").mkdir(parents=True)
    (out / "new-0" / "thesis.txt").write_text("years of work")
    with pytest.raises(RewardError, match="it is no run's folder; give another --out"):
        reproduce(claim, out, seeds=1)
    assert (out / "new-0" / "thesis.txt").read_text() == "years of work"


def test_only_a_bundled_claims_result_is_kept_and_never_in_place_of_one_with_more_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_rewards.commands.outcome.claims", lambda: {"mine": tmp_path / "mine.yaml"})
    claim = load_claim(claim_of(tmp_path))
    keep(claim, {"seeds": [0, 1, 2, 3, 4], "of": claim.fingerprint})
    with pytest.raises(RewardError, match="has 5 seeds, and this result 1"):
        keep(claim, {"seeds": [0], "of": claim.fingerprint})
    (tmp_path / "other").mkdir()
    with pytest.raises(RewardError, match="only bundled claims have a place"):
        keep(load_claim(claim_of(tmp_path / "other")), {"seeds": [0], "of": claim.fingerprint})


def test_the_words_of_a_claim_may_change_without_its_result(tmp_path):
    first = load_claim(claim_of(tmp_path)).fingerprint
    assert load_claim(claim_of(tmp_path, claim="put better", caveat="known")).fingerprint == first
    expect = [{"measure": "right", "arm": "new", "than": "old", "by": 0.1}]
    assert load_claim(claim_of(tmp_path, expect=expect)).fingerprint != first


def test_a_run_that_fails_is_named_with_its_log_after_the_others_are_done(tmp_path):
    arms = _with_end(claim_of(tmp_path), "old", "no number")
    claim, out = load_claim(claim_of(tmp_path, arms=arms)), tmp_path / "runs"
    with pytest.raises(RewardError, match=r"failed: old, seed 0 \(see .*old-0/log.txt\)"):
        reproduce(claim, out, seeds=1)
    assert "could not convert string to float" in (out / "old-0" / "log.txt").read_text()
    assert (out / "new-0" / "done").is_file()


def test_a_bad_claim_is_refused_with_all_that_is_wrong(tmp_path):
    file = claim_of(
        tmp_path,
        arms={"old": {"command": ["x"], "before": ["nothing"]}, "new": {"recipe": "quickstart", "command": ["x"]}},
        measures={"right": {"key": "right", "take": "best"}, "steps": {"key": "right", "take": "steps_to"}},
        expect=[{"measure": "length", "arm": "newer", "than": "old", "direction": "better"}, {"arm": "old"}],
        wordy=True,
    )
    with pytest.raises(RecipeError) as caught:
        load_claim(file)
    said = str(caught.value)
    for part in (
        "arms.old: before names 'nothing'",
        "arms.new: give recipe or command",
        "measures.right.take: must be",
        "measures.steps: level goes with",
        "expect[0].direction: must be",
        "expect[1]: measure is required",
        "wordy: unknown key",
    ):
        assert part in said, said
    with pytest.raises(RecipeError, match="no such file, nor a bundled claim"):
        load_claim("nobody")


def check_recipes(claim):
    for stage in (*claim.stages.values(), *claim.arms.values()):
        if stage.recipe:
            folder = str(Path(__file__).parents[1] / "recipes" / "claims")
            filled = json.loads(json.dumps(stage.overrides).replace('"{seed}"', "0").replace("{claims}", folder))
            Recipe.load(stage.recipe, filled, check_trl=False)


def test_bundled_claims_are_whole_and_their_recipes_take_their_overrides():
    assert claims()
    for name in claims():
        claim = load_claim(name)
        check_recipes(claim)
        if claim.full:
            Recipe.load(claim.full, check_trl=False)
        result = kept(name)
        assert result is None or result["of"] == claim.fingerprint, f"{name} is not what was run; run it again"


def test_the_guides_claim_is_one(tmp_path):
    guide = (Path(__file__).parents[1] / "docs" / "claims.md").read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)[0])
    claim = load_claim(str(file))
    assert list(claim.arms) == ["plain", "clipped"]
    check_recipes(claim)


def test_the_command_lists_claims_and_prints_a_table_and_a_verdict(tmp_path):
    listed = CliRunner().invoke(app, ["reproduce"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines()] == ["claim", *claims()]  # a row a line
    assert "](http" not in listed.output
    done = CliRunner().invoke(
        app, ["reproduce", claim_of(tmp_path), "--seeds", "2", "--jobs", "2", "--out", str(tmp_path / "runs")]
    )
    assert done.exit_code == 0, done.output
    assert "new is better than old" in done.output
    assert "right: new higher than old: +0.3 (+0.3 to +0.3), reproduced" in done.output
    assert "0/6 model, seed 0 begins" in done.output
    assert "6/6 new, seed 1:" in done.output or "6/6 old, seed 1:" in done.output
    assert (tmp_path / "runs/mine/plot.png").is_file()
    assert (tmp_path / "runs/mine/report.html").is_file()


@pytest.mark.slow
def test_a_recipe_runs_as_an_arm_with_its_overrides_and_seed(tmp_path):
    overrides = {"max_steps": 1, "eval_on_start": False, "eval_strategy": "no", "per_device_train_batch_size": 16}
    arm = {"recipe": "quickstart", "overrides": {**overrides, "logging_steps": 1, "rewards.length.weight": 0.5}}
    measures = {"reward": {"key": "reward"}}
    expect = [{"measure": "reward", "arm": "only", "than": 0.0}]
    claim = load_claim(claim_of(tmp_path, stages={}, arms={"only": arm}, measures=measures, expect=expect))
    result = reproduce(claim, tmp_path / "runs", seeds=1)
    assert 0 < result["values"]["only"]["reward"][0] < 3
    saved = yaml.safe_load((tmp_path / "runs/only-0/recipe.yaml").read_text())
    assert (saved["seed"], saved["rewards"][3]["weight"], saved["max_steps"]) == (0, 0.5, 1)
