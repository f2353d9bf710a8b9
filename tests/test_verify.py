# SPDX-License-Identifier: Apache-2.0
"""``silo verify``, ``aggregator verify`` and ``aggregator reindex`` over real homes, folders and a real service."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sqlite3
import threading
from pathlib import Path

import msgspec
import pytest

from aggregator import admission, commands, service
from aggregator import verify as aggregator_verify
from aggregator.board import Board
from aggregator.store import Row
from cli import aggregator as aggregator_cli
from cli import errors
from cli import silo as silo_cli
from privacy import files
from privacy.audit.evidence import read_report
from privacy.audit.findings import Slot
from privacy.audit.whole import Verdict
from privacy.errors import ConfigError, MachineError
from privacy.identity import keys
from privacy.transparency import log
from silo import verify as silo_verify
from silo.home import Home
from tests.whole import Whole


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Whole:
    """A federation after two rounds, its processes gone."""
    whole = Whole.create(tmp_path_factory.mktemp("verify") / "whole")
    keys.write_public(whole.home.public_path, whole.identity, "Hub")
    for number in (1, 2, 3):
        home = Home(whole.root / f"silo-{number}")
        keys.write_public(home.public_path, keys.load(home.identity_path), f"Hospital {number}")
    whole.run(2)
    whole.close()
    return whole


@pytest.fixture
def whole(original, tmp_path) -> Whole:
    """A copy of it, closed."""
    copied = original.copied(tmp_path / "whole")
    copied.close()
    return copied


def named(found: Verdict) -> set[Slot]:
    return {check.slot for check in found.failed}


def sql(whole, statement: str, *values) -> None:
    with contextlib.closing(sqlite3.connect(whole.home.root / "documents.sqlite")) as connection, connection:
        connection.execute(statement, values)


def without_table(whole) -> None:
    for path in whole.home.root.glob("documents.sqlite*"):
        path.unlink()


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


# --- The aggregator's home -----------------------------------------------------------------------------------------------------


def test_a_home_holds_with_nothing_open_and_nothing_changed(whole):
    before = content(whole.home.evidence_folder), content(whole.home.log_folder)
    found = aggregator_verify.verify(whole.home.root)
    assert found.holds
    assert not found.open
    assert found.recomputed == (1, 2)
    assert before == (content(whole.home.evidence_folder), content(whole.home.log_folder))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("digest = '" + "ab" * 32 + "'", "missing"), ("digest = 'nonsense'", "missing"), ("size = size + 1", "says"),
        ("leaf = leaf + 1000", "place"), ("party = 9", ""), ("kind = 'list'", ""),
    ],
)  # fmt: skip
def test_a_table_with_a_changed_row_is_named(whole, change, what):
    sql(whole, f"UPDATE documents SET {change} WHERE kind = 'pair-seeds' AND number = 1 AND party = 2")
    found = aggregator_verify.verify(whole.home.root)
    slots = {Slot("pair-seeds", 1, 2), Slot("pair-seeds", 1, 9), Slot("list", 1, 2)}
    assert named(found) & slots, found.failed
    assert what in " ".join(check.why for check in found.failed)


def test_two_rows_that_changed_places_are_named(whole):
    rows = {(row.kind, row.number, row.party): row.leaf for row in aggregator_verify.rows_of(whole.home)}
    one, other = rows["upload", 1, 1], rows["upload", 2, 1]
    for leaf, number in ((-1, 1), (one, 2), (other, 1)):
        sql(whole, "UPDATE documents SET leaf = ? WHERE kind = 'upload' AND party = 1 AND number = ?", leaf, number)
    assert named(aggregator_verify.verify(whole.home.root)) == {Slot("upload", 1, 1), Slot("upload", 2, 1)}


def test_a_row_that_is_gone_is_named_by_the_log(whole):
    sql(whole, "DELETE FROM documents WHERE kind = 'release' AND number = 1 AND party = 3")
    assert Slot("release", 1, 3) in named(aggregator_verify.verify(whole.home.root))


def test_a_damaged_log_is_named(whole):
    bundle = whole.home.log_folder / log.tile_path("entries", 0, in_head(whole))
    raw = bundle.read_bytes()
    for place in (0, 2, 100, len(raw) - 1):
        bundle.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        found = aggregator_verify.verify(whole.home.root)
        assert [(check.kind, check.what) for check in found.failed] == [("log", "tiles")]


def test_a_home_without_a_table_says_how_to_get_one(whole):
    without_table(whole)
    with pytest.raises(ConfigError, match="no table") as caught:
        aggregator_verify.verify(whole.home.root)
    assert "aggregator reindex" in caught.value.hint
    assert caught.value.code == "no-table"
    assert not (whole.home.root / "documents.sqlite").exists()


# --- The table made again ------------------------------------------------------------------------------------------------------


def in_head(whole) -> int:
    """How many leaves the newest head covers."""
    return int((whole.home.log_folder / "checkpoint").read_text().splitlines()[1])


def test_a_lost_table_is_made_again_and_everything_goes_on(whole):
    before = aggregator_verify.rows_of(whole.home)
    without_table(whole)
    made = aggregator_verify.reindex(whole.home.root)
    after = aggregator_verify.rows_of(whole.home)
    assert made == {"documents": len(before), "in_log": sum(row.leaf is not None for row in before), "missing": [], "aside": {}}
    covered = [row for row in before if row.leaf is not None and row.leaf < in_head(whole)]
    assert covered
    assert set(covered) <= set(after)

    def bare(rows) -> set[tuple]:
        return {row._replace(leaf=row.leaf is None, received_at=0) for row in rows}

    assert bare(after) == bare(before)
    assert sorted(row.leaf for row in after if row.leaf is not None) == list(range(made["in_log"]))
    assert aggregator_verify.verify(whole.home.root).holds
    goes_on = Whole(whole.root, whole.accepted)
    goes_on.run(3)
    goes_on.close()
    found = aggregator_verify.verify(whole.home.root)
    assert found.holds
    assert found.recomputed == (1, 2, 3)


def test_a_table_is_made_again_without_any_log(whole):
    before = aggregator_verify.rows_of(whole.home)
    without_table(whole)
    shutil.rmtree(whole.home.log_folder)
    aggregator_verify.reindex(whole.home.root)
    after = aggregator_verify.rows_of(whole.home)
    assert {row[:5] for row in after} == {row[:5] for row in before}
    assert sorted(row.leaf for row in after if row.leaf is not None) == sorted(row.leaf for row in before if row.leaf is not None)
    found = aggregator_verify.verify(whole.home.root)
    assert found.holds
    assert {check.kind for check in found.open} == {"log", "checkpoint", "cosignature", "head"}


def test_a_table_that_is_not_empty_is_left_alone(whole):
    before = aggregator_verify.rows_of(whole.home)
    with pytest.raises(MachineError, match="not empty"):
        aggregator_verify.reindex(whole.home.root)
    assert aggregator_verify.rows_of(whole.home) == before


def test_what_cannot_be_made_again_is_named(whole):
    row = next(row for row in aggregator_verify.rows_of(whole.home) if row[:3] == ("consent", 1, 2))
    (whole.home.evidence_folder / row.digest).unlink()
    (whole.home.evidence_folder / "notes.txt").write_text("mine")
    without_table(whole)
    made = aggregator_verify.reindex(whole.home.root)
    assert made["missing"] == ["consent 1 of party 2"]
    assert list(made["aside"]) == ["notes.txt"]
    assert named(aggregator_verify.verify(whole.home.root)) == {Slot("consent", 1, 2)}


def test_a_row_is_what_the_store_writes(whole):
    assert Row._fields == ("kind", "number", "party", "digest", "size", "received_at", "leaf", "header")
    assert all(isinstance(row, Row) for row in aggregator_verify.rows_of(whole.home))


# --- A silo ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(whole):
    """The whole's board, over HTTP on this machine."""
    live = Whole(whole.root, whole.accepted)
    board = Board(live.store, admission.admit, live.clock)
    with service.listen("127.0.0.1", 0) as listener:
        running = service.server(service.create_app(board, log_folder=live.home.log_folder))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join(30)
            live.close()


