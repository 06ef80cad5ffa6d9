"""LaRe: losses as recorded, an outcome given out to steps, and code that is not run where it should not be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from trl_rewards_process import propose
from trl_rewards_process.factors import BUILT_IN, TRIAL
from trl_rewards_process.latent_reward import decomposition_losses

from trl_rewards import Context, Failed, Pipeline, Reward, RewardError, Samples, World, load_reward
from trl_rewards.models.scripted_judge import ScriptedJudge
from trl_rewards.sandbox import open_sandbox
from trl_rewards.scoring import Source

FILE = Path(__file__).with_name("step_reward_cases.json")
CASES = json.loads(FILE.read_text(encoding="utf-8"))["cases"]["lare"]


@pytest.fixture(scope="module")
def sandbox():
    try:
        with open_sandbox() as opened:
            yield opened
    except RewardError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"][:20])
def test_losses_are_the_recorded_ones(case):
    given = case["inputs"]
    rewards = torch.tensor(given["latent_factors"]) @ torch.tensor(given["w"])  # (B, T)
    lengths, returns = torch.tensor(given["length"])[:, 0], torch.tensor(given["episode_return"])[:, 0]
    mask = torch.arange(rewards.shape[1]) < lengths[:, None]
    if steps := given.get("steps"):
        rewards, mask = rewards[:, steps], mask[:, steps]
    losses = decomposition_losses(rewards, mask, returns, lengths, unbiased="unbiased=True" in case["case"])
    assert losses.mean().item() == pytest.approx(case["outputs"]["loss"], abs=1e-6)


def test_the_edges_of_the_unbiased_loss():
    one = decomposition_losses(*map(torch.tensor, ([[2.0]], [[1.0]], [1.0], [1.0])), unbiased=True)
    assert one.tolist() == [1.0]  # one step: all of them, and no variance
    drawn = decomposition_losses(*map(torch.tensor, ([[1.0, 3.0]], [[1.0, 1.0]], [1.0], [1.0])), unbiased=True)
    assert drawn.tolist() == [1.0 + 2 * 1 / 2]  # K = 2 of T = 1, drawn twice: 1 - K/T is -1
    lucky = decomposition_losses(*map(torch.tensor, ([[0.0, 2.0]], [[1.0, 1.0]], [4.0], [4.0])), unbiased=True)
    assert lucky.tolist() == [0.0 - 2 * 0.5 / 2]  # it may be negative


def test_the_unbiased_loss_of_sampled_steps_is_that_of_all_steps_on_average():
    generator = torch.Generator().manual_seed(0)
    rewards, returns, lengths = torch.randn(1, 6, generator=generator), torch.tensor([2.0]), torch.tensor([6.0])
    wanted = decomposition_losses(rewards, torch.ones(1, 6), returns, lengths).item()
    pairs = list(torch.combinations(torch.arange(6), 3))
    for unbiased, close in ((True, True), (False, False)):
        found = [
            decomposition_losses(rewards[:, p], torch.ones(1, 3), returns, lengths, unbiased).item() for p in pairs
        ]
        assert (sum(found) / len(found) == pytest.approx(wanted, abs=1e-6)) == close


@pytest.mark.parametrize(
    ("name", "steps", "wanted"),
    [
        ("length", ["", "a b c d e f g h i j k"], [0.0, 0.497]),
        ("position", ["a", "b", "c"], [0.0, 0.5, 1.0]),
        ("position", ["a"], [0.0]),
        ("repetition", ["a b c d", "A b C e", "x"], [0.0, 0.5, 0.0]),
        ("repetition", ["a b c a b c"], [0.25]),
        ("digits", ["ab12", ""], [0.5, 0.0]),
        ("equations", ["2 + 3 = 5", "2 + 3 = 6, 2 * 3 = 6", "none", "10 / 3 = 3.33", "7 / 2 = 3"], [1, 0, 0, 1, -1]),
        ("equations", ["2 + 3 * 4 = 14", "x + 2 + 3 = 9", "1,200 × 2 = 2,400.", "2 + 3 = 5 + 1 = 6"], [1, 0, 1, 1]),
        ("equations", ["1 / 0 = 7", "10 - 2 - 3 = 5", "20 / 40 = 50%", "1.5 + 1.5 = 3"], [-1, 1, 0, 1]),
    ],
)
def test_built_in_factors_are_what_they_say(name, steps, wanted):
    assert [row[0] for row in BUILT_IN[name]("?", steps)] == pytest.approx(wanted, abs=1e-3)


class Given(Reward):
    """The column `R`."""

    columns = ("R",)

    def score(self, samples):
        return samples["R"]


def pipeline_of(tmp_path, **options):
    reward = load_reward("latent_reward", **options)
    pipeline = Pipeline([Source("latent", reward), Source("given", Given())])
    pipeline.setup(Context(seed=1, base_dir=str(tmp_path)))
    return pipeline


def test_after_learning_the_rewards_of_steps_add_up_to_the_outcome_and_go_to_those_that_earned_it(tmp_path):
    """Outcome: 1 for each right sum less 0.5 for each step; no row says which step it was."""
    generator = torch.Generator().manual_seed(0)
    texts, outcomes = [], []
    for _ in range(48):
        right = torch.randint(2, (int(torch.randint(1, 6, (), generator=generator)),), generator=generator)
        texts.append("\n\n".join("2 + 3 = 5" if one else "2 + 3 = 6" for one in right))
        outcomes.append(right.sum().item() - 0.5 * len(right))
    outcomes[0] = None
    for options in ({"sampled": 3, "unbiased": True}, {}):
        learning = {"learning_rate": 1e-2, "hidden": 16, "mini_batch": 48, "passes": 200}
        pipeline = pipeline_of(tmp_path, factors=["equations", "digits"], **learning, **options)
        samples = Samples(["?"] * len(texts), texts, columns={"R": outcomes})
        first = pipeline.score(samples, group_size=4)
        assert (first.scores.values[:, 0] == 0).all()
        metrics = pipeline.update(first)
        reward = pipeline.sources[0].reward
        sums = pipeline.score(samples, group_size=4).scores.values[1:, 0]
        error = (sums - torch.tensor(outcomes[1:])).abs().mean().item()
        assert error < 0.05, (options, error, metrics)
        one = Samples(["?"], ["2 + 3 = 5\n\n2 + 3 = 6"])
        assert reward.score_steps(one, reward.steps_of(one))[0] == pytest.approx([0.5, -0.5], abs=0.05)


def test_its_state_comes_back_and_resumes_alike(tmp_path):
    samples = Samples(["?"] * 4, ["a\n\nb 1", "a 2 3", "b", ""], columns={"R": [1.0, 0.0, 2.0, 1.0]})
    one, other = (pipeline_of(tmp_path, passes=2, sampled=1) for _ in range(2))
    one.update(one.score(samples, group_size=2))
    other.load_state_dict(one.state_dict())
    for pipeline in (one, other):
        assert pipeline.update(pipeline.score(samples, group_size=2))["rewards/latent/loss"] > 0
    found = one.score(samples, group_size=2).scores.values[:, 0]
    assert found[:3].abs().min() > 0
    assert found[3].isnan()  # no step, no reward
    assert torch.equal(found[:3], other.score(samples, group_size=2).scores.values[:3, 0])


LEARN = """
from trl_rewards import Context, Pipeline, Reward, Samples, World, load_reward
from trl_rewards.scoring import Source


