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


def load_data(name: str = "tiny") -> DatasetDict:
    """Splits `train` and `test` with columns prompt (conversational), answer, references, task, steps."""
    # datasets takes seconds to import, and a caller who wants only the model should not wait for it.
    from datasets import Dataset, DatasetDict

    folder = model_path(name)
    # Dataset.from_json writes a cache under the user's home; reading the lines here leaves no trace.
    return DatasetDict({split: Dataset.from_list(read_rows(folder / f"{split}.jsonl")) for split in ("train", "test")})


def read_rows(path: Path) -> list[dict]:
    """One JSON object per line."""
    import json

    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
