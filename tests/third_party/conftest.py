"""Lets the tests of the distributions here find their modules without an install."""

import sys
from pathlib import Path

sys.path += [str(folder.parent) for folder in Path(__file__).parent.glob("*/pyproject.toml")]