class Given(Reward):
    columns = ("R",)

    def score(self, samples):
        return samples["R"]


def learn(world):
    latent = load_reward("latent_reward", sampled=2, mini_batch=3)
    pipeline = Pipeline([Source("latent", latent), Source("given", Given())])
    pipeline.setup(Context(seed=1))
    texts = ["a\\n\\nb 1\\n\\nc", "a 2 3", "b", "c\\n\\nd\\n\\n1 + 1 = 2", "e\\n\\nf", "g 4"]
    samples = Samples(["?"] * 6, texts, columns={"R": [1.0, 0.0, 2.0, 1.0, None, 0.5]})
    samples = samples.take(range(world.rank * 6 // world.size, (world.rank + 1) * 6 // world.size))
    for _ in range(2):
        pipeline.update(pipeline.score(samples, group_size=2, world=world))
    return pipeline.score(samples, group_size=2, world=world).scores.values[:, 0].tolist()
"""
RANKS = """
import torch

torch.distributed.init_process_group("gloo")
from accelerate import PartialState

PartialState(cpu=True)
found = learn(World.current())
if World.current().rank == 0:
    print("RESULT" + str(found))
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(run_ranks):
    scope: dict = {}
    exec(LEARN, scope)
    alone = scope["learn"](World())
    line = next(line for line in run_ranks(LEARN + RANKS, 2).stdout.splitlines() if "RESULT" in line)
    assert json.loads(line.partition("RESULT")[2]) == pytest.approx(alone, abs=1e-5)
    assert min(map(abs, alone)) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": []}, "factors is empty"),
        ({"factors": ["lenght"]}, "factors: no 'lenght'; there is length"),
        ({"unbiased": True}, "unbiased needs the variance"),
        ({"unbiased": True, "sampled": 1}, "unbiased needs the variance"),
        ({"sandbox": "unsafe"}, "sandbox must be one of auto, bwrap, landlock"),
        ({"sandbox": "auto", "factors": ["package.module:name"]}, "is no file"),
        ({"passes": 0}, "passes must be above 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_reward("latent_reward", **options)


def test_an_outcome_must_be_named_among_several(tmp_path):
    pipeline = pipeline_of(tmp_path, outcome="givn")
    with pytest.raises(RewardError, match="set outcome to one of given; got 'givn'"):
        pipeline.update(pipeline.score(Samples(["?"], ["a"], columns={"R": [1.0]}), group_size=1))


FUNCTION = """
import sys

def factors(question, steps):
    if "raise" in question:
        raise KeyError("odd")
    return [[float(len(step)), float("torch" in sys.modules)] for step in steps]
"""


def test_a_users_function_runs_here_and_in_the_sandbox_only_there(write, tmp_path, monkeypatch, sandbox):
    monkeypatch.chdir(tmp_path)
    write("factors.py", FUNCTION)
    rows = [("?", ["ab", "c"]), ("raise", ["x"]), ("?", [])]
    here = load_reward("latent_reward", factors=["digits", "./factors.py:factors"])
    there = load_reward("latent_reward", factors=["digits", "./factors.py:factors"], sandbox=sandbox.name)
    for reward, trusted in ((here, 1.0), (there, 0.0)):
        found = reward._factors(rows)
        assert found[0] == [[0.0, 2.0, trusted], [0.0, 1.0, trusted]]
        assert isinstance(found[1], Failed)
        assert "KeyError" in found[1].reason
        assert found[2] == []
        reward.close()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [[1.0]]", "1 lists of factors for 2 steps"),
        ("return [[1.0], [1.0, 2.0]]", "lists of 1 and 2 factors"),
        ("return [[float('nan')]] * 2", "infinite or no number"),
        ("return [[]] * 2", "lists of 0 factors"),
        ("return 3", "not iterable"),
    ],
)
def test_a_function_that_gives_no_factors_is_found_before_training(write, tmp_path, monkeypatch, body, message):
    monkeypatch.chdir(tmp_path)
    write("factors.py", f"def factors(question, steps):\n    {body}\n")
    with pytest.raises(RewardError, match=message):
        load_reward("latent_reward", factors=["./factors.py:factors"])


class Author(ScriptedJudge):
    """A server that writes the given replies in turn, the last one again and again."""

    def __init__(self, *replies):
        super().__init__()
        self.replies = list(replies)

    def reply(self, request, fate):
        text = self.replies.pop(0) if fate == "ok" and len(self.replies) > 1 else self.replies[0]
        message = {"role": "assistant", "content": text}
        return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def test_proposed_code_is_mended_in_the_sandbox_and_written_for_review(tmp_path, monkeypatch, sandbox, capsys):
    marker = tmp_path / "was_run"
    evil = f"open({str(marker)!r}, 'w').write('x')"
    good = "def factors(question, steps):\n    return [[len(step) / 1000, 1.0] for step in steps]"
    replies = [
        f"```python\n{evil}\n```",  # candidates are shown to the model, and not run
        "<think>```python\nno\n```</think>```python\ndef factors(question, steps):\n    return [[1.0]]\n```",
        f"```python\n{evil}\n{good}\n```",  # the sandbox refuses to write there
        f"Here it is.\n```python\n{good}\n```",
    ]
    command = ["--task", "Sums.\nWords.", "--model", "some", "--out", str(tmp_path / "f.py"), "--candidates", "1"]
    with Author(*replies[1:]) as server:
        assert propose.main([*command, "--endpoint", server.url, "--sandbox", sandbox.name]) == 0
        asked = list(server.requests)
    assert not marker.exists()
    text = (tmp_path / "f.py").read_text()
    header = "# Latent factors of steps, written by 'some' and reviewed by nobody yet.\n# Task: 'Sums.\\nWords.'\n"
    assert text == f"{header}\n{good}\n"
    assert "1 lists of factors for 3 steps" in asked[1]["messages"][-1]["content"]
    assert [each["temperature"] for each in asked] == [1.0, 0.3, 0.3]
    assert "f.py:factors]" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert load_reward("latent_reward", factors=["./f.py:factors"])._factors.width == 2
    with pytest.raises(SystemExit):
        propose.main([*command, "--endpoint", server.url])
    assert "is there already" in capsys.readouterr().err

    with Author(replies[0]) as server:  # three candidates, one summary, one repair
        out = ["--out", str(tmp_path / "g.py"), "--candidates", "3", "--repairs", "1"]
        assert propose.main([*command, *out, "--endpoint", server.url, "--sandbox", sandbox.name]) == 1
        asked = list(server.requests)
    assert "no function that runs after 1 repairs" in capsys.readouterr().err
    assert len(asked) == 5
    assert asked[3]["messages"][-1]["content"].count(evil) == 3
    assert not (tmp_path / "g.py").exists()
    assert not marker.exists()


def test_the_trial_has_what_the_built_in_factors_read():
    assert {name: function(*TRIAL)[0] != [0.0] for name, function in BUILT_IN.items()} == {
        "length": True, "position": False, "repetition": False, "digits": True, "equations": True,
    }  # fmt: skip
