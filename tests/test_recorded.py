# SPDX-License-Identifier: Apache-2.0
"""A recorded federation, ``tests/vectors/round.json.gz``: two rounds of share mode, in the second of which silo 3 fell.

It holds every document in the order of the log, and the aggregator's receiving seed (the federation trained nothing; its sums are
of fixed integers). It is replayed twice: by ``tests/by_the_page.py``, which knows docs/spec and nothing of our code, and by our
pure functions, which must make the aggregator's documents again byte for byte. ``python -m tests.test_recorded`` records anew.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest

from aggregator import rounds
from aggregator import verify as hub_verify
from privacy import envelope, update_rule
from privacy.audit import whole
from privacy.audit.evidence import Evidence
from privacy.errors import TrustError
from privacy.messages import AGGREGATOR, Freeze, Header, Listing, Manifest, Outcome, Roster, Shares, Signed, Upload, decode, encode
from privacy.secure_sum import freeze, guardian_sum, shares
from privacy.transparency import log, notes
from tests import by_the_page as page
from tests.whole import PowerCut, Whole

RECORD = Path(__file__).parent / "vectors" / "round.json.gz"
SILOS, FALLEN = (1, 2, 3, 4), 3
MISSING_IN = {1: set(), 2: {FALLEN}}


class Recorded:
    """aggregator.rounds.Documents over the record."""

    def __init__(self, facts):
        self.rows = [
            ((kind, at, party), base64.b64decode(data), leaf, time) for kind, at, party, leaf, time, data in facts["documents"]
        ]
        self.documents = {slot: data for slot, data, _, _ in self.rows}
        self.seal_seed = bytes.fromhex(facts["receive_seed"])
        self.accepted = rounds.accepted_in(self)

    def get(self, kind, number, party):
        return self.documents.get((kind, number, party))

    def parties(self, kind, number):
        return tuple(sorted(party for k, n, party in self.documents if (k, n) == (kind, number)))

    def latest(self, kind):
        return max((n for k, n, _ in self.documents if k == kind), default=None)

    def body(self, kind, number, party=AGGREGATOR):
        return decode(self.documents[kind, number, party], Signed).body

    def all(self, kind, number):
        return {party: self.documents[kind, number, party] for party in self.parties(kind, number)}

    def upload(self, number, silo):
        return decode(self.body("upload", number, silo), Upload)

    def header(self, number, silo):
        return decode(decode(self.upload(number, silo).header, Signed).body, Header)


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded(json.loads(gzip.decompress(RECORD.read_bytes())))


@pytest.fixture(params=[1, 2], ids=["all", "silo-3-fell"])
def number(request) -> int:
    return request.param


# --- By the page alone ------------------------------------------------------------------------------------------------------------


def test_contexts_are_those_of_the_page(recorded, number):
    manifest = decode(recorded.body("manifest", number), Manifest)
    contract = page.h(recorded.body("contract", 1))
    assert manifest.epoch_ctx == page.epoch_ctx(contract, manifest.epoch, recorded.body("roster", manifest.epoch))
    assert manifest.previous == (contract if number == 1 else page.h(recorded.body("outcome", number - 1)))
    for silo in recorded.parties("upload", number):
        assert recorded.header(number, silo).round_ctx == page.h(recorded.body("manifest", number))


def opened_vectors(recorded, number):
    """y by silo, opened with the aggregator's seed; HPKE itself has its vectors elsewhere."""
    found = {}
    for silo in recorded.parties("upload", number):
        upload, header = recorded.upload(number, silo), recorded.header(number, silo)
        info = b"gsum/1 upload\0" + header.round_ctx + page.u32(silo) + page.h(upload.header)
        raw = envelope.open_sealed(recorded.seal_seed, upload.sealed, info=info)
        found[silo] = list(struct.unpack(f"<{len(raw) // 4}I", raw))
        assert page.vector_root(found[silo]) == header.root
    return found


