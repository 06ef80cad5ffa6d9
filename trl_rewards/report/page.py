"""The page of a run: self-contained HTML, with nothing in it that runs or is fetched."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trl_rewards.report.drawing import SMOOTH_FROM, draw, theme
from trl_rewards.report.evidence import ENOUGH, findings
from trl_rewards.report.figures import Plot, plots
from trl_rewards.report.reliability import CAPTION, draw_reliability, used_calibrations
from trl_rewards.report.run import Run, alarms, curve, finite, read_run, watched
from trl_rewards.report.style import STYLE

PAGE = "report.html"
SHOWN_PROMPTS = 4
SHOWN_CHARACTERS = 3000
"""Longer prompts and completions are cut on the page; samples.jsonl has them whole."""


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` and `plots/*.png` into the folder of a run, from what the run left there.

    The page needs no other file and no network. ValueError if the run left no metrics.
    """
    run = read_run(Path(run_dir))
    folder = run.folder / "plots"
    folder.mkdir(exist_ok=True)
    figures = []
    for plot in _fill_rows(plots(run)):
        light, dark = draw(plot), draw(plot, dark=True)
        (folder / f"{plot.name}.png").write_bytes(light)
        figures.append(_figure(plot, light, dark))
    if kept := used_calibrations(run.recipe):
        light, dark = draw_reliability(kept, theme()), draw_reliability(kept, theme(dark=True))
        (folder / "calibration.png").write_bytes(light)
        figures.append(_figure(Plot("calibration", "Calibration", CAPTION, [], wide=True), light, dark))
    page = run.folder / PAGE
    # Completions may hold lone surrogates, which UTF-8 cannot say.
    page.write_text(_page(run, figures), encoding="utf-8", errors="replace")
    return page


def _fill_rows(found: list[Plot]) -> list[Plot]:
    """Widen the last of an odd number of half-width plots, which would leave a hole on the page."""
    halves = [index for index, plot in enumerate(found) if not plot.wide]
    if len(halves) % 2:
        found[halves[-1]] = found[halves[-1]]._replace(wide=True)
    return found


def _page(run: Run, figures: list[str]) -> str:
    title = run.folder.resolve().name
    last = max(line["step"] for line in run.history)
    parts = [
        f"<header><p class=kind>Training report</p><h1>{escape(title)}</h1>",
        f"<p class=signature>{escape(run.signature)}</p>" if run.signature else "",
        f"</header>{_tiles(run, last)}",
        "".join(f"<p class=note>{escape(note)}</p>" for note in run.notes),
        _failures(run),
        _evidence(run),
        f"<section><h2>Curves</h2>{_smoothing(run)}<div class=figures>{''.join(figures)}</div></section>",
        f"<section><h2>First and last values</h2>{_table(run)}</section>",
        _completions(run),
        f"<section><h2>Recipe</h2><pre>{escape(run.recipe)}</pre></section>" if run.recipe else "",
        "<footer>Written by trl-rewards. Data: metrics.jsonl and samples.jsonl beside this page.</footer>",
    ]
    return document(f"{title} · training report", parts)


def document(title: str, parts: Sequence[str]) -> str:
    """A page of HTML on which no script runs and nothing is fetched, whatever a model wrote that it shows."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        + "\n".join(part for part in parts if part)
        + "</main></body></html>\n"
    )


def _smoothing(run: Run) -> str:
    if max(len(curve(run, key).steps) for key in ("reward", "loss")) < SMOOTH_FROM:
        return ""
    return (
        "<p class=caption>Thin lines are the logged values, thick ones their centred running mean over a tenth of the "
        "logs. Shares of failures, gradient norms and evaluations are not smoothed.</p>"
    )


def _tiles(run: Run, last: int) -> str:
    tiles = [("Steps", f"{last:,}", "")]
    for label, key in (
        ("Total reward", "reward"),
        ("Eval reward", "eval_reward"),
        ("Pair accuracy", "accuracy"),
        ("Mean length", "completions/mean_length"),
        ("Loss", "loss"),
    ):
        values = curve(run, key).values
        if values and (key != "loss" or len(tiles) == 1):
            tiles.append((label, number(values[-1]), f"from {number(values[0])}"))
    if runtime := curve(run, "train_runtime").values:
        minutes, seconds = divmod(round(sum(runtime)), 60)
        hours, minutes = divmod(minutes, 60)
        tiles.append(("Training time", f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s", ""))
    cells = "".join(
        f"<div class=tile><span>{label}</span><strong>{value}</strong><span>{below}</span></div>"
        for label, value, below in tiles
    )
    return f"<div class=tiles>{cells}</div>"


def _evidence(run: Run) -> str:
    """The recipe's alarms and what the metrics show, in words."""
    marks = [f"Alarm at step {step}: {said}." for step, said in alarms(run)]
    lines = [(text, True) for text in marks] + [(finding.text, finding.harm) for finding in findings(run)]
    if len(curve(run, "reward").values) >= ENOUGH and not any(harm for _, harm in lines):
        lines.append(("No sign of over-optimisation that is looked for here is in the logs.", False))
    if not lines:
        return ""
    items = "".join(f"<li{' class=harm' if harm else ''}>{escape(text)}</li>" for text, harm in lines)
    return (
        f"<section><h2>What the logs show</h2><ul class=evidence>{items}</ul>"
        "<p class=caption>Evidence of what was, from the logged metrics of this run alone; it does not say what "
        f"comes. Nothing is said of metrics with fewer than {ENOUGH} logs, nor of changes that noise can explain."
        "</p></section>"
    )


