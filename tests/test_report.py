"""The recorder keeps what happened, the page shows it safely, and the terminal says it in lines."""

import io
import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from trl_rewards.components import RewardBatch, Scores, Status
from trl_rewards.console import Column, LiveTable, lay_out, source_names, tame_logging
from trl_rewards.report import RunRecorder, figures, page, write_report
from trl_rewards.report.drawing import draw
from trl_rewards.report.page import sample_pairs
from trl_rewards.report.run import curve, read_lines, read_run, running_mean
from trl_rewards.samples import Samples

NAN = float("nan")


def logs(step=1, sources=("bleuberi", "length"), **more):
    """What GRPOTrainer logs at a step, with the pipeline's metrics."""
    found = {
        "loss": 0.01,
        "grad_norm": 0.5,
        "learning_rate": 1e-6,
        "reward": 0.1 * step,
        "reward_std": 0.2,
        "kl": 0.001,
    }
    found |= {"rewards/total/mean": 0.1 * step, "rewards/total/std": 0.2, "rewards/total/missing": 0.0}
    found |= {"frac_reward_zero_std": 0.25, "completions/mean_length": 100.0, "completions/clipped_ratio": 0.5}
    for name in sources:
        found |= {f"rewards/{name}/mean": 0.01 * step, f"rewards/{name}/std": 0.1, f"rewards/{name}/missing": 0.0}
        found |= {f"rewards/{name}/failed": 0.0, f"rewards/{name}/weight": 1.0, f"rewards/{name}/seconds": 0.1}
    return found | more


def evaluation(step=1):
    return {f"eval_{key}": value for key, value in logs(step).items()}


def row(step=1, prompt="p", completion="c", mode="train", **more):
    sample = {"step": step, "mode": mode, "prompt": prompt, "completion": completion, "scores": {"bleuberi": 0.5}}
    return sample | {"status": {"bleuberi": "ok"}, "total": 0.5, "advantage": 1.0} | more


def write(folder, metrics=(), samples=()):
    """A run's folder from (step, logs) and rows."""
    lines = [json.dumps({"step": step, **found}) for step, found in metrics]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def html(folder):
    return write_report(folder).read_text(encoding="utf-8")


def words(folder):
    """The page without its plots, which take a second."""
    return page._page(read_run(folder), [])


def batch():
    """Four rows, two prompts, two sources; row 1 is a timeout of `b`, row 2 has nothing to say at all."""
    return RewardBatch(
        rewards=torch.tensor([1.0, 2.0, NAN, 4.0]),
        scores=Scores(
            names=("a", "b"),
            values=torch.tensor([[1.0, 0.5], [2.0, NAN], [NAN, NAN], [4.0, 0.5]]),
            status=torch.tensor(
                [
                    [Status.OK, Status.OK],
                    [Status.OK, Status.TIMEOUT],
                    [Status.ABSTAINED, Status.FAILED],
                    [Status.OK, Status.OK],
                ],
                dtype=torch.uint8,
            ),
            weights=torch.ones(2),
            group_size=2,
        ),
        samples=Samples(
            prompts=["p", "p", [{"role": "user", "content": "q"}], [{"role": "user", "content": "q"}]],
            completions=["w", "x", "y", [{"role": "assistant", "content": "z"}]],
        ),
    )


def trainer_of(last_batch=None, last_advantages=None):
    return SimpleNamespace(last_batch=last_batch, last_advantages=last_advantages)


def at(step, max_steps=10, main=True):
    return SimpleNamespace(global_step=step, max_steps=max_steps, is_world_process_zero=main, log_history=[])


def args_for(folder):
    return SimpleNamespace(output_dir=str(folder))


def test_a_log_becomes_one_line_of_valid_json_with_nan_as_null(tmp_path):
    recorder = RunRecorder(trainer_of())
    recorder.on_log(
        args_for(tmp_path), at(3), None, logs={"reward": NAN, "kl": float("inf"), "loss": 0.5, "none": None}
    )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 3, "reward": None, "kl": None, "loss": 0.5, "none": None}
    assert "NaN" not in text
    assert "Infinity" not in text


def test_tensors_in_logs_are_kept_as_numbers(tmp_path):
    recorder = RunRecorder(trainer_of())
    recorder.on_log(args_for(tmp_path), at(1), None, logs={"loss": torch.tensor(0.5), "many": torch.zeros(2)})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["loss"] == 0.5
    assert isinstance(line["many"], str)


