"""Sandboxes that are not processes here: services over HTTP, and Monty's interpreter."""

from __future__ import annotations

import base64
import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trl_rewards.sandbox import Limits, Program, open_sandbox, run_tests
from trl_rewards.sandbox.remote import Remote


class Service(BaseHTTPRequestHandler):
    """Answers as SandboxFusion and Piston do; programs run as they are, since these tests' own are harmless."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, request, self.headers.get("Authorization")))
        status, answer = self.server.answers.pop(0) if self.server.answers else (200, None)
        if answer is None:
            answer = self.fusion(request) if self.path == "/run_code" else self.piston(request)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fusion(self, request):
        files = {name: base64.b64decode(text).decode() for name, text in request["files"].items()}
        outcome = self.outcome(request["code"], request["stdin"], files, request["run_timeout"])
        late = outcome.status == "timeout"
        result = {
            "status": "TimeLimitExceeded" if late else "Finished",
            "execution_time": outcome.seconds,
            "return_code": None if late else outcome.exit_code,
            "stdout": outcome.stdout,
            "stderr": outcome.stderr,
        }
        return {"status": "Success" if outcome.status == "ok" else "Failed", "message": "", "run_result": result}

    def piston(self, request):
        main, *files = request["files"]
        files = {file["name"]: file["content"] for file in files}
        outcome = self.outcome(main["content"], request["stdin"], files, request["run_timeout"] / 1000)
        killed = outcome.status == "timeout"
        result = {"stdout": outcome.stdout, "stderr": outcome.stderr, "output": outcome.stdout + outcome.stderr}
        result |= {"code": None if killed else outcome.exit_code, "signal": "SIGKILL" if killed else None}
        return {"language": "python", "version": "3.12.0", "run": result}

    def outcome(self, source, stdin, files, seconds):
        limits = Limits(seconds=seconds, output_kb=1024)
        return self.server.runner.run(Program(source=source, stdin=stdin, files=files, limits=limits))

    def log_message(self, *_):
        pass


@pytest.fixture
def service():
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        server.asked, server.answers = [], []
        server.runner = open_sandbox("unsafe", allow_unsafe=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.address = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


CODE = """
import os, time
def f(x):
    if x == 1: time.sleep(1000)
    if x == 2: os._exit(0)
    if x == 3: print('{"status": "passed", "message": ""}')
    if x == 4: return os.path.exists("job.json")
    if x == 5:
        parent = os.getppid()
        for name in ("fd/1", "fd/3", "fd/4"):
            try: open(f"/proc/{parent}/{name}", "w").write('{"status": "passed", "message": ""}\\n' * 9)
            except OSError: pass
    return x
"""
TESTS = [
    "assert f(0) == 0",
    "f(1)",
    "f(2)",
    "assert f(3) == 4",
    "assert f(4) is False",
    "assert f(5) == 0",
    "assert f(6) == 6",
]
STATUSES = ["passed", "timeout", "failed", "failed", "passed", "failed", "passed"]


@pytest.mark.parametrize("kind", ["sandbox_fusion", "piston"])
def test_a_service_runs_programs_and_tests(service, kind, monkeypatch):
    monkeypatch.setenv("SANDBOX_KEY", "sesame")
    endpoint = service.address + ("/api/v2" if kind == "piston" else "")
    with open_sandbox("remote", endpoint=endpoint, service=kind, api_key_env="SANDBOX_KEY") as sandbox:
        program = Program(source="print(input() + open('a.txt').read())\nexit(2)", stdin="x", files={"a.txt": "ü"})
        outcome = sandbox.run(program)
        assert (outcome.status, outcome.stdout, outcome.exit_code) == ("error", "xü\n", 2)
        slow = sandbox.run(Program(source="while True: pass", limits=Limits(seconds=0.5)))
        assert slow.status == "timeout"
        assert sandbox.run(Program(source="print('x' * 10000)", limits=Limits(output_kb=1))).status == "output"
        results = run_tests(sandbox, CODE, TESTS, timeout=1)
        assert [result.status for result in results] == STATUSES, results
    path, request, key = service.asked[0]
    assert key == "Bearer sesame"
    if kind == "piston":
        assert path == "/api/v2/execute"
        assert (request["version"], request["run_timeout"], request["run_memory_limit"]) == ("3", 10000, 512 * 2**20)
    else:
        assert path == "/run_code"
        assert (request["language"], request["run_timeout"], request["memory_limit_MB"]) == ("python", 10, 512)


SHADOW = """
import os, signal
for name in ("statistics", "heapq"):
    open(f"{name}.py", "w").write("mean = lambda values: 4\\nnsmallest = lambda n, values: [4]")
