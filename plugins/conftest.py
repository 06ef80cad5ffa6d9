"""The fixtures of the core's tests, for the plugins' tests too."""

from tests.conftest import policy_path, reward_model_path, run_ranks, write  # noqa: F401
