# SPDX-License-Identifier: Apache-2.0
"""The golden vectors of docs/spec: fixed keys and inputs, and what they must give, byte for byte.

``python -m tests.test_golden`` writes them anew; a change of any of them is a change of the protocol.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from privacy import envelope, keys
from privacy.entries import Reserve
from privacy.errors import LedgerBroken, TrustError
from privacy.ledger import History, Ledger
from privacy.mechanism import LatticeGaussian
from privacy.messages import Consent, Signed, decode, encode

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


if __name__ == "__main__":
    VECTORS.mkdir(exist_ok=True)
    (VECTORS / "envelope.json").write_text(json.dumps(envelope_vectors(), indent=1) + "\n")
    (VECTORS / "ledger.jsonl").unlink(missing_ok=True)
    write_ledger(VECTORS / "ledger.jsonl")
    (VECTORS / "ledger.lock").unlink(missing_ok=True)
    (VECTORS / "ledger.json").write_text(json.dumps({"sign_key": identity(1).public.sign_key.hex()}, indent=1) + "\n")