def test_a_silo_verifies_over_http_and_from_a_copy_alike(whole, tmp_path):
    root = whole.root / "silo-1"
    before = content(root)
    with served(whole) as url:
        over_http = silo_verify.verify(root, url=url)
    from_copy = silo_verify.verify(root, folder=whole.home.root)
    for found in (over_http, from_copy):
        assert found.holds, found.failed
        assert not found.open
        assert found.recomputed == (1, 2)
        assert found.state == whole.progress(1).state.digest.hex()
        assert {check.what for check in found.checks if check.kind in ("ledger", "state")} == {"chain", "reserve", "own state"}
        assert "log" in {check.kind for check in found.checks}
    assert content(root) == before


def test_an_auditor_needs_a_folder_and_a_fingerprint_only(whole, tmp_path):
    for name in ("evidence", "log"):
        shutil.copytree(whole.home.root / name, tmp_path / "copy" / name)
    printed = keys.fingerprint(whole.identity.public.under(keys.ED25519))
    for folder in (tmp_path / "copy", tmp_path / "copy" / "evidence"):
        found = silo_verify.verify(tmp_path / "nowhere", folder=folder, fingerprint=printed)
        assert found.holds
        assert not found.open
        assert any(check.kind == "ledger" and check.status == "note" for check in found.checks)
    assert not silo_verify.verify(tmp_path, folder=tmp_path / "copy", fingerprint="00" * 32).holds


