import random
import re
from itertools import combinations
from pathlib import Path

import pytest
from trl_rewards_rewardanything.consensus import consensus, supporters


def brute_force(rankings, scores, support):
    """The length of the longest supported subsequence of any ranking, by trying all."""
    for size in range(max(map(len, rankings)), 0, -1):
        for ranking in rankings:
            for part in combinations(ranking, size):
                if all(supporters(scores, a, b) >= support for a, b in combinations(part, 2)):
                    return size
    return 0


def test_the_part_that_three_of_four_support_is_kept():
    rankings = [list("abc"), list("abc"), list("bac"), list("abc")]
    scores = [{"a": 5, "b": 4, "c": 1}, {"a": 5, "b": 3, "c": 1}, {"a": 3, "b": 5, "c": 2}, {"a": 4, "b": 2, "c": 2}]
    # a over b: judges 1, 2, 4; a over c: all; b over c: 1, 2, 3 (a tie is no support)
    assert consensus(rankings, scores, support=3) == ["a", "b", "c"]
    assert consensus(rankings, scores, support=4) == ["a", "c"]


def test_support_of_neighbours_is_not_enough():
    # Three judges have a over b, three have b over c, but only two have a over c.
    scores = [{"a": 3, "b": 2, "c": 1}, {"a": 3, "b": 2, "c": 1}, {"a": 2, "b": 1, "c": 3}, {"a": 1, "b": 3, "c": 2}]
    assert [supporters(scores, *pair) for pair in ("ab", "bc", "ac")] == [3, 3, 2]
    assert consensus([list("abc")] * 4, scores, support=3) == ["a", "b"]


def test_the_longest_part_is_found_on_random_judges():
    rng = random.Random(0)
    for _ in range(300):
        names = list("abcdefg")[: rng.randrange(1, 8)]
        scores = [{name: rng.randint(1, 5) for name in names} for _ in range(4)]
        rankings = [sorted(rng.sample(names, len(names)), key=lambda name: -judge[name]) for judge in scores]
        for support in (1, 2, 3, 4):
            found = consensus(rankings, scores, support)
            assert all(supporters(scores, a, b) >= support for a, b in combinations(found, 2))
            assert len(found) == brute_force(rankings, scores, support)
            assert found == consensus(rankings, scores, support)


def test_of_equally_long_parts_the_first_judges_better_ranked_names_are_kept():
    scores = [{"a": 2, "b": 2, "c": 2}] * 2
    assert consensus([list("bac"), list("abc")], scores, support=1) == ["b"]


def test_a_judge_that_lacks_a_name_supports_nothing_about_it():
    scores = [{"a": 3}, {"a": 3, "b": 1}]
    assert supporters(scores, "a", "b") == 1
    assert consensus([["a"], ["a", "b"]], scores, support=1) == ["a", "b"]


def test_twenty_candidates_take_no_time():
    rng = random.Random(1)
    names = [f"r{i}" for i in range(20)]
    scores = [{name: rng.randint(1, 5) for name in names} for _ in range(4)]
    rankings = [sorted(names, key=lambda name: -judge[name]) for judge in scores]
    assert len(consensus(rankings, scores, support=2)) >= 3


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="support must be from 1 to the number of judges"):
        consensus([["a"]], [{"a": 1}], support=2)
    with pytest.raises(ValueError, match="per judge"):
        consensus([["a"]], [], support=1)


def test_the_example_in_the_readme_holds():
    text = Path(__file__).parent.with_name("README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(example, {})
