# SPDX-License-Identifier: Apache-2.0
"""Leaves, paths, tiles, trees read from tiles, and receipts."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import federation
from privacy.errors import TrustError
from privacy.messages import EMPTY_LOG, KINDS, Signed, Upload, decode, encode
from privacy.secure_sum import merkle
from privacy.transparency import log, notes, proofs, tree
from privacy.transparency.log import Leaf, Tiles
from privacy.transparency.tree import Tree
from tests.terms import contract_bytes, public, seed

TERMS = federation.parse(contract_bytes(3)).terms
SIZES = (1, 2, 3, 5, 8, 255, 256, 257, 511, 512, 700)


def leaf_of(index: int) -> bytes:
    digest = hashlib.sha256(str(index).encode()).digest()
    return encode(Leaf(kind="upload", number=index, party=1, digest=digest, header=digest[::-1], time=1_800_000_000))


LEAVES = [leaf_of(index) for index in range(700)]


class Files:
    """The log's files for one size, and what was fetched of them."""

    def __init__(self, leaves):
        made = grown(leaves)
        self.root, self.fetched = made.root(), []
        self.files = {}
        for level, index, width in log.tiles_of(len(leaves)):
            start = index * log.WIDTH
            self.files[log.tile_path(level, index, width)] = b"".join(made.nodes(8 * level, start, width))
            if level == 0:
                self.files[log.tile_path("entries", index, width)] = log.bundle(leaves[start : start + width])

    def fetch(self, path):
        assert log.is_resource(path)
        self.fetched.append(path)
        return self.files.get(path)


def grown(leaves) -> Tree:
    made = Tree()
    for leaf in leaves:
        made.append(leaf)
    return made


# --- Leaves ------------------------------------------------------------------------------------------------------------


def test_a_leaf_has_one_encoding_of_known_bytes() -> None:
    leaf = Leaf(kind="roster", number=1, party=0, digest=bytes(32), time=2)
    assert encode(leaf) == b"\x97\xaesiloquy-leaf/1\xa6roster\x01\x00\xc4\x20" + bytes(32) + b"\xc4\x00\x02"
    assert decode(encode(leaf), Leaf) == leaf
    for other in (encode(leaf) + b"\0", encode(leaf)[:-1], encode(leaf).replace(b"\x01\x00\xc4", b"\xcc\x01\x00\xc4")):
        with pytest.raises(TrustError):
            decode(other, Leaf)


def test_every_leaf_fits_the_cap() -> None:
    most = Leaf(kind=max(KINDS, key=len), number=2**32 - 1, party=2**16 - 1, digest=bytes(32), header=bytes(32), time=2**63 - 1)
    assert len(encode(most)) <= log.MOST_LEAF_BYTES
    assert len(log.bundle([encode(most)] * 256)) <= log.MOST_RESOURCE_BYTES


def test_only_an_upload_has_a_header_digest() -> None:
    header = b"signed header"
    body = encode(Upload(header=header, sealed=b"sealed"))
    document = encode(Signed(version="gsum/1", type="upload", sender=1, context=bytes(32), body=body, signature=bytes(64)))
    assert log.header_digest("upload", document) == hashlib.sha256(header).digest()
    assert log.header_digest("roster", document) == log.header_digest("upload", b"no upload") == b""


def test_a_manifest_of_no_log_names_the_root_of_nothing() -> None:
    assert EMPTY_LOG == Tree().root() == tree.root_of([]) == proofs.EMPTY_ROOT