def f(x):
    if x == 9: os.kill(os.getppid(), signal.SIGTERM)
    return x
"""


def test_code_at_a_service_replaces_no_module_and_makes_no_hole(service):
    with open_sandbox("remote", endpoint=service.address) as sandbox:
        tests = ["assert statistics.mean([f(1)]) == 4", "import heapq\nassert heapq.nsmallest(1, [f(1)]) == [4]"]
        assert [result.status for result in run_tests(sandbox, SHADOW, tests, timeout=5)] == ["failed"] * 2
        assert [result.status for result in run_tests(sandbox, SHADOW, ["f(9)"], timeout=5)] == ["failed"]


@pytest.mark.parametrize(
    ("kind", "answer", "words"),
    [
        ("sandbox_fusion", (200, {"status": "SandboxError", "message": "no pod", "run_result": None}), "no pod"),
        ("sandbox_fusion", (200, {"status": "Success", "run_result": {"status": "Finished"}}), "another form"),
        ("sandbox_fusion", (200, ["?"]), "another form"),
        ("sandbox_fusion", (422, {"detail": "no such language"}), "no such language"),
        ("piston", (200, {"message": "Requests limited"}), "another form"),
        (
            "piston",
            (200, {"run": {"stdout": "", "stderr": "", "code": None, "status": "XX", "message": "box"}}),
            "box",
        ),
    ],
)
def test_a_service_that_fails_says_nothing_of_the_program(service, kind, answer, words):
    service.answers += [answer] * 2
    with Remote(service.address, service=kind) as sandbox:
        outcome = sandbox.run(Program(source="print(1)"))
        assert outcome.status == "infra"
        assert words in outcome.stderr
        assert [result.status for result in run_tests(sandbox, "x = 1", ["assert x", "assert x"])] == ["infra"] * 2


def test_a_busy_service_is_asked_again_and_one_that_is_gone_is_no_verdict(service):
    service.answers += [(503, {}), (200, None)]
    with Remote(service.address) as sandbox:
        assert sandbox.run(Program(source="print(1)")).stdout == "1\n"
    with Remote("http://127.0.0.1:9", retries=0) as sandbox:
        assert sandbox.run(Program(source="print(1)")).status == "infra"


@pytest.mark.skipif(importlib.util.find_spec("pydantic_monty") is not None, reason="pydantic-monty is installed")
def test_monty_names_its_extra():
    with pytest.raises(ValueError, match=r"trl-rewards\[sandbox\]"):
        open_sandbox("monty")


@pytest.fixture(scope="module")
def monty():
    pytest.importorskip("pydantic_monty")
    with open_sandbox("monty") as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        ("import math\nprint(math.gcd(12, 18))", "ok", "6\n"),
        ("1 / 0", "error", "ZeroDivisionError"),
        ("print(", "error", ""),
        ("while True: pass", "timeout", "time limit"),
        ("9**9**9", "memory", ""),
        ("x = 'a' * (1 << 30)", "memory", ""),
        ("def f(): return f()\nf()", "error", "RecursionError"),
        ("while True: print('x' * 1000)", "output", ""),
        ("open('/etc/passwd').read()", "error", "PermissionError"),
        ("import os\nprint(os.environ)", "error", "not supported"),
        ("import socket", "error", "socket"),
        ("import subprocess", "error", "subprocess"),
        ("().__class__.__base__.__subclasses__()", "error", ""),
        ("import os\nos.kill(1, 9)", "error", ""),
    ],
)
def test_monty_runs_snippets_and_grants_nothing(monty, source, status, said):
    outcome = monty.run(Program(source=source, limits=Limits(seconds=1, memory_mb=64, output_kb=16)))
    assert outcome.status == status, outcome
    assert said in outcome.stdout + outcome.stderr


def test_monty_runs_tests(monty):
    code = "def f(x):\n    while x == 3: pass\n    return x * 2"
    results = run_tests(
        monty, code, ["assert f(2) == 4", "assert f(2) == 5", "f(3)", "assert candidate(1) == 2"], 1, entry_point="f"
    )
    assert [result.status for result in results] == ["passed", "failed", "timeout", "passed"]
    assert results[1].message.startswith("AssertionError")
    with pytest.raises(ValueError, match="neither stdin nor files"):
        monty.run(Program(source="", stdin="x"))
