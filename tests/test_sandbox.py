"""Hostile programs get nothing: not out of the sandbox, not a pass for nothing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trl_rewards import RewardError
from trl_rewards.sandbox import Limits, Outcome, Program, folders, open_sandbox, opening, run_tests
from trl_rewards.sandbox.local import Unsafe, landlock_version
from trl_rewards.sandbox.programs import status_of
from trl_rewards.sandbox.selftest import PROBE, leaks

CONFINED = [
    pytest.param(
        "landlock", marks=pytest.mark.skipif(landlock_version() < 3, reason="the kernel has no Landlock ABI 3")
    ),
    pytest.param("bwrap", marks=pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")),
]


@pytest.fixture(scope="module", params=CONFINED)
def sandbox(request, tmp_path_factory):
    """Each confined backend that is here; its programs' folders must be gone after each program."""
    folder = tmp_path_factory.mktemp("programs")
    with open_sandbox(request.param, folder=str(folder)) as opened:
        yield opened
        assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What a program must not get at: a secret, listeners, another process, the trainer's environment."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "secret").write_text("the secret")
    os.environ["TRL_REWARDS_CANARY"] = "the canary"
    victim = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        udp.bind(("127.0.0.1", 0))
        unix.bind(str(folder / "unix"))
        unix.listen()
        datagrams.bind(str(folder / "datagrams"))
        abstract.bind(f"\0trl-rewards-{os.getpid()}")
        abstract.listen()
        yield {
            "FOLDER": str(folder),
            "TCP": tcp.getsockname()[1],
            "UDP": udp.getsockname()[1],
            "ABSTRACT": f"\0trl-rewards-{os.getpid()}",
            "TRAINER": os.getpid(),
            "VICTIM": victim.pid,
        }
    del os.environ["TRL_REWARDS_CANARY"]
    assert victim.poll() is None, "a program has ended another process"
    victim.kill()
    victim.wait()
    assert (folder / "secret").read_text() == "the secret"
    assert (folder / "secret").stat().st_mode & 0o777 == 0o644
    assert {path.name for path in folder.iterdir()} == {"secret", "unix", "datagrams"}


