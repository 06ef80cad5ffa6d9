"""The plugin author's kit: samples out of nothing, and one call that checks a component's contract.

    from trl_rewards.testing import check_reward, make_samples

    def test_my_reward_keeps_the_contract():
        check_reward(MyReward())

The checks raise AssertionError and say what was promised. They run in milliseconds, without a model.
"""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trl_rewards import plugins
from trl_rewards.components import (
    Advantage,
    Combiner,
    Component,
    Objective,
    OutcomeObjective,
    Outcomes,
    Preferences,
    Reward,
    RewardBatch,
    Score,
    Scores,
    Selector,
    Shaper,
    TokenShaper,
    Tool,
    ToolCall,
)
from trl_rewards.events import run_async
from trl_rewards.maths import column_values
from trl_rewards.samples import Failed, Samples, Text
from trl_rewards.toolbox import Toolbox

if TYPE_CHECKING:
    from torch import Tensor

_PROMPTS = ["What is 17 + 5?", "Name the opposite of hot.", "Which day follows Monday?"]
_COMPLETIONS = [
    "<think>17 + 5 = 22</think><answer>The sum is 22.</answer>",
    "The sum is 23.",
    "cold",
    "It is cold, cold, cold, and it stays cold for a very long time indeed.",
    "",
    "Größe 山 🙂 {} %s <answer>",
]


