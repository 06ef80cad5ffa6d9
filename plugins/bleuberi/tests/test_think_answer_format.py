import json
from pathlib import Path

from trl_rewards import Samples, load_reward

CASES = json.loads(Path(__file__).with_name("bleu_cases.json").read_text(encoding="utf-8"))["format"]


def test_scores_are_those_of_the_authors_code():
    completions = [case["text"] for case in CASES]
    reward = load_reward("think_answer_format")
    assert reward.score(Samples(["q"] * len(CASES), completions)) == [case["expected"] for case in CASES]
    chats = [[{"role": "assistant", "content": text}] for text in completions]
    assert reward.score(Samples(["q"] * len(CASES), chats)) == [case["expected"] for case in CASES]
