"""Which sandbox: by name, or the strongest one that is there and keeps what it promises."""

from __future__ import annotations

import threading
from typing import Any

from trl_rewards.errors import RewardError, did_you_mean
from trl_rewards.sandbox.local import Bubblewrap, Landlock, LocalSandbox, Unsafe
from trl_rewards.sandbox.programs import Sandbox
from trl_rewards.sandbox.selftest import leaks

NAMES = ("auto", "bwrap", "landlock", "monty", "remote", "unsafe")
_CONFINED: dict[str, type[LocalSandbox]] = {"bwrap": Bubblewrap, "landlock": Landlock}  # the strongest first
_INSTALL = (
    "install bubblewrap (apt install bubblewrap) where user namespaces are allowed, or use a kernel with Landlock "
    "(Linux 6.2), or give the address of a sandbox service (sandbox: remote), or say that programs may do whatever "
    "you can (sandbox: unsafe, allow_unsafe: true)"
)
_tested: dict[tuple[str, bool], list[str]] = {}
_testing = threading.Lock()


def check_choice(use: str, *, endpoint: str | None = None, allow_unsafe: bool = False) -> None:
    """ValueError for a choice that cannot be opened anywhere."""
    if use not in NAMES:
        raise ValueError(f"sandbox must be one of {', '.join(NAMES)}, got {use!r}{did_you_mean(use, NAMES)}")
    if use == "unsafe" and not allow_unsafe:
        raise ValueError(
            "sandbox: unsafe runs what a model wrote as you, with your files and your network; set allow_unsafe: true "
            "if that is meant, or choose auto"
        )
    if (use == "remote") != (endpoint is not None):
        raise ValueError("sandbox: remote and endpoint, the service's address, go together")


def open_sandbox(
    use: str = "auto",
    *,
    processes: int | None = None,
    packages: bool = False,
    folder: str | None = None,
    endpoint: str | None = None,
    service: str = "sandbox_fusion",
    api_key_env: str | None = None,
    allow_unsafe: bool = False,
) -> Sandbox:
    """A sandbox that has passed its self-test. ValueError for a wrong choice, RewardError where none works here.

    `auto` is `bwrap` or `landlock`, never anything weaker. `processes` programs run at a time, by default as many as
    there are processors (32 for `remote`). `packages`: programs may import what is installed for this interpreter.
    `folder` is where programs' private folders are made. `endpoint`, `service` (`sandbox_fusion` or `piston`) and
    `api_key_env` are for `remote`.
    """
    check_choice(use, endpoint=endpoint, allow_unsafe=allow_unsafe)
    if use == "remote":
        from trl_rewards.sandbox.remote import Remote

        assert endpoint is not None
        return Remote(endpoint, service=service, api_key_env=api_key_env, processes=processes or 32)
    if use == "monty":
        from trl_rewards.sandbox.monty import Monty

        return Monty(processes=processes)
    local: dict[str, Any] = {"processes": processes, "packages": packages, "folder": folder}
    if use == "unsafe":
        return Unsafe(**local)
    problems = []
    for name in _CONFINED if use == "auto" else [use]:
        try:
            sandbox = _CONFINED[name](**local)
        except ValueError as error:
            problems.append(str(error))
            continue
        found = _leaks_of(sandbox)
        if not found:
            return sandbox
        problems.append(f"{name} {', '.join(found)}")
    what = "no sandbox works here" if use == "auto" else f"the {use} sandbox does not work here"
    raise RewardError(f"{what}: {'; '.join(problems)}. What to do: {_INSTALL}")


def _leaks_of(sandbox: LocalSandbox) -> list[str]:
    """The self-test's findings, once for each kind of sandbox in a process."""
    key = (sandbox.name, sandbox.packages)
    with _testing:
        if key not in _tested:
            _tested[key] = leaks(sandbox)
        return _tested[key]
