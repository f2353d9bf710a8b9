# SPDX-License-Identifier: Apache-2.0
"""The ledger: what was acknowledged stays, what was altered is named, nothing shrinks."""

from __future__ import annotations

import hashlib
import json
import os
import re

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.dp import ledger as ledgers
from privacy.dp.entries import Begin, Commit, Plan, Reserve, Void
from privacy.dp.ledger import History, Ledger
from privacy.dp.mechanism import LatticeGaussian
from privacy.errors import LedgerBroken, MachineError, PrivacyRefusal

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
A, B = "aa" * 32, "bb" * 32
PLAN = LatticeGaussian(sampling_rate=0.2, lattice_bits=16, share_variance=2**34, shares=4, dimension=100, steps=10)
STEP = PLAN.with_steps(1)


def verify(data, signature, key=KEY):
    key.public_key().verify(signature, data)


def parts(key=KEY, clock=lambda: 1_800_000_000.7):
    return {"sign": key.sign, "verify": lambda data, signature: verify(data, signature, key), "clock": clock}


def filled(path):
    with Ledger.create(path, who="silo-1", **parts()) as ledger:
        ledger.declare(contract=A, run="first", mechanism=PLAN, epsilon=3.0, delta=1e-5)
        for number in range(1, 4):
            ledger.reserve(contract=A, round_number=number, attempt=f"{number:032x}", mechanism=STEP)
            if number != 2:
                ledger.commit(contract=A, round_number=number, attempt=f"{number:032x}")
        ledger.void(contract=A, round_number=2, reason='a silo was absent; "quoted", é')
    return path.read_bytes()


def reopened(path):
    return Ledger.open(path, **parts())


def test_everything_written_comes_back_in_order(tmp_path):
    path = tmp_path / "ledger.jsonl"
    filled(path)
    with reopened(path) as ledger:
        assert [type(body) for body in ledger.entries] == [Begin, Plan, Reserve, Commit, Reserve, Reserve, Commit, Void]
        assert ledger.counter == 8
        assert ledger.entries[0] == Begin(who="silo-1", version=1)
        assert ledger.plan(A) == Plan(contract=A, run="first", mechanism=PLAN, epsilon=3.0, delta=1e-5)
        assert ledger.plan(B) is None
        assert ledger.attempts(A, 2) == [f"{2:032x}"]
        assert ledger.attempts(B, 2) == []
        ledger.reserve(contract=B, round_number=1, attempt="0b", mechanism=STEP)
    assert History.read(path, verify=verify).counter == 9


def test_the_format_is_what_the_module_says(tmp_path):
    lines = filled(tmp_path / "ledger.jsonl").splitlines()
    previous = "0" * 64
    for number, line in enumerate(lines):
        entry = json.loads(line)
        assert list(entry) == ["sequence", "previous", "time", "kind", "body", "signature"]
        assert (entry["sequence"], entry["previous"], entry["time"]) == (number, previous, 1_800_000_000)
        signed = re.sub(rb',"signature":"[0-9a-f]+"\}$', b"}", line)
        verify(b"siloquy ledger\0" + signed, bytes.fromhex(entry["signature"]))
        previous = hashlib.sha256(line).hexdigest()
    assert History.read(tmp_path / "ledger.jsonl", verify=verify).head == previous


