# SPDX-License-Identifier: Apache-2.0
"""Signed notes, checkpoints and cosignatures: public vectors, and everything a note must not be."""

from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from privacy.errors import TrustError
from privacy.transparency import notes
from privacy.transparency.notes import COSIGNATURE, Checkpoint, Line, Note, VerifierKey

# golang.org/x/mod, sumdb/note, example_test.go: a signer, its verifier key and a note.
GO_SEED = base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]
GO_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
GO_NOTE = (
    GO_TEXT + "\n— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)
# C2SP/C2SP signed-note.md @0552876: the example of the specification (its key is not published; one text has an empty line).
C2SP_NOTE = (
    "Ognuno sta solo sul cuor della terra\ntrafitto da un raggio di sole:\n\ned è subito sera.\n\n"
    "— quasimodo.example/salvatore "
    "NnugSzTjtVAewIS+Z/iJhUPeFDkO/5QQ2i5ddnGITLlC+EhfLW9oJKONrMouFSQU0xMcXxj99ihAQwaqP3ZekRwNtIc=\n"
)
# yaglo/signed_note, README: made by another implementation, in Elixir.
ELIXIR_KEY = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
ELIXIR_NOTE = (
    "This is an example message.\n\n"
    "— example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n"
)
SEED = bytes(range(32))
PUBLIC = Ed25519PrivateKey.from_private_bytes(SEED).public_key().public_bytes_raw()
LOG = VerifierKey(name="bank/log", key=PUBLIC)
WITNESS = VerifierKey(name="bank/silo-1", key=PUBLIC, type=COSIGNATURE)
HEAD = Checkpoint(origin="bank/log", size=7, root=hashlib.sha256(b"root").digest())


def refused(raw: bytes | str) -> bool:
    try:
        notes.parse(raw if isinstance(raw, bytes) else raw.encode())
    except TrustError as error:
        return error.code == "malformed"
    return False


# --- Vectors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("raw", "key"), [(GO_NOTE, GO_KEY), (ELIXIR_NOTE, ELIXIR_KEY)])
def test_notes_of_other_implementations_verify(raw: str, key: str) -> None:
    known = VerifierKey.parse(key)
    note = notes.parse(raw.encode())
    assert notes.verified(note, [known]) == (known,)
    assert note.to_bytes() == raw.encode()
    assert known.text == key


def test_the_same_note_is_made_byte_for_byte() -> None:
    assert notes.signed(GO_TEXT, name="PeterNeumann", seed=GO_SEED).to_bytes() == GO_NOTE.encode()


def test_the_example_of_the_specification_parses() -> None:
    note = notes.parse(C2SP_NOTE.encode())
    assert note.text == C2SP_NOTE.rpartition("\n\n")[0] + "\n"
    assert [(line.name, line.key_id.hex(), len(line.signature)) for line in note.lines] == [
        ("quasimodo.example/salvatore", "367ba04b", 64)
    ]
    assert note.to_bytes() == C2SP_NOTE.encode()


def test_a_cosignature_by_hand() -> None:
    """c2sp.org/tlog-cosignature: key id with type 4; id ‖ u64 time ‖ Ed25519 over "cosignature/v1", the time and the text."""
    raw = notes.cosigned(HEAD.text, name="bank/silo-1", seed=SEED, time=1_700_000_000).to_bytes()
    text, _, line = raw.decode().rpartition("\n\n")
    assert text + "\n" == HEAD.text == f"bank/log\n7\n{base64.b64encode(HEAD.root).decode()}\n"
    blob = base64.b64decode(line.removeprefix("— bank/silo-1 "))
    assert blob[:4] == hashlib.sha256(b"bank/silo-1\n\x04" + PUBLIC).digest()[:4]
    assert blob[4:12] == (1_700_000_000).to_bytes(8, "big")
    message = b"cosignature/v1\ntime 1700000000\n" + HEAD.text.encode()
    Ed25519PrivateKey.from_private_bytes(SEED).public_key().verify(blob[12:], message)
    assert notes.verified(notes.parse(raw), [WITNESS]) == (WITNESS,)


# --- Verifying ---------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_note_is_refused_or_of_an_unknown_key() -> None:
    for note in (
        notes.signed(HEAD.text, name="bank/log", seed=SEED), notes.cosigned(HEAD.text, name="bank/silo-1", seed=SEED, time=9)
    ):  # fmt: skip
        raw = note.to_bytes()
        for bit in range(8 * len(raw)):
            changed = bytearray(raw)
            changed[bit // 8] ^= 1 << bit % 8
            try:
                found = notes.verified(notes.parse(bytes(changed)), [LOG, WITNESS])
            except TrustError:
                continue
            assert found == (), bytes(changed)


def test_a_line_of_an_unknown_key_counts_for_nothing_and_a_bad_one_of_a_known_key_spoils_the_note() -> None:
    good = notes.signed(HEAD.text, name="bank/log", seed=SEED)
    stranger = notes.signed(HEAD.text, name="bank/log", seed=bytes(32))  # the same name, another key id
    assert notes.verified(notes.joined(good, [stranger]), [LOG]) == (LOG,)
    assert notes.verified(stranger, [LOG]) == ()
    forged = Line(name=LOG.name, key_id=LOG.id, signature=bytes(64))
    with pytest.raises(TrustError):
        notes.verified(Note(text=HEAD.text, lines=(forged, *stranger.lines)), [LOG])


def test_a_cosignature_is_no_signature_and_the_other_way_round() -> None:
    """One key, one name, two types: a line verifies as its own type only."""
    cosigner = VerifierKey(name=LOG.name, key=PUBLIC, type=COSIGNATURE)
    signed = notes.signed(HEAD.text, name=LOG.name, seed=SEED)
    cosigned = notes.cosigned(HEAD.text, name=LOG.name, seed=SEED, time=5)
    assert notes.verified(signed, [cosigner]) == notes.verified(cosigned, [LOG]) == ()
    for note, key in ((signed, cosigner), (cosigned, LOG)):
        moved = Note(text=note.text, lines=(Line(name=LOG.name, key_id=key.id, signature=note.lines[0].signature),))
        with pytest.raises(TrustError):
            notes.verified(moved, [key])


def test_a_cosignature_binds_its_time() -> None:
    line = notes.cosigned(HEAD.text, name=WITNESS.name, seed=SEED, time=1000).lines[0]
    for time in (0, 999, 1001, 2**63):
        other = Line(name=line.name, key_id=line.key_id, signature=time.to_bytes(8, "big") + line.signature[8:])
        with pytest.raises(TrustError):
            notes.verified(Note(text=HEAD.text, lines=(other,)), [WITNESS])


def test_joined_notes_have_one_text_and_each_line_once() -> None:
    first, second = (notes.cosigned(HEAD.text, name=f"bank/silo-{i}", seed=SEED, time=i) for i in (1, 2))
    both = notes.joined(first, [second, first])
    assert [line.name for line in both.lines] == ["bank/silo-1", "bank/silo-2"]
    with pytest.raises(TrustError):
        notes.joined(first, [notes.cosigned("bank/log\n8\n" + HEAD.text[11:], name="bank/silo-3", seed=SEED, time=3)])
    with pytest.raises(TrustError):  # two signatures of one key
        notes.joined(first, [notes.cosigned(HEAD.text, name="bank/silo-1", seed=SEED, time=8)])


# --- Parsing -----------------------------------------------------------------------------------------------------------

LINE = notes.signed(HEAD.text, name="bank/log", seed=SEED).to_bytes().decode().rpartition("\n\n")[2]


@pytest.mark.parametrize(
    "raw",
    [
        "", "\n", "\n\n", "text\n", "text\n\n", f"text\n{LINE}", f"\n\n{LINE}", f"text\n\n{LINE[:-1]}", f"text\n\n{LINE}\n",
        f"text\n\n\n{LINE}"[:-1], f"te\rxt\n\n{LINE}", f"te\txt\n\n{LINE}", f"te\0xt\n\n{LINE}", f"te\x7fxt\n\n{LINE}",
        f"text\r\n\r\n{LINE}", f"text\n\n{LINE}{LINE}", f"text\n\n {LINE}", f"text\n\n--{LINE[1:]}", f"text\n\n—{LINE[2:]}",
        f"text\n\n—\u00a0{LINE[2:]}", f"text\n\n{LINE[:-1]} \n", f"text\n\n{LINE[:-1]}=\n", f"text\n\n{LINE[:-2]}\n",
        "text\n\n— name+x AAAAAAAA\n", "text\n\n—  AAAAAAAA\n", "text\n\n— na\u2003me AAAAAAAA\n", "text\n\n— name AAAAAA==\n",
        "text\n\n— name\n", "text\n\n— name \n", "text\n\n— name AAAA\nAAAA\n", "text\n\n— name AAAAAA-_AAAA\n",
    ],
)  # fmt: skip
def test_what_is_no_note_is_refused(raw: str) -> None:
    assert refused(raw)


def test_notes_are_utf8_and_of_bounded_size() -> None:
    assert refused(b"te\xffxt\n\n" + LINE.encode())
    assert refused(b"te\xed\xa0\x80xt\n\n" + LINE.encode())  # a surrogate
    assert refused(b"a" * notes.MOST_BYTES + b"\n\n" + LINE.encode())
    lines = "".join(f"— n{i} {base64.b64encode(bytes(8)).decode()}\n" for i in range(notes.MOST_LINES + 1))
    assert refused(f"text\n\n{lines}")
    assert not refused("text\n\n" + "".join(lines.splitlines(keepends=True)[1:]))


def test_base64_has_one_spelling() -> None:
    assert notes.from_base64("AAA=") == bytes(2)
    for text in ("AAB=", "AAA", "AAA==", "AAA=\n", " AAA=", "AA A=", "AA-_", "ＡＡＡ=", "AAA=AAA=", "=", "A", "é"):
        with pytest.raises(TrustError):
            notes.from_base64(text)


@pytest.mark.parametrize("size", ["", "-1", "+7", "07", "7 ", " 7", "7.0", "1_0", "0x7", "７", "٧", "1e3", "9" * 20, "7\n8"])
def test_sizes_are_plain_ascii_decimals(size: str) -> None:
    with pytest.raises(TrustError):
        notes.checkpoint(f"bank/log\n{size}\n{HEAD.text.split()[2]}\n")
    with pytest.raises(TrustError):
        notes.decimal(size)


def test_a_checkpoint_has_three_lines_and_no_more() -> None:
    assert notes.checkpoint(HEAD.text) == HEAD
    root = HEAD.text.split("\n")[2]
    for text in (
        "", "\n\n\n", f"bank/log\n7\n{root}", f"bank/log\n7\n{root}\nmore\n", f"bank/log\n7\n{root}\n\n", f"\n7\n{root}\n",
        f"bank log\n7\n{root}\n", f"bank/log\n7\n{root[:-4]}\n", f"bank/log\n7\n{root[:-2]}B=\n", f"bank/log\n7\n{root}{root}\n",
    ):  # fmt: skip
        with pytest.raises(TrustError):
            notes.checkpoint(text)


def test_a_verifier_key_states_its_own_id() -> None:
    for text in (
        GO_KEY.replace("c74f20a3", "c74f20a4"), GO_KEY.replace("c74f20a3", "C74F20A3"), GO_KEY.replace("Peter", "Paul"), "", "+",
        GO_KEY + "=", GO_KEY.replace("+ARpc", "+BBpc"), "name+00000000+", GO_KEY.replace("PeterNeumann", ""),
        "PeterNeumann+c74f20a3+" + base64.b64encode(b"\1" + bytes(31)).decode(),
    ):  # fmt: skip
        with pytest.raises(TrustError):
            VerifierKey.parse(text)


@given(st.text(), st.binary(min_size=1, max_size=80))
def test_whatever_is_signed_reads_back_or_is_not_signed(text: str, seed: bytes) -> None:
    try:
        note = notes.signed(text, name="bank/log", seed=hashlib.sha256(seed).digest())
    except (TrustError, UnicodeEncodeError):
        return
    assert notes.parse(note.to_bytes()) == note
    assert note.text == text


@given(st.binary(max_size=300))
def test_any_bytes_are_a_note_in_one_spelling_or_refused(raw: bytes) -> None:
    for tried in (raw, raw + b"\n\n" + LINE.encode()):
        try:
            note = notes.parse(tried)
        except TrustError:
            continue
        assert note.to_bytes() == tried
