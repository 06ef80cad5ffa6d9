"""Sandboxes on this machine: processes that a launcher confines, watched from outside, with all that they hold.

`bwrap` (bubblewrap: namespaces) and `landlock` are confined by the kernel; `unsafe` has resource limits, nothing else.
"""

from __future__ import annotations

import ctypes
import json
import marshal
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl_rewards.sandbox import folders
from trl_rewards.sandbox.programs import (
    Limits,
    Outcome,
    Program,
    Sandbox,
    Status,
    Suite,
    TestResult,
    status_of,
    usable_processors,
)
from trl_rewards.sandbox.syscalls import architecture, seccomp_filter

LAUNCHER = str(Path(__file__).with_name("launcher.py"))
PEER = Path(__file__).with_name("peer.py")
TICK = 0.05
"""Seconds between two looks at a program's folder."""
START_SECONDS = 30.0
"""For the two processes of a suite to come up; counted against no test."""
INTERPRETER = os.path.realpath(vars(sys)["_base_executable"])  # a virtual environment's own base
_BOOT = (  # `exit` and `quit` come from the site module, which costs more than the program's whole start
    "__import__('builtins').exit = __import__('builtins').quit = __import__('sys').exit; "
    "__file__ = __import__('sys').argv[0] = 'main.py'; "
    "exec(compile(open('main.py', encoding='utf-8').read(), 'main.py', 'exec'))"
)


class LocalSandbox(Sandbox):
    """What the local backends share: start, watch, kill, remove."""

    kernel = True
    """Whether the launcher takes rights away from the process, and does not only limit what it uses."""

    def __init__(self, *, processes: int | None = None, packages: bool = False, folder: str | None = None):
        """At most `processes` programs run at a time, by default as many as there are processors. With `packages` they
        may import what is installed for this interpreter, such as numpy. Their private folders are made in `folder`,
        by default the system's place for temporary files.
        """
        if processes is not None and processes < 1:
            raise ValueError(f"processes must be at least 1, got {processes}")
        self.processes = processes or usable_processors()
        self.packages = packages
        self.folder = folder
        self._running: set[Confined] = set()
        self._lock = threading.Lock()
        self._closed = False

    wraps = False
    """Whether the process that is started is not the program's, but tells of it and outlives it."""

    def command(self, inner: list[str], folder: str, told: int) -> list[str]:
        """What to start, so that `inner`, the launcher, runs for the program in `folder`. What `wraps` writes the
        program's process to the descriptor `told`, as `{"child-pid": …}`."""
        return inner

    def landlock(self, folder: str) -> tuple | None:
        """What the launcher tells Landlock; None where it is not used."""
        return None

    def readable(self) -> list[str]:
        """Files and folders that a program needs to run at all: the interpreter's and the system's libraries."""
        base = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
        base += [os.path.join(sys.base_exec_prefix, "lib"), "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
        base += ["/etc/ld.so.cache", "/usr/share/zoneinfo", "/etc/localtime"]
        return [path for path in dict.fromkeys(base + self.package_folders()) if os.path.exists(path)]

    def package_folders(self) -> list[str]:
        """Where installed packages are, if programs may import them."""
        return (
            list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))) if self.packages else []
        )

    def run(self, program: Program) -> Outcome:
        started = time.monotonic()
        files = dict(program.files) | {"main.py": program.source}
        try:
            with Confined(self, ["-c", _BOOT], files, program.limits, stdin=program.stdin) as confined:
                stopped = confined.watch(started + program.limits.seconds)
                problem = confined.problem()
        except OSError as error:
            return Outcome(status="infra", stderr=f"{type(error).__name__}: {error}")
        seconds = time.monotonic() - started
        if problem:
            return Outcome(status="infra", stderr=problem, seconds=seconds)
        most = program.limits.output_kb * 1024
        stdout, stderr = (part[:most].decode("utf-8", "replace") for part in (confined.stdout, confined.stderr))
        code = confined.process.returncode
        status = stopped or status_of(code, stderr)
        return Outcome(status=status, stdout=stdout, stderr=stderr, exit_code=code, seconds=seconds)

    def run_suite(self, suite: Suite) -> list[TestResult]:
        results: list[TestResult] = []
        while len(results) < len(suite.tests):  # a test that ends or hangs the code costs that test
            try:
                results += self._judge(suite, suite.tests[len(results) :])
            except OSError as error:
                left = len(suite.tests) - len(results)
                results += [TestResult("infra", f"{type(error).__name__}: {error}")] * left
            if suite.stop_early and any(result.status != "passed" for result in results):
                break
        return results

    def _judge(self, suite: Suite, tests: list[str]) -> list[TestResult]:
        """Results of the first tests, up to one that ended the processes; at least one."""
        limits = replace(
            suite.limits,
            seconds=START_SECONDS + suite.timeout * (len(tests) + 1),
            output_kb=64 + 2 * len(tests),  # a verdict is shorter
        )
        main = {"main.py": PEER.read_text(encoding="utf-8")}
        job = json.dumps(suite.job(tests))
        from_code, to_judge = os.pipe()
        from_judge, to_code = os.pipe()
        with ExitStack() as stack:
            try:
                ports = ["main.py", "solve", str(from_judge), str(to_judge)]
                files = main | {"solution.py": suite.code}
                solver = Confined(self, ports, files, limits, keep=(from_judge, to_judge), quiet=True)
                stack.enter_context(solver)
                ports = ["main.py", "judge", str(from_code), str(to_code)]
                judge = Confined(self, ports, main | {"job.json": job}, limits, keep=(from_code, to_code))
                stack.enter_context(judge)
            finally:  # they are the processes' now: here an open end would keep one from seeing that the other is gone
                for end in (from_code, to_judge, from_judge, to_code):
                    os.close(end)
            return _follow(judge, solver, len(tests), suite.timeout)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            running = list(self._running)
        for confined in running:
            confined.kill()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a sandbox does not pickle; open one in each process")


