"""An arm in a process of its own, which always ends with the benchmark."""

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

LIMIT_S = 900.0  # longest wait for an answer: a peer may compile for minutes first
LEAVE_S = 10.0  # to exit before it is killed


class Child:
    """A process that takes orders as JSON lines (peers/lines.py). It leads a process group of its own, so
    Ctrl-C reaches only the benchmark, which then ends the group and all that the arm started."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        limit_s: float = LIMIT_S,
        leave_s: float = LEAVE_S,
    ) -> None:
        self._limit_s, self._leave_s = limit_s, leave_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the child)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=folder,
            env=environment,
            bufsize=0,
            start_new_session=True,
        )

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for its exit if there was no error, then kill the rest of its group."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            if error is None:
                self._process.wait(self._leave_s)
        except subprocess.TimeoutExpired:
            pass  # killed below
        finally:
            self._kill()
            self._process.stdout.close()
            self._errors.close()

    def ask(self, **order: object) -> dict[str, Any]:
        """Its answer; {"failure": why} if it died or did not answer in time."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
        except BrokenPipeError:
            return {"failure": self._ended()}
        line = self._line()
        if line is None:
            self._kill()  # a late answer would be taken for the next one
            return {"failure": f"no answer in {self._limit_s:g} s"}
        if not line.endswith(b"\n"):
            return {"failure": self._ended()}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _line(self) -> bytes | None:
        """Its next line, without a newline if it ended; None after the limit. The process is polled
        too, as a child that it started may hold the pipe open."""
        assert self._process.stdout is not None
        until = time.monotonic() + self._limit_s
        line = b""
        while not line.endswith(b"\n"):
            ended = self._process.poll() is not None
            wait_s = 0.0 if ended else max(min(1.0, until - time.monotonic()), 0.0)
            if select.select([self._process.stdout], [], [], wait_s)[0]:
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    break
                line += part
            elif ended:
                break
            elif time.monotonic() >= until:
                return None
        return line

    def _ended(self) -> str:
        """Its exit code and the last line of its stderr."""
        try:
            code = str(self._process.wait(1.0))
        except subprocess.TimeoutExpired:
            code = "its stdout, not itself"
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").split("\n")
        last = next((each.strip() for each in reversed(words) if each.strip()), "")
        return f"the process ended ({code}): {last}"

    def _kill(self) -> None:
        with suppress(ProcessLookupError):  # the group has ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
