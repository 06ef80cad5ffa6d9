"""The `remote` sandbox: a service that runs programs, SandboxFusion or Piston, over HTTP.

SandboxFusion: https://github.com/bytedance/SandboxFusion (`POST /run_code`). Piston: its API's version 2,
https://github.com/engineer-man/piston (`POST /execute`). What the service keeps programs from is the service's word.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl_rewards.events import run_async
from trl_rewards.sandbox.programs import Outcome, Program, Sandbox, Status, Suite, TestResult, status_of

PEER = Path(__file__).with_name("peer.py")
COMPILE_SECONDS = 10
SERVICES = ("sandbox_fusion", "piston")


class Remote(Sandbox):
    """Programs at a service. Requests that fail are sent again; what fails for good is `infra`."""

    name = "remote"

    def __init__(
        self,
        endpoint: str,
        *,
        service: str = "sandbox_fusion",
        api_key_env: str | None = None,
        processes: int = 32,
        timeout: float = 120.0,
        retries: int = 4,
    ):
        """`endpoint` is what the service's paths come after: `http://host:8080`, for Piston `http://host:2000/api/v2`.
        `processes` requests are under way at a time; one try takes at most `timeout` seconds."""
        from trl_rewards.models.http import HttpClient

        if service not in SERVICES:
            raise ValueError(f"service must be one of {', '.join(SERVICES)}, got {service!r}")
        self.processes = processes
        self._service = service
        self._client = HttpClient(
            endpoint, api_key_env=api_key_env, timeout=timeout, retries=retries, concurrency=processes
        )

    def run(self, program: Program) -> Outcome:
        from trl_rewards.models.http import HttpFailure

        started = time.monotonic()
        fusion = self._service == "sandbox_fusion"
        request = _fusion_request(program) if fusion else _piston_request(program)
        try:
            answer = run_async(self._client.post("/run_code" if fusion else "/execute", request))
            outcome = _fusion_outcome(answer) if fusion else _piston_outcome(answer)
        except HttpFailure as failure:
            outcome = Outcome(status="infra", stderr=str(failure))
        except (AttributeError, KeyError, TypeError) as error:
            outcome = Outcome(status="infra", stderr=f"the service's answer has another form: {error!r}")
        most = program.limits.output_kb * 1024
        status = outcome.status
        if status != "infra" and max(len(outcome.stdout), len(outcome.stderr)) > most:
            status = "output"
        return Outcome(
            status=status,
            stdout=outcome.stdout[:most],
            stderr=outcome.stderr[:most],
            exit_code=outcome.exit_code,
            seconds=time.monotonic() - started,
        )

    def run_suite(self, suite: Suite) -> list[TestResult]:
        # The tests' process starts the code's, in the same place. That one might find a way to write among the
        # verdicts, but each bears a word that it cannot know.
        word = secrets.token_hex(16)
        job = suite.job(suite.tests) | {"word": word, "timeout": suite.timeout}
        count = len(suite.tests)
        limits = replace(suite.limits, seconds=suite.timeout * (count + 2) + 5, output_kb=64 + 2 * count)
        files = {"job.json": json.dumps(job), "solution.py": suite.code}
        outcome = self.run(Program(source=PEER.read_text(encoding="utf-8"), files=files, limits=limits))
        if outcome.status == "infra":
            return [TestResult("infra", outcome.stderr)] * count
        said = [line for line in _lines(outcome.stdout) if line.get("word") == word]
        results = [TestResult(line["status"], line["message"]) for line in said if "status" in line][:count]
        if not said and outcome.status == "error":
            return [TestResult("infra", f"the tests did not start: {outcome.stderr.strip()[-300:]}")] * count
        missing = "timeout" if outcome.status == "timeout" else "failed"
        return results + [TestResult(missing, "the run ended before this test")] * (count - len(results))


def _lines(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def _fusion_request(program: Program) -> dict[str, Any]:
    return {
        "language": "python",
        "code": program.source,
        "stdin": program.stdin,
        "files": {name: base64.b64encode(text.encode()).decode() for name, text in program.files.items()},
        "compile_timeout": COMPILE_SECONDS,
        "run_timeout": program.limits.seconds,
        "memory_limit_MB": program.limits.memory_mb,
    }


def _fusion_outcome(answer: dict[str, Any]) -> Outcome:
    result = answer.get("run_result")
    if answer["status"] == "SandboxError" or result is None:
        return Outcome(status="infra", stderr=f"SandboxFusion: {answer.get('message') or answer['status']}"[:500])
    stdout, stderr, code = result["stdout"] or "", result["stderr"] or "", result["return_code"]
    if result["status"] == "TimeLimitExceeded":
        return Outcome(status="timeout", stdout=stdout, stderr=stderr)
    if result["status"] != "Finished" or code is None:
        return Outcome(status="infra", stderr=f"SandboxFusion: {result['status']}: {stderr}"[:500])
    return Outcome(status=status_of(code, stderr), stdout=stdout, stderr=stderr, exit_code=code)


def _piston_request(program: Program) -> dict[str, Any]:
    files = [{"name": "main.py", "content": program.source}]
    files += [{"name": name, "content": text} for name, text in program.files.items()]
    return {
        "language": "python",
        "version": "3",
        "files": files,
        "stdin": program.stdin,
        "run_timeout": round(1000 * program.limits.seconds),
        "run_memory_limit": program.limits.memory_mb * 2**20,
    }


def _piston_outcome(answer: dict[str, Any]) -> Outcome:
    result = answer["run"]
    stdout, stderr, code = result["stdout"] or "", result["stderr"] or "", result["code"]
    why = result.get("status")  # younger versions say it; older ones only kill
    if why == "XX":
        return Outcome(status="infra", stderr=f"Piston: {result.get('message') or 'internal error'}"[:500])
    status: Status
    if why == "TO" or (why is None and result.get("signal") == "SIGKILL"):
        status = "timeout"
    elif why in ("OL", "EL"):
        status = "output"
    elif code is None:
        status = "memory" if result.get("signal") == "SIGKILL" else "error"
    else:
        status = status_of(code, stderr)
    return Outcome(status=status, stdout=stdout, stderr=stderr, exit_code=code)
