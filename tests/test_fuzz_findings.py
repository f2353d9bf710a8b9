# SPDX-License-Identifier: Apache-2.0
"""Every parser on honest inputs, on a fixed set of broken ones, and on whatever broke one before (tests/fuzz/findings)."""

from __future__ import annotations

import random
import signal
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import targets
from tests.fuzz.targets import TARGETS, attempt

FINDINGS = Path(__file__).parent / "fuzz" / "findings"
BROKEN_EACH = 300
MOST_MEMORY = 64 * 2**20
ANSWERS = ("log-path", "folder-names", "refusal", "bundle-payload", "unit-set")
"""Targets that answer everything with a value; all others must refuse what is broken."""
PIECES = (
    b"", b"\0", b"\xff", b"\n", b"\r", b'"', b"\\", b"[" * 500, b"{" * 500, b'{"a":' * 300, b"(" * 100, b"0", b"-1", b"1e999",
    b"NaN", b"9" * 400, b"0x1p99999", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80", "１２".encode(), b"1_0", b"..", b"/", b"%00",
    b"\x93" * 300, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xcf" + b"\xff" * 8, b"null", b"true", b"=", b"'''",
    b"1979-05-27T07:32:00Z", b"x = " + b"[" * 2000, b"[a" + b".a" * 800, b"x = " + b"9" * 5000,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_folder_stays() -> Iterator[None]:
    yield
    targets.sweep()


@pytest.fixture
def in_time() -> Iterator[None]:
    """A parser that hangs is stopped and shown, where the system can do that."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError("a parser ran for too long")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def broken(name: str) -> Iterator[bytes]:
    """The same damaged inputs on every run."""
    generator, seeds = random.Random(f"siloquy {name}"), list(TARGETS[name].seeds())
    yield from PIECES
    for _ in range(BROKEN_EACH):
        data = bytearray(generator.choice(seeds))
        for _ in range(generator.randint(1, 3)):
            at, end = sorted(generator.randrange(len(data) + 1) for _ in range(2))
            how = generator.randrange(5)
            if how == 0 and at < len(data):
                data[at] ^= 1 << generator.randrange(8)
            elif how == 1:
                data[at:end] = b""
            elif how == 2:
                data[at:at] = generator.choice(PIECES)
            elif how == 3:
                data[at:at] = data[at:end]
            else:
                data[at:end] = generator.choice(PIECES)
        yield bytes(data[: targets.MOST_BYTES])


@pytest.mark.parametrize("name", TARGETS)
def test_honest_inputs_are_read(name: str) -> None:
    for data in TARGETS[name].seeds():
        assert attempt(TARGETS[name], data) is None


@pytest.mark.parametrize("name", TARGETS)
def test_broken_inputs_end_in_a_value_or_a_named_refusal(name: str, in_time: None) -> None:
    for data in TARGETS[name].seeds():  # what is made once is no one's memory
        attempt(TARGETS[name], data)
    refused = 0
    tracemalloc.start()
    try:
        for data in broken(name):
            tracemalloc.reset_peak()
            held = tracemalloc.get_traced_memory()[0]
            signal.alarm(targets.TIMEOUT_S)
            try:
                refused += attempt(TARGETS[name], data) is not None
            except Exception as error:
                raise AssertionError(f"{name} on {data!r}: {error!r}") from error
            assert tracemalloc.get_traced_memory()[1] - held < MOST_MEMORY, data
    finally:
        tracemalloc.stop()
    assert refused > 10 or name in ANSWERS


def findings() -> list[Path]:
    return sorted(path for path in FINDINGS.glob("*/*") if path.is_file())


def test_every_finding_belongs_to_a_target() -> None:
    assert {path.parent.name for path in findings()} <= set(TARGETS)


@pytest.mark.parametrize("path", findings(), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_broke_a_parser_once_is_refused_by_name(path: Path, in_time: None) -> None:
    signal.alarm(targets.TIMEOUT_S)
    assert attempt(TARGETS[path.parent.name], path.read_bytes()) is not None
