"""The measuring side of a worker: start it, ask it, end it."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from benchmarks.report import REPO_ROOT

LAST_LINES = 3  # of stderr, in the reason why a worker ended


class PeerError(Exception):
    """A worker cannot do what it was asked, or ended; the text is the reason to print."""


class WorkerProcess:
    """One engine with one model in a fresh process. Use it in a `with` block.

    Args:
        engine: name of a module in `benchmarks.peers`.
        job: what to open; `threads` also sets the size of the OpenMP pool.
        python: interpreter that has the engine; None is this one.
        environment: further environment variables.

    Raises:
        PeerError: the engine is not there, or cannot open the model.
    """

    def __init__(
        self,
        engine: str,
        job: Mapping[str, Any],
        *,
        python: str | Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": str(job["threads"]),
            "TOKENIZERS_PARALLELISM": "false",
            **(environment or {}),
        }
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        try:
            self._process = subprocess.Popen(
                [str(python or sys.executable), "-m", f"benchmarks.peers.{engine}"],
                cwd=REPO_ROOT,
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        except OSError as error:
            self._log.close()
            raise PeerError(f"{python}: {error.strerror or error}") from error
        try:
            self.opened = self._exchange(job)
        except PeerError:
            self.close()
            raise

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Returns the worker's answer.

        Raises:
            PeerError: it cannot, or it ended.
        """
        return self._exchange({"do": command, **arguments})

    def close(self) -> None:
        """End the process by ending its input."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None, "both were opened as pipes"
        try:
            stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        stdout.close()
        self._log.close()

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _exchange(self, message: Mapping[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None, "both were opened as pipes"
        try:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "unsupported" in answer:
            raise PeerError(answer["unsupported"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines()]
        lines = [line for line in lines if any(map(str.isalpha, line))]  # not those of "^^^^"
        return f"the process ended with code {code}: {' | '.join(lines[-LAST_LINES:])}"