# --- Paths and tiles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "index", "width", "path"),
    [
        (0, 1234067, 256, "tile/0/x001/x234/067"),  # the example of c2sp.org/tlog-tiles
        (0, 273, 112, "tile/0/273.p/112"), (63, 0, 1, "tile/63/000.p/1"), ("entries", 999, 256, "tile/entries/999"),
        ("entries", 1000, 255, "tile/entries/x001/000.p/255"), (2, 10**9, 256, "tile/2/x001/x000/x000/000"),
    ],
)  # fmt: skip
def test_paths_of_tiles(level, index, width, path) -> None:
    assert log.tile_path(level, index, width) == path
    assert log.is_resource(path)


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "checkpoint/", "Checkpoint", "checkpoint\n", "signed", "tile", "tile/", "tile/0", "tile/0/", "tile/0/0",
        "tile/0/00",
        "tile/0/0000", "tile/0/000.p/0", "tile/0/000.p/256", "tile/0/000.p/01", "tile/0/000.p/", "tile/64/000", "tile/00/000",
        "tile/-1/000", "tile/0/001/000", "tile/0/x001/x000", "tile/0/../000", "../evidence", "tile/0/٠٠٠", "tile/0/000.p/１",
        "tile/entries", "tile/Entries/000", "tile/0/000/", "/tile/0/000", "tile//000", "tile/0/000.p/5/6", "log/checkpoint",
        "tile/0/x001/x001/x001/x001/x001/000", "tile/0/000\n", "tile/0/000.P/5", "%2e%2e/aggregator.key", "..", "checkpoint.",
    ],
)  # fmt: skip
def test_nothing_else_is_a_resource(path) -> None:
    assert not log.is_resource(path)


def test_the_tiles_of_the_specifications_tree() -> None:
    """c2sp.org/tlog-tiles: a tree of 70,000 leaves, and one of 256."""
    found = list(log.tiles_of(70_000))
    assert [sum(1 for tile in found if tile[0] == level and tile[2] == 256) for level in (0, 1, 2)] == [273, 1, 0]
    assert [tile for tile in found if tile[2] < 256] == [(0, 273, 112), (1, 1, 17), (2, 0, 1)]
    assert list(log.tiles_of(256)) == [(0, 0, 256), (1, 0, 1)]
    assert list(log.tiles_of(0)) == []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2000), st.integers(0, 2000))
def test_growing_writes_exactly_the_tiles_that_are_new(before, added) -> None:
    new = set(log.tiles_of(before + added, before))
    whole = set(log.tiles_of(before + added))
    assert new == whole - set(log.tiles_of(before))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=20))
def test_bundles_come_apart_as_they_were(leaves) -> None:
    data = log.bundle(leaves)
    assert log.unbundle(data, len(leaves)) == leaves
    for other, width in ((data + b"\0", len(leaves)), (data, len(leaves) + 1), (data[:-1], len(leaves))):
        if other != data or width != len(leaves):
            with pytest.raises(TrustError):
                log.unbundle(other, width)


# --- Trees -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_three_ways_to_one_root(size) -> None:
    leaves = LEAVES[:size]
    made = grown(leaves)
    assert made.root() == merkle.root_of_leaves(leaves) == proofs.root_of_hashes([proofs.leaf_hash(leaf) for leaf in leaves])
    assert grown(LEAVES).root(size) == made.root()


def test_proofs_from_nodes_are_the_proofs_over_lists() -> None:
    made, hashes = grown(LEAVES[:70]), [proofs.leaf_hash(leaf) for leaf in LEAVES[:70]]
    for size in range(1, 70):
        for index in range(size):
            assert tree.inclusion(made.node, index, size) == proofs.inclusion_proof(hashes[:size], index)
        for old in range(size + 1):
            assert tree.consistency(made.node, old, size) == proofs.consistency_proof(hashes[:size], old)
    for index, size in ((-1, 5), (5, 5), (0, 0)):
        with pytest.raises(TrustError):
            tree.inclusion(made.node, index, size)
    for old, new in ((-1, 5), (6, 5)):
        with pytest.raises(TrustError):
            tree.consistency(made.node, old, new)


