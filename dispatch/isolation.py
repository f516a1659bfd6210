"""The parent's end of `dispatch.worker`: a process for tuning candidates that may crash or hang."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import Any, Iterator, Mapping, Optional

from backends import registry
from dispatch.errors import ArgumentError


class WorkerDied(Exception):
    """The worker process ended, or did not answer in time; the message says which."""


class WorkerProcess:
    """The other end of `dispatch.worker`."""

    def __init__(self) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dispatch.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        self._answers: queue.Queue[Optional[str]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def ask(self, request: Mapping[str, Any], seconds: float) -> Iterator[dict]:
        """The answers to a request, up to and including the final one. Raises WorkerDied.

        Args:
            seconds: to wait for each answer.
        """
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has died; what it answered before tells how
        while True:
            try:
                line = self._answers.get(timeout=max(0.01, seconds))
            except queue.Empty:
                self.close()
                raise WorkerDied(f"no answer within {seconds:.0f} s") from None
            if line is None:
                raise WorkerDied(self._death())
            answer = json.loads(line)
            yield answer
            if "ok" in answer or "failed" in answer:
                return

    def _death(self) -> str:
        code = self._process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    def close(self) -> None:
        """End the process and all it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()


def importable_backends() -> list[tuple[str, str, str]]:
    """(module, class, name) of the backends that the worker has to register itself."""
    found = []
    for name in registry.names():
        cls = type(registry.get(name))
        if not cls.__module__.startswith("backends."):
            if cls.__module__ == "__main__":
                raise ArgumentError(
                    f"backend {name!r} is defined in the main script, which the tuning process cannot import; move its "
                    "class to a module"
                )
            found.append((cls.__module__, cls.__qualname__, name))
    return found