# Each line is an attack of its own: what comes back without an exception has got through.
ATTACKS = {
    "read": """
        open(FOLDER + "/secret").read()
        open("/etc/passwd").read()
        os.listdir(FOLDER)
        open("/etc/hostname").read()
        open(__import__("glob").glob("/root/.*rc")[0]).read()
    """,
    "read through links": """
        (os.symlink(FOLDER + "/secret", "soft"), open("soft").read())
        (os.symlink(FOLDER, "folder"), open("folder/secret").read())
        (os.symlink("/proc/self/root", "root"), os.listdir("root/tmp"))
        os.link(FOLDER + "/secret", "hard")
        os.rename(FOLDER + "/secret", "moved")
        os.open(FOLDER, os.O_TMPFILE | os.O_RDWR)
    """,
    "write": """
        open(FOLDER + "/written", "w")
        open(FOLDER + "/secret", "a")
        os.open(FOLDER + "/secret", os.O_RDONLY | os.O_TRUNC)
        os.truncate(FOLDER + "/secret", 0)
        os.unlink(FOLDER + "/secret")
        os.mkdir(FOLDER + "/made")
        os.rename("main.py", FOLDER + "/main.py")
        os.symlink("main.py", FOLDER + "/link")
        open("/written", "w")
        open("/dev/shm/written", "w")
        open(os.path.dirname(os.getcwd()) + "/written", "w")
        open(os.__file__, "a")
        (os.symlink(FOLDER + "/new", "dangling"), open("dangling", "w"))
    """,
    "change": """
        os.chmod(FOLDER + "/secret", 0o777)
        os.chown(FOLDER + "/secret", 1, 1)
        os.utime(FOLDER + "/secret")
        os.setxattr(FOLDER + "/secret", "user.x", b"x")
        os.fchmod(os.open(os.__file__, os.O_RDONLY), 0o777)
        os.mknod("device", 0o60666, 0x801)
        os.mkfifo(FOLDER + "/pipe")
    """,
    "environment": """
        os.environ["TRL_REWARDS_CANARY"]
        open(f"/proc/{TRAINER}/environ").read()
        open(f"/proc/{os.getppid()}/environ").read()
        open("/proc/1/environ").read()
        open("/proc/self/environ").read()
        [os.fstat(number) for number in range(3, 64) if descriptor_is_open(number)][0]
    """,
    "network": """
        socket.create_connection(("127.0.0.1", TCP), 5)
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", UDP))
        socket.socket(socket.AF_INET6)
        socket.socket(socket.AF_UNIX).connect(FOLDER + "/unix")
        socket.socket(socket.AF_UNIX).connect(ABSTRACT)
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"x", FOLDER + "/datagrams")
        socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"x", FOLDER + "/datagrams")
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
        socket.socket(socket.AF_VSOCK)
        socket.create_server(("127.0.0.1", 0))
        __import__("urllib.request").request.urlopen(f"http://127.0.0.1:{TCP}", timeout=5)
    """,
    "other processes": """
        os.kill(TRAINER, 0)
        os.kill(VICTIM, signal.SIGKILL)
        os.kill(-1, signal.SIGKILL)
        os.killpg(os.getpgid(VICTIM), signal.SIGKILL)
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pidfd_send_signal(os.pidfd_open(VICTIM), signal.SIGKILL)
        fcntl.fcntl(socket.socketpair()[0], fcntl.F_SETOWN, VICTIM)
        resource.prlimit(VICTIM, resource.RLIMIT_NOFILE, (0, 0))
        os.setpriority(os.PRIO_PROCESS, VICTIM, 19)
        os.sched_setaffinity(VICTIM, {0})
        c("ptrace", 16, VICTIM, 0, 0)
        c("process_vm_readv", VICTIM, 0, 0, 0, 0, 0)
        open(f"/proc/{VICTIM}/mem", "rb")
    """,
    "starting processes": """
        os.fork()
        os.posix_spawn(sys.executable, ["python", "-c", ""], {})
        subprocess.run([sys.executable, "-c", ""])
        os.execv("/bin/sh", ["sh", "-c", "echo ESCAPED"])
        os.execv("/bin/ls", ["ls", "/"])
        threading.Thread(target=print).start()
        multiprocessing.Process(target=print).start()
        os.setsid()
    """,
    "more rights": """
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        os.setuid(1)
        os.setgroups([])
        os.chroot(".")
        c("mount", b"none", b".", b"tmpfs", 0, 0)
        c("unshare", 0x10000000)
        c("umount2", b"/", 2)
        c("personality", 0x0040000)
        c("memfd_create", b"x", 0)
        syscall(425, 1, bytes(120))
        syscall(435, bytes(88), 88)
        syscall(321, 0, bytes(64), 64)
        syscall(298, bytes(64), 0, -1, -1, 0)
        syscall(323, 0)
        syscall(250, 0, -3, 0)
        syscall(304, -100, bytes(64), 0)
    """,
}
HARNESS = """
import ctypes, fcntl, multiprocessing, os, resource, shutil, signal, socket, subprocess, sys, threading

libc = ctypes.CDLL(None, use_errno=True)

def fails(result):
    if result < 0:
        raise OSError(ctypes.get_errno())

def c(name, *arguments):
    fails(getattr(libc, name)(*arguments))

def syscall(number, *arguments):
    fails(libc.syscall(number, *arguments))

def descriptor_is_open(number):
    try:
        return bool(os.fstat(number))
    except OSError:
        return False

for attack in ATTACKS:
    try:
        eval(attack)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, AttributeError, SystemError):
        pass
    else:
        print("got through:", attack)
print("done")
"""


@pytest.mark.parametrize("kind", ATTACKS)
def test_no_attack_gets_through(sandbox, world, kind):
    attacks = [line.strip() for line in ATTACKS[kind].strip().splitlines()]
    if platform.machine() != "x86_64":  # the numbers are that architecture's
        attacks = [attack for attack in attacks if not attack.startswith("syscall(")]
    given = "".join(f"{name} = {value!r}\n" for name, value in (world | {"ATTACKS": attacks}).items())
    outcome = sandbox.run(Program(source=given + HARNESS, limits=Limits(seconds=30, memory_mb=256, disk_mb=64)))
    assert outcome.stdout == "done\n", outcome


