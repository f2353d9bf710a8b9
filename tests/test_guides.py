# SPDX-License-Identifier: Apache-2.0
"""The guides are run: every shell block of docs/guides/by-hand.md, in order, in real processes.

Only three things are put in: a free port, the printed fingerprint, and a tiny base model in place of the packaged one.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import sessions

GUIDE = Path(__file__).parents[1] / "docs/guides/by-hand.md"

pytestmark = pytest.mark.slow


def blocks() -> list[tuple[bool, list[str]]]:
    """(whether it runs in terminals of its own, its lines) of each shell block."""
    found = re.findall(r"^```sh( background)?\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(bool(mark), [line for line in text.splitlines() if line and not line.startswith("#")]) for mark, text in found]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_the_federation_by_hand_runs_as_it_is_written(tmp_path: Path) -> None:
    model, port = sessions.tiny_model(tmp_path / "model"), free_port()
    for place, name in enumerate(("north", "south", "west")):
        (tmp_path / name).mkdir()
        sessions.write_rows(tmp_path / name / "records.jsonl", sessions.rows(50, start_at=50 * place))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    fingerprint, running, printed = "", [], []
    try:
        for own_terminals, lines in blocks():
            for line in lines:
                words = shlex.split(line.replace("8470", port).replace("$FINGERPRINT", fingerprint))
                words += ["--model", str(model), "--last-layers", "0", "--rank", "4"] if words[:2] == ["aggregator", "init"] else []
                command = [sys.executable, "-m", f"cli.{words[0]}", *words[1:]]
                if own_terminals:
                    running.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL))
                    continue
                done = subprocess.run(
                    command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=240
                )
                assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
                printed.append(done.stdout)
                if words[:2] == ["aggregator", "init"]:
                    fingerprint = re.search(r"fingerprint ([0-9a-f ]{79})", done.stdout)[1]
        assert all(child.wait(60) == 0 for child in running[1:]), "a silo failed"
    finally:
        for child in running:
            child.terminate()
        for child in running:
            child.wait(20)
    everything = "".join(printed)
    assert (tmp_path / "report/report.html").is_file()
    digest = re.search(r"model digest: ([0-9a-f]{64})", everything)[1]
    assert digest in (tmp_path / "report/report.json").read_text(encoding="utf-8")
