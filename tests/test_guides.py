# SPDX-License-Identifier: Apache-2.0
"""The guides are run: every shell block of docs/guides/by-hand.md, in order, in real processes.

Only three things are put in: a free port, the printed fingerprint, and a tiny base model in place of the packaged one.
"""

from __future__ import annotations

import re
import shlex
import socket
from pathlib import Path

import pytest

from tests import sessions

GUIDE = Path(__file__).parents[1] / "docs/guides/by-hand.md"

pytestmark = pytest.mark.slow


def blocks(guide: Path = GUIDE) -> list[tuple[bool, list[str]]]:
    """(whether it runs in terminals of its own, its lines) of each shell block."""
    found = re.findall(r"^```sh( background)?\n(.*?)^```$", guide.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(bool(mark), [line for line in text.splitlines() if line and not line.startswith("#")]) for mark, text in found]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_the_federation_by_hand_runs_as_it_is_written(tmp_path: Path, tiny_bert: Path) -> None:
    port = free_port()
    for place, name in enumerate(("north", "south", "west")):
        (tmp_path / name).mkdir()
        sessions.write_rows(tmp_path / name / "records.jsonl", sessions.rows(50, start_at=50 * place))
    fingerprint, running, printed = "", [], []
    try:
        for own_terminals, lines in blocks():
            for line in lines:
                words = shlex.split(line.replace("8470", port).replace("$FINGERPRINT", fingerprint))
                if words[:2] == ["aggregator", "init"]:
                    words += ["--model", str(tiny_bert), "--last-layers", "0", "--rank", "4"]
                if own_terminals:
                    running.append(sessions.start(*words, cwd=tmp_path))
                    continue
                done = sessions.finish(*words, cwd=tmp_path, timeout_s=240)
                assert done.code == 0, f"{line}\n{done.out}{done.err}"
                printed.append(done.out)
                if words[:2] == ["aggregator", "init"]:
                    fingerprint = re.search(r"fingerprint ([0-9a-f ]{79})", done.out)[1]
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