def test_without_a_home_and_a_folder_there_is_nothing_to_verify(tmp_path):
    with pytest.raises(ConfigError, match="no silo"):
        silo_verify.verify(tmp_path)


def test_a_ledger_without_the_reservation_of_an_own_upload_is_named(whole):
    home = Home(whole.root / "silo-2")
    lines = home.ledger_path.read_bytes().splitlines(keepends=True)
    files.write_atomic(home.ledger_path, b"".join(lines[:3]), mode=files.PRIVATE)
    found = silo_verify.verify(home.root, folder=whole.home.root)
    assert named(found) == {Slot("ledger", 2, 2)}, found.failed


def test_a_ledger_with_a_changed_byte_is_named(whole):
    home = Home(whole.root / "silo-2")
    raw = bytearray(home.ledger_path.read_bytes())
    raw[len(raw) // 2] ^= 1
    files.write_atomic(home.ledger_path, bytes(raw), mode=files.PRIVATE)
    found = silo_verify.verify(home.root, folder=whole.home.root)
    assert named(found) == {Slot("ledger", 0, 2)}
    assert "line" in found.failed[0].why


def test_a_federation_that_lost_a_round_this_silo_settled_is_named(whole):
    """The aggregator's home of after round 1, and a silo that has seen round 2."""
    sql(whole, "DELETE FROM documents WHERE number = 2 AND kind NOT IN ('checkpoint', 'cosignature', 'head')")
    with served(whole) as url:
        found = silo_verify.verify(whole.root / "silo-3", url=url)
    assert Slot("manifest", 2, 0) in named(found)


# --- A report in the log ---------------------------------------------------------------------------------------------------------


def reported(whole, folder: Path, *, later: int = 0, **extra) -> Path:
    """A report on the whole, made so many seconds later; its record."""
    whole.home.facts_path.write_text('{"lora_width": 1, "simulated": false}')
    facts = commands.build_report(whole.home.root, extra)
    record, _ = commands.write_report(
        whole.home.root, folder, msgspec.structs.replace(facts, generated_at=facts.generated_at + later)
    )
    return record


def reports(whole) -> list[Row]:
    return [row for row in aggregator_verify.rows_of(whole.home) if row.kind == "report"]


def in_log(found: Verdict) -> list[str]:
    return [check.status for check in found.checks if check.what == "in the log"]


def test_a_report_stands_in_the_log_once_and_both_sides_find_it_there(whole, tmp_path):
    record = reported(whole, tmp_path / "one")
    first = record.read_bytes()
    again = reported(whole, tmp_path / "two", later=60)
    assert again.read_bytes() == first, "the same facts are the same report, wherever and whenever it is written"
    (row,) = reports(whole)
    assert row.leaf == in_head(whole) - 1, "a head covers it at once, though no round follows"
    over = (
        aggregator_verify.verify(whole.home.root, report=read_report(record)),
        silo_verify.verify(whole.root / "silo-1", folder=whole.home.root, report=record),
    )
    for found in over:
        assert found.holds, found.failed
        assert not found.open
        assert in_log(found) == ["ok", "note"]
    reported(whole, tmp_path / "three", held_out_records=7)
    assert [row.number for row in reports(whole)] == [1, 2], "other facts are another report"
    forged = record.with_name("forged.json")
    forged.write_bytes(first.replace(b'"generated_at": ', b'"generated_at": 1'))
    found = silo_verify.verify(whole.root / "silo-1", folder=whole.home.root, report=forged)
    assert [(check.kind, check.what) for check in found.failed] == [("report", "in the log")]


def test_a_report_goes_on_to_the_next_rounds_head(whole, tmp_path):
    record = reported(whole, tmp_path / "report")
    goes_on = Whole(whole.root, whole.accepted)
    goes_on.run(3)
    goes_on.close()
    found = aggregator_verify.verify(whole.home.root)
    assert found.holds, found.failed
    assert not found.open
    found = silo_verify.verify(whole.root / "silo-1", folder=whole.home.root, report=record)
    assert in_log(found) == ["ok"], "a quorum cosigned a head over it"
    assert {check.what for check in found.failed} == {"contents", "epsilon outside", "epsilon insiders", "epsilon sum_broken"}


def test_without_a_log_or_a_head_over_it_a_reports_place_is_open(whole, tmp_path):
    with whole.home.locked():  # as while a coordinator is at work
        record = reported(whole, tmp_path / "report")
    assert reports(whole)[0].leaf >= in_head(whole), "the head is the coordinator's to make"
    found = aggregator_verify.verify(whole.home.root, report=read_report(record))
    assert (in_log(found), found.holds) == (["open"], True)
    shutil.rmtree(whole.home.log_folder)
    found = aggregator_verify.verify(whole.home.root, report=read_report(record))
    assert in_log(found) == ["open"]


# --- A home that was cut ---------------------------------------------------------------------------------------------------------


def cut(whole) -> None:
    """Round 2 and the log are gone, as if they had never been."""
    sql(whole, "DELETE FROM documents WHERE number > 1")
    sql(whole, "DELETE FROM documents WHERE kind IN ('checkpoint', 'cosignature', 'head')")
    kept = {row.digest for row in aggregator_verify.rows_of(whole.home)}
    for path in whole.home.evidence_folder.iterdir():
        if path.name not in kept:
            path.unlink()
    shutil.rmtree(whole.home.log_folder)


def test_a_home_that_was_cut_ends_with_6_and_with_the_number_of_rounds_with_4(whole, capsys):
    cut(whole)
    words = ["verify", "--home", str(whole.home.root)]
    assert errors.run(aggregator_cli.app, [*words, "--json"]) == 6
    document = json.loads(capsys.readouterr().out)
    assert document["holds"] is True
    assert document["counts"]["failed"] == 0
    assert document["counts"]["open"] > 0
    assert sum(document["counts"].values()) == len(document["checks"])
    assert errors.run(aggregator_cli.app, [*words, "--allow-open"]) == 0
    assert "? " in capsys.readouterr().out
    assert errors.run(aggregator_cli.app, [*words, "--allow-open", "--rounds-at-least", "1"]) == 0
    capsys.readouterr()
    assert errors.run(aggregator_cli.app, [*words, "--allow-open", "--rounds-at-least", "2"]) == 4
    assert "the last round that ended here is 1" in capsys.readouterr().out
    silo = ["verify", "--home", str(whole.root / "silo-1"), "--folder", str(whole.home.root), "--allow-open"]
    assert errors.run(silo_cli.app, silo) == 4, "the silo itself knows that it settled round 2"
    assert "this silo settled round 2" in capsys.readouterr().out


def test_a_log_that_ends_before_the_head_a_silo_holds_is_named(whole):
    rows = {(row.kind, row.number): row.digest for row in aggregator_verify.rows_of(whole.home)}
    old = whole.home.evidence_folder / rows["checkpoint", 1]
    files.write_atomic(whole.home.log_folder / "checkpoint", old.read_bytes())
    found = silo_verify.verify(whole.root / "silo-1", folder=whole.home.root)
    assert ("log", "own head") in {(check.kind, check.what) for check in found.failed}


# --- The commands ---------------------------------------------------------------------------------------------------------------


def test_the_commands_end_with_0_or_4_and_name_the_object(whole, capsys):
    root = whole.home.root
    assert errors.run(aggregator_cli.app, ["verify", "--home", str(root)]) == 0
    assert "✓ " in capsys.readouterr().out
    assert errors.run(silo_cli.app, ["verify", "--home", str(whole.root / "silo-1"), "--folder", str(root), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["holds"] is True
    assert document["recomputed"] == [1, 2]
    assert document["spent"][1]["insiders"] > document["spent"][0]["insiders"]
    row = next(row for row in aggregator_verify.rows_of(whole.home) if row[:3] == ("outcome", 1, 0))
    path = root / "evidence" / row.digest
    path.write_bytes(path.read_bytes()[:-1])
    assert errors.run(aggregator_cli.app, ["verify", "--home", str(root), "--json"]) == 4
    failed = [check for check in json.loads(capsys.readouterr().out)["checks"] if check["status"] == "failed"]
    assert [(check["kind"], check["number"], check["party"], check["file"]) for check in failed] == [("outcome", 1, 0, row.digest)]
    assert errors.run(aggregator_cli.app, ["verify", "--home", str(root)]) == 4
    shown = capsys.readouterr().out
    assert "✗ outcome 1 (aggregator)" in shown
    assert "damaged" in shown


def test_reindex_as_a_command(whole, capsys):
    without_table(whole)
    assert errors.run(aggregator_cli.app, ["verify", "--home", str(whole.home.root)]) == 3
    assert "aggregator reindex" in capsys.readouterr().err
    assert errors.run(aggregator_cli.app, ["reindex", "--home", str(whole.home.root)]) == 0
    assert "documents" in capsys.readouterr().out
    assert errors.run(aggregator_cli.app, ["verify", "--home", str(whole.home.root), "--round", "2"]) == 0
    assert "round 2 recomputed" in capsys.readouterr().out


def test_words_that_contradict_are_a_usage_error(whole, capsys):
    assert errors.run(aggregator_cli.app, ["verify", "--home", str(whole.home.root), "--round", "1", "--all"]) == 2
    assert "not both" in capsys.readouterr().err