def test_the_same_attacks_get_through_where_there_is_no_sandbox(world):
    given = "".join(f"{name} = {value!r}\n" for name, value in world.items())
    attacks = [
        "open(FOLDER + '/secret').read()",
        "os.kill(VICTIM, 0)",
        "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)",
    ]
    attacks += ["socket.create_connection(('127.0.0.1', TCP), 5)", "open(f'/proc/{TRAINER}/environ').read()"]
    with open_sandbox("unsafe", allow_unsafe=True) as unsafe:
        outcome = unsafe.run(Program(source=f"{given}ATTACKS = {attacks!r}\n{HARNESS}"))
    assert outcome.stdout.count("got through") == len(attacks)


GREEDY = {
    "memory": ("x = bytearray(1 << 30)", "memory"),
    "memory, bit by bit": ("x = []\nwhile True:\n    x.append(' ' * 1000000)", "memory"),
    "shared memory": ("import mmap\nmmap.mmap(-1, 1 << 30)", "error"),
    "output": ("while True:\n    print('x' * 1000)", "output"),
    "errors": ("import os\nwhile True:\n    os.write(2, b'x' * 1000)", "output"),
    "loop": ("while True:\n    pass", "timeout"),
    "sleep": ("import time\ntime.sleep(1000)", "timeout"),
    "deaf": (
        "import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except OSError: pass\n"
        "while True:\n    try: time.sleep(1000)\n    except BaseException: pass",
        "timeout",
    ),
    "silent": ("import os, time\nos.close(1)\nos.close(2)\ntime.sleep(1000)", "timeout"),
    "recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", ("memory", "error", "timeout")),
    "stack": ("x = []\nfor _ in range(10**6): x = [x]\nrepr(x)", ("memory", "error")),
    "crash": ("import ctypes\nctypes.string_at(0)", "error"),
    "large file": ("with open('x', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))", ("error", "output")),
    "sparse file": ("open('x', 'wb').truncate(1 << 40)", "error"),
    "many files": ("for n in range(10**9): open(str(n), 'w').write('x')", "output"),
    "many bytes": ("for n in range(10**9): open(str(n % 50), 'wb').write(bytes(4 << 20))", "output"),
    "files where no path reaches": (
        "import os, time\nfor _ in range(20):\n    os.mkdir('d' * 250)\n    os.chdir('d' * 250)\n"
        "for n in range(50): open(str(n), 'wb').write(bytes(4 << 20))\ntime.sleep(10)",
        "output",
    ),
    "files that cannot be listed": (
        "import os, time\nos.mkdir('d', 0o300)\n"
        "for n in range(50): open(f'd/{n}', 'wb').write(bytes(4 << 20))\ntime.sleep(10)",
        "output",
    ),
    "many descriptors": ("x = [open('main.py') for _ in range(1000)]", "error"),
}


@pytest.mark.parametrize("kind", GREEDY)
def test_who_takes_too_much_is_stopped(sandbox, kind):
    source, status = GREEDY[kind]
    seconds = 1 if "timeout" in (status, *status) else 30
    limits = Limits(seconds=seconds, memory_mb=128, output_kb=16, disk_mb=16)
    outcome = sandbox.run(Program(source=source, limits=limits))
    assert outcome.status in status, outcome
    assert len(outcome.stdout) <= 16 * 1024
    assert len(outcome.stderr) <= 16 * 1024


def test_whatever_a_program_makes_of_its_folder_is_removed(sandbox):
    source = (
        "import os, shutil\n"
        "os.mkdir('closed', 0)\n"
        "os.symlink('/', 'root')\n"
        "os.symlink('loop', 'loop')\n"
        "for n in range(9): os.makedirs(f'.{n}.lifted/a/b')\n"
        "for _ in range(1200):\n    os.mkdir('d')\n    os.chdir('d')\n"
        "open('bottom', 'w')\n"
        "os.open('bottom', os.O_CREAT, 0)\n"
    )
    assert sandbox.run(Program(source=source)).status == "ok"
    assert sandbox.run(Program(source="import os, shutil\nshutil.rmtree(os.getcwd(), True)\nprint(1)")).stdout == "1\n"
    assert list(Path(sandbox.folder).iterdir()) == []