def released(recorded, number):
    """Each guardian's released shares by (silo, secret): the page's order, each with its proof."""
    outcome, found = decode(recorded.body("outcome", number), Outcome), {}
    silos = [silo for silo, _ in outcome.seeds]
    missing = sorted(MISSING_IN[number])
    places = [(i, 0) for i in silos] + [(i, j) for i in silos for j in missing]
    for guardian in recorded.parties("shares", number):
        stated = decode(recorded.body("shares", number, guardian), Shares)
        info = b"gsum/1 shares\0" + stated.round_ctx + stated.frozen + page.u32(guardian)
        payload = envelope.open_sealed(recorded.seal_seed, stated.sealed, info=info)
        found[guardian], start = {}, 0
        for silo, secret in places:
            header = recorded.header(number, silo)
            peers = [peer for peer, _ in header.pair_commitments]
            size, index = len(peers) + 1, 0 if not secret else peers.index(secret) + 1
            share, start = payload[start : start + 32], start + 32
            ids = page.u32(silo) + page.u32(guardian) + page.u32(secret)
            leaf = page.h(b"\0gsum/1 share\0" + header.round_ctx + header.attempt + ids + share)
            start, root = climbed(payload, start, leaf, index, size)
            assert root == {each: r for each, _, r in header.bundles}[guardian]
            found[guardian][silo, secret] = share
        assert start == len(payload)
    return found


def climbed(payload, start, node, index, size):
    """RFC 9162 §2.1.3.2, reading the proof as it is needed."""
    last = size - 1
    while last:
        if index % 2 or index != last:
            sibling, start = payload[start : start + 32], start + 32
            node = page.h(b"\1" + sibling + node) if index % 2 else page.h(b"\1" + node + sibling)
        index, last = index // 2, last // 2
    return start, node


def interpolated(points):
    """The secret at 0 from {x: share}, byte by byte, with inverses by trial."""
    secret = bytearray(32)
    for x, share in points.items():
        weight = 1
        for other in points:
            if other != x:
                inverse = next(a for a in range(1, 256) if page.times(a, other ^ x) == 1)
                weight = page.times(weight, page.times(other, inverse))
        secret = bytearray(have ^ page.times(weight, byte) for have, byte in zip(secret, share, strict=True))
    return bytes(secret)


def test_the_shares_give_the_published_secrets_and_these_the_sum(recorded, number):
    outcome = decode(recorded.body("outcome", number), Outcome)
    guardians = [guardian.id for guardian in recorded.accepted.terms.guardian]
    given, quorum = released(recorded, number), recorded.accepted.terms.quorum
    used = sorted(given)[:quorum]
    assert len(used) == quorum
    seeds, pair_keys = dict(outcome.seeds), {(i, j): key for i, j, key in outcome.pair_keys}
    for (silo, secret), wanted in {**{(i, 0): seed for i, seed in seeds.items()}, **pair_keys}.items():
        assert interpolated({guardians.index(g) + 1: given[g][silo, secret] for g in used}) == wanted
    assert set(seeds) == set(SILOS) - MISSING_IN[number]
    assert set(pair_keys) == {(i, j) for i in seeds for j in MISSING_IN[number]}
    vectors = {silo: y for silo, y in opened_vectors(recorded, number).items() if silo in seeds}
    assert {silo: struct.pack(f"<{len(y)}I", *y) for silo, y in vectors.items()} == dict(outcome.vectors)
    attempts = {silo: recorded.header(number, silo).attempt for silo in seeds}
    for silo, seed in seeds.items():
        header = recorded.header(number, silo)
        assert header.self_commitment == page.self_commitment(seed, header.round_ctx, header.attempt, silo)
    total = page.unmasked(vectors, seeds, attempts, page.h(recorded.body("manifest", number)), pair_keys)
    assert struct.pack(f"<{len(total)}I", *total) == outcome.total


def test_the_set_follows_from_the_lists(recorded, number):
    frozen = decode(recorded.body("freeze", number), Freeze)
    lists = [decode(decode(raw, Signed).body, Listing) for raw in frozen.lists]
    common = set(lists[0].headers).intersection(*(each.headers for each in lists[1:]))
    headers = [(decode(raw, Signed).sender, page.h(raw)) for raw in frozen.headers]
    assert headers == sorted(common)
    assert dict(frozen.left_out) == dict.fromkeys(MISSING_IN[number], "absent")
    entries = [page.u32(silo) + recorded.header(number, silo).attempt + digest for silo, digest in headers]
    assert decode(recorded.body("outcome", number), Outcome).frozen == page.h(b"gsum/1 set\0" + b"".join(entries))


def test_the_log_of_the_page_has_the_recorded_heads(recorded):
    leaves = []
    for (kind, number, party), data, leaf, time in recorded.rows:
        if leaf is None:
            continue
        assert leaf == len(leaves)
        header = page.h(decode(decode(data, Signed).body, Upload).header) if kind == "upload" else b""
        ours = encode(log.Leaf(kind=kind, number=number, party=party, digest=page.h(data), header=header, time=time))
        if party < 128 and number < 128:
            assert ours == page.leaf(kind, number, party, page.h(data), header, time)
        leaves.append(ours)
    for number in (1, 2, 3):
        head = notes.checkpoint(notes.parse(recorded.get("checkpoint", number, AGGREGATOR)).text)
        assert head.root == page.root(leaves[: head.size])


