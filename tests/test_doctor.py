# SPDX-License-Identifier: Apache-2.0
"""``silo doctor``: all is asked, what fails says what to do and ends the command, nothing changes; the self-test is part of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from silo import doctor
from silo.learning import training
from tests import sessions
from tests.sessions import Terminal
from tests.test_export import copied, home_of
from tests.test_selftest import no_clip

ASKED = ["settings", "keys", "arithmetic", "disk", "device", "ledger", "contract", "limits", "base model", "records", "self-test"]


@pytest.fixture(scope="module")
def joined(tiny_bert, tmp_path_factory) -> Path:
    root = home_of(tmp_path_factory.mktemp("doctor") / "north", tiny_bert).root
    sessions.write_rows(root / "records.jsonl", sessions.rows(120))
    return root


@pytest.fixture
def north(joined, tmp_path) -> Path:
    return copied(joined, tmp_path / "north")


def everything(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def failing(document: dict) -> list[str]:
    return [each["name"] for each in document["checks"] if not each["passed"]]


def test_a_silo_that_is_well_passes_every_question_and_nothing_changes(north, capsys):
    before, begun = everything(north), time.process_time()
    done = Terminal(capsys)("silo doctor --json --home", north)
    assert done.code == 0, done.out
    assert time.process_time() - begun < 60, "seconds of the processor, of a tiny model"
    assert [each["name"] for each in done.document["checks"]] == ASKED
    assert done.document["selftest"]["passed"]
    assert everything(north) == before
    quick = Terminal(capsys)("silo doctor --quick --home", north)
    assert quick.code == 0
    assert "fit to train" in quick.out
    assert quick.out.count("✓") == len(ASKED)
    assert "120" not in quick.out, "how many units there are is nobody's business"


def test_the_self_test_is_part_of_it(north, capsys, monkeypatch):
    monkeypatch.setattr(training, "to_lattice", no_clip)
    done = Terminal(capsys)("silo doctor --home", north)
    assert done.code == 5
    assert "train no further" in done.out
    assert "bound" in done.out


def spoil_records(root: Path) -> None:
    sessions.write_rows(root / "records.jsonl", sessions.rows(5))


def spoil_ledger(root: Path) -> None:
    raw = bytearray((root / "ledger.jsonl").read_bytes())
    raw[len(raw) // 2] ^= 1
    (root / "ledger.jsonl").write_bytes(bytes(raw))


def spoil_limits(root: Path) -> None:
    text = (root / "silo.toml").read_text()
    (root / "silo.toml").write_text(text.replace("epsilon = 40.0", "epsilon = 1.0"))


def spoil_keys(root: Path) -> None:
    (root / "identity.key").chmod(0o644)


def spoil_model(root: Path) -> None:
    text = (root / "silo.toml").read_text()
    (root / "other").mkdir()
    at = text.index("[model]")
    lines = [f'path = "{root / "other"}"' if line.startswith("path = ") else line for line in text[at:].splitlines()]
    (root / "silo.toml").write_text(text[:at] + "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("spoil", "name", "code"),
    [
        (spoil_records, "records", 3), (spoil_ledger, "ledger", 5), (spoil_limits, "limits", 5), (spoil_keys, "keys", 3),
        (spoil_model, "base model", 3),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_to_do_and_the_rest_is_asked_all_the_same(north, capsys, spoil, name, code):
    spoil(north)
    done = Terminal(capsys)("silo doctor --quick --json --home", north)
    assert done.code == code, done.out
    assert failing(done.document)[0] == name
    assert [each["name"] for each in done.document["checks"]] == ASKED[:-1]
    assert all(each["hint"] for each in done.document["checks"] if not each["passed"])


def test_a_full_disk_is_seen_before_it_stops_a_round(north, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 2**62)
    done = Terminal(capsys)("silo doctor --quick --json --home", north)
    assert (done.code, failing(done.document)) == (7, ["disk"])


def test_before_it_joins_and_before_there_is_a_silo(tmp_path, capsys):
    terminal = Terminal(capsys)
    none = terminal("silo doctor --quick --json --home", tmp_path / "none")
    assert none.code == 3
    assert "arithmetic" not in failing(none.document)
    records = sessions.write_rows(tmp_path / "r.jsonl", sessions.rows(5))
    words = "silo init --name north --organisation N --aggregator http://127.0.0.1:1 --records"
    assert terminal(words, records, "--home", tmp_path / "north").code == 0
    fresh = terminal("silo doctor --quick --json --home", tmp_path / "north")
    assert fresh.code == 0, fresh.out
    assert "none joined yet" in fresh.out