def test_rows_of_the_last_batch_are_kept_with_scores_and_reasons(tmp_path):
    recorder = RunRecorder(trainer_of(batch(), torch.tensor([-1.0, 1.0, 0.0, 0.5])))
    recorder.on_log(args_for(tmp_path), at(3), None, logs=logs())
    lines, _ = read_lines(tmp_path / "samples.jsonl")
    assert len(lines) == 4
    assert lines[1] == {
        "step": 3,
        "mode": "train",
        "prompt": "p",
        "completion": "x",
        "scores": {"a": 2.0, "b": None},
        "status": {"a": "ok", "b": "timeout"},
        "total": 2.0,
        "advantage": 1.0,
    }
    assert lines[2]["status"] == {"a": "abstained", "b": "failed"}
    assert lines[2]["total"] is None
    assert (lines[3]["prompt"], lines[3]["completion"]) == ("q", "z")


def test_fewer_rows_than_the_batch_are_spread_over_its_prompts(tmp_path):
    RunRecorder(trainer_of(batch()), rows=2).on_log(args_for(tmp_path), at(1), None, logs=logs())
    lines, _ = read_lines(tmp_path / "samples.jsonl")
    assert [line["prompt"] for line in lines] == ["p", "q"]
    assert [line["advantage"] for line in lines] == [None, None]


def test_an_evaluation_is_marked_and_a_batch_is_kept_once(tmp_path):
    trainer = trainer_of(batch())
    recorder = RunRecorder(trainer)
    recorder.on_log(args_for(tmp_path), at(1), None, logs=evaluation())
    recorder.on_log(args_for(tmp_path), at(2), None, logs=logs(2))
    lines, _ = read_lines(tmp_path / "samples.jsonl")
    assert [line["mode"] for line in lines] == ["eval"] * 4
    trainer.last_batch = batch()
    recorder.on_log(args_for(tmp_path), at(3), None, logs=logs(3))
    lines, _ = read_lines(tmp_path / "samples.jsonl")
    assert [line["step"] for line in lines] == [1] * 4 + [3] * 4


def test_a_resumed_run_drops_what_came_after_the_step_it_resumes_from(tmp_path):
    write(tmp_path, [(step, logs(step)) for step in (2, 4, 6)], [row(2), row(6)])
    RunRecorder(trainer_of()).on_train_begin(args_for(tmp_path), at(4), None)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")[0]] == [2, 4]
    assert [line["step"] for line in read_lines(tmp_path / "samples.jsonl")[0]] == [2]


def test_a_fresh_run_starts_fresh_files(tmp_path):
    write(tmp_path, [(2, logs())], [row(2)])
    RunRecorder(trainer_of()).on_train_begin(args_for(tmp_path), at(0), None)
    assert not list(tmp_path.iterdir())


def test_only_the_main_process_writes(tmp_path):
    recorder, state = RunRecorder(trainer_of(batch())), at(1, main=False)
    recorder.on_train_begin(args_for(tmp_path / "run"), state, None)
    recorder.on_log(args_for(tmp_path / "run"), state, None, logs=logs())
    recorder.on_train_end(args_for(tmp_path / "run"), state, None)
    assert not (tmp_path / "run").exists()


def test_the_end_of_training_writes_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "plots", lambda run: [])
    recorder = RunRecorder(trainer_of(batch()))
    recorder.on_train_begin(args_for(tmp_path), at(0), None)
    recorder.on_log(args_for(tmp_path), at(1), None, logs=logs())
    recorder.on_train_end(args_for(tmp_path), at(1), None)
    assert (tmp_path / "report.html").exists()


def test_a_plot_that_breaks_does_not_break_a_finished_run(tmp_path, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(page, "draw", broken)
    write(tmp_path, [(1, logs())])
    with caplog.at_level(logging.WARNING, logger="trl_rewards.report.recording"):
        RunRecorder(trainer_of()).on_train_end(args_for(tmp_path), at(1), None)
    assert "no report was written" in caplog.text


def test_the_page_holds_plots_table_signature_recipe_and_completions(tmp_path):
    write(tmp_path, [(1, logs()), (1, evaluation()), (9, logs(9)), (9, evaluation(9))], [row(1), row(9)])
    (tmp_path / "signature.txt").write_text("the signature\n")
    (tmp_path / "recipe.yaml").write_text("rewards: [bleuberi]\n")
    found = html(tmp_path)
    for text in ("the signature", "rewards: [bleuberi]", "Total reward", "eval bleuberi", "step 9", "+0.800"):
        assert text in found, text
    names = {file.stem for file in (tmp_path / "plots").glob("*.png")}
    assert names == {
        *("reward", "sources", "advantages", "zero_variance", "length", "policy", "optimiser", "time"),
    }
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (tmp_path / "plots").iterdir())


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path):
    found = html(write(tmp_path, [(1, logs())], [row(completion="http://example.com/a.png")]))
    fetched = re.findall(r"""\b(?:src|href|srcset|action)\s*=\s*(.{,23})""", found)
    assert fetched
    assert set(fetched) == {'"data:image/png;base64,'}
    assert not re.search(r"<(script|link|iframe|object|embed|form)\b|@import|url\(", found)
    assert "default-src 'none'" in found