# --- By our code, byte for byte -------------------------------------------------------------------------------------------------


def test_the_aggregators_documents_are_made_again_byte_for_byte(recorded, number):
    accepted = recorded.accepted
    opened = rounds.round_in(recorded, accepted, number)
    roster = decode(recorded.body("roster", opened.manifest.epoch), Roster)
    notes_of, guards = ({decode(raw, Signed).sender: raw for raw in each} for each in (roster.notes, roster.guardians))
    assert encode(rounds.roster(accepted, opened.manifest.epoch, notes_of, guards)) == encode(roster)
    place = {"accepted": accepted, "epoch_ctx": opened.context}
    headers = {silo: recorded.upload(number, silo).header for silo in recorded.parties("upload", number)}
    stood = decode(recorded.body("freeze", number), Freeze)
    lists = {decode(raw, Signed).sender: raw for raw in stood.lists}  # a later list was not there yet
    made = freeze.choose(headers, lists, silos=SILOS, round_ctx=opened.ctx, **place)
    assert encode(made) == recorded.body("freeze", number)
    frozen = guardian_sum.check_freeze(made, round_ctx=opened.ctx, own_header=None, silos=SILOS, **place)
    certificate = freeze.choose_endorsements(recorded.all("endorsement", number), frozen, **place)
    certified = guardian_sum.check_certificate(certificate, frozen, **place)
    given = {
        guardian.id: shares.open_shares(
            recorded.get("shares", number, guardian.id),
            certified,
            guardian=guardian,
            epoch_ctx=opened.context,
            seal_seed=recorded.seal_seed,
        )
        for guardian in accepted.terms.guardian
        if recorded.get("shares", number, guardian.id) is not None
    }
    secrets = shares.reconstruct(given, certified, accepted=accepted)
    vectors = {silo: np.array(y, dtype="<u4") for silo, y in opened_vectors(recorded, number).items() if silo in frozen.headers}
    total = guardian_sum.unmask(vectors, secrets.seeds, certified, secrets.pair_keys)
    state = update_rule.initial(accepted.terms)
    for before in range(1, number):
        state = rounds.settle(state, decode(recorded.body("outcome", before), Outcome), accepted.terms)
    outcome, _ = rounds.result(accepted, opened, state, certified, total, secrets.seeds, vectors, pair_keys=secrets.pair_keys)
    assert encode(outcome) == recorded.body("outcome", number)


def test_the_record_verifies_and_a_changed_byte_of_any_document_does_not(recorded, tmp_path):
    from privacy.audit.evidence import Entry
    from privacy.audit.findings import Slot

    entries = []
    for slot, data, leaf, time in recorded.rows:
        (tmp_path / hashlib.sha256(data).hexdigest()).write_bytes(data)
        entries.append(Entry(slot=Slot(*slot), digest=page.h(data), size=len(data), time=time, leaf=leaf))
    found = whole.audit(Evidence.indexed(tmp_path, entries), pinned=[recorded.accepted.digest.hex()])
    assert found.holds, found.failed
    assert found.recomputed == (1, 2)
    for slot, data, _, _ in recorded.rows[::7]:
        if slot[0] not in ("checkpoint", "cosignature", "head"):
            with pytest.raises(TrustError):
                decode(data[:-1] + bytes([data[-1] ^ 1]) + b"\0", Signed)


# --- Recording ------------------------------------------------------------------------------------------------------------------


def record() -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = Whole.create(
            Path(folder) / "federation", silos=SILOS, sum={"protocol": "shares", "dropouts": 1, "corrupt_guardians": 1}
        )
        whole.run(1)
        whole = whole.restarted()

        def falls() -> None:
            with pytest.raises(PowerCut):
                whole.take_part(FALLEN, 2, line=whole.dying("upload", 2))

        whole.run_hurried(2, falls, *(functools.partial(whole.take_part, silo, 2) for silo in SILOS if silo != FALLEN))
        documents = []
        for row in hub_verify.rows_of(whole.home):
            data = whole.store.get(row.kind, row.number, row.party)
            documents.append([row.kind, row.number, row.party, row.leaf, row.received_at, base64.b64encode(data).decode()])
        facts = {"receive_seed": whole.identity.receive_seed.hex(), "documents": documents}
        RECORD.write_bytes(gzip.compress(json.dumps(facts).encode(), mtime=0))
        whole.close()


if __name__ == "__main__":
    record()
