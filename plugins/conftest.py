"""The fixtures of the core's tests, for the plugins' tests too."""

from tests.conftest import policy_path, reward_model_path, write  # noqa: F401