def _failures(run: Run) -> str:
    """What went wrong, in words, over the whole run; a line of relief if every source scored every row."""
    lines, known = [], False
    for name in run.sources:
        failed = curve(run, f"rewards/{name}/failed")
        known = known or bool(failed.steps)
        if any(failed.values):
            worst = max(failed.values)
            step = failed.steps[failed.values.index(worst)]
            mean = sum(failed.values) / len(failed.values)
            lines.append(
                f"<p class=alarm><b>{escape(name)}</b> failed on {mean:.1%} of the rows over the run, "
                f"and on {worst:.1%} at step {step}.</p>"
            )
    if not lines and known:
        return "<p class=calm>No source failed on any row.</p>"
    return "".join(lines)


def _table(run: Run) -> str:
    rows = [("total reward", "reward")]
    held_out = watched(run)
    rows += [(f"{name}, held out" if name in held_out else name, f"rewards/{name}/mean") for name in run.sources]
    rows += [("eval total reward", "eval_reward")]
    rows += [(f"eval {name}", f"eval_rewards/{name}/mean") for name in run.sources]
    rows += [
        ("pair accuracy", "accuracy"),
        ("pair accuracy", "rewards/accuracies"),
        ("mean length, tokens", "completions/mean_length"),
        ("clipped completions", "completions/clipped_ratio"),
        ("repeated 4-grams", "completions/repetition"),
        ("reward explained by length", "rewards/total/length_explained"),
        ("groups without variance", "frac_reward_zero_std"),
        ("KL, nats", "kl"),
        ("KL coefficient", "kl/coefficient"),
        ("critic's explained variance", "value/explained_variance"),
        ("value loss", "value/loss"),
        ("entropy, nats", "entropy"),
        ("loss", "loss"),
        ("eval loss", "eval_loss"),
        ("gradient norm", "grad_norm"),
    ]
    body = ""
    for label, key in rows:
        values = curve(run, key).values
        if not values:
            continue
        tenth = max(1, len(values) // 10)
        early, late = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
        cells = [number(value) for value in (values[0], values[-1], early, late)]
        cells.append(("+" if late > early else "") + number(late - early))
        body += f"<tr><th>{escape(label)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return (
        "<p class=caption>Single logged values are noisy; the last columns compare the means of the first and of the "
        "last tenth of the logs.</p><div class=scroll><table><thead><tr><th>metric</th><th>first</th><th>last</th>"
        f"<th>first tenth</th><th>last tenth</th><th>change</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def sample_pairs(samples: Sequence[dict[str, Any]]) -> tuple[list[tuple[dict, dict]], bool]:
    """(early, late) rows to show beside each other, and whether the two of a pair answer the same prompt.

    Same prompts are taken if some were seen at steps at least half the run apart, evaluation rows first; otherwise
    rows of the first and of the last step. Of several rows of a step the first is taken: scores choose nothing.
    """
    if not samples:
        return [], False
    steps = [sample["step"] for sample in samples]
    far = max((max(steps) - min(steps)) / 2, 1)
    seen: dict[tuple[str, str], list[dict]] = {}
    for sample in samples:
        seen.setdefault((sample.get("mode", "train"), sample["prompt"]), []).append(sample)
    pairs = []
    for key in sorted(seen, key=lambda key: key[0] != "eval"):
        rows = seen[key]
        early = min(rows, key=lambda row: row["step"])
        late = next(row for row in rows if row["step"] == max(row["step"] for row in rows))
        if late["step"] - early["step"] >= far:
            pairs.append((early, late))
    if pairs:
        pairs.sort(key=lambda pair: pair[0]["step"] - pair[1]["step"])
        pairs.sort(key=lambda pair: pair[0].get("mode") != "eval")
        return pairs[:SHOWN_PROMPTS], True
    train = [sample for sample in samples if sample.get("mode") != "eval"] or list(samples)
    first, last = min(row["step"] for row in train), max(row["step"] for row in train)
    early, late = [row for row in train if row["step"] == first], [row for row in train if row["step"] == last]
    return list(zip(early, late, strict=False))[:SHOWN_PROMPTS], False


def _completions(run: Run) -> str:
    pairs, same = sample_pairs(run.samples)
    if not pairs:
        return ""
    how = (
        "The same prompts early and late in the run"
        if same
        else "No prompt was recorded both early and late, so these are rows of the first and of the last recorded step"
    )
    cards = ""
    for early, late in pairs:
        if same:
            inner = (
                f"<div class=prompt>{_text(early['prompt'])}</div><div class=pair>{_card(early)}{_card(late)}</div>"
            )
        else:
            both = "".join(f"<div>{_prompt(row)}{_card(row)}</div>" for row in (early, late))
            inner = f"<div class=pair>{both}</div>"
        cards += f"<article>{inner}</article>"
    return (
        "<section><h2>Completions</h2>"
        f"<p class=caption>{how}; the first recorded row each, not chosen by score.</p>{cards}</section>"
    )


def _prompt(sample: Mapping[str, Any]) -> str:
    return f"<div class=prompt>{_text(sample['prompt'])}</div>"


def _card(sample: Mapping[str, Any]) -> str:
    """A completion with its scores."""
    status = sample.get("status") or {}
    rows = ""
    for name, score in (sample.get("scores") or {}).items():
        why = status.get(name, "no score")
        shown = number(score) if finite(score) is not None else why
        style = " class=hole" if why in ("failed", "timeout") else " class=none" if finite(score) is None else ""
        rows += f"<tr><th>{escape(name)}</th><td{style}>{escape(shown)}</td></tr>"
    for name in ("total", "advantage"):
        shown = number(sample.get(name)) if finite(sample.get(name)) is not None else "none"
        rows += f"<tr class={name}><th>{name}</th><td>{shown}</td></tr>"
    mode = "eval, " if sample.get("mode") == "eval" else ""
    traces = "".join(
        f"<details><summary>how {escape(name)} came to its score</summary>"
        f"<pre>{_text(yaml.safe_dump(trace, sort_keys=False, allow_unicode=True, width=100))}</pre></details>"
        for name, trace in (sample.get("traces") or {}).items()
    )
    return (
        f"<div class=card><p class=when>{mode}step {sample['step']}</p>"
        f"<div class=completion>{_text(sample['completion'])}</div><table><tbody>{rows}</tbody></table>{traces}</div>"
    )


def _text(text: str) -> str:
    if not text.strip():
        return "<i>empty</i>"
    more = len(text) - SHOWN_CHARACTERS
    return escape(text[:SHOWN_CHARACTERS]) + (f"<i> … {more:,} more characters</i>" if more > 0 else "")


def _figure(plot: Plot, light: bytes, dark: bytes) -> str:
    return (
        f"<figure{' class=wide' if plot.wide else ''}><h3>{escape(plot.title)}</h3>"
        f"{picture(light, dark, f'{plot.title} over optimiser steps')}"
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def picture(light: bytes, dark: bytes, words: str) -> str:
    """A PNG in the page itself, for a light and for a dark one."""
    source, image = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (dark, light))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{source}">'
        f'<img alt="{escape(words)}" src="{image}"></picture>'
    )


def number(value: Any) -> str:
    """A number for people: three or four digits that count; an en dash for none."""
    found = finite(value)
    if found is None:
        return "–"
    size = abs(found)
    if size == 0:
        return "0"
    if size >= 1e6 or size < 1e-3:
        return f"{found:.2e}"
    return f"{found:,.{4 if size < 0.1 else 3 if size < 10 else 2 if size < 100 else 1 if size < 10000 else 0}f}"


def escape(value: Any) -> str:
    return html.escape(str(value), quote=True)
