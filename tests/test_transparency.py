# SPDX-License-Identifier: Apache-2.0
"""The log in a whole federation: what is left of it after some rounds, and an aggregator that lies to one silo or to all."""

from __future__ import annotations

import functools
import sqlite3

import pytest

from privacy.errors import Equivocation, TrustError
from privacy.messages import AGGREGATOR, decode, encode
from privacy.transparency import log, notes
from privacy.transparency.log import Leaf, Tiles
from privacy.transparency.tree import Tree
from silo.home import Home
from tests.whole import SILOS, Whole, together


@pytest.fixture
def ran(tmp_path):
    whole = Whole.create(tmp_path / "federation")
    whole.run(1)
    yield whole
    whole.close()


def kept(whole, silo, name):
    path = Home(whole.root / f"silo-{silo}").log_folder / name
    return path.read_bytes() if path.is_file() else None


def read_log(whole):
    """Every leaf below the newest head, from the files alone, and that head."""
    line = whole.line()
    note = notes.parse(line.fetch("checkpoint"))
    head = log.open_checkpoint(note, whole.accepted.terms)
    tiles = Tiles(head.size, line.fetch)
    tiles.check(head.root)
    return [decode(tiles.leaf(index), Leaf) for index in range(head.size)], note


def test_the_log_names_every_document_in_the_order_of_storing(ran) -> None:
    ran.run(3)
    leaves, note = read_log(ran)
    assert log.cosigned_by(note, ran.accepted.terms) == SILOS, "after the last round too"
    assert leaves == ran.store.leaves(0, len(leaves))
    slots = [(leaf.kind, leaf.number, leaf.party) for leaf in leaves]
    assert len(set(slots)) == len(slots)
    assert slots[0] == ("contract", 1, AGGREGATOR)
    for number in (1, 2, 3):
        order = [slots.index((kind, number, AGGREGATOR)) for kind in ("manifest", "freeze", "certificate", "outcome")]
        assert order == sorted(order)
        assert order[0] < min(slots.index(("upload", number, silo)) for silo in SILOS)
    by_slot = {(leaf.kind, leaf.number, leaf.party): leaf for leaf in leaves}
    assert all(ran.store.entry(*slot).digest == leaf.digest for slot, leaf in by_slot.items())


def test_every_silo_holds_a_receipt_for_each_upload_and_outcome(ran) -> None:
    ran.run(3)
    for silo in SILOS:
        for number in (1, 2, 3):
            for kind, party in (("upload", silo), ("outcome", AGGREGATOR)):
                leaf, _, note = log.open_receipt(kept(ran, silo, f"receipt-{kind}-{number}"), ran.accepted.terms)
                assert (leaf.kind, leaf.number, leaf.party) == (kind, number, party)
                assert leaf.digest == ran.store.entry(kind, number, party).digest
                assert log.cosigned_by(note, ran.accepted.terms) == (SILOS if number < 3 else ())
            assert kept(ran, silo, f"complaint-{number}") is None
        assert not list(Home(ran.root / f"silo-{silo}").log_folder.glob("expect-*"))


def test_the_manifest_names_the_head_that_all_cosigned(ran) -> None:
    ran.run(2)
    with ran.coordinator() as coordinator:
        for number in (1, 2):
            manifest = coordinator._desk.round(number).manifest
            head = log.open_head(notes.parse(ran.store.get("head", number, AGGREGATOR)), ran.accepted.terms)
            assert (manifest.log_size, manifest.log_root) == (head.size, head.root)
            before = ran.store.entry("outcome", 1, AGGREGATOR) if number == 2 else ran.store.entry("roster", 1, AGGREGATOR)
            assert before.leaf < head.size


def fork(whole, number):
    """The aggregator's own signature over another past: leaf 3 is another document."""
    checkpoint = notes.checkpoint(notes.parse(whole.store.get("checkpoint", number, AGGREGATOR)).text)
    made, leaves = Tree(), whole.store.leaves(0, checkpoint.size)
    leaves[3] = Leaf(kind="countersignature", number=1, party=2, digest=bytes(32), time=0)
    for leaf in leaves:
        made.append(encode(leaf))
    head = notes.Checkpoint(origin=checkpoint.origin, size=made.size, root=made.root())
    files = {log.tile_path("entries", 0, made.size): log.bundle([encode(leaf) for leaf in leaves])}
    return notes.signed(head.text, name=head.origin, seed=whole.identity.sign_seed).to_bytes(), files


def test_a_silo_that_is_shown_another_past_stops_with_evidence_and_no_round_is_opened(ran) -> None:
    line, shown = ran.line(), {}

    def alter(slot, data):
        if slot == ("checkpoint", 3, AGGREGATOR) and data is not None:
            raw, files = fork(ran, 3)
            shown.update(files)
            return raw
        return shown.get(slot[1], data) if slot[0] == "log" else data

    line.alter = alter

    def lied_to():
        with pytest.raises(Equivocation) as caught:
            ran.take_part(1, 2, line=line)
        assert caught.value.code == "log-equivocation"

    def hub():
        with pytest.raises(Exception, match="no acknowledgement 2"):
            ran.coordinate(3)

    def hurry():
        ran.wait_for("cosignature", 3, 2, 3)
        ran.wait_for("acknowledgement", 2, 2, 3)
        ran.clock.skip(1000.0)

    together(lied_to, hub, hurry, *(functools.partial(ran.take_part, silo, 2) for silo in (2, 3)))
    (path,) = Home(ran.root / "silo-1").log_folder.glob("equivocation-*.json")
    with pytest.raises(Equivocation, match=path.name):
        ran.take_part(1, 3)
    assert ran.store.latest("manifest") == 2
    assert ran.store.entry("cosignature", 3, 1) is None


def test_a_changed_table_stops_the_coordinator_before_anything_is_signed(ran) -> None:
    ran.close()
    with sqlite3.connect(ran.home.root / "documents.sqlite") as table:
        table.execute("UPDATE documents SET received_at = received_at + 1 WHERE leaf = 5")
    again = Whole(ran.root, ran.accepted)
    with pytest.raises(TrustError) as caught:
        again.coordinate(2)
    assert caught.value.code == "log-rolled-back"
    assert again.store.latest("manifest") == 1
    again.close()
