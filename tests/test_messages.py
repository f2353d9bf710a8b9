# SPDX-License-Identifier: Apache-2.0
"""The decoder accepts exactly what the encoder writes."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy import messages
from privacy.errors import TrustError

MANIFEST = messages.Manifest(
    epoch_ctx=b"e" * 32,
    epoch=1,
    round=7,
    previous=b"p" * 32,
    base_state=b"s" * 32,
    dimension=12,
    ring_bits=32,
    lattice_bits=20,
    clamp=99,
    opened_at=1,
    deadline_at=2,
)


def test_what_is_encoded_is_decoded() -> None:
    assert messages.decode(messages.encode(MANIFEST), messages.Manifest) == MANIFEST


@given(st.integers(0, len(messages.encode(MANIFEST)) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_says_something_else(position: int, flip: int) -> None:
    bent = bytearray(messages.encode(MANIFEST))
    bent[position] ^= flip
    try:
        other = messages.decode(bytes(bent), messages.Manifest)
    except TrustError:
        return
    assert other != MANIFEST
    assert messages.encode(other) == bytes(bent)


@given(st.binary(max_size=200))
def test_noise_never_raises_anything_but_trust_errors(data: bytes) -> None:
    for kind in (messages.Manifest, messages.Signed, messages.Upload, messages.Freeze, messages.Outcome):
        with contextlib.suppress(TrustError):
            assert messages.encode(messages.decode(data, kind)) == data


def test_trailing_bytes_wide_integers_and_long_arrays_are_refused() -> None:
    raw = messages.encode(MANIFEST)
    fields = msgspec.msgpack.decode(raw)
    for other in (
        raw + b"\x00",
        msgspec.msgpack.encode([*fields, 1]),
        msgspec.msgpack.encode(fields[:-1]),
        raw.replace(b"\x0c", b"\xcc\x0c"),
    ):
        assert other != raw
        with pytest.raises(TrustError, match="malformed manifest"):
            messages.decode(other, messages.Manifest)


def test_deep_nesting_is_refused_not_a_crash() -> None:
    with pytest.raises(TrustError):
        messages.decode(b"\x91" * 100_000, messages.Freeze)


def test_digests_of_another_length_are_refused() -> None:
    bent = msgspec.structs.replace(MANIFEST, base_state=b"short")
    with pytest.raises(TrustError):
        messages.decode(messages.encode(bent), messages.Manifest)


def test_every_aggregator_kind_is_a_kind() -> None:
    assert set(messages.KINDS) >= messages.AGGREGATOR_KINDS


def parts(kind: object) -> Iterator[object]:
    """The plain types that a field's type is made of."""
    inside = get_args(kind)
    if not inside or str(get_origin(kind)) == "typing.Literal":
        yield kind
    for each in inside if str(get_origin(kind)) != "typing.Literal" else ():
        yield from parts(each)


def test_no_wire_type_has_a_place_for_a_float() -> None:
    """Whatever leaves a silo is integers and bytes, and of words those of a fixed list: vectors go as words of the ring."""
    assert {int, bytes} <= set(parts(get_type_hints(messages.Header)["bundles"])), "the walk sees into tuples"
    for kind in messages.Wire.__subclasses__():
        for name, stated in get_type_hints(kind).items():
            assert not [each for each in parts(stated) if each in (float, complex, object)], (kind, name)


SAID_BY_A_SILO = {
    "Countersignature": "contract member former",
    "EpochNote": "contract epoch silo instance seed_key dh_key basis",
    "PairSeeds": "epoch silo sealed",
    "Confirmation": "epoch silo tags",
    "Upload": "header sealed bundles",
    "Header": "round_ctx silo attempt ledger_counter dimension root self_commitment pair_commitments bundles",
    "Consent": "round_ctx silo frozen",
    "Release": "round_ctx silo frozen sealed",
    "SegmentVerdict": "round_ctx silo claim right wrong withheld",
    "Acknowledgement": "round_ctx silo outcome state",
}
"""Every field that a silo fills in: public names and numbers, digests, commitments, sealed bytes. No count, loss, norm or time."""


def test_what_a_silo_says_has_these_fields_and_no_others() -> None:
    """A count of records, a loss, a norm or a duration would need a field, and an entry above: think before you add one."""
    for name, fields in SAID_BY_A_SILO.items():
        assert list(getattr(messages, name).__struct_fields__) == fields.split(), name
    silo_or_guardian = {"Listing", "Endorsement", "Shares", "Close", "GuardianNote"}
    aggregators = {"EpochCall", "Roster", "Manifest", "Freeze", "Certificate", "Vector", "SumClaim", "Audit", "Outcome"}
    of_this_file = {kind.__name__ for kind in messages.Wire.__subclasses__() if kind.__module__ == messages.__name__}
    assert of_this_file == SAID_BY_A_SILO.keys() | silo_or_guardian | aggregators | {"Signed"}


FIRST_USES = """
import sys, threading
sys.setswitchinterval(1e-6)
from privacy import federation, messages
from tests.terms import contract_bytes
raw = contract_bytes()
def empty(kind):
    try:
        messages.decode(b"\\x90", kind)
    except messages.TrustError:
        pass
def first(gate, use, *given):
    gate.wait()
    use(*given)
for use, *given in [(federation.parse, raw), *((empty, kind) for kind in messages.Wire.__subclasses__())]:
    gate = threading.Barrier(8)
    threads = [threading.Thread(target=first, args=(gate, use, *given)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


def test_first_uses_of_a_type_in_many_threads_do_not_crash_the_process():
    """msgspec's own first use is not safe: the service died of it, now and then, at the first documents of three silos."""
    root = Path(__file__).parents[1]
    for _ in range(6):
        assert subprocess.run([sys.executable, "-c", FIRST_USES], cwd=root, check=False).returncode == 0
