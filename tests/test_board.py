# SPDX-License-Identifier: Apache-2.0
"""The board: retries never fail, other bytes are refused by name, and only an owner's signature accuses an owner."""

from __future__ import annotations

import msgspec
import pytest

from aggregator import admission
from aggregator.board import Board
from aggregator.store import Store
from privacy.envelope import sign
from privacy.errors import Equivocation, RoundError, TrustError
from privacy.messages import Countersignature, Signed, decode, encode
from tests.federation import Federation, silo_identity


def test_the_same_bytes_are_accepted_after_everything_is_settled(tmp_path):
    federation = Federation(tmp_path)
    federation.ready().run_round(1)
    said = {slot: data for silo in federation.silos for slot, data in silo.sent.items() if silo.id == 2}
    assert {kind for kind, _ in said} >= {"epoch-note", "upload", "consent", "release"}
    for (kind, number), data in said.items():
        assert federation.board.put(kind, number, 2, data) == "same"


def test_a_second_signed_document_is_equivocation_and_a_forged_one_is_not(tmp_path):
    federation = Federation(tmp_path)
    federation.ready()
    opened = federation.stall(1, "upload", 1)
    silo = federation.silos[1]
    first = silo.sent["upload", 1]
    second = silo.sign("upload", opened.context, silo.upload(1, opened.ctx))
    assert second != first
    with pytest.raises(Equivocation, match="a second upload 1 of party 2"):
        federation.board.put("upload", 1, 2, second)
    other_sealed = msgspec.structs.replace(decode(first, Signed), body=decode(second, Signed).body)
    for forged in (second[:-1] + bytes([second[-1] ^ 1]), second + b"x", encode(other_sealed)):
        with pytest.raises(TrustError) as caught:
            federation.board.put("upload", 1, 2, forged)
        assert not isinstance(caught.value, Equivocation)
    assert federation.board.get("upload", 1, 2) == first


def test_nothing_is_taken_before_a_contract_is_published(tmp_path):
    board = Board(Store(tmp_path / "evidence", f"sqlite:///{tmp_path / 'x.sqlite'}"), admission.admit, lambda: 0.0)
    raw = sign(silo_identity(1), type="countersignature", context=bytes(32), sender=1, body=b"")
    with pytest.raises(RoundError, match="no contract is published"):
        board.put("countersignature", 1, 1, raw)
    with pytest.raises(RoundError, match="no contract is published"):
        board.cap("upload")
    assert board.status() == {"contract": None, "countersigned": [], "epoch": None, "round": None, "outcome": None}


def test_status_tells_people_where_the_federation_stands(tmp_path):
    federation = Federation(tmp_path)
    closed = federation.ready().run_round(1)
    status = federation.board.status()
    assert status["contract"]["digest"] == federation.accepted.digest.hex()
    assert status["countersigned"] == [1, 2, 3]
    assert (status["epoch"], status["round"]) == (1, 1)
    assert status["outcome"] == {"round": 1, "kind": "result", "state": closed.state.hex()}


def test_a_document_is_stored_with_the_boards_clock(tmp_path):
    federation = Federation(tmp_path)
    digest = federation.accepted.digest
    body = encode(Countersignature(contract=digest, member=3))
    raw = sign(silo_identity(3), type="countersignature", context=digest, sender=3, body=body)
    assert not federation.board.has("countersignature", 1, 3)
    assert federation.board.put("countersignature", 1, 3, raw) == "created"
    assert federation.board.has("countersignature", 1, 3)
    assert federation.store.entry("countersignature", 1, 3).received_at == int(federation.clock())