def test_nothing_of_a_program_runs_when_its_folder_is_removed(sandbox, monkeypatch):
    inside: list[list[str]] = []

    def processes(folder: str) -> list[str]:
        found = []
        for process in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.readlink(f"/proc/{process}/cwd").startswith(folder):
                    found.append(process)
            except OSError:
                continue
        return found

    def remove(folder: str) -> None:
        inside.append(processes(folder))
        removed(folder)

    removed = folders.remove
    monkeypatch.setattr(folders, "remove", remove)
    busy = "import os\nwhile True:\n    os.mkdir('a')\n    os.rename('a', 'b')\n    os.rmdir('b')"
    for _ in range(5):
        assert sandbox.run(Program(source=busy, limits=Limits(seconds=0.3))).status == "timeout"
    assert inside == [[]] * 5


FORGERIES = {
    "leaves at once": "import os\nos._exit(0)",
    "exits": "raise SystemExit(0)",
    "leaves when called": "import os\ndef f(x): os._exit(0)",
    "exits when called": "import sys\ndef f(x): sys.exit(0)",
    "prints verdicts": """print('{"at": "up"}\\n{"status": "passed", "message": ""}\\n' * 9)""",
    "writes verdicts everywhere": """
import os
def f(x):
    for number in range(64):
        try: os.write(number, b'{"status": "passed", "message": ""}\\n')
        except OSError: pass
    return 0
""",
    "equals everything": """
class E:
    def __eq__(self, other): return True
    __ne__ = __sub__ = __abs__ = __lt__ = __le__ = __contains__ = __eq__
    def __hash__(self): return hash(4)
def f(x): return E()
""",
    "an int that equals everything": "class E(int):\n    def __eq__(s, o): return True\ndef f(x): return E(0)",
    "a list that equals everything": "class E(list):\n    def __eq__(s, o): return True\ndef f(x): return E()",
    "redefines built-ins": """
import builtins
builtins.AssertionError = builtins.Exception = Warning
set = abs = lambda *a: 0
builtins.set = builtins.abs = builtins.isinstance = set
def f(x): return 0
""",
    "redefines modules": """
import math, sys
math.isclose = lambda *a: True
class math:
    isclose = lambda *a: True
sys.modules['math'] = math
def f(x): return 0
""",
    "looks for the tests": """
import gc, os, re, sys
def f(x):
    seen = [value for value in gc.get_objects() if isinstance(value, str)]
    for folder, _, names in os.walk('.'):
        seen += [open(os.path.join(folder, name), errors='replace').read() for name in names]
    frame = sys._getframe()
    while frame:
        seen += map(repr, [frame.f_locals, frame.f_globals])
        frame = frame.f_back
    return int((re.findall(r'assert f.2. == (.)', ' '.join(seen)) or [0])[0])
""",
    "raises the harness's own exceptions": """
import sys
def f(x):
    harness = sys.modules['__main__']
    raise (harness.Gone if x == 2 else harness.Late)('passed')
""",
    "ends the test's loops": "def f(x): raise StopIteration",
    "ends the tests from inside": "def f(x): raise KeyboardInterrupt",
    "answers nonsense": """
import os
def f(x):
    for number in range(3, 20):
        try: os.write(number, b'\\x00\\x00\\x00\\x02[]' * 99)
        except OSError: pass
""",
    "answers without end": """
import os
def f(x):
    for number in range(3, 20):
        try:
            while os.write(number, b'\\x01\\x00\\x00\\x00' + b'x' * 65536): pass
        except OSError: pass
""",
    "is not there": "def g(x): return x * x",
    "does not parse": "def f(x: return x",
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_no_pass_is_forged(sandbox, kind):
    tests = [
        "assert f(2) == 4",
        "assert set([f(2)]) == set([4])",
        "import math\nassert math.isclose(f(2), 4)",
        "assert abs(f(2) - 4) < 1e-6",
        "assert 4 in [f(2)] and f(2) in [4]",
        "assert not f(2) != 4",
        "assert all(map(lambda x: f(x) == 4, [2, 2]))",
    ]
    results = run_tests(sandbox, FORGERIES[kind], tests, timeout=10)
    assert [result.status for result in results] == ["failed"] * len(tests), results
    assert all(result.message for result in results)


@pytest.mark.parametrize(
    ("code", "test"),
    [
        ("return ask('get', x, '__globals__')", "f(lambda: 4)"),
        ("return ask('get', x, 'gi_frame')", "f(n for n in [4])"),
        ("return ask('item', x, 0)", "f(lambda: 4)"),
        ("return ask('get', x, '__class__')", "class T: pass\nf(T())"),
        ("x.right = lambda n: True", "class T:\n    def right(self, n): return n == 4\nf(T())"),
    ],
)
def test_the_code_reaches_nothing_of_the_tests_through_what_it_is_handed(sandbox, code, test):
    source = f"def f(x):\n    ask = object.__getattribute__(x, '_peer').ask\n    {code}"
    (result,) = run_tests(sandbox, source, [test])
    assert result.status == "failed"
    assert "is not allowed here" in result.message


HONEST = """
import collections, functools

def same(x): return x
def sort(items): items.sort(reverse=True)
def each(function, items): return [function(item) for item in items]
def count(n):
    for i in range(n): yield i
def tree(node): return 0 if node is None else node.value + tree(node.left) + tree(node.right)
def sum(a, b): return a * b
class Odd(ValueError): pass
def raises(): raise Odd("three")
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item); return self
    def __len__(self): return len(self.items)
    def __eq__(self, other): return self.items == other.items
LIMIT = 7
Point = collections.namedtuple("Point", "x y")
def point(): return Point(1, 2)
def adder(n): return functools.partial(int.__add__, n)
"""
VALUES = [
    *("None", "True", "-5", "2**100", "1.5", "float('inf')", "'ü\\ud800'", "b'x'", "(1, [2, {3}])", "frozenset({1})"),
    *(
        "{1: {'a': (2,)}}",
        "1+2j",
        "range(3)",
        "bytearray(b'x')",
        "decimal.Decimal('1.10')",
        "fractions.Fraction(1, 3)",
    ),
    *("datetime.datetime(2020, 1, 2, 3)", "datetime.timedelta(1)", "collections.deque([1])", "10**5000", "len", "int"),
]
PASS = [
    *(f"v = same({value})\nassert v == {value} and type(v) is type({value})" for value in VALUES),
    "x = [1, 3, 2]\nsort(x)\nassert x == [3, 2, 1]",
    "assert each(lambda n: n + 1, [1, 2]) == [2, 3]",
    "assert list(count(3)) == [0, 1, 2] and next(count(1)) == 0",
    "class Node:\n    def __init__(s, v, l=None, r=None): s.value, s.left, s.right = v, l, r\n"
    "assert tree(Node(1, Node(2), Node(3))) == 6",
    "assert sum(10, 15) == 150",  # the only name, so it is the code's
    "assert same(sum([1, 2])) == 3",  # the built-in one
    "try: raises()\nexcept ValueError as e: assert str(e) == 'three'",
    "try: raises()\nexcept Odd: pass\nelse: assert False",
    "s = Stack()\ns.push(1).push(2)\nassert len(s) == 2 and s.items == [1, 2] and s == Stack().push(1).push(2)",
    "assert isinstance(Stack(), Stack) and Stack() != 5",
    "assert LIMIT == 7 and point() == (1, 2)",
    "assert adder(2)(3) == 5",
    "assert statistics.mean([same(1), 3]) == 2",
    "print('x' * 10**6)",
]


def test_honest_code_is_seen_as_it_is(sandbox):
    results = run_tests(sandbox, HONEST, PASS, timeout=20)
    assert [(test, result) for test, result in zip(PASS, results, strict=True) if result.status != "passed"] == []


def test_what_came_of_each_test_is_told(sandbox):
    code = "import time\ndef f(x):\n    if x == 3: time.sleep(1000)\n    return x\n"
    tests = ["assert f(1) == 2", "y = 1\nassert f(3)", "f(1) / 0", "assert f(4) == 4", "assert (", "assert g(1)"]
    found = run_tests(sandbox, code, [*tests, "f(object())"], timeout=1)
    assert [result.status for result in found] == [
        *("failed", "timeout", "failed", "passed", "broken", "failed", "broken")
    ]
    assert found[0].message == "AssertionError: assert f(1) == 2"
    assert found[1].message == "took longer than 1 s"
    assert found[2].message == "ZeroDivisionError: division by zero: f(1) / 0"
    assert "name 'g' is not defined" in found[5].message
    assert "cannot travel" in found[6].message
    assert run_tests(sandbox, code, []) == []
    slow = run_tests(sandbox, "while True: pass", ["assert True"] * 3, timeout=1)
    assert [result.status for result in slow] == ["timeout"] * 3


def test_helpers_and_entry_point_as_in_humaneval(sandbox):
    setup = "def f(n): 'Double.'\n\ndef half(n): return n / 2\ndef check(candidate): assert candidate(half(4)) == 4"
    (right,) = run_tests(sandbox, "def f(n): return 2 * n", ["check(f)"], setup=setup, entry_point="f")
    forged = "def f(n): return 0\ndef half(n): return 0\ndef check(c): pass\n"
    (wrong,) = run_tests(sandbox, forged, ["check(f)"], setup=setup, entry_point="f")
    (broken,) = run_tests(sandbox, "def f(n): return 2 * n", ["check(f)"], setup="1 / 0", entry_point="f")
    assert (right.status, wrong.status, broken.status) == ("passed", "failed", "broken")


HOLES = {
    "raises where names are asked for": "peer.operations['names'] = lambda wanted: [][0]",
    "raises a mistake in the test": "peer.operations['names'] = lambda wanted: compile('(', 'test', 'exec')",
    "raises as if a module were missing": "peer.operations['names'] = lambda wanted: __import__('no_such_module')",
    "answers without an answer": "peer._answer = lambda message: peer._send(['answer'])",
    "answers with no value": "peer._answer = lambda message: peer._send(['answer', {'set': [[]]}, []])",
    "answers with another's changes": "peer._answer = lambda message: peer._send(['answer', {}, [[7, 1]]])",
}


@pytest.mark.parametrize("kind", HOLES)
def test_wrong_code_makes_no_hole_of_itself(sandbox, kind):
    code = (
        f"import gc, sys\nsolver = sys.modules['__main__'].Solver\ndef f(x): return 0\n"
        f"for peer in gc.get_objects():\n    if isinstance(peer, solver):\n        {HOLES[kind]}\n        break\n"
    )
    for setup in ("", "expected = 4\ndef known(): return f(2)"):
        results = run_tests(sandbox, code, ["assert f(2) == 4", "assert 4 == f(2)"], 10, setup=setup)
        assert [result.status for result in results] == ["failed"] * 2, results


def test_a_test_that_wants_what_is_not_there_is_broken(sandbox):
    tests = ["import no_such_module\nassert f(1) == 1", "assert f(1) == 1", "f(2)"]
    code = "def f(x):\n    if x == 2: import no_such_module\n    return x"
    assert [result.status for result in run_tests(sandbox, code, tests)] == ["broken", "passed", "failed"]


def test_a_program_gets_its_input_files_and_modules(sandbox):
    source = "import sys, helper\nprint(input(), helper.x, open('data/a.txt').read(), len(sys.stdin.read()))\nexit(3)"
    files = {"helper.py": "x = 5", "data/a.txt": "ü"}
    outcome = sandbox.run(Program(source=source, stdin="first\n" + "x" * 10**6, files=files))
    assert (outcome.status, outcome.stdout, outcome.exit_code) == ("error", f"first 5 ü {10**6}\n", 3)
    with pytest.raises(ValueError, match="must lie in its folder"):
        sandbox.run(Program(source="", files={"../x": ""}))


def test_threads_where_they_are_allowed(sandbox):
    source = "import os, threading\nt = threading.Thread(target=print, args=('hi',))\nt.start()\nt.join()\nos.fork()"
    outcome = sandbox.run(Program(source=source, limits=Limits(threads=True)))
    assert outcome.stdout == "hi\n"
    assert "PermissionError" in outcome.stderr


def test_64_programs_at_once_keep_their_order(sandbox):
    programs = [Program(source="print(int(input()) ** 2)", stdin=str(n)) for n in range(64)]
    assert [outcome.stdout for outcome in sandbox.run_all(programs)] == [f"{n * n}\n" for n in range(64)]
    tests = sandbox.spread(lambda n: run_tests(sandbox, f"x = {n}", [f"assert x == {n}", "assert x < 0"]), range(8))
    assert [[result.status for result in results] for results in tests] == [["passed", "failed"]] * 8


def test_installed_packages_where_they_are_allowed():
    source = "import numpy\nprint(numpy.arange(3).sum())"
    with open_any() as sandbox:
        assert "ModuleNotFoundError" in sandbox.run(Program(source=source)).stderr
        use = sandbox.name
    with open_sandbox(use, packages=True) as sandbox:
        outcome = sandbox.run(Program(source=source, limits=Limits(memory_mb=1024)))
        assert outcome.stdout == "3\n", outcome
        code = "import numpy\ndef f(x): return numpy.float64(x)\ndef g(x): return numpy.array([x, x])"
        tests = ["assert f(2) == 2.0", "import numpy\nassert (g(2) == numpy.array([2, 2])).all()"]
        results = run_tests(sandbox, code, tests, timeout=20, limits=Limits(memory_mb=1024))
        assert [result.status for result in results] == ["passed"] * 2, results


def open_any():
    try:
        return open_sandbox()
    except RewardError as error:
        pytest.skip(str(error))


def test_closing_kills_what_runs():
    sandbox = open_any()
    outcomes: list[Outcome] = []
    program = Program(source="import time\ntime.sleep(600)", limits=Limits(seconds=600))
    thread = threading.Thread(target=lambda: outcomes.append(sandbox.run(program)))
    thread.start()
    while not sandbox._running:
        pass
    sandbox.close()
    thread.join()
    assert outcomes[0].status == "infra"
    assert sandbox.run(Program(source="1")).status == "infra"


def test_a_backend_that_leaks_is_refused_and_auto_takes_nothing_weaker(monkeypatch):
    class Leaky(Unsafe):
        name = "landlock"

    monkeypatch.setattr(opening, "_CONFINED", {"landlock": Leaky})
    monkeypatch.setattr(opening, "_tested", {})
    with pytest.raises(
        RewardError, match=r"no sandbox works here: landlock reads other files, .*apt install bubblewrap"
    ):
        open_sandbox()
    monkeypatch.setattr(opening, "_CONFINED", {})
    with pytest.raises(RewardError, match="no sandbox works here"):
        open_sandbox()


def test_a_sandbox_that_does_not_come_up_is_no_verdict(monkeypatch, sandbox):
    command = ["/bin/sh", "-c", "echo broken >&2; exit 1"]
    monkeypatch.setattr(type(sandbox), "command", lambda self, inner, folder, told: command)
    outcome = sandbox.run(Program(source="print(1)"))
    assert outcome.status == "infra"
    assert outcome.stderr == f"the {sandbox.name} sandbox did not come up: broken"
    (result,) = run_tests(sandbox, "x = 1", ["assert x == 1"])
    assert (result.status, "broken" in result.message) == ("infra", True)
    assert "runs no program" in leaks(sandbox)[0]


def promises() -> dict[str, dict[str, str]]:
    """docs/sandbox.md: backend -> what a program does there -> the table's word for it."""
    page = (Path(__file__).parent.parent / "docs/sandbox.md").read_text(encoding="utf-8")
    lines = page[page.index("| a program |") :].partition("\n\n")[0].splitlines()
    (_, *backends), _, *rows = ([cell.strip(" *") for cell in line.strip("| ").split("|")] for line in lines)
    return {name: {row[0]: row[number] for row in rows} for number, name in enumerate(backends, start=1)}


def test_what_the_documentation_promises_is_what_the_self_test_finds(sandbox):
    assert set(promises()[sandbox.name].values()) == {"no"}
    assert leaks(sandbox) == []
    with open_sandbox("unsafe", allow_unsafe=True) as unsafe:
        found = leaks(unsafe)
    said = promises()["unsafe"]
    assert list(said) == re.findall(r'(?:tried\(|append\()"([^"]+)"', PROBE)
    assert {what for what, word in said.items() if word == "yes"} == set(found) - {"raises its own limits"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use": "unsafe"}, "allow_unsafe: true"),
        ({"use": "bwarp"}, "did you mean 'bwrap'"),
        ({"use": "remote"}, "go together"),
        ({"use": "auto", "endpoint": "http://x"}, "go together"),
        ({"use": "remote", "endpoint": "http://x", "service": "e2b"}, "sandbox_fusion, piston"),
    ],
)
def test_a_wrong_choice_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        open_sandbox(**options)


@pytest.mark.parametrize(
    ("code", "stderr", "status"),
    [
        (0, "", "ok"),
        (1, "x", "error"),
        (1, "Traceback\nMemoryError\n", "memory"),
        (-9, "", "memory"),
        (137, "", "memory"),
        (-24, "", "timeout"),
        (152, "", "timeout"),
        (-11, "", "error"),
    ],
)
def test_exit_codes(code, stderr, status):
    assert status_of(code, stderr) == status
