# SPDX-License-Identifier: Apache-2.0
"""Child processes of a simulation: each silo is a real ``silo`` command, the mailbox a real ``aggregator serve``.

Promised: every child is ended when the block is left, however it is left, and when this process is killed; a child that fails
is reported with the last lines it wrote, by the name of its log. Children get one compute thread each. Secrets are never in a
child's arguments.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from privacy.errors import ConfigError, MachineError, PrivacyRefusal, RoundError, SiloquyError, TrustError
from privacy.lifeline import Lifeline

_BY_EXIT: dict[int, type[SiloquyError]] = {3: ConfigError, 4: TrustError, 5: PrivacyRefusal, 6: RoundError, 7: MachineError}
_GRACE_S = 10.0


class Children:
    """The running children and where their logs go. Use through ``children``."""

    def __init__(self, logs: Path, *, threads: int) -> None:
        self._logs = logs
        self._lifeline = Lifeline()
        quiet = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
        self._environment = {**os.environ, **self._lifeline.environment, **quiet}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: str, arguments: Sequence[str | Path]) -> None:
        """Start ``silo`` or ``aggregator`` with arguments; its output goes to ``<logs>/<name>.log``."""
        with (self._logs / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [*_entry(command), *map(str, arguments)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                pass_fds=(self._lifeline.descriptor,),
            )

    def answer(self, name: str, command: str, arguments: Sequence[str | Path], *, threads: int = 1) -> dict[str, object]:
        """Run a command to its end with ``--json`` and give its document.

        Raises:
            SiloquyError: what the command itself reported, as the class of its exit code.
        """
        environment = {**self._environment, "OMP_NUM_THREADS": str(threads)}
        with (self._logs / f"{name}.log").open("ab") as log:
            done = subprocess.run(
                [*_entry(command), *map(str, arguments), "--json"],
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=(self._lifeline.descriptor,),
                check=False,
            )
        try:
            document = json.loads(done.stdout)
        except ValueError:
            document = None
        if done.returncode != 0 or not isinstance(document, dict):
            raise self._failed(name, done.returncode, document)
        return document

    def check(self) -> None:
        """Raise when a child has ended with an error."""
        for name, child in self._running.items():
            code = child.poll()
            if code not in (None, 0):
                raise self._failed(name, int(code or 0), None)

    def wait(self, name: str, *, timeout_s: float) -> None:
        """Wait until a child has ended well. Raises as :meth:`check`, and MachineError when it takes too long."""
        try:
            self._running[name].wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise MachineError(f"{name} did not end within {timeout_s:g} s", hint=f"read {self._logs / name}.log") from error
        self.check()

    def kill(self, name: str) -> None:
        """End a child at once, without a request: its power goes. It is no failure, and the child may be started again."""
        child = self._running.pop(name)
        child.kill()
        child.wait()

    def end(self) -> None:
        """End all children: a request first, then by force."""
        for child in self._running.values():
            if child.poll() is None:
                child.terminate()
        for child in self._running.values():
            try:
                child.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._lifeline.close()

    def _failed(self, name: str, code: int, document: object) -> SiloquyError:
        log = self._logs / f"{name}.log"
        told = document.get("error", {}) if isinstance(document, dict) else {}
        message = told.get("message") or _last_line(log) or "no output"
        kind = _BY_EXIT.get(code, MachineError)
        return kind(
            f"{name} ended with exit code {code}: {message}",
            hint=told.get("hint") or f"read {log}",
            code="child-failed",
            child=name,
        )


@contextlib.contextmanager
def children(logs: Path, *, threads: int = 1) -> Iterator[Children]:
    """Children that do not outlive the block. ``logs`` is created."""
    logs.mkdir(parents=True, exist_ok=True)
    running = Children(logs, threads=threads)
    try:
        yield running
    finally:
        running.end()


def _entry(command: str) -> list[str]:
    """The installed command beside this interpreter, so that children run this environment's code."""
    script = Path(sys.executable).with_name(command)
    if script.exists():
        return [str(script)]
    return [sys.executable, "-m", f"cli.{command}"]


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1][:300]