def test_the_file_and_its_lock_are_private(tmp_path):
    filled(tmp_path / "ledger.jsonl")
    assert {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {"ledger.jsonl": 0o600, "ledger.lock": 0o600}


# --- Charging -----------------------------------------------------------------------------------------------------------


def test_charged_counts_every_reservation_and_merges_equal_mechanisms(tmp_path):
    path = tmp_path / "ledger.jsonl"
    filled(path)
    other = STEP.with_shares(3)
    with reopened(path) as ledger:
        assert ledger.charged() == [PLAN.with_steps(3)]
        ledger.reserve(contract=B, round_number=1, attempt="01", mechanism=STEP)
        ledger.reserve(contract=B, round_number=1, attempt="02", mechanism=other)
        ledger.reserve(contract=A, round_number=2, attempt="03", mechanism=STEP)
        ledger.void(contract=B, round_number=1, reason="")
        assert ledger.charged() == [PLAN.with_steps(5), other]
        assert ledger.charged(A) == [PLAN.with_steps(4)]
        assert ledger.charged(B) == [STEP, other]
        assert ledger.attempts(A, 2) == [f"{2:032x}", "03"]


def test_an_attempt_is_charged_once_and_committed_only_if_charged(tmp_path):
    path = tmp_path / "ledger.jsonl"
    filled(path)
    with reopened(path) as ledger:
        before = path.read_bytes()
        with pytest.raises(PrivacyRefusal, match="charged already"):
            ledger.reserve(contract=A, round_number=1, attempt=f"{1:032x}", mechanism=STEP)
        with pytest.raises(PrivacyRefusal, match="never reserved"):
            ledger.commit(contract=A, round_number=1, attempt="ff")
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    "wrong", [{"contract": "XY"}, {"contract": ""}, {"contract": "aa\n"}, {"attempt": "0"}, {"attempt": "AA"}, {"round_number": -1}]
)
def test_what_could_not_be_read_back_is_never_written(tmp_path, wrong):
    path = tmp_path / "ledger.jsonl"
    before = filled(path)
    with reopened(path) as ledger:
        with pytest.raises(PrivacyRefusal):
            ledger.reserve(**{"contract": A, "round_number": 9, "attempt": "0a", "mechanism": STEP, **wrong})
        assert path.read_bytes() == before
        with pytest.raises(PrivacyRefusal):
            ledger.declare(contract=A, run="", mechanism=PLAN, epsilon=float("nan"), delta=1e-5)
        ledger.reserve(contract=A, round_number=9, attempt="0a", mechanism=STEP)
    assert History.read(path, verify=verify).counter == 9


# --- Tampering ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("ledger") / "ledger.jsonl")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "ledger.jsonl"


