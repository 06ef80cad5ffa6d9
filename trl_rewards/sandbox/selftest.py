"""What a sandbox must keep from a program, tried out: a backend that leaks any of it is refused."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from pathlib import Path

from trl_rewards.sandbox.programs import Limits, Program, Sandbox

_MEMORY_MB = 160
_SECRET = "what no program may read"
PROBE = """
import json, os, resource, socket, sys

given, leaks = json.loads(sys.stdin.read()), []

def tried(what, attempt):
    try:
        attempt()
    except (OSError, ValueError, MemoryError):
        return
    leaks.append(what)

def environment_of_others():
    for process in (given["trainer"], os.getppid(), 1):
        try:
            return open(f"/proc/{process}/environ", "rb").read()
        except OSError:
            pass
    raise OSError

def fork():
    if not os.fork():
        os._exit(0)

allowed = {"HOME", "TMPDIR", "LANG", "LC_CTYPE", "PYTHONHASHSEED", "PYTHONPATH", "OMP_NUM_THREADS", "PWD",
           "OPENBLAS_NUM_THREADS"}
if set(os.environ) - allowed:
    leaks.append("has environment variables of the trainer")
tried("reads other files", lambda: open(given["secret"]).read())
tried("writes outside its folder", lambda: open(given["secret"] + ".written", "w").write("x"))
tried("changes the permissions of other files", lambda: os.chmod(given["secret"], 0o777))
tried("reads the environment of other processes", environment_of_others)
tried("signals other processes", lambda: os.kill(given["trainer"], 0))
tried("opens TCP connections", lambda: socket.create_connection(("127.0.0.1", given["port"]), 2))
tried("opens UDP sockets", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9)))
tried("opens Unix sockets", lambda: socket.socket(socket.AF_UNIX).connect(given["unix"]))
tried("starts processes", fork)
tried("raises its own limits", lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)))
tried("has more memory than it is given", lambda: bytearray(given["memory"]))
print(json.dumps(leaks))
"""


def leaks(sandbox: Sandbox) -> list[str]:
    """What a program in this sandbox can do and must not, or why none runs there at all. Empty if all is well."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        secret = Path(folder, "secret")
        secret.write_text(_SECRET, encoding="utf-8")
        unix = os.path.join(folder, "socket")
        with socket.socket(socket.AF_UNIX) as local:
            local.bind(unix)
            local.listen()
            given = {
                "secret": str(secret),
                "port": listener.getsockname()[1],
                "unix": unix,
                "trainer": os.getpid(),
                "memory": (_MEMORY_MB + 16) * 2**20,
            }
            program = Program(source=PROBE, stdin=json.dumps(given), limits=Limits(memory_mb=_MEMORY_MB, seconds=30))
            outcome = sandbox.run(program)
    if outcome.status != "ok":
        return [f"runs no program ({outcome.status}: {outcome.stderr.strip()[-300:]})"]
    return json.loads(outcome.stdout)
