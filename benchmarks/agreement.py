"""How often BLEU, and rewards that need no model, agree with recorded preferences on public pairs.

    python benchmarks/agreement.py --data FOLDER [--sets pandalm vicuna_people …] [--ties strict]

FOLDER holds folders as below; the sets that are absent are left out. Each is what `trl-rewards agree` reads: a file of
pairs with a label, and lists of references in columns. A set's table has a row per reward, with 95 % intervals.

- pandalm: PandaLM's 999 response pairs with three votes each, by majority (https://github.com/WeOpenML/PandaLM), with
  references of up to five strong models in `references.jsonl`, `{instruction, references: {model: text}}`.
- vicuna_people, vicuna_gpt4: Vicuna's 80 questions (https://github.com/lm-sys/FastChat): people on GPT-3.5 against
  Vicuna 13B, and GPT-4's scores of twelve pairs of models. References: GPT-4's answers, for people's pairs Bard's too.
- rm_bench: RM-Bench's chat, code and safety pairs (https://github.com/THU-KEG/RM-Bench), all styles against all.
  References: the right answer in its two other styles, which is more than a training set would have.
- mathprm: RewardBench's math-prm, people's solutions against a model's wrong ones. It has no references.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

from trl_rewards import Recipe
from trl_rewards.commands.agree import Recorded, agree
from trl_rewards.files import write_rows

HERE = Path(__file__).name
BARE = ("longer", "more_words", "more_different_words", "echo", "chance")
"""The rewards of this file, which need neither a model nor references."""


def longer(completions: list, **columns: Any) -> list[float]:
    """Characters: the paper's length baseline."""
    return [float(len(_text(completion))) for completion in completions]


def more_words(completions: list, **columns: Any) -> list[float]:
    """Words."""
    return [float(len(_text(completion).split())) for completion in completions]


def more_different_words(completions: list, **columns: Any) -> list[float]:
    """Share of the words that are different ones, in [0, 1]."""
    words = [_text(completion).lower().split() for completion in completions]
    return [len(set(found)) / len(found) if found else 0.0 for found in words]


def echo(prompts: list, completions: list, **columns: Any) -> list[float]:
    """Share of the prompt's different words that the answer has, in [0, 1]."""
    asked = [set(_text(prompt).lower().split()) for prompt in prompts]
    said = [set(_text(completion).lower().split()) for completion in completions]
    return [len(wanted & found) / max(len(wanted), 1) for wanted, found in zip(asked, said, strict=True)]


def chance(completions: list, **columns: Any) -> list[float]:
    """A number that the text decides, and nothing that it says."""
    return [float(zlib.crc32(_text(completion).encode())) for completion in completions]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else value[-1]["content"]


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def pair(prompt: str, first: Any, second: Any, label: int, references: list[str], category: str) -> dict[str, Any]:
    """A line of a set, with the first k references for each k."""
    row: dict[str, Any] = {"prompt": prompt, "first": str(first), "second": str(second), "label": str(label)}
    row |= {f"references_{k}": references[:k] for k in range(1, len(references) + 1)}
    return row | {"category": category}


def pandalm(folder: Path) -> Iterator[dict[str, Any]]:
    wanted = {row["instruction"]: list(row["references"].values()) for row in read(folder / "references.jsonl")}
    for row in read(folder / "testset-v1.jsonl"):
        prompt = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
        found = wanted.get(prompt) or wanted.get(row["instruction"]) or []
        vote, count = Counter(row[f"annotator{index}"] for index in (1, 2, 3)).most_common(1)[0]
        label = int(vote) if count >= 2 else 9  # no majority
        yield pair(prompt, row["response1"], row["response2"], label, found, row["motivation_app"])


MODELS = {  # review files -> models of answers.jsonl
    "vicuna-13b_20230322-clean-lang": "vicuna-13b",
    "vicuna-13b_20230322-new-hp-fp16": "vicuna-13b-20230322-new-hp-fp16",
    "vicuna-7b_20230322-fp16": "vicuna-7b-20230322-fp16",
    "llama": "llama-13b",
}


def vicuna(folder: Path) -> tuple[dict[int, dict], dict[tuple[str, int], str]]:
    questions = {row["question_id"]: row for row in read(folder / "questions.jsonl")}
    answers = {(row["model"], row["question_id"]): row["text"] for row in read(folder / "answers.jsonl")}
    return questions, answers