def test_a_span_covers_its_leaves_once_and_the_parts_give_the_root_of_the_whole() -> None:
    made = grown(LEAVES[:90])
    for start in range(90):
        for end in range(start, 90):
            covered = [i for level, index in tree.span(start, end) for i in range(index << level, (index + 1) << level)]
            assert covered == list(range(start, end))
            parts = [
                (level, index, made.node(level, index)) for each in ((0, start), (start, end)) for level, index in tree.span(*each)
            ]
            assert tree.root_of(parts) == made.root(end)


@pytest.mark.parametrize("size", SIZES)
def test_a_tree_is_read_from_its_files_alone(size) -> None:
    whole = grown(LEAVES)
    for since in sorted({0, 1, size // 2, max(0, size - 3), size}):
        files = Files(LEAVES[:size])
        tiles = Tiles(size, files.fetch)
        tiles.check(files.root, since=since)
        assert tiles.root(since) == whole.root(since)
        assert [tiles.leaf(index) for index in range(since, size)] == LEAVES[since:size]
        for index in range(0, size, 37):
            proof = tree.inclusion(tiles.node, index, size)
            proofs.verify_inclusion(proofs.leaf_hash(LEAVES[index]), index, size, proof, files.root)


def test_a_small_step_of_a_large_log_reads_few_files() -> None:
    files = Files(LEAVES[:700])
    Tiles(700, files.fetch).check(files.root, since=690)
    assert sorted(files.fetched) == ["tile/1/000.p/2", "tile/entries/002.p/188"]
    files = Files(LEAVES[:200])
    Tiles(200, files.fetch).check(files.root, since=190)
    assert files.fetched == ["tile/entries/000.p/200"]


def test_every_changed_byte_of_a_file_that_is_read_is_noticed() -> None:
    for since in (0, 300):
        files = Files(LEAVES[:300])
        Tiles(300, files.fetch).check(files.root, since=since)
        for path in set(files.fetched):
            data = files.files[path]
            step = max(1, len(data) // 200)
            for place in range(0, len(data), step):
                files.files[path] = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
                with pytest.raises(TrustError) as caught:
                    Tiles(300, files.fetch).check(files.root, since=since)
                assert caught.value.code == "log-damaged"
            for other in (b"", data[:-1], data + b"\0", None):
                files.files[path] = other
                with pytest.raises(TrustError):
                    Tiles(300, files.fetch).check(files.root, since=since)
            files.files[path] = data


def test_a_tree_has_no_tile_beyond_its_size() -> None:
    files = Files(LEAVES[:256])
    tiles = Tiles(256, files.fetch)
    tiles.check(files.root)
    with pytest.raises(RuntimeError):
        tiles.leaf(256)
    for level, index in ((0, 256), (8, 1), (9, 0)):
        with pytest.raises(TrustError):
            tiles.node(level, index)


def test_a_leaf_that_was_not_checked_is_not_given() -> None:
    files = Files(LEAVES[:300])
    tiles = Tiles(300, files.fetch)
    for since in (None, 290):
        if since is not None:
            tiles.check(files.root, since=since)
            assert tiles.leaf(since) == LEAVES[since]
        with pytest.raises(RuntimeError):
            tiles.leaf(289)


# --- Heads and receipts ------------------------------------------------------------------------------------------------


def head_note(root: bytes, size: int, name: str = "test-federation/log", signer: int = 100) -> notes.Note:
    head = notes.Checkpoint(origin=name, size=size, root=root)
    return notes.signed(head.text, name=name, seed=seed(signer))


def cosigned(note: notes.Note, *silos: int) -> notes.Note:
    return notes.joined(note, [notes.cosigned(note.text, name=f"test-federation/silo-{i}", seed=seed(i), time=1) for i in silos])


def test_a_head_needs_the_aggregator_and_a_quorum() -> None:
    note = head_note(bytes(32), 5)
    assert log.open_checkpoint(note, TERMS).size == 5
    assert log.open_head(cosigned(note, 1, 2, 3), TERMS).size == 5
    assert log.cosigned_by(cosigned(note, 3, 1), TERMS) == (1, 3)
    for silos in ((), (1,), (1, 2)):
        with pytest.raises(TrustError) as caught:
            log.open_head(cosigned(note, *silos), TERMS)
        assert caught.value.code == "log-quorum"
    with pytest.raises(TrustError) as caught:
        log.open_checkpoint(head_note(bytes(32), 5, name="other-federation/log"), TERMS)
    assert caught.value.code == "log-origin"
    for unsigned in (
        head_note(bytes(32), 5, signer=1),
        notes.cosigned(note.text, name="test-federation/log", seed=seed(100), time=1),
    ):
        with pytest.raises(TrustError) as caught:
            log.open_checkpoint(unsigned, TERMS)
        assert caught.value.code == "log-unsigned"


def test_a_quorum_is_of_different_parties() -> None:
    """Silo 2's key under silo 1's and 3's names, or one silo twice: it stays one cosignature."""
    note = head_note(bytes(32), 5)
    borrowed = [notes.cosigned(note.text, name=f"test-federation/silo-{i}", seed=seed(2), time=1) for i in (1, 2, 3)]
    assert log.cosigned_by(notes.joined(note, borrowed), TERMS) == (2,)
    with pytest.raises(TrustError):
        notes.joined(note, [notes.cosigned(note.text, name="test-federation/silo-2", seed=seed(2), time=i) for i in (1, 2)])


def test_a_cosignature_document_is_one_partys_own_line_over_the_checkpoint_that_stands() -> None:
    note = head_note(bytes(32), 5)
    line = lambda silo, at=note.text: notes.cosigned(at, name=f"test-federation/silo-{silo}", seed=seed(silo), time=1)  # noqa: E731
    assert log.open_cosignature(line(2).to_bytes(), note.to_bytes(), TERMS, 2) == line(2)
    other = head_note(bytes(32), 6).text
    for raw, party in (
        (line(2), 1), (line(2), 9), (line(2, other), 2), (notes.joined(line(2), [line(1)]), 2), (note, 2),
        (notes.joined(line(2), [note]), 2),
    ):  # fmt: skip
        with pytest.raises(TrustError):
            log.open_cosignature(raw.to_bytes(), note.to_bytes(), TERMS, party)


def test_guardians_cosign_in_share_mode_and_members_in_consent_mode() -> None:
    assert list(log.cosigners(TERMS)) == [1, 2, 3]
    assert log.cosigner_key(TERMS, TERMS.member[0]).key == bytes.fromhex(public(1))
    assert log.aggregator_key(TERMS).name == log.origin(TERMS) == "test-federation/log"


def test_a_receipt_proves_its_leaf_without_the_log() -> None:
    files = Files(LEAVES[:300])
    tiles = Tiles(300, files.fetch)
    tiles.check(files.root)
    note = head_note(files.root, 300)
    for index in (0, 255, 256, 299):
        raw = log.receipt(tiles, index, note)
        assert raw.startswith(b"c2sp.org/tlog-proof@v1\nextra ")
        assert log.open_receipt(raw, TERMS) == (decode(LEAVES[index], Leaf), index, note)
        more = log.with_note(raw, cosigned(note, 1, 2, 3))
        leaf, _, signed = log.open_receipt(more, TERMS)
        assert leaf.number == index
        assert log.cosigned_by(signed, TERMS) == (1, 2, 3)


def test_every_flipped_bit_of_a_receipt_is_refused() -> None:
    files = Files(LEAVES[:5])
    tiles = Tiles(5, files.fetch)
    tiles.check(files.root)
    raw = log.receipt(tiles, 2, head_note(files.root, 5))
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TrustError):
            log.open_receipt(bytes(changed), TERMS)
    for other in (b"", raw[:-1], b"\n" + raw, raw + b"\n", raw.replace(b"index 2", b"index 02"), raw * 300):
        with pytest.raises(TrustError):
            log.open_receipt(other, TERMS)