def make_samples(
    completions: Sequence[Text] | None = None,
    prompts: Sequence[Text] | None = None,
    group_size: int | None = None,
    chat: bool = False,
    step: int = 0,
    max_steps: int = 0,
    **columns: Sequence[Any],
) -> Samples:
    """Samples with sensible values for what is not given: six varied completions, an empty and a unicode one included.

    `chat=True` wraps prompts and completions in messages. Columns are given by name, one value per row. Token ids are
    one per word.
    """
    texts: list[Text] = list(completions if completions is not None else _COMPLETIONS)
    rows = len(texts)
    cycle = [_PROMPTS[row // (group_size or 2) % 3] for row in range(rows)]
    asked: list[Text] = list(prompts if prompts is not None else cycle)
    ids = [[3 + len(word) for word in str(text).split()] for text in texts]
    if chat:
        asked = [text if not isinstance(text, str) else [{"role": "user", "content": text}] for text in asked]
        texts = [text if not isinstance(text, str) else [{"role": "assistant", "content": text}] for text in texts]
    return Samples(
        prompts=asked,
        completions=texts,
        completion_ids=ids,
        columns={name: list(values) for name, values in columns.items()},
        group_size=group_size,
        step=step,
        max_steps=max_steps,
    )


def make_scores(
    values: Sequence[Sequence[float | None]], weights: Sequence[float] | None = None, group_size: int = 2
) -> Scores:
    """Scores (N, K) from nested lists, None for a hole; sources are called a, b, c …"""
    import torch

    table = torch.tensor([[math.nan if cell is None else cell for cell in row] for row in values])
    count = table.shape[1]
    return Scores(
        names=tuple("abcdefghij"[:count]),
        values=table,
        status=table.isnan().to(torch.uint8),
        weights=torch.tensor(list(weights) if weights else [1.0] * count),
        group_size=group_size,
    )


def make_batch(rewards: Sequence[float | None], group_size: int = 2, tokens: int = 3) -> RewardBatch:
    """A RewardBatch of one source whose totals are `rewards`, None for a row without a score.

    Every field is there: a row's last token earns its total, the critic's values are 0.25, and the policy's tokens are
    a little likelier than the reference's.
    """
    import torch

    scores = make_scores([[reward] for reward in rewards], group_size=group_size)
    samples = make_samples(completions=["text"] * len(rewards))
    mask = torch.ones(len(rewards), tokens)
    totals = scores.values[:, 0].clone()
    token_rewards = torch.zeros(len(rewards), tokens)
    token_rewards[:, -1] = totals.nan_to_num(nan=0.0)
    return RewardBatch(
        totals,
        scores,
        samples,
        mask=mask,
        process_rewards=torch.zeros(len(rewards), tokens),
        token_rewards=token_rewards,
        values=mask * 0.25,
        logps=mask * -1.0,
        ref_logps=mask * -1.1,
        shaped=scores.values.clone(),
    )


def check_reward(
    reward: Reward,
    samples: Samples | None = None,
    within: tuple[float, float] | None = None,
    **columns: Sequence[Any],
) -> None:
    """A reward gives one score per row, in any order and any batch, for plain and chat rows, and survives pickling.

    Give `samples`, or columns for the six rows that `make_samples` makes. `within`: the range that its scores are in,
    if it has one.
    """
    group_size = 2 if reward.scope == "group" else None
    made: dict[str, Any] = columns
    given = [samples] if samples is not None else [make_samples(chat=chat, **made) for chat in (False, True)]
    for rows in given:
        rows = rows.take(range(len(rows)), group_size)
        missing = rows.missing(reward.reads())
        assert not missing, f"it reads columns {missing}: pass them, check_reward(reward, {missing[0]}=[…])"
        rows = rows.only(reward.reads())
        before = copy.deepcopy(rows)
        scores = run_reward(reward, rows)
        assert rows == before, "it changes its samples; other components read them too"
        _check_scores(scores, len(rows))
        _check_range([score for score in scores if isinstance(score, int | float)], within)
        if not reward.deterministic:
            continue
        _same(run_reward(reward, rows), scores, "scores the same rows differently the second time")
        unit = group_size or 1
        starts = range(0, len(rows), unit)
        units = [rows.take(range(start, start + unit), group_size) for start in starts]
        alone = [score for each in units for score in run_reward(reward, each)]
        _same(alone, scores, f"a {'group' if group_size else 'row'} scores differently in another batch")
        order = [start + offset for start in reversed(starts) for offset in range(unit)]
        backwards = run_reward(reward, rows.take(order, group_size))
        _same(backwards, [scores[row] for row in order], "scores depend on the order of rows")
        _same(run_reward(pickle.loads(pickle.dumps(reward)), rows), scores, "scores differ after pickling")
    _check_no_rows(reward, given[0])
    _check_state(reward)


def run_reward(reward: Reward, samples: Samples) -> list[Score]:
    """A reward's scores, whether it is sync or async."""
    return list(run_async(reward.ascore(samples)) if reward.is_async() else reward.score(samples))


def _check_no_rows(reward: Reward, samples: Samples) -> None:
    nothing = samples.take([], 2 if reward.scope == "group" else None).only(reward.reads())
    assert run_reward(reward, nothing) == [], "no rows must give no scores"


def _check_scores(scores: list[Score], rows: int) -> None:
    assert len(scores) == rows, f"{len(scores)} scores for {rows} rows; give exactly one per row"
    for score in scores:
        assert score is None or isinstance(score, Failed) or _is_real(score), (
            f"{score!r} is not a score; give a finite float, None for no opinion, or Failed(reason)"
        )


def _check_range(values: Sequence[float], within: tuple[float, float] | None) -> None:
    low, high = within or (-math.inf, math.inf)
    outside = [value for value in values if not low - 1e-6 <= value <= high + 1e-6]
    assert not outside, f"{outside[0]} is not in [{low:g}, {high:g}]"


def _is_real(score: Any) -> bool:
    return isinstance(score, int | float) and math.isfinite(score)


def _same(got: list[Score], wanted: list[Score], complaint: str) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        if isinstance(mine, int | float) and isinstance(theirs, int | float):
            equal = math.isclose(mine, theirs, abs_tol=1e-5)
        else:
            equal = mine == theirs
        assert equal, f"it {complaint}: {theirs!r} became {mine!r}"


def check_combiner(combiner: Combiner, rises: bool = False, within: tuple[float, float] | None = None) -> None:
    """A combiner gives (N,), leaves a row without any score NaN, treats rows alike whatever their place, passes over a
    source of weight 0, gives the same twice, and restores its state exactly.

    Scores in [0, 1] are used. `rises`: no total falls when one of its scores rises. `within`: the range of totals.
    """
    import torch

    fresh = copy.deepcopy(combiner)

    values = [[0.2, 0.9], [0.4, 0.1], [0.7, 0.7], [0.0, 0.6], [None, 0.5], [0.3, None], [None, None], [0.8, 0.2]]
    scores = make_scores(values, weights=[1.0, 0.5], group_size=4)
    samples = make_samples(completions=["text"] * len(values), group_size=4)
    before = scores._replace(
        values=scores.values.clone(), status=scores.status.clone(), weights=scores.weights.clone()
    )
    total = combiner(scores, samples)
    assert total.shape == (len(values),), f"got shape {tuple(total.shape)}, wanted ({len(values)},)"
    for name in ("values", "status", "weights"):
        mine, theirs = getattr(before, name), getattr(scores, name)
        assert torch.equal(mine.nan_to_num(-9), theirs.nan_to_num(-9)), f"it changes the scores it was given ({name})"
    _check_range(total[~total.isnan()].tolist(), within)
    _close(copy.deepcopy(fresh)(scores, samples), total, "it combines the same scores differently the second time")
    assert total[6].isnan(), "a row without any score must stay NaN"
    assert total[[0, 1, 2, 3, 7]].isfinite().all(), "rows with every score must have a finite total"
    for order, of_what in (([4, 5, 6, 7, 0, 1, 2, 3], "groups"), ([2, 0, 3, 1, 7, 5, 4, 6], "rows within a group")):
        moved = scores._replace(values=scores.values[order], status=scores.status[order])
        again = copy.deepcopy(fresh)(moved, samples)
        _close(again, total[order], f"totals depend on the order of {of_what}")
    for constant in (0.0, 1.0):
        flat = copy.deepcopy(fresh)(make_scores([[constant] * 2] * len(values), [1.0, 0.5], 4), samples)
        assert flat.isfinite().all(), f"constant scores of {constant} give {flat.tolist()}"
    if rises:
        for column in (0, 1):
            grid = [[step / 10 if k == column else 0.3 for k in (0, 1)] for step in range(8)]
            along = copy.deepcopy(fresh)(make_scores(grid, [1.0, 0.5], 4), samples)
            assert (along.diff() >= -1e-6).all(), f"totals {along.tolist()} fall while source {column} rises"
    if _takes_one_source(fresh):
        alone = make_scores([row[:1] for row in values], group_size=4)
        assert copy.deepcopy(fresh)(alone, samples).shape == (len(values),), "one source alone must work"
    watching = make_scores([[*row, watched] for row, watched in zip(values, [9, None] * 4, strict=True)], group_size=4)
    weights = torch.tensor([1.0, 0.5, 0.0])
    watched = copy.deepcopy(fresh)(watching._replace(weights=weights), samples)
    _close(watched, total, "a source of weight 0 changes totals")
    resumed = copy.deepcopy(fresh)
    resumed.load_state_dict(copy.deepcopy(combiner.state_dict()))
    for _ in range(2):
        _close(resumed(scores, samples), combiner(scores, samples), "state_dict does not hold all of its state")
    _check_state(combiner)


def _takes_one_source(combiner: Combiner) -> bool:
    """Whether its options name no source beside the first."""
    try:
        combiner.check_sources(["a"])
    except ValueError:
        return False
    return True


def check_shaper(
    shaper: Shaper,
    samples: Samples | None = None,
    rises: bool = False,
    within: tuple[float, float] | None = None,
    **columns: Sequence[Any],
) -> None:
    """A shaper gives (N,), keeps NaN rows NaN and out of its statistics, treats rows alike whatever their place, gives
    the same twice, is affine if it says so, and restores its state exactly.

    `rises`: of rows that differ in their reward alone, the higher is not shaped lower. `within`: the range of what it
    gives.
    """
    import torch

    rewards = torch.tensor([0.5, -1.5, math.nan, 2.0, 0.5, 0.25])
    made: dict[str, Any] = columns
    samples = samples if samples is not None else make_samples(**made)
    fresh = copy.deepcopy(shaper)
    before = rewards.clone()
    shaped = shaper(rewards, samples)
    assert shaped.shape == rewards.shape, f"got shape {tuple(shaped.shape)}, wanted {tuple(rewards.shape)}"
    assert torch.equal(rewards.nan_to_num(-9), before.nan_to_num(-9)), "it changes the rewards it was given"
    assert torch.equal(shaped.isnan(), rewards.isnan()), "NaN rows must stay NaN, and only they"
    _check_range(shaped[~shaped.isnan()].tolist(), within)
    _close(copy.deepcopy(fresh)(rewards, samples), shaped, "it shapes the same rewards differently the second time")
    backwards = [5, 4, 3, 2, 1, 0]
    turned = copy.deepcopy(fresh)(rewards[backwards], samples.take(backwards))
    _close(turned, shaped[backwards], "rewards are shaped by their place")
    alike, ramp = samples.take([0] * 6), torch.linspace(-2, 3, 6)  # of one prompt and completion
    along = copy.deepcopy(fresh)(ramp, alike)
    assert not (rises or shaper.affine()) or (along.diff() >= -1e-6).all(), f"{ramp.tolist()} gives {along.tolist()}"
    if shaper.affine():
        _close(along.diff(), along.diff().mean().expand(5), "it says that it is affine, and steps of 1 differ")
        assert along[-1] > along[0], f"it says that it is affine with a slope above 0, and gives {along.tolist()}"
    there = [0, 1, 3, 4, 5]
    _close(copy.deepcopy(fresh)(rewards[there], samples.take(there)), shaped[there], "a NaN row moves the others")
    for constant in (0.0, 1.0):
        flat = copy.deepcopy(fresh)(torch.full((len(samples),), constant), samples)
        assert flat.isfinite().all(), f"constant rewards of {constant} give {flat.tolist()}"
    state = copy.deepcopy(shaper.state_dict())
    assert shaper(before, samples).shape == rewards.shape
    second = shaper(before, samples)
    resumed = copy.deepcopy(fresh)
    resumed.load_state_dict(state)
    resumed(before, samples)
    _close(resumed(before, samples), second, "state_dict does not hold all of its state")
    _check_state(shaper)


def check_token_shaper(shaper: TokenShaper, scores: Scores | None = None) -> None:
    """A shaper of tokens gives (N, T), NaN where its input is NaN and only there, and changes nothing it is given.

    Process rewards in [0, 1] are used, of six rows; one says nothing. `scores`: of other sources, if it reads them.
    """
    import torch

    nan = math.nan
    rows = [[nan, 0.9, 0.7, nan, 0.4], [0.8] + [nan] * 4, [nan] * 5, [0.1] * 5, [0.0] * 5, [nan, nan, 1.0, 0.5, nan]]
    rewards = torch.tensor(rows)
    scores = scores if scores is not None else make_scores([[float(row % 2)] for row in range(6)])
    samples, before = make_samples(), rewards.clone()
    shaped = shaper.shape_tokens(rewards, scores, samples)
    assert shaped.shape == rewards.shape, f"got shape {tuple(shaped.shape)}, wanted {tuple(rewards.shape)}"
    assert torch.equal(rewards.nan_to_num(-9), before.nan_to_num(-9)), "it changes the rewards it was given"
    assert torch.equal(shaped.isnan(), rewards.isnan()), "tokens without a value must stay NaN, and only they"
    assert not shaped.isinf().any(), "it gives infinity"
    nothing = torch.full((6, 5), nan)
    assert shaper.shape_tokens(nothing, scores, samples).isnan().all(), "rows without a value must stay without"
    _check_state(shaper)


def check_advantage(advantage: Advantage, high: float = 1.0) -> None:
    """An advantage gives (N,) or (N, T): finite, unmoved by the order of groups and by rows without a reward; 0 for
    these, equal groups and G=1, unless it says that it does not compare groups; the same twice; unmoved by a · r + b
    if it says so.

    Rewards between 0 and `high` are used.
    """
    import torch

    compares_groups = advantage.compares_groups

    def run(rewards: Sequence[float | None], group_size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        batch = make_batch([None if r is None else (r * scale + shift) * high for r in rewards], group_size)
        before = copy.deepcopy(batch)
        result = advantage(batch)
        for name in ("rewards", "token_rewards", "process_rewards", "values", "mask", "shaped"):
            mine, theirs = getattr(before, name), getattr(batch, name)
            assert torch.equal(mine.nan_to_num(-9), theirs.nan_to_num(-9)), f"it changes the batch's {name}"
        wanted = (len(rewards),) if advantage.level == "sequence" else (len(rewards), 3)
        assert tuple(result.shape) == wanted, (
            f"got shape {tuple(result.shape)}, wanted {wanted} ({advantage.level} level)"
        )
        assert result.isfinite().all(), f"rewards {rewards} give {result.tolist()}"
        return result.double()

    rewards = [0.1, 0.9, 0.4, 0.4, 0.3, 0.3, 0.3, 0.3, 0.8, None, 0.2, 0.5]
    result = run(rewards, 4)
    if compares_groups:
        assert (result[4:8] == 0).all(), f"a group of equal rewards must give exactly 0, got {result[4:8].tolist()}"
        assert (result[9] == 0).all(), "a row without a reward must give exactly 0"
    assert (result[0] != result[1]).any(), "different rewards in a group must give a signal"
    moved = [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]
    _close(run([rewards[row] for row in moved], 4), result[moved], "advantages depend on the order of groups")
    inside = [1, 0, 3, 2, 4, 5, 6, 7, 11, 10, 9, 8]
    _close(run([rewards[row] for row in inside], 4), result[inside], "advantages depend on the order within a group")
    _close(run(rewards, 4), result, "the same rewards have other advantages the second time")
    if advantage.undoes_affine():
        moved_alike = run(rewards, 4, scale=0.5, shift=0.25)
        _close(moved_alike, result, "it says that it undoes a · r + b, and gives others", tolerance=5e-3)
    holed = run([0.1, 0.9, 0.4, None, 0.8, None, 0.2, 0.5], 4)
    without = run([0.1, 0.9, 0.4, 0.8, 0.2, 0.5], 3)
    _close(holed[[0, 1, 2, 4, 6, 7]], without, "a row without a reward moves the others")
    alone = run([0.2, 0.9], 1)
    assert not compares_groups or (alone == 0).all(), "a group of one has nothing to compare with"
    for special in ([None] * 8, [0.0] * 8, [1.0] * 8, [None, None, None, 0.5] * 2):
        found = run(special, 4)
        assert not compares_groups or (found == 0).all(), f"rewards {special} must give 0"
    _check_state(advantage)
    assert torch.is_tensor(advantage(make_batch([0.0, high], 2)))


def check_objective(objective: Objective, **columns: Sequence[Any]) -> None:
    """An objective's loss is one finite number, also for extreme rewards, and on the whole lowers when chosen answers
    score higher and rejected ones lower. An evaluation leaves its state as it is.

    `columns`: three values each, of the columns that it reads; None among numbers is NaN.
    """
    import torch

    names, made = list(objective.outputs()), {name: column_values(values) for name, values in columns.items()}
    assert names, "outputs() must name at least one output"
    ids = torch.tensor([[5, 6, 7, 0], [5, 8, 7, 9], [5, 6, 9, 0], [5, 6, 8, 7], [5, 9, 0, 0], [5, 7, 0, 0]])

    def run(rewards: list[float], training: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs (6, K), rewards (6,), loss."""
        outputs = torch.tensor(rewards)[:, None].repeat(1, len(names)).requires_grad_()
        hidden = outputs[:, :1].expand(-1, 4)
        prompt_hidden = hidden.detach() if "prompt_hidden" in objective.needs else None
        scores = outputs[:, 0] if len(names) == 1 else objective.reward(outputs, prompt_hidden)
        assert scores.shape == (6,), f"reward() must give one number per row, got shape {tuple(scores.shape)} for 6"
        better, worse = scores.chunk(2)
        batch = Preferences(
            better,
            worse,
            -torch.nn.functional.logsigmoid(better - worse).mean(),
            made,
            hidden if "hidden" in objective.needs else None,
            prompt_hidden,
            outputs,
            ids,
            (ids != 0).long(),
            step=1,
            max_steps=2,
            training=training,
            generator=torch.Generator().manual_seed(0),
        )
        return outputs, scores, objective.loss(batch._replace(again=lambda: batch))

    outputs, scores, loss = run([0.5, -0.25, 0.0, 0.25, 0.5, 0.0])
    assert loss.dim() == 0, f"the loss must be one number, got shape {tuple(loss.shape)}"
    assert loss.requires_grad, "the loss has no gradient; make it of batch.chosen, batch.rejected or batch.loss"
    (gradient,) = torch.autograd.grad(loss, outputs, retain_graph=True)
    for rows, better in ((slice(0, 3), True), (slice(3, 6), False)):
        (toward,) = torch.autograd.grad(scores[rows].sum(), outputs, retain_graph=True)
        rises = (gradient * toward).sum() < 0  # does a step down the loss raise these rewards?
        falls = (gradient * toward).sum() > 0
        assert rises if better else falls, (
            "a step down the loss must raise the chosen answers and lower the rejected; gradients are "
            f"{gradient[:3].tolist()} and {gradient[3:].tolist()}"
        )
    for extreme in ([60.0] * 3 + [-60.0] * 3, [-60.0] * 3 + [60.0] * 3, [0.0] * 6):
        assert run(extreme)[2].isfinite(), f"rewards {extreme} give no finite loss"
    before = _saved(objective)
    assert run([0.5, -0.25, 0.0, 0.25, 0.5, 0.0], training=False)[2].isfinite(), "an evaluation gives no finite loss"
    assert _saved(objective) == before, "an evaluation (batch.training is False) changes its state"
    _check_state(objective)


def check_outcome_objective(objective: OutcomeObjective, **columns: Sequence[Any]) -> None:
    """Its loss is one finite number, also for extreme log-ratios, and lowers when right answers become likelier and
    wrong ones less likely. An evaluation leaves its state as it is.

    `columns`: four values each, of the columns that it reads; None among numbers is NaN.
    """
    import torch

    made = {name: column_values(values) for name, values in columns.items()}
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0])

    def run(values: list[float], training: bool = True) -> tuple[Tensor, Tensor]:
        log_ratios = torch.tensor(values).requires_grad_()
        return log_ratios, objective.loss(Outcomes(log_ratios, labels, made, 1, 2, training))

    log_ratios, loss = run([2.0, -1.0, 0.0, 3.0])
    assert loss.dim() == 0, f"the loss must be one number, got shape {tuple(loss.shape)}"
    assert loss.requires_grad, "the loss has no gradient; make it of batch.log_ratios"
    (gradient,) = torch.autograd.grad(loss, log_ratios)
    assert (gradient * (1 - 2 * labels) >= 0).all(), (
        f"a step down the loss must make right answers likelier and wrong ones less likely; gradients are {gradient}"
    )
    assert gradient.any(), "the loss does not change with the log-ratios"
    for extreme in ([1e4, -1e4, 1e4, -1e4], [-1e4, 1e4, -1e4, 1e4], [0.0] * 4):
        assert run(extreme)[1].isfinite(), f"log-ratios {extreme} give no finite loss"
    before = _saved(objective)
    run([2.0, -1.0, 0.0, 3.0], training=False)
    assert _saved(objective) == before, "an evaluation (batch.training is False) changes its state"
    _check_state(objective)


def check_selector(selector: Selector, holes: bool = False) -> None:
    """A selector gives at most `count` different rows, the same ones for the same seed, and no row without a score.

    `holes`: an option asks for rows without a score.
    """
    import numpy as np

    scores = [0.5, None, 0.1, 0.5, -2.0, 0.9, None, 0.5, 1e-9, 0.3]
    before, states = list(scores), (random.getstate(), repr(np.random.get_state()))
    for given in (scores, [0.25] * 6, [None, None], []):
        for count in (0, 1, 4, len(given), 50):
            for seed in (0, 1):
                chosen = selector.select(given, count, seed)
                where = f"of {len(given)} rows, {count} wanted, it chose {chosen}"
                assert all(type(row) is int and 0 <= row < len(given) for row in chosen), f"not row indices: {where}"
                assert len(set(chosen)) == len(chosen), f"a row twice: {where}"
                assert len(chosen) <= count, f"too many: {where}"
                assert holes or all(given[row] is not None for row in chosen), f"a row without a score: {where}"
                assert selector.select(given, count, seed) == chosen, f"other rows the second time: {where}"
    assert scores == before, "it changes the scores it was given"
    assert (random.getstate(), repr(np.random.get_state())) == states, "it draws from global random numbers"
    _check_state(selector)


def check_tool(
    tool: Tool, *inputs: str, name: str = "", answer: str = "", row: Mapping[str, Any] | None = None
) -> None:
    """A tool says what it is for, and gives the same text for the same input however many calls run beside it. What it
    cannot use is a failure that a model can read, within its time.

    `inputs` are some that it has a result for; `name` is the one to call it by, if not its own; `answer` and `row` are
    the answer and the columns that it looks at.
    """
    assert inputs, "give one or more inputs that it has a result for: check_tool(tool, '2023-05-01')"
    assert tool.description.strip(), "it has no description: say what it is for and what its input looks like"
    missing = [column for column in tool.reads() if column not in (row or {})]
    assert not missing, f"it reads columns {missing}: pass them, check_tool(tool, …, row={{{missing[0]!r}: …}})"
    call = ToolCall(name or tool.display_name, answer, "", answer, row or {})
    assert tool.answers(tool.display_name), f"it does not answer to its own name, {tool.display_name!r}"
    assert tool.answers(call.name), f"it does not answer to {call.name!r}"
    toolbox = Toolbox([tool])
    texts = []
    for input in inputs:
        (observation,) = toolbox.run([(input, call)])
        assert observation is not None
        assert observation.ok, f"it has no result for {input!r}: {observation.problem}"
        texts.append(observation.text)
    together = toolbox.run([(input, call) for input in inputs for _ in range(4)])
    for number, observation in enumerate(together):
        assert observation is not None
        input, text = inputs[number // 4], texts[number // 4]
        assert observation.text == text, f"several calls at a time: {input!r} gave {text!r}, then {observation}"
    for input in ("", "?" * 20_000, "Größe 山 🙂 {} %s \0"):
        (observation,) = toolbox.run([(input, call)])
        assert observation is not None
        assert "no result within" not in observation.problem, f"{input[:30]!r} takes longer than {tool.timeout} s"
    if tool.state_dict():
        _check_state(tool)


def _saved(component: Component) -> bytes:
    """The bytes of a component's state, as a checkpoint has them."""
    import io

    import torch

    file = io.BytesIO()
    torch.save(component.state_dict(), file)
    return file.getvalue()


def _close(got: Tensor, wanted: Tensor, complaint: str, tolerance: float = 1e-5) -> None:
    import torch

    assert torch.allclose(got.double(), wanted.double(), atol=tolerance, equal_nan=True), (
        f"{complaint}: {wanted.tolist()} became {got.tolist()}"
    )


def _check_state(component: Component) -> None:
    """`state_dict` goes through a checkpoint and back."""
    import io

    import torch

    try:
        restored = torch.load(io.BytesIO(_saved(component)), weights_only=True)
    except pickle.UnpicklingError as error:
        raise AssertionError(f"state_dict may hold tensors, numbers, strings, lists and dicts only: {error}") from None
    component.load_state_dict(restored)


@contextmanager
def plugin_manager(plugins_by_name: Mapping[str, Any] | None = None) -> Generator[plugins.Registry]:
    """A registry with the installed plugins and yours, in use inside the block.

    with plugin_manager({"mine": my_module}):
        load_reward("my_reward")
    """
    installed = plugins.load_plugins()
    registry = plugins.new_registry()
    registry.plugins, registry.entries = list(installed.plugins), list(installed.entries)
    for name, module in (plugins_by_name or {}).items():
        plugins.add_plugin(registry, module, name)
    with plugins.use_registry(registry):
        yield registry