def vicuna_people(folder: Path) -> Iterator[dict[str, Any]]:
    questions, answers = vicuna(folder)
    for row in read(folder / "human_gpt35_vs_vicuna13b.jsonl"):
        number = row["question_id"]
        label = {"CHATGPT": 1, "VICUNA13B": 2, "TIE": 0}[row["label"]]
        references = [answers["gpt-4", number], answers["bard", number]]
        sides = answers["gpt35", number], answers["vicuna-13b", number]
        yield pair(questions[number]["text"], *sides, label, references, questions[number]["category"])


def vicuna_gpt4(folder: Path) -> Iterator[dict[str, Any]]:
    questions, answers = vicuna(folder)
    for row in read(folder / "gpt4_reviews.jsonl"):
        number, (version, names) = row["question_id"], row["file"].split("/review_")
        other = names.split("_")[0]
        other, model = MODELS.get(other, other), MODELS[version]
        first, second = row["score"]
        label = 9 if min(first, second) < 0 else 1 if first > second else 2 if second > first else 0
        sides = answers[other, number], answers[model, number]
        yield pair(questions[number]["text"], *sides, label, [answers["gpt-4", number]], other)


def rm_bench(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob("*.jsonl")):
        for row in read(file):
            for good in row["chosen"]:
                for bad in row["rejected"]:
                    others = [each for each in row["chosen"] if each != good]
                    yield pair(row["prompt"], good, bad, 1, others, file.stem)


def mathprm(folder: Path) -> Iterator[dict[str, Any]]:
    for row in read(folder / "math_prm_pairs.jsonl"):
        yield pair(row["problem"], "\n".join(row["chosen"]), "\n".join(row["rejected"]), 1, [], str(row["subject"]))


SETS: dict[str, tuple[str, Callable[[Path], Iterator[dict[str, Any]]], int]] = {  # folder, reader, references
    "pandalm": ("pandalm_human", pandalm, 5),
    "vicuna_people": ("vicuna80", vicuna_people, 2),
    "vicuna_gpt4": ("vicuna80", vicuna_gpt4, 1),
    "rm_bench": ("rm_bench", rm_bench, 2),
    "mathprm": ("rewardbench_mathprm", mathprm, 0),
}


def rewards(references: int) -> list[dict[str, Any]]:
    """Entries for `rewards:`: BLEU with 1 to so many references, what else compares with references, and `BARE`."""
    whole = {"extract_answer": False}
    found = [
        {"use": "bleuberi", "as": f"bleu_{k}", "with": {"references": f"references_{k}"} | whole}
        for k in range(1, references + 1)
    ]
    for name in ("rouge_l", "bleu_rouge_f1"):
        for k in sorted({1, references}) if references else []:
            found.append({"use": name, "as": f"{name}_{k}", "with": {"references": f"references_{k}"} | whole})
    return found + [{"use": f"./{HERE}:{name}"} for name in BARE]


def measure(data: Path, name: str, entries: list[dict[str, Any]], ties: Any = "half") -> dict[str, Any]:
    """What `trl-rewards agree` finds on a set."""
    folder, reader, _ = SETS[name]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, f"{name}.jsonl")
        write_rows(file, reader(data / folder))
        recipe = Recipe.parse({"rewards": entries}, base_dir=str(Path(__file__).parent), check_trl=False)
        recorded = Recorded(
            data=str(file), answers=("first", "second"), label="label", values=("1", "2", "0"), ties=ties
        )
        return agree(recipe, recorded, None, batch_size=256)


def table(found: dict[str, Any]) -> str:
    """Markdown, a row per reward."""
    lines = ["| reward | agrees | 95 % interval | pairs | ties |", "| --- | --- | --- | --- | --- |"]
    for each in found["results"]:
        if each["reward"] != "total" or len(found["results"]) == 1:
            interval = f"{each['low']:.1%} to {each['high']:.1%}"
            lines.append(f"| {each['reward']} | {each['share']:.1%} | {interval} | {each['pairs']} | {each['ties']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--ties", choices=("half", "strict"), default="half")
    arguments = parser.parse_args()
    disable_progress_bars()
    for name in arguments.sets:
        folder, _, references = SETS[name]
        if not (arguments.data / folder).is_dir():
            print(f"\n{name}: no folder {folder}")
            continue
        found = measure(arguments.data, name, rewards(references), arguments.ties)
        print(f"\n{name}: {found['left_out']}\n\n{table(found)}", flush=True)


if __name__ == "__main__":
    main()