def test_what_a_model_wrote_is_escaped_everywhere(tmp_path):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    sample = row(1, prompt=evil, completion=evil, scores={evil: None}, status={evil: evil})
    write(tmp_path, [(1, logs(sources=(evil,)) | {f"rewards/{evil}/failed": 0.5})], [sample])
    (tmp_path / "signature.txt").write_text(evil)
    (tmp_path / "recipe.yaml").write_text(evil)
    found = words(tmp_path)
    assert "<script" not in found
    assert "<img src=x" not in found
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in found


def test_names_that_matplotlib_would_read_as_markup_are_plain_text(tmp_path):
    write(tmp_path, [(1, logs(sources=("$x_{", "_hidden")))])
    assert all(draw(plot) for plot in figures.plots(read_run(tmp_path)) if plot.name in ("sources", "time"))


def test_a_lone_surrogate_in_a_completion_does_not_stop_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "plots", lambda run: [])
    assert "a?b" in html(write(tmp_path, [(1, logs())], [row(completion="a\ud800b")]))


def test_missing_files_are_named_on_the_words(tmp_path):
    found = words(write(tmp_path, [(1, logs())]))
    for name in ("samples.jsonl", "signature.txt", "recipe.yaml"):
        assert f"There is no {name}" in found


def test_no_metrics_at_all_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="give the output_dir of a run that logged"):
        write_report(tmp_path)