class Confined:
    """A confined process with its private folder, from start to removal."""

    def __init__(
        self,
        sandbox: LocalSandbox,
        arguments: Sequence[str],
        files: Mapping[str, str],
        limits: Limits,
        *,
        stdin: str = "",
        keep: Sequence[int] = (),
        quiet: bool = False,
    ):
        """Run the interpreter with `arguments` beside `files`. It inherits the descriptors in `keep`; with `quiet`
        nobody reads what it writes."""
        self.sandbox, self.limits = sandbox, limits
        self.stdout, self.stderr = bytearray(), bytearray()
        self._selector = selectors.DefaultSelector()
        self._looked = time.monotonic()
        self.folder = os.path.realpath(tempfile.mkdtemp(prefix="trl-rewards-sandbox-", dir=sandbox.folder))
        self._ready, ready = os.pipe()
        tells, told = os.pipe()
        try:
            folders.write_files(self.folder, files)
            launch = [INTERPRETER, "-I", "-S", LAUNCHER, self._config(arguments, ready)]
            command = sandbox.command(launch, self.folder, told)
            with tempfile.TemporaryFile() as given:
                given.write(stdin.encode("utf-8", "surrogatepass"))
                given.seek(0)
                self.process = subprocess.Popen(
                    command,
                    stdin=given if stdin else subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL if quiet else subprocess.PIPE,
                    stderr=subprocess.DEVNULL if quiet else subprocess.PIPE,
                    pass_fds=(ready, *([told] if sandbox.wraps else []), *keep),
                    env={},  # whatever stands between the launcher and this process must hold no secrets either
                    cwd=self.folder,
                    start_new_session=True,
                )
        except BaseException:
            os.close(self._ready)
            os.close(tells)
            folders.remove(self.folder)
            raise
        finally:
            os.close(ready)
            os.close(told)
        self._inner = _process_told(tells) if sandbox.wraps else None
        os.close(tells)
        for pipe, buffer in ((self.process.stdout, self.stdout), (self.process.stderr, self.stderr)):
            if pipe is not None:
                self._selector.register(pipe, selectors.EVENT_READ, buffer)
        with sandbox._lock:
            sandbox._running.add(self)
        if sandbox._closed:
            self.kill()

    def _config(self, arguments: Sequence[str], ready: int) -> str:
        """What the launcher is told."""
        limits, mib = self.limits, 2**20
        seconds = math.ceil(limits.seconds) + 1
        environment = {
            "HOME": self.folder,
            "TMPDIR": self.folder,
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",  # the same program, the same outcome
            "PYTHONPATH": os.pathsep.join(self.sandbox.package_folders()),  # empty counts as not set
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        config = {
            "ready": ready,
            "limits": {
                "RLIMIT_AS": limits.memory_mb * mib,
                "RLIMIT_CPU": seconds,
                "RLIMIT_FSIZE": limits.disk_mb * mib,
                "RLIMIT_NOFILE": 64,
                "RLIMIT_CORE": 0,
            },
            "kernel": self.sandbox.kernel,
            "landlock": self.sandbox.landlock(self.folder),
            "seccomp": seccomp_filter(limits.threads) if self.sandbox.kernel else b"",
            "command": [INTERPRETER, "-s", "-S", "-B", *arguments],
            "env": environment,
        }
        return marshal.dumps(config).hex()

    def watch(self, deadline: float, done: Callable[[], bool] | None = None, beside: Confined | None = None):
        """Read what it writes until it ends or is `done`; the Status at which it was stopped, if it was.

        `beside` is another process whose folder is watched too.
        """
        most = self.limits.output_kb * 1024
        while not (done and done()):
            left = deadline - time.monotonic()
            if left <= 0:
                return self._stop("timeout")
            ended = self.process.poll() is not None
            if self._selector.get_map():
                events = self._selector.select(0 if ended else min(TICK, left))
            else:
                events = []
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(min(TICK, left))
            for key, _ in events:
                part = os.read(key.fd, 65536)
                key.data.extend(part)
                if not part:
                    self._selector.unregister(key.fileobj)
                if len(key.data) > most:
                    return self._stop("output")
            if ended and not events:
                return None
            if time.monotonic() - self._looked > TICK:
                self._looked = time.monotonic()
                if any(folders.is_over(one.folder, self.limits.disk_mb * 2**20) for one in (self, beside) if one):
                    return self._stop("output")
        return None

    def _stop(self, status: Status) -> Status:
        self.kill()
        return status

    def problem(self) -> str:
        """Why nothing is known of the program; an empty string if it was started and left alone."""
        if self.sandbox._closed:
            return "the sandbox was closed"
        os.set_blocking(self._ready, False)
        try:
            came_up = os.read(self._ready, 16) == b"ok"
        except BlockingIOError:
            came_up = False
        said = self.stderr.decode("utf-8", "replace").strip()[-500:]
        return "" if came_up else f"the {self.sandbox.name} sandbox did not come up: {said or 'it said nothing'}"

    def kill(self) -> None:
        """End the process and all of its group."""
        # A confined program is one process: once that has ended, its number may be another's.
        if self.process.returncode is None or not self.sandbox.kernel:
            with suppress(ProcessLookupError):
                if self._inner:  # what wraps it ends when it is gone: until then it might still change its folder
                    os.kill(self._inner, signal.SIGKILL)
                else:
                    os.killpg(self.process.pid, signal.SIGKILL)

    def __enter__(self) -> Confined:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        try:
            self.process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with self.sandbox._lock:
            self.sandbox._running.discard(self)
        self._selector.close()
        os.close(self._ready)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        folders.remove(self.folder)


def _process_told(tells: int) -> int | None:
    """The process that what wraps it tells of; None if it says nothing, because it failed."""
    said = b""
    with selectors.DefaultSelector() as waiting:
        waiting.register(tells, selectors.EVENT_READ)
        while b"}" not in said:
            part = os.read(tells, 4096) if waiting.select(START_SECONDS) else b""
            if not part:
                return None
            said += part
    return json.loads(said)["child-pid"]


def _follow(judge: Confined, solver: Confined, count: int, timeout: float) -> list[TestResult]:
    """Read verdicts as they come, at least one; after `timeout` seconds without, the test that runs has timed out."""
    results: list[TestResult] = []
    lines = 0
    deadline = time.monotonic() + START_SECONDS
    while len(results) < count:
        stopped = judge.watch(deadline, lambda seen=lines: judge.stdout.count(b"\n") > seen, beside=solver)
        said = judge.stdout.split(b"\n")[lines:-1]
        for line in said:
            verdict = json.loads(line)
            if "status" in verdict:
                results.append(TestResult(verdict["status"], verdict["message"]))
        lines += len(said)
        deadline = time.monotonic() + timeout
        if said and not stopped:
            continue
        if lines == 0:
            problem = judge.problem() or solver.problem() or f"no answer within {START_SECONDS:g} s"
            return [TestResult("infra", problem)] * count
        if stopped == "timeout" and lines == 1:
            return [TestResult("timeout", f"the code does not load within {timeout:g} s")] * count
        if stopped == "timeout":
            return [*results, TestResult("timeout", f"took longer than {timeout:g} s")]
        if judge.sandbox._closed:
            return results + [TestResult("infra", "the sandbox was closed")] * (count - len(results))
        # The judge ended or was stopped for what it wrote: after a result, the next test has processes of its own.
        why = "wrote more than its folder or output may hold" if stopped else "the tests' process ended"
        return results or [TestResult("failed", why)]
    return results


class Landlock(LocalSandbox):
    """Landlock for files, a seccomp filter for all else, resource limits. Linux 6.2 or later; needs no privileges."""

    name = "landlock"

    def __init__(self, **options: Any):
        super().__init__(**options)
        version = landlock_version()
        if version < 3:
            raise ValueError(f"landlock needs Landlock ABI 3 (Linux 6.2) switched on in the kernel; it has {version}")
        if architecture() is None:
            raise ValueError("landlock has no table of system calls for this architecture")
        files = (1 << (16 if version >= 5 else 15)) - 1
        # TCP, which the seccomp filter refuses as well; then abstract sockets and signals, likewise
        self._handled = (files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)

    def landlock(self, folder: str) -> tuple:
        execute, write, read, list_ = 1, 2, 4, 8
        # in its own folder all but devices, sockets, named pipes and running what it wrote
        own = self._handled[0] & ~(execute | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 15)
        rules = [(path, read | list_) for path in self.readable()]
        rules += [(path, execute | read) for path in [INTERPRETER, *dynamic_linkers()]]
        rules += [("/dev/null", read | write), ("/dev/zero", read), ("/dev/urandom", read), ("/dev/random", read)]
        return self._handled, [*rules, (folder, own)]


class Bubblewrap(LocalSandbox):
    """Bubblewrap: namespaces of its own for files, network, processes and users; inside, the same seccomp filter."""

    name = "bwrap"
    wraps = True

    def __init__(self, **options: Any):
        super().__init__(**options)
        found = shutil.which("bwrap")
        if found is None:
            raise ValueError(
                "bwrap is not installed: it is bubblewrap in the system's packages (apt install bubblewrap)"
            )
        if architecture() is None:
            raise ValueError("bwrap has no table of system calls for this architecture")
        self._bwrap = found

    def command(self, inner: list[str], folder: str, told: int) -> list[str]:
        options = [
            "--info-fd",
            str(told),
            "--unshare-all",
            "--unshare-user",
            "--uid",
            "65534",
            "--gid",
            "65534",
            "--cap-drop",
            "ALL",
        ]
        options += ["--die-with-parent", "--new-session"]
        bound: list[str] = []
        for path in [*self.readable(), INTERPRETER, *dynamic_linkers(), LAUNCHER]:
            if not any(Path(path).is_relative_to(above) for above in bound):
                options += ["--ro-bind", path, path]
                bound.append(path)
        for device in ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"):
            options += ["--dev-bind", device, device]
        # The root is a file system in memory without a limit, so it is not writable; /proc is not there at all.
        return [self._bwrap, *options, "--bind", folder, folder, "--remount-ro", "/", "--chdir", folder, "--", *inner]


class Unsafe(LocalSandbox):
    """No sandbox: a process with resource limits that can read, write, send and start whatever this user can."""

    name = "unsafe"
    kernel = False


def landlock_version() -> int:
    """Version of Landlock's interface here; 0 without Landlock."""
    if sys.platform != "linux":
        return 0
    return max(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1)), 0)


def dynamic_linkers() -> list[str]:
    """The programs that load the interpreter's libraries."""
    candidates = [
        "/lib64/ld-linux-x86-64.so.2",
        "/lib/ld-linux-aarch64.so.1",
        *map(str, Path("/lib").glob("ld-musl-*")),
    ]
    return [path for path in candidates if os.path.exists(path)]
