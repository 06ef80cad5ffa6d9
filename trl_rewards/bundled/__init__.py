"""The bundled policy and data: a first run that downloads nothing.  Made by `python -m trl_rewards.bundled.make`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The bundles that exist, sorted."""
    return sorted(config.parent.name for config in FOLDER.glob("*/config.json"))


def model_path(name: str = "tiny") -> Path:
    """The folder with config, weights and tokenizer, as `from_pretrained` takes it."""
    if name not in names():
        raise ValueError(f"no bundled model or data called {name!r}; there is {', '.join(names())}")
    return FOLDER / name


def load_data(name: str = "tiny", task: str | None = None) -> DatasetDict:
    """Splits `train` and `test` with columns prompt (conversational), answer, references, task, steps.

    Of one task alone, such as "chain" (sums of several steps), or of all. ValueError if there is no such.
    """
    # datasets takes seconds to import, and a caller who wants only the model should not wait for it.
    from datasets import Dataset, DatasetDict

    folder = model_path(name)
    # Dataset.from_json writes a cache under the user's home; reading the lines here leaves no trace.
    rows = {split: read_rows(folder / f"{split}.jsonl") for split in ("train", "test")}
    tasks = sorted({row["task"] for row in rows["train"]})
    if task is not None and task not in tasks:
        raise ValueError(f"bundled data {name!r} have no part called {task!r}; there is {', '.join(tasks)}")
    return DatasetDict(
        {split: Dataset.from_list([row for row in of if task in (None, row["task"])]) for split, of in rows.items()}
    )


def read_rows(path: Path) -> list[dict]:
    """One JSON object per line."""
    import json

    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