def test_without_metrics_the_newest_checkpoint_is_read(tmp_path):
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        history = [{"step": 1, **logs()}, {"step": step, **logs(step, reward=NAN)}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert "checkpoint-10/trainer_state.json" in words(tmp_path)


def test_null_and_nan_values_are_left_out(tmp_path):
    lines = [(1, logs(reward=None)), (2, logs(reward=NAN)), (3, logs(reward=0.5)), (4, logs(reward_std=None))]
    write(tmp_path, lines, [row(scores={"bleuberi": None}, total=None, advantage=None)])
    assert curve(read_run(tmp_path), "reward") == ([3, 4], [0.5, 0.1])
    assert "<td>0.500</td>" in words(tmp_path)


def test_a_metric_without_any_value_has_no_plot(tmp_path):
    html(write(tmp_path, [(1, {"loss": 0.1, "reward": None, "kl": NAN})]))
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["optimiser.png"]


def test_a_line_that_a_killed_run_left_half_written_is_counted(tmp_path):
    write(tmp_path, [(1, logs()), (2, logs(2))])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    assert "1 line(s) of metrics.jsonl could not be read" in words(tmp_path)


def test_one_logged_step_is_enough(tmp_path):
    assert "First and last values" in html(write(tmp_path, [(1, logs())], [row(1)]))


def test_twenty_sources_each_get_a_panel_and_a_row(tmp_path):
    names = [f"source_{index}" for index in range(20)]
    write(tmp_path, [(1, logs(sources=names)), (2, logs(2, sources=names))])
    found = words(tmp_path)
    assert all(f"<th>{name}</th>" in found for name in names)
    (sources,) = [plot for plot in figures.plots(read_run(tmp_path)) if plot.name == "sources"]
    assert [panel.title for panel in sources.panels] == names
    assert draw(sources)


def test_failures_are_said_in_words_and_drawn(tmp_path):
    failing = logs(7, **{"rewards/bleuberi/failed": 0.5, "rewards/bleuberi/missing": 0.75})
    write(tmp_path, [(1, logs()), (7, failing)])
    assert "<b>bleuberi</b> failed on 25.0% of the rows over the run, and on 50.0% at step 7" in words(tmp_path)
    (holes,) = [plot for plot in figures.plots(read_run(tmp_path)) if plot.name == "holes"]
    assert {panel.title: panel.lines[0].curve.values for panel in holes.panels} == {
        "abstained": [0.0, 0.25],
        "failed or timed out": [0.0, 0.5],
    }


def test_a_run_without_holes_has_no_plot_of_them_and_says_so(tmp_path):
    assert "No source failed on any row" in words(write(tmp_path, [(1, logs())]))
    assert "holes" not in [plot.name for plot in figures.plots(read_run(tmp_path))]


def test_a_preference_run_without_rewards_gets_a_page(tmp_path):
    lines = [(step, {"loss": 0.7 / step, "accuracy": 0.5, "margin": 0.1 * step}) for step in (1, 2)]
    html(write(tmp_path, lines))
    assert {file.stem for file in (tmp_path / "plots").iterdir()} == {"optimiser", "preferences"}


def test_the_same_prompt_early_and_late_is_shown_side_by_side():
    rows = [row(1, "p", "before"), row(1, "other", "x"), row(10, "p", "after"), row(10, "new", "y")]
    assert sample_pairs(rows) == ([(rows[0], rows[2])], True)


def test_evaluation_prompts_are_shown_before_training_prompts():
    rows = [row(1), row(10), row(1, "q", mode="eval"), row(10, "q", mode="eval")]
    pairs, same = sample_pairs(rows)
    assert same
    assert [early["mode"] for early, _ in pairs] == ["eval", "train"]


def test_without_a_common_prompt_the_first_and_last_steps_are_shown():
    rows = [row(1, "a"), row(5, "b"), row(9, "c")]
    assert sample_pairs(rows) == ([(rows[0], rows[2])], False)
    assert sample_pairs([]) == ([], False)


def test_the_running_mean_is_centred_and_shorter_at_the_ends():
    assert running_mean([1.0, 2.0, 6.0, 4.0], 3) == [1.5, 3.0, 4.0, 5.0]
    assert running_mean([1.0, 2.0], 1) == [1.0, 2.0]


def table(sources=("bleuberi", "length"), width=140, terminal=False):
    file = io.StringIO()
    return LiveTable(sources, "tiny with GRPOTrainer", Console(file=file, width=width, force_terminal=terminal)), file


def run_table(live, lines, max_steps=10):
    live.on_train_begin(args_for("out"), at(0, max_steps), None)
    for step, found in lines:
        live.on_log(args_for("out"), at(step, max_steps), None, logs=found)
    live.on_train_end(args_for("out"), at(lines[-1][0], max_steps), None)


def test_a_log_is_one_aligned_line_with_every_source():
    live, file = table()
    run_table(live, [(1, logs()), (2, logs(2))])
    lines = file.getvalue().splitlines()
    header = next(line for line in lines if line.startswith("step "))
    rows = [line for line in lines if re.match(r"[12]/10", line)]
    assert header.split()[:8] == ["step", "elapsed", "left", "reward", "bleuberi", "length", "tokens", "kl"]
    assert [line.split()[3:6] for line in rows] == [["0.100", "0.010", "0.010"], ["0.200", "0.020", "0.020"]]
    assert {len(line) for line in rows} == {len(header)}
    assert len(header) <= 140


def test_the_header_says_what_is_trained(capsys):
    LiveTable(["bleuberi"], "tiny with GRPOTrainer").on_train_begin(args_for("out"), at(4), None)
    said = capsys.readouterr().out
    for text in ("tiny with GRPOTrainer", "bleuberi", "resumed at step 4 of 10", "out"):
        assert text in said


def test_failures_stand_out_on_every_line_and_steady_abstentions_once():
    live, file = table()
    failing = {"rewards/bleuberi/failed": 0.125, "rewards/bleuberi/missing": 0.125, "rewards/length/missing": 0.25}
    run_table(live, [(1, logs(**failing)), (2, logs(2, **failing)), (3, logs(3))])
    said, closing = file.getvalue().split("done:" if "done:" in file.getvalue() else "stopped:")
    assert said.count("!! bleuberi failed 12.5%") == 2
    assert said.count("! length abstained 25.0%") == 1
    assert "over the run: bleuberi failed 8.3%" in closing


def test_no_holes_no_note():
    live, file = table()
    run_table(live, [(1, logs())])
    assert "!" not in file.getvalue()
    assert "over the run" not in file.getvalue()


def test_failures_are_red_in_a_terminal_and_plain_elsewhere():
    failing = [(1, logs(**{"rewards/bleuberi/failed": 0.5, "rewards/bleuberi/missing": 0.5}))]
    live, file = table(terminal=True)
    run_table(live, failing)
    assert "\x1b[1;31m  !! bleuberi failed" in file.getvalue()
    live, file = table(terminal=False)
    run_table(live, failing)
    assert "\x1b" not in file.getvalue()
    assert file.getvalue().isascii()


def test_an_evaluation_has_its_own_labelled_line_and_closing_values():
    live, file = table()
    run_table(live, [(1, logs()), (1, evaluation(1)), (10, logs(10)), (10, evaluation(10))])
    assert "eval 10" in file.getvalue()
    assert re.search(r"^reward +0.100 +1.000 +\+0.900$", file.getvalue(), re.MULTILINE)
    assert re.search(r"^eval bleuberi +0.010 +0.100 +\+0.090$", file.getvalue(), re.MULTILINE)


@pytest.mark.parametrize("width", [100, 160])
def test_many_sources_wrap_and_all_are_printed(width):
    names = [f"source_number_{index:02}" for index in range(20)]
    live, file = table(names, width)
    run_table(live, [(1, logs(sources=names))])
    body = file.getvalue().split("sources")[1].split("\n", 1)[1].split("stopped:")[0]
    assert all(name in body for name in names)
    assert max(len(line) for line in body.splitlines()) <= width


def test_the_least_important_columns_go_first_when_a_line_is_full():
    columns = [Column("a", "a", droppable=False), Column("b", "b"), Column("c", "c")]
    assert lay_out(columns, 18) == [columns[:2]]
    assert lay_out(columns, 5) == [columns[:1]]
    assert lay_out([columns[0], columns[0]], 9) == [[columns[0]], [columns[0]]]


def test_the_header_comes_back_every_twenty_lines():
    live, file = table()
    run_table(live, [(step, logs(step)) for step in range(1, 42)], max_steps=50)
    assert len(re.findall(r"^step ", file.getvalue(), re.MULTILINE)) == 3


def test_missing_values_are_dashes():
    live, file = table()
    run_table(live, [(1, logs()), (2, logs(2, reward=None, **{"rewards/length/mean": NAN}))])
    (line,) = [line for line in file.getvalue().splitlines() if line.startswith("2/10")]
    assert line.split()[3:6] == ["-", "0.020", "-"]


def test_the_last_log_of_transformers_is_no_step():
    live, file = table()
    run_table(live, [(10, logs(10)), (10, {"train_runtime": 3.0, "train_loss": 0.1, "epoch": 1.0})])
    assert file.getvalue().count("10/10") == 1


def test_other_processes_print_nothing():
    live, file = table()
    state = at(1, main=False)
    live.on_train_begin(args_for("out"), state, None)
    live.on_log(args_for("out"), state, None, logs=logs())
    live.on_train_end(args_for("out"), state, None)
    assert file.getvalue() == ""


def test_sources_are_found_in_the_logs_and_total_is_none_of_them():
    assert source_names(logs()) == ["bleuberi", "length"]
    live, file = table(sources=())
    run_table(live, [(1, logs())])
    assert "bleuberi" in file.getvalue()


def test_tame_logging_takes_out_the_progress_bar_and_leaves_integrations():
    from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, PrinterCallback, ProgressCallback

    class Integration(DefaultFlowCallback):
        pass

    handler = CallbackHandler([Integration(), PrinterCallback(), ProgressCallback()], None, None, None, None)
    trainer = SimpleNamespace(
        remove_callback=handler.remove_callback,
        add_callback=handler.add_callback,
        pipeline=SimpleNamespace(names=["bleuberi"]),
        model=SimpleNamespace(config=SimpleNamespace(name_or_path="tiny")),
    )
    live = tame_logging(trainer)
    assert [type(callback) for callback in handler.callbacks] == [Integration, LiveTable]
    assert handler.callbacks[-1] is live


def test_how_scores_came_about_is_kept_and_shown(tmp_path):
    told = [{"b": {"steps": [{"tool": "calculator", "observation": "<b>7</b>"}]}}, {}, {}, {}]
    recorder = RunRecorder(trainer_of(batch()._replace(traces=told)))
    recorder.on_log(args_for(tmp_path), at(1), None, logs=logs())
    lines, _ = read_lines(tmp_path / "samples.jsonl")
    assert [line["traces"] for line in lines] == told
    shown = words(write(tmp_path, [(1, logs())], lines))
    assert "how b came to its score" in shown
    assert "tool: calculator" in shown
    assert "&lt;b&gt;7&lt;/b&gt;" in shown
    assert shown.count("<details>") == 2  # of one row, as the first and the last of the run
