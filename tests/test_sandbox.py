"""Hostile programs get nothing: not out of the sandbox, not a pass for nothing."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trl_rewards import RewardError
from trl_rewards.sandbox import Limits, Outcome, Program, opening, open_sandbox, run_tests
from trl_rewards.sandbox.local import Unsafe, landlock_version
from trl_rewards.sandbox.programs import status_of
from trl_rewards.sandbox.selftest import leaks

LINUX = sys.platform == "linux"
CONFINED = [
    pytest.param(
        "landlock", marks=pytest.mark.skipif(landlock_version() < 3, reason="the kernel has no Landlock ABI 3")
    ),
    pytest.param("bwrap", marks=pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")),
]
SMALL = Limits(seconds=20, memory_mb=128)


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
        "import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
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
        "for _ in range(1200):\n    os.mkdir('d')\n    os.chdir('d')\n"
        "open('bottom', 'w')\n"
        "os.open('bottom', os.O_CREAT, 0)\n"
    )
    assert sandbox.run(Program(source=source)).status == "ok"
    assert sandbox.run(Program(source="import os, shutil\nshutil.rmtree(os.getcwd(), True)\nprint(1)")).stdout == "1\n"
    assert list(Path(sandbox.folder).iterdir()) == []


FORGERIES = {
    "leaves at once": "import os\nos._exit(0)",
    "exits": "raise SystemExit(0)",
    "leaves when called": "import os\ndef f(x): os._exit(0)",
    "exits when called": "import sys\ndef f(x): sys.exit(0)",
    "prints verdicts": 'print(\'{"at": "up"}\\n{"status": "passed", "message": ""}\\n\' * 9)',
    "writes verdicts everywhere": (
        'import os\ndef f(x):\n    for n in range(64):\n        try: os.write(n, b\'{"status": "passed", "message": ""}\\n\')'
        "\n        except OSError: pass\n    return 0"
    ),
    "equals everything": (
        "class E:\n    def __eq__(s, o): return True\n    __ne__ = __sub__ = __abs__ = __lt__ = __le__ = __contains__ = __eq__\n"
        "    def __hash__(s): return hash(4)\ndef f(x): return E()"
    ),
    "an int that equals everything": "class E(int):\n    def __eq__(s, o): return True\ndef f(x): return E(0)",
    "a list that equals everything": "class E(list):\n    def __eq__(s, o): return True\ndef f(x): return E()",
    "redefines built-ins": (
        "import builtins\nbuiltins.AssertionError = builtins.Exception = Warning\nset = abs = lambda *a: 0\n"
        "builtins.set = builtins.abs = builtins.isinstance = set\ndef f(x): return 0"
    ),
    "redefines modules": (
        "import math, sys\nmath.isclose = lambda *a: True\nclass math:\n    isclose = lambda *a: True\n"
        "sys.modules['math'] = math\ndef f(x): return 0"
    ),
    "looks for the tests": (
        "import gc, os, re, sys\ndef f(x):\n    seen = [o for o in gc.get_objects() if isinstance(o, str)]\n"
        "    for d, _, names in os.walk('.'):\n        seen += [open(os.path.join(d, n), errors='replace').read() for n in names]\n"
        "    frame = sys._getframe()\n    while frame:\n        seen += map(repr, [frame.f_locals, frame.f_globals]); frame = frame.f_back\n"
        "    return int((re.findall(r'assert f\\(2\\) == (\\d+)', ' '.join(seen)) or [0])[0])"
    ),
    "raises the harness's own exceptions": (
        "import sys\ndef f(x):\n    m = sys.modules['__main__']\n    raise (m.Gone if x == 2 else m.Late)('passed')"
    ),
    "ends the tests from inside": "def f(x): raise KeyboardInterrupt",
    "answers nonsense": (
        "import os, sys\ndef f(x):\n    for n in range(3, 20):\n        try: os.write(n, b'\\x00\\x00\\x00\\x02[]' * 99)\n"
        "        except OSError: pass"
    ),
    "answers without end": (
        "import os\ndef f(x):\n    for n in range(3, 20):\n        try:\n            while os.write(n, b'\\x01\\x00\\x00\\x00' + b'x' * 65536): pass\n"
        "        except OSError: pass"
    ),
    "asks for the tests' variables": (
        "import sys\ndef f(x):\n    peer = sys.modules['__main__'].solver_peer = None\n    return 0"
    ),
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
    ]
    results = run_tests(sandbox, FORGERIES[kind], tests, timeout=10)
    assert [result.status for result in results] == ["failed"] * len(tests), results
    assert all(result.message for result in results)
