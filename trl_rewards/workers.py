"""Worker processes that can be killed: for code that may hang with the interpreter's lock held, where no thread helps.

Not multiprocessing, because its `spawn` imports the user's training script again and its `fork` copies a process that
holds CUDA; not a thread, because sympy on a pathological answer never lets another thread run. One item's hang costs
that item: its worker is killed and replaced. Linux and macOS.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from trl_rewards.errors import RewardError
from trl_rewards.samples import Failed

START_SECONDS = 120  # imports of a worker's first start; not counted against an item's time-out


class WorkerPool:
    """`size` processes, each holding `target(*args)`: a callable that is given one item at a time.

    `target` is "module:function", a factory that runs in the worker, so that nothing unpicklable travels.
    """

    def __init__(self, target: str, args: tuple = (), size: int = 1):
        self._job = pickle.dumps((target, args))
        self._size = size
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()

    def map(self, items: list, timeout: float | None = None) -> list[Any]:
        """One result per item, in order; Failed for an item that raised, ran past `timeout` seconds, or crashed."""
        with self._lock:
            return self._map(items, timeout)

    def _map(self, items: list, timeout: float | None) -> list[Any]:
        results: list[Any] = [None] * len(items)
        todo = deque(range(len(items)))
        busy: dict[Connection, tuple[_Worker, int, float]] = {}
        try:
            while todo or busy:
                while todo and len(busy) < self._size:
                    index = todo.popleft()
                    worker = self._hand_out((items[index], timeout))
                    busy[worker.connection] = (worker, index, time.monotonic() + (timeout or float("inf")))
                nearest = min(deadline for _, _, deadline in busy.values()) - time.monotonic()
                ready = wait(list(busy), timeout=None if nearest == float("inf") else max(nearest, 0))
                for connection in [connection for connection in busy if connection in ready]:
                    worker, index, _ = busy.pop(connection)
                    try:
                        results[index] = worker.connection.recv()
                        self._idle.append(worker)
                    except (EOFError, OSError):
                        results[index] = Failed(f"its worker process ended (exit code {worker.kill()})")
                for connection, (worker, index, deadline) in list(busy.items()):
                    if time.monotonic() >= deadline:
                        worker.kill()
                        del busy[connection]
                        results[index] = Failed(f"took longer than {timeout:g} s", status="timeout")
        finally:
            for worker, _, _ in busy.values():
                worker.kill()
        return results

    def _hand_out(self, work: tuple) -> _Worker:
        """Give work to an idle worker, which may have been killed meanwhile, or to one that is started for it."""
        while self._idle:
            worker = self._idle.pop()
            try:
                worker.connection.send(work)
            except OSError:
                worker.kill()
            else:
                return worker
        worker = _Worker(self._job)
        worker.connection.send(work)
        return worker

    def close(self) -> None:
        """End the worker processes."""
        while self._idle:
            self._idle.pop().kill()

    def __del__(self):
        try:  # noqa: SIM105 (contextlib may be gone at the interpreter's end)
            self.close()
        except Exception:
            pass

    def __getstate__(self):
        raise TypeError("a WorkerPool does not pickle; make one in each process")


class _Worker:
    def __init__(self, job: bytes):
        self.connection, theirs = Pipe()
        # No GPU, one thread: a scoring process must not take what the policy needs.
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trl_rewards.workers", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # so that the whole tree can be killed
            env=env,
        )
        theirs.close()
        self.connection.send_bytes(job)
        try:
            if not self.connection.poll(START_SECONDS):
                raise RewardError(f"a scoring process did not start within {START_SECONDS} s")
            problem = self.connection.recv()
        except (EOFError, OSError):
            problem = f"it ended with exit code {self.kill()}"
        if problem:
            self.kill()
            raise RewardError(f"a scoring process could not start: {problem}")

    def kill(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        return self.process.wait()


def _serve(connection: Connection) -> None:
    """The worker's side: build the callable, then answer items until the parent closes the pipe."""
    from trl_rewards.plugins import load_target

    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    sys.stdout = sys.stderr  # a reward's prints must not be lost, nor mixed into what the trainer prints
    target, args = pickle.loads(connection.recv_bytes())
    try:
        function = load_target(target)(*args)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send(None)
    while True:
        try:
            item, timeout = connection.recv()
        except EOFError:
            return
        # If the parent is killed while code here holds the interpreter's lock, no thread of ours runs: then the kernel
        # ends this process after so many CPU seconds.
        signal.setitimer(signal.ITIMER_PROF, 2 * timeout + 5 if timeout else 0)
        try:
            result = function(item)
        except Exception as error:
            result = Failed(f"{type(error).__name__}: {error}{_where(error)}")
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send(result)


def _end_with_parent(parent: int) -> None:
    """Leave when the parent is gone: a worker that waits for a network would never see the closed pipe."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
