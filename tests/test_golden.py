# SPDX-License-Identifier: Apache-2.0
"""The golden vectors of docs/spec: fixed keys and inputs, and what they must give, byte for byte.

``python -m tests.test_golden`` writes them anew; a change of any of them is a change of the protocol.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from privacy import envelope, prg
from privacy.dp.entries import Reserve
from privacy.dp.ledger import History, Ledger
from privacy.dp.mechanism import LatticeGaussian
from privacy.errors import LedgerBroken, TrustError
from privacy.identity import keys
from privacy.messages import Consent, Signed, decode, encode
from privacy.secure_sum import guardian_sum, shamir
from privacy.transparency import log, notes, proofs
from tests import by_the_page as page

VECTORS = Path(__file__).parent / "vectors"
CONTEXT = b"\x11" * 32


def identity(number: int) -> keys.Identity:
    return keys.Identity(name=f"silo-{number}", sign_seed=bytes([number]) * 32)


# --- what the specification says, written a second time without our code ------------------------------------------------


def packed(*fields: str | int | bytes) -> bytes:
    """A MessagePack array of short items, after the public specification."""
    out = bytes([0x90 | len(fields)])
    for field in fields:
        if isinstance(field, str):
            out += bytes([0xA0 | len(field)]) + field.encode()
        elif isinstance(field, int):
            out += bytes([field]) if field < 128 else b"\xcd" + field.to_bytes(2, "big")
        else:
            out += (b"\xc4" + bytes([len(field)]) if len(field) < 256 else b"\xc5" + len(field).to_bytes(2, "big")) + field
    return out


def envelope_vectors() -> dict[str, object]:
    body = encode(Consent(round_ctx=b"\x22" * 32, silo=2, frozen=b"\x33" * 32))
    signed_bytes = b"gsum/1 sig consent\0" + CONTEXT + (2).to_bytes(4, "big") + hashlib.sha256(body).digest()
    raw = envelope.sign(identity(2), type="consent", context=CONTEXT, sender=2, body=body)
    seal_seed = b"\x44" * 32
    info = b"gsum/1 release\0" + b"\x22" * 32 + b"\x33" * 32 + (2).to_bytes(4, "big")
    return {
        "sign_seed": (b"\x02" * 32).hex(), "sign_key": identity(2).public.sign_key.hex(), "context": CONTEXT.hex(), "sender": 2,
        "type": "consent", "body": body.hex(), "signed_bytes": signed_bytes.hex(), "document": raw.hex(),
        "fingerprint": keys.fingerprint(identity(2).public),
        "seal_seed": seal_seed.hex(), "seal_key": keys.seal_public_key(seal_seed).hex(), "info": info.hex(),
        "plaintext": (b"\x55" * 32).hex(), "sealed": envelope.seal(keys.seal_public_key(seal_seed), b"\x55" * 32, info=info).hex(),
    }  # fmt: skip


def mechanism() -> LatticeGaussian:
    return LatticeGaussian(sampling_rate=0.25, lattice_bits=20, share_variance=10**12, shares=2, dimension=26, steps=1)


def write_ledger(path: Path) -> None:
    clock = iter(range(1767225600, 1767225700))
    sign, verify = identity(1).sign, verifier()
    with Ledger.create(path, who="silo-1", sign=sign, verify=verify, clock=lambda: float(next(clock))) as ledger:
        ledger.declare(contract="aa" * 32, run="", mechanism=mechanism().with_steps(10), epsilon=8.0, delta=1e-5)
        ledger.reserve(contract="aa" * 32, round_number=1, attempt="01" * 16, mechanism=mechanism())
        ledger.commit(contract="aa" * 32, round_number=1, attempt="01" * 16)
        ledger.reserve(contract="aa" * 32, round_number=2, attempt="02" * 16, mechanism=mechanism())
        ledger.void(contract="aa" * 32, round_number=2, reason="the round closed without a result")


# A sum of three, of which the third sends nothing: every number fixed.
ROUND, LINKS = hashlib.sha256(b"a manifest").digest(), {(1, 2): b"\x12" * 32, (1, 3): b"\x13" * 32, (2, 3): b"\x23" * 32}
X = {1: [1, 2, 2**32 - 1], 2: [10, 20, 5], 3: [100, 200, 0]}
SEEDS, ATTEMPTS = {i: bytes([0xB0 + i]) * 32 for i in X}, {i: bytes([0xA0 + i]) * 16 for i in X}
COEFFICIENTS = bytes(range(32)) + bytes(range(100, 132))


def keys_of(silo: int) -> dict[int, bytes]:
    return {peer: page.pair_key(LINKS[min(silo, peer), max(silo, peer)], ROUND, silo, peer) for peer in X if peer != silo}


def sum_vectors() -> dict[str, object]:
    """By the page alone."""
    y = {
        i: page.masked(X[i], silo=i, self_seed=SEEDS[i], attempt=ATTEMPTS[i], round_ctx=ROUND, keys=keys_of(i)) for i in X
    }
    gone = {(i, 3): keys_of(i)[3] for i in (1, 2)}
    return {
        "round_ctx": ROUND.hex(), "links": {f"{i}-{j}": link.hex() for (i, j), link in LINKS.items()},
        "next_links": {f"{i}-{j}": page.next_link(link).hex() for (i, j), link in LINKS.items()},
        "x": X, "self_seeds": {i: seed.hex() for i, seed in SEEDS.items()},
        "attempts": {i: attempt.hex() for i, attempt in ATTEMPTS.items()},
        "pair_keys": {i: {j: key.hex() for j, key in keys_of(i).items()} for i in X},
        "pair_commitments": {i: {j: page.expand(key, "gsum/1 commit").hex() for j, key in keys_of(i).items()} for i in X},
        "self_commitments": {i: page.self_commitment(SEEDS[i], ROUND, ATTEMPTS[i], i).hex() for i in X},
        "y": y, "roots": {i: page.vector_root(y[i]).hex() for i in X},
        "sum_of_all": page.unmasked(y, SEEDS, ATTEMPTS, ROUND, {}),
        "sum_without_3": page.unmasked({i: y[i] for i in (1, 2)}, {i: SEEDS[i] for i in (1, 2)}, ATTEMPTS, ROUND, gone),
        "stream_key": (b"\x77" * 32).hex(), "stream_of_segment_1": page.stream(b"\x77" * 32, 2**18 + 4)[-4:],
        "shamir": {
            "secret": SEEDS[1].hex(), "coefficients": COEFFICIENTS.hex(), "threshold": 3,
            "shares": [page.share_at(x, SEEDS[1], [COEFFICIENTS[:32], COEFFICIENTS[32:]]).hex() for x in range(1, 6)],
        },
    }  # fmt: skip


LEAVES = [
    ("contract", 1, 0, b""), ("roster", 1, 0, b""), ("manifest", 1, 0, b""), ("upload", 1, 2, b"\x66" * 32), ("outcome", 1, 0, b""),
]  # fmt: skip


def log_vectors() -> dict[str, object]:
    """Leaves, root and checkpoint by the page; the signed note by our code."""
    leaves = [page.leaf(kind, number, party, page.h(kind.encode()), header, 1767225600) for kind, number, party, header in LEAVES]
    text = page.checkpoint("north/log", leaves)
    note = notes.joined(
        notes.signed(text, name="north/log", seed=b"\x01" * 32),
        [notes.cosigned(text, name="north/clinic-a", seed=b"\x02" * 32, time=1767225601)],
    )
    return {
        "leaves": [each.hex() for each in leaves], "checkpoint": text, "note": note.to_bytes().decode(),
        "key_ids": [
            page.key_id("north/log", 1, identity(1).public.sign_key).hex(),
            page.key_id("north/clinic-a", 4, identity(2).public.sign_key).hex(),
        ],
        "tile_numbers": {str(n): page.tile_number(n) for n in (0, 999, 1000, 1234067)},
    }  # fmt: skip


def verifier():
    key = identity(1).public.sign_key
    return lambda data, signature: keys.verify_signature(key, data, signature)


# --- tests --------------------------------------------------------------------------------------------------------------


def test_a_signed_document_is_the_one_in_the_vectors_and_reads_as_the_page_says():
    found = json.loads((VECTORS / "envelope.json").read_text())
    ours = envelope_vectors()
    assert {name: value for name, value in ours.items() if name != "sealed"} == {k: v for k, v in found.items() if k != "sealed"}
    document = decode(bytes.fromhex(found["document"]), Signed)
    by_hand = packed("gsum/1", "consent", 2, CONTEXT, bytes.fromhex(found["body"]), document.signature)
    assert by_hand.hex() == found["document"]
    assert found["body"] == packed(b"\x22" * 32, 2, b"\x33" * 32).hex()
    keys.verify_signature(bytes.fromhex(found["sign_key"]), bytes.fromhex(found["signed_bytes"]), document.signature)


def test_the_sealed_message_of_the_vectors_opens_with_its_info_alone():
    found = {name: value if isinstance(value, int) or name in ("type", "fingerprint") else bytes.fromhex(value)
             for name, value in json.loads((VECTORS / "envelope.json").read_text()).items()}  # fmt: skip
    assert envelope.open_sealed(found["seal_seed"], found["sealed"], info=found["info"]) == found["plaintext"]
    assert len(found["sealed"]) == len(found["plaintext"]) + envelope.OVERHEAD_BYTES
    with pytest.raises(TrustError):
        envelope.open_sealed(found["seal_seed"], found["sealed"], info=found["info"][:-1] + b"\3")


def test_the_ledger_of_the_vectors_is_written_again_byte_for_byte(tmp_path):
    write_ledger(tmp_path / "ledger.jsonl")
    assert (tmp_path / "ledger.jsonl").read_bytes() == (VECTORS / "ledger.jsonl").read_bytes()


def test_the_ledger_of_the_vectors_reads_as_the_page_says():
    history = History.read(VECTORS / "ledger.jsonl", verify=verifier())
    assert [body.kind for body in history.entries] == ["open", "plan", "reserve", "commit", "reserve", "void"]
    assert [event.steps for event in history.charged()] == [2], "void attempts are charged"
    assert isinstance(history.entries[2], Reserve)
    previous = "0" * 64
    for number, line in enumerate((VECTORS / "ledger.jsonl").read_bytes().split(b"\n")[:-1]):
        entry = json.loads(line)
        assert (entry["sequence"], entry["previous"]) == (number, previous)
        plain = line[: line.rindex(b',"signature"')] + b"}"
        verifier()(b"siloquy ledger\0" + plain, bytes.fromhex(entry["signature"]))
        previous = hashlib.sha256(line).hexdigest()


@pytest.mark.parametrize("line", range(6))
def test_a_byte_changed_in_the_ledger_of_the_vectors_is_refused_by_its_line(tmp_path, line):
    lines = (VECTORS / "ledger.jsonl").read_bytes().split(b"\n")
    lines[line] = lines[line].replace(b'"time":17', b'"time":18')
    (tmp_path / "ledger.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(LedgerBroken, match=f"line {line + 1} "):
        History.read(tmp_path / "ledger.jsonl", verify=verifier())


def test_masks_commitments_roots_and_sums_are_those_of_the_vectors_and_of_the_page():
    found = json.loads((VECTORS / "sum.json").read_text())
    assert json.loads(json.dumps(sum_vectors())) == found
    y = {}
    for silo, x in X.items():
        place = {"round_ctx": ROUND, "silo": silo, "attempt": ATTEMPTS[silo], "self_seed": SEEDS[silo], "pair_keys": keys_of(silo)}
        y[silo] = guardian_sum.mask(np.array(x, dtype="<u4"), **place)
        header = guardian_sum.build_header(y[silo], ledger_counter=1, **place)
        assert y[silo].tolist() == found["y"][str(silo)]
        assert header.root.hex() == found["roots"][str(silo)]
        assert header.self_commitment.hex() == found["self_commitments"][str(silo)]
        assert {str(j): c.hex() for j, c in header.pair_commitments} == found["pair_commitments"][str(silo)]
    assert found["sum_of_all"] == [111, 222, 4]
    assert found["sum_without_3"] == [11, 22, 4]
    assert prg.stream(b"\x77" * 32, 2**18 + 4)[-4:].tolist() == found["stream_of_segment_1"]


def test_shares_are_those_of_the_vectors_and_any_three_give_the_secret():
    found = json.loads((VECTORS / "sum.json").read_text())["shamir"]
    secret = np.frombuffer(bytes.fromhex(found["secret"]), dtype=np.uint8).reshape(1, 32)
    # Which coefficient is drawn first is nobody's business but the dealer's: either order gives shares of this secret.
    drawn = [COEFFICIENTS, COEFFICIENTS[32:] + COEFFICIENTS[:32]]
    made = [shamir.split(secret, threshold=3, count=5, random=lambda n, c=c: c[:n]) for c in drawn]
    assert found["shares"] in [[share.tobytes().hex() for share in shares] for shares in made]
    shares = [np.frombuffer(bytes.fromhex(each), dtype=np.uint8).reshape(1, 32) for each in found["shares"]]
    for chosen in ((0, 1, 2), (4, 2, 0), (1, 3, 4)):
        assert shamir.combine(chosen, [shares[i] for i in chosen]).tobytes().hex() == found["secret"]


def test_the_log_of_the_vectors_is_ours_and_that_of_the_page():
    found = json.loads((VECTORS / "log.json").read_text())
    assert json.loads(json.dumps(log_vectors())) == found
    ours = [
        encode(log.Leaf(kind=kind, number=number, party=party, digest=page.h(kind.encode()), header=header, time=1767225600))
        for kind, number, party, header in LEAVES
    ]
    assert [each.hex() for each in ours] == found["leaves"]
    note = notes.parse(found["note"].encode())
    head = notes.checkpoint(note.text)
    assert (head.origin, head.size, head.root) == ("north/log", 5, proofs.root_of_hashes(list(map(proofs.leaf_hash, ours))))
    known = [
        notes.VerifierKey(name="north/log", key=identity(1).public.sign_key),
        notes.VerifierKey(name="north/clinic-a", key=identity(2).public.sign_key, type=notes.COSIGNATURE),
    ]
    assert notes.verified(note, known) == tuple(known)
    assert [key.id.hex() for key in known] == found["key_ids"]
    for number, text in found["tile_numbers"].items():
        assert log.tile_path(0, int(number)) == f"tile/0/{text}"


if __name__ == "__main__":
    VECTORS.mkdir(exist_ok=True)
    (VECTORS / "envelope.json").write_text(json.dumps(envelope_vectors(), indent=1) + "\n")
    (VECTORS / "sum.json").write_text(json.dumps(sum_vectors(), indent=1) + "\n")
    (VECTORS / "log.json").write_text(json.dumps(log_vectors(), indent=1) + "\n")
    (VECTORS / "ledger.jsonl").unlink(missing_ok=True)
    write_ledger(VECTORS / "ledger.jsonl")
    (VECTORS / "ledger.lock").unlink(missing_ok=True)
    (VECTORS / "ledger.json").write_text(json.dumps({"sign_key": identity(1).public.sign_key.hex()}, indent=1) + "\n")
