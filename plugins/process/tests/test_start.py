"""What recipes/process/start.py makes: labels by hand, and a model that the rewards read as it was trained."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
import torch
from trl_rewards_process.formats import encode_steps

from trl_rewards import Recipe, load_reward
from trl_rewards.bundled import quiz
from trl_rewards.testing import make_samples

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.fixture(scope="module")
def process():
    spec = importlib.util.spec_from_file_location("start", RECIPES / "process" / "start.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUESTION = quiz.Question("chain", "Compute 3 + 4 - 2.", "3 + 4 = 7\n7 - 2 = 5", "5", ["It is {}."], [])


@pytest.mark.parametrize(
    ("steps", "wrong"),
    [
        (["3 + 4 = 7", "7 - 2 = 5", "It is 5."], -1),
        (["3 + 4 = 7", "7 - 2 = 5", "It is 5. It is 5. Is that good?"], 2),
        (["3 + 4 = 8", "8 - 2 = 6", "It is 6."], 0),
        (["3 + 4 = 7", "7 - 2 = 5", "It is 7."], 2),
        (["3 + 4 = 7", "It is 5."], 1),
        (["3 + 4 = 7", "7 - 2 = 5", "I do not know."], 2),
        (["easy", "It is 5."], 0),
        (["It is 5."], 0),
    ],
)
def test_the_first_wrong_step_is_known_by_rule(process, steps, wrong):
    assert process.first_wrong(QUESTION, steps) == wrong


def test_labels_stand_where_the_reward_reads_scores_up_to_the_first_wrong_step(process):
    tokenizer, layout = process.new_tokenizer(), process.READ[0]
    for steps, label, wanted in ((["1", "3", "3"], 1, [1, 0]), (["1", "2"], -1, [1, 1])):
        places = encode_steps(tokenizer, layout, "1 + 1?", steps).places
        ids, labels = process.encoded(tokenizer, layout, process.Solution("1 + 1?", steps, label, "clean"))
        assert len(ids) == len(labels)
        assert {at: each for at, each in enumerate(labels) if each >= 0} == dict(zip(places, wanted, strict=False))


def test_the_rewards_read_the_model_as_it_was_trained(process, tmp_path):
    rng = random.Random(0)
    torch.manual_seed(0)
    model = process.train(tmp_path, rng, process.solutions(rng, set()), 1).eval()
    problem, steps = "Compute 3 + 4.", ["3 + 4 = 7", "It is 7."]
    for layout, recipe in zip(process.READ, ("process", "reasonflux-prm"), strict=True):
        encoded = encode_steps(process.new_tokenizer(), layout, problem, steps)
        with torch.no_grad():
            wanted = model(torch.tensor([encoded.ids])).logits[0, encoded.places].softmax(dim=-1)[:, 1].tolist()
        sources = Recipe.load(RECIPES / recipe / "cpu.yaml", check_trl=False).rewards
        (source,) = (source for source in sources if "path" in source.options)
        reward = load_reward(source.use, **source.options | {"path": str(tmp_path)})
        completion = f"<think>{steps[0]}</think><answer>{steps[1]}</answer>"
        samples = make_samples([completion], prompts=[problem])
        assert reward.steps_of(samples) == [steps]
        assert reward.score_steps(samples, [steps]) == [pytest.approx(wanted, abs=1e-5)]


def test_solutions_that_are_one_step_are_right_if_their_answer_is(process):
    found = process.solutions(random.Random(0), set(), whole=1.0)
    rows = [next(found) for _ in range(100)]
    assert all(len(row.steps) == 1 for row in rows)
    assert {row.label for row in rows} == {-1, 0}
