"""Alarms are checked with the recipe, counted over logs, and end a run that can be resumed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml

from trl_rewards import Recipe, RecipeError
from trl_rewards.alarms import Alarm, Count
from trl_rewards.errors import AlarmStop
from trl_rewards.report import AlarmWatch, RunRecorder, page
from trl_rewards.report.run import read_lines, read_run
from trl_rewards.train import STOPPED, main, train

NAN = float("nan")


def fires(alarm: Alarm, values: list[float]) -> list[int]:
    """Places of the values at which there is something to say."""
    count = Count(alarm)
    return [place for place, value in enumerate(values) if count.look(value)]


def test_a_bound_is_crossed_for_so_many_logs_in_a_row_and_said_once():
    assert fires(Alarm("kl", "above", 1.0, 2), [2.0, 1.0, 2.0, 2.0, 2.0, 0.5, 2.0, 2.0]) == [3, 7]
    assert fires(Alarm("kl", "below", 1.0), [1.0, 0.9, 0.8]) == [1]


def test_a_fall_is_from_the_highest_mean_of_as_many_logs():
    # Means of two: 0.5, 0.6, 0.6, 0.4. Of them 0.6 is the highest: 0.3 and 0.2 are 0.3 and more below it.
    assert fires(Alarm("gold", "falls", 0.3, 2), [0.4, 0.6, 0.6, 0.3, 0.2, 0.2]) == [4]
    assert fires(Alarm("gold", "falls", 0.3), [0.4, 0.6, 0.35, 0.25]) == [3]


def test_a_rise_is_from_the_lowest():
    assert fires(Alarm("length", "rises", 50.0), [100.0, 90.0, 139.0, 140.0]) == [3]


def test_after_a_stop_the_count_begins_anew():
    assert fires(Alarm("kl", "above", 1.0, 2, "stop"), [2.0] * 5) == [1, 3]


def test_infinity_is_out_of_bounds_and_no_level_to_compare_with():
    inf = float("inf")
    assert fires(Alarm("kl", "above", 0.5), [0.1, inf, 0.1]) == [1]
    assert fires(Alarm("kl", "rises", 0.5), [0.1, inf, 0.2, 0.3]) == [1]
    assert fires(Alarm("reward", "falls", 0.5), [inf, 0.1, 0.2, -0.5]) == [3]
    watch = AlarmWatch([Alarm("kl", "above", 0.5, then="stop")], RunRecorder(None))
    assert [said for _, said in watch._look({"kl": inf})] == ["kl above 0.5: it is inf"]
    assert watch._look({"kl": float("nan")}) == watch._look({"kl": None}) == []


def problems(*alarms, **keys) -> list[str]:
    recipe = {"rewards": ["exact_match", "repetition"], "alarms": list(alarms)} | keys
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(recipe, check_trl=False)
    return caught.value.problems


def test_every_problem_of_every_alarm_is_said_at_once():
    found = problems(
        {"metric": "kl", "then": "stopp", "abov": 1},
        {"metric": "rewards/exact_mach/mean", "falls": -1, "below": "a", "for": 0},
        {"above": 1},
        "kl",
        rewards=["exact_match", "repetitoin"],
    )
    wanted = (
        "alarms[0]: unknown key 'abov', did you mean 'above'?",
        "alarms[0]: one of above, below, rises, falls is needed, got none",
        "alarms[0].then: must be log or mark or stop, got 'stopp', did you mean 'stop'?",
        "alarms[1]: one of above, below, rises, falls is needed, got below and falls",
        "alarms[1].metric: no source 'exact_mach', did you mean 'exact_match'?",
        "alarms[1].falls: by how much, above 0, got -1",
        "alarms[1].below: must be a number, got 'a'",
        "alarms[1].for: must be a whole number of logs from 1, got 0",
        "alarms[2].metric: a metric's name is needed",
        "alarms[3]: must be a mapping",
        "rewards[1].use: ",
    )
    for text in wanted:
        assert any(problem.startswith(text) for problem in found), (text, found)


def test_alarms_are_a_list_and_go_with_every_trainer():
    assert problems(alarms={"metric": "kl"})[0].startswith("alarms: must be a list")
    for trainer in ("grpo", "rloo", "ppo", "dpo", "reward", "kto"):
        rewards = {} if trainer in ("reward", "kto") else {"rewards": ["repetition"]}
        alarm = {"metric": "loss", "above": 9, "for": 3, "then": "mark"}
        recipe = Recipe.parse({"trainer": trainer, "alarms": [alarm], **rewards}, check_trl=False)
        assert recipe.alarms == [Alarm("loss", "above", 9.0, 3, "mark")]


def test_a_stop_and_a_strategy_that_keeps_only_the_best_do_not_go_together():
    alarm = {"metric": "kl", "above": 1, "then": "stop"}
    keys = {"output_dir": "o", "bf16": False, "use_cpu": True, "save_strategy": "best", "eval_strategy": "steps"}
    with pytest.raises(RecipeError, match="save_strategy: best keeps no checkpoint of the step"):
        Recipe.parse({"rewards": ["repetition"], "alarms": [alarm], **keys})


def watch(folder, *alarms, step=0):
    """Recorder and alarms of a run that begins, or goes on at `step`; returns what takes a log and the watch."""
    recorder = RunRecorder(SimpleNamespace(last_batch=None, last_advantages=None))
    watching = AlarmWatch(alarms, recorder)
    args, control = SimpleNamespace(output_dir=str(folder)), SimpleNamespace(should_save=False)
    control.should_training_stop = False

    def state(step):
        return SimpleNamespace(global_step=step, is_world_process_zero=True, log_history=[])

    def log(step, **logs):
        for callback in (recorder, watching):
            callback.on_log(args, state(step), control, logs=logs)
        return control.should_training_stop

    for callback in (recorder, watching):
        callback.on_train_begin(args, state(step), control)
    return log, watching


def test_a_log_warns_and_a_mark_is_written_among_the_metrics(tmp_path, caplog):
    log, watching = watch(tmp_path, Alarm("kl", "above", 1.0), Alarm("kl", "above", 2.0, then="mark"))
    assert not log(1, kl=1.5)
    assert not log(2, kl=2.5)
    assert watching.stopped is None
    said = [record.message for record in caplog.records]
    assert said == [
        "alarm at step 1: kl above 1: it is 1.5",
        "alarm at step 2: kl above 2: it is 2.5",
    ]
    lines, _ = read_lines(tmp_path / "metrics.jsonl")
    assert lines[-1] == {"step": 2, "alarm": "kl above 2: it is 2.5", "metric": "kl", "then": "mark"}
    assert len(lines) == 3


def test_values_that_are_none_or_absent_do_not_count(tmp_path):
    log, _ = watch(tmp_path, Alarm("kl", "above", 1.0, 2, "stop"))
    assert [log(1, kl=2.0), log(2, kl=None), log(3, kl=NAN), log(4, loss=0.1), log(5, kl=2.0)] == [False] * 4 + [True]


def test_a_resumed_run_counts_on_where_it_was(tmp_path):
    alarm = Alarm("kl", "above", 1.0, 3, "stop")
    log, _ = watch(tmp_path, alarm)
    assert [log(step, kl=2.0) for step in (1, 2)] == [False, False]
    log, watching = watch(tmp_path, alarm, step=2)
    assert log(3, kl=2.0)
    assert watching.stopped == "alarm: kl above 1 for 3 logs: it is 2, at step 3"
    log, _ = watch(tmp_path, alarm, step=1)  # what was logged after the step that it resumes from does not count
    assert [log(step, kl=2.0) for step in (2, 3)] == [False, True]


def test_a_metric_that_is_never_logged_is_asked_after(tmp_path, caplog):
    alarms = [Alarm("completion/repetition", "above", 0.3), Alarm("eval_reward", "below", 0.0)]
    log, watching = watch(tmp_path, *alarms)
    for step in range(1, 6):
        log(step, loss=0.1, **{"completions/repetition": 0.1})
    assert [record.message for record in caplog.records] == [
        "alarms: 'completion/repetition' is in none of the first 5 logs, did you mean 'completions/repetition': "
        "its alarm has nothing to watch"
    ]
    state = SimpleNamespace(is_world_process_zero=True)
    watching.on_train_end(None, state, None)
    assert "'eval_reward' was in no log" in caplog.records[-1].message


def test_what_an_alarm_says_is_escaped_on_the_page(tmp_path):
    evil = "<script>alert(1)</script>"
    lines = [{"step": 1, evil: 2.0, "loss": 0.1}, {"step": 1, "alarm": f"{evil} above 1", "metric": evil}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = page._page(read_run(tmp_path), [])
    assert "<script" not in found
    assert "&lt;script&gt;alert(1)&lt;/script&gt; above 1" in found


@pytest.mark.slow
def test_an_alarm_ends_a_run_with_a_checkpoint_and_the_run_can_go_on(policy_path, tmp_path, caplog, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in ("a", "b", "c", "d")))
    out = tmp_path / "out"
    recipe = {
        "model_name_or_path": policy_path,
        "dataset_name": str(data),
        "output_dir": str(out),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 6,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "rewards": [{"use": "length", "with": {"soft_limit": 1, "hard_limit": 4}}, {"use": "repetition", "weight": 0}],
        "alarms": [
            {"metric": "rewards/repetition/weight", "below": 0.5, "for": 2, "then": "mark"},
            {"metric": "completions/mean_length", "above": 0, "for": 3, "then": "stop"},
            {"metric": "no_such_metric", "above": 0},
        ],
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    assert main(["--config", str(file)]) == STOPPED
    said = capsys.readouterr().err
    assert "alarm: completions/mean_length above 0 for 3 logs" in said
    assert "at step 3" in said
    assert "--resume_from_checkpoint true" in said
    assert (out / "checkpoint-3" / "trainer_state.json").is_file()
    assert (out / "model.safetensors").is_file()
    assert "'no_such_metric' was in no log" in caplog.text
    lines, _ = read_lines(out / "metrics.jsonl")
    assert [(line["step"], line["then"]) for line in lines if "alarm" in line] == [(2, "mark"), (3, "stop")]
    logged = next(line for line in lines if "loss" in line)
    assert {"completions/repetition", "rewards/repetition/mean"} <= set(logged)
    assert "repetition/weight below 0.5" in (out / "report.html").read_text(encoding="utf-8")

    with pytest.raises(AlarmStop, match="at step 6"):  # it counts from 0 again, and has fired at step 3
        train(str(file), ["--resume_from_checkpoint", "true"])
    lines, _ = read_lines(out / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [(line["step"], line["then"]) for line in lines if "alarm" in line] == [
        *((2, "mark"), (3, "stop"), (6, "stop")),
    ]