def test_any_byte_flipped_is_detected(whole, scratch):
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        scratch.write_bytes(changed)
        with pytest.raises(LedgerBroken):
            History.read(scratch, verify=verify)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_byte_replaced_is_detected_by_line(whole, scratch, data):
    place = data.draw(st.integers(0, len(whole) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    scratch.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
    with pytest.raises(LedgerBroken) as caught:
        reopened(scratch)
    assert f"line {whole[:place].count(10) + 1}" in caught.value.message or value == 10 or whole[place] == 10


def test_any_line_deleted_swapped_or_repeated_is_detected(whole, scratch):
    lines = whole.splitlines(keepends=True)
    receipt = (len(lines), hashlib.sha256(lines[-1][:-1]).hexdigest())
    for i in range(len(lines)):
        changes = [lines[:i] + lines[i + 1 :], lines[: i + 1] + lines[i:]]
        changes += [[*lines[:i], lines[j], *lines[i + 1 : j], lines[i], *lines[j + 1 :]] for j in range(i + 1, len(lines))]
        for changed in changes:
            scratch.write_bytes(b"".join(changed))
            with pytest.raises(LedgerBroken):
                History.read(scratch, verify=verify).check_receipt(*receipt)


def test_lines_cut_from_the_end_are_detected_by_a_receipt(whole, scratch):
    lines = whole.splitlines(keepends=True)
    scratch.write_bytes(b"".join(lines[:-2]))
    short = History.read(scratch, verify=verify)
    short.check_receipt(short.counter, short.head)
    short.check_receipt(0, ledgers.NO_PREVIOUS)
    with pytest.raises(LedgerBroken, match="has 6 entries, a receipt says 8"):
        short.check_receipt(8, "ab" * 32)
    with pytest.raises(LedgerBroken, match="line 5 has digest"):
        short.check_receipt(5, "ab" * 32)


def test_another_key_is_refused(whole, scratch):
    scratch.write_bytes(whole)
    with pytest.raises(LedgerBroken, match=r"line 1 .* not signed"):
        Ledger.open(scratch, **parts(OTHER))


def test_a_rightly_signed_line_that_says_something_else_is_refused(whole, scratch):
    head = hashlib.sha256(whole.splitlines()[-1]).hexdigest()
    good = {"sequence": 8, "previous": head, "time": 1, "kind": "void", "body": {"contract": A, "round": 1, "reason": ""}}
    for change in (
        {"sequence": 7}, {"sequence": 9}, {"previous": "0" * 64}, {"kind": "refund"},
        {"kind": "open", "body": {"who": "x", "version": 1}},
        {"body": {"contract": A, "round": 1}}, {"body": {"contract": A, "round": -1, "reason": ""}}, {"also": 1}, {"time": -1},
        {"kind": "reserve", "body": {"contract": A, "round": 1, "attempt": "aa", "mechanism": {"type": "free"}}},
    ):
        plain = json.dumps({**good, **change}, separators=(",", ":")).encode()
        line = plain[:-1] + b',"signature":"' + KEY.sign(b"siloquy ledger\0" + plain).hex().encode() + b'"}\n'
        scratch.write_bytes(whole + line)
        with pytest.raises(LedgerBroken, match="line 9"):
            History.read(scratch, verify=verify)


def test_a_missing_or_empty_ledger_is_never_taken_for_a_new_one(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with pytest.raises(LedgerBroken, match="missing"):
        reopened(path)
    path.write_bytes(b"")
    with pytest.raises(LedgerBroken, match="no entry"):
        reopened(path)
    filled(path)
    with pytest.raises(LedgerBroken, match="never started twice"):
        Ledger.create(path, who="silo-1", **parts())


def test_a_ledger_that_cannot_be_read_is_named_and_never_taken_for_a_missing_one(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.mkdir()
    for use in (lambda: ledgers.is_begun(path), lambda: reopened(path), lambda: History.read(path, verify=verify)):
        with pytest.raises(MachineError, match="cannot read") as caught:
            use()
        assert caught.value.code == "cannot-read"


# --- Crashes ------------------------------------------------------------------------------------------------------------


def test_cut_at_every_byte_no_acknowledged_entry_is_lost(whole, scratch):
    """A crash while a line is written leaves some prefix of it: all before is still there, and the file is whole again."""
    for size in range(len(whole) + 1):
        scratch.write_bytes(whole[:size])
        acknowledged = whole[:size].count(b"\n")
        if acknowledged == 0:
            with pytest.raises(LedgerBroken):
                reopened(scratch)
            continue
        assert History.read(scratch, verify=verify).counter == acknowledged
        end = whole[:size].rfind(b"\n") + 1
        if size % 29 and size - end > 1 and whole[size : size + 1] != b"\n":
            continue  # each opening costs an fsync
        with reopened(scratch) as ledger:
            assert ledger.counter == acknowledged
        assert scratch.read_bytes() == whole[:end]


def test_after_a_torn_line_is_cut_the_chain_goes_on(whole, scratch):
    scratch.write_bytes(whole[:-5])
    assert History.read(scratch, verify=verify).counter == 7
    assert len(scratch.read_bytes()) == len(whole) - 5, "reading changes nothing"
    with reopened(scratch) as ledger:
        ledger.void(contract=A, round_number=2, reason="again")
        assert ledger.counter == 8
    assert scratch.stat().st_mode & 0o777 == 0o600
    assert History.read(scratch, verify=verify).counter == 8


def test_a_crash_while_creating_can_be_repeated(whole, tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(whole[:50])
    with Ledger.create(path, who="silo-1", **parts()) as ledger:
        assert ledger.counter == 1
    assert History.read(path, verify=verify).counter == 1


def test_a_full_disk_leaves_the_ledger_whole_and_closed(tmp_path):
    import resource
    import signal

    path = tmp_path / "ledger.jsonl"
    before = filled(path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with reopened(path) as ledger:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, old[1]))
            with pytest.raises(MachineError, match="cannot write"):
                ledger.void(contract=A, round_number=3, reason="")
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            assert path.read_bytes() == before
            assert ledger.counter == 8
            with pytest.raises(MachineError, match="a write to it failed"):
                ledger.void(contract=A, round_number=3, reason="")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert History.read(path, verify=verify).counter == 8


def test_a_file_changed_from_outside_is_not_appended_to(tmp_path):
    path = tmp_path / "ledger.jsonl"
    filled(path)
    with reopened(path) as ledger:
        with path.open("ab") as file:
            file.write(b"x")
        with pytest.raises(LedgerBroken, match="changed from outside"):
            ledger.void(contract=A, round_number=3, reason="")


def test_only_one_process_may_append_and_anyone_may_read(tmp_path):
    path = tmp_path / "ledger.jsonl"
    filled(path)
    with reopened(path) as ledger:
        with pytest.raises(MachineError, match="another process"):
            reopened(path)
        pid = os.fork()
        if pid == 0:
            try:
                reopened(path)
            except MachineError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert History.read(path, verify=verify).counter == ledger.counter
    with pytest.raises(MachineError, match="closed"):
        ledger.void(contract=A, round_number=3, reason="")
    with reopened(path) as ledger:
        assert ledger.counter == 8


def test_a_ledger_that_fails_to_open_gives_its_lock_back(tmp_path):
    path = tmp_path / "ledger.jsonl"
    content = filled(path)
    path.write_bytes(content[:40] + b"#" + content[41:])
    with pytest.raises(LedgerBroken):
        reopened(path)
    path.write_bytes(content)
    reopened(path).close()
