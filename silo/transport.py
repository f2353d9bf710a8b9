# SPDX-License-Identifier: Apache-2.0
"""The silo's side of the board: documents by (kind, number, party), each written once.

Nothing here is trusted: every document proves itself by its signature, so the carrier decides only whether and when bytes
arrive. Promised: no more than a fixed number of bytes is read per document, no other host is ever contacted, and a refusal
comes back as the error class the aggregator meant. Not promised: that the bytes are genuine; callers verify them.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from typing import Any, Protocol

import httpx2
import msgspec

from privacy.errors import (
    BudgetExhausted,
    ConfigError,
    Equivocation,
    LedgerBroken,
    MachineError,
    NotCertified,
    PrivacyRefusal,
    RecordsError,
    Replay,
    RoundError,
    SiloquyError,
    TrustError,
)
from privacy.transparency.log import MOST_RESOURCE_BYTES

LONGEST_WAIT_S = 30.0
MOST_BYTES = 16 << 20
MOST_BYTES_OUTCOME = 2 << 30
_MOST_PROBLEM = 1 << 16
_CHUNK_GRACE_S = 15.0
_NOT_THERE = "not-found"


def most_bytes(kind: str) -> int:
    """The most bytes that are read of a document of this kind."""
    return MOST_BYTES_OUTCOME if kind in ("outcome", "upload", "vector") else MOST_BYTES


class Transport(Protocol):
    """A board of documents. Two implementations: HTTP here, and a dictionary in the tests."""

    def get(self, kind: str, number: int, party: int, *, wait_s: float) -> bytes | None:
        """The document, or None when it is not there after ``wait_s`` seconds."""
        ...

    def part(self, kind: str, number: int, party: int, start: int, size: int, *, wait_s: float) -> bytes | None:
        """``size`` bytes of a masked vector from byte ``start`` on; None when it is not there after ``wait_s`` seconds, or shorter.

        Nothing says that they are right but the hashes to which the caller holds them.
        """
        ...

    def put(self, kind: str, number: int, party: int, data: bytes) -> None:
        """Write the document once; the same bytes again are fine, other bytes are refused."""
        ...

    def fetch(self, path: str) -> bytes | None:
        """A resource of the transparency log (privacy.transparency.log.is_resource), or None when it is not there."""
        ...

    def status(self) -> dict[str, Any]:
        """What the aggregator says about itself: a hint for people, never a fact to act on."""
        ...


def vectors_of(transport: Transport, number: int, *, wait_s: float = 0.0) -> Callable[[int, int, int], bytes | None]:
    """How to fetch bytes of a round's masked vectors (privacy.secure_sum.audits.Fetch)."""
    return lambda silo, start, size: transport.part("vector", number, silo, start, size, wait_s=wait_s)


class HttpTransport:
    """The board over HTTP.

    Args:
        url: where the aggregator listens.
        insecure_http: allow plain http to another machine.
        patience_s: how long to go on retrying when nobody answers, or the answer is a fault of the server.
        carrier: httpx2's transport, for tests.
        clock, sleep: monotonic seconds, and how to wait.

    Raises:
        ConfigError: no http(s) address, or plain http to another machine without ``insecure_http``.
    """

    def __init__(
        self,
        url: str,
        *,
        insecure_http: bool = False,
        patience_s: float = 120.0,
        carrier: httpx2.BaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        local = _check_url(url, insecure_http=insecure_http)
        self._url = url.rstrip("/")
        self._patience_s = patience_s
        self._clock = clock
        self._sleep = sleep
        timeout = httpx2.Timeout(connect=10.0, read=LONGEST_WAIT_S + _CHUNK_GRACE_S, write=60.0, pool=10.0)
        self._client = httpx2.Client(timeout=timeout, transport=carrier, follow_redirects=False, trust_env=not local)

    def get(self, kind: str, number: int, party: int, *, wait_s: float) -> bytes | None:
        """See :class:`Transport`.

        Raises:
            MachineError: nobody answered within the patience, or more bytes came than a document may have.
            SiloquyError: the aggregator's refusal, as its class.
        """
        return self._get(f"/v1/{kind}/{number}/{party}", wait_s, most=most_bytes(kind))

    def part(self, kind: str, number: int, party: int, start: int, size: int, *, wait_s: float) -> bytes | None:
        """See :class:`Transport`. Raises as :meth:`get` does."""
        try:
            return self._get(f"/v1/{kind}/{number}/{party}", wait_s, most=size, first=start)
        except SiloquyError as error:
            if error.code in ("range", "too-large"):  # it is shorter, or something on the way knows no ranges
                return None
            raise

    def _get(self, slot: str, wait_s: float, *, most: int, first: int | None = None) -> bytes | None:
        end = self._clock() + wait_s
        asked = None if first is None else f"bytes={first}-{first + most - 1}"
        while True:
            left = max(0.0, end - self._clock())
            path = f"{slot}?wait={min(left, LONGEST_WAIT_S):.3f}"
            # A part may be shorter than the problem that is told in its place.
            status, body = self._exchange("GET", path, most=most if asked is None else max(most, _MOST_PROBLEM), part=asked)
            if status == (200 if first is None else 206):
                return body
            if status == 200:
                return None
            if not (status == 404 and _problem(body).code == _NOT_THERE):  # another 404: this is no aggregator, or another version
                raise refusal(status, body)
            if self._clock() >= end:
                return None
            self._sleep(0.05)  # a server that answers a long poll at once must not be asked in a tight loop

    def put(self, kind: str, number: int, party: int, data: bytes) -> None:
        """See :class:`Transport`.

        Raises:
            MachineError: nobody answered within the patience.
            SiloquyError: the aggregator's refusal, as its class.
        """
        status, body = self._exchange("PUT", f"/v1/{kind}/{number}/{party}", data=data)
        if status not in (200, 201):
            raise refusal(status, body)

    def fetch(self, path: str) -> bytes | None:
        """See :class:`Transport`. Raises as :meth:`get` does."""
        status, body = self._exchange("GET", f"/log/{path}", most=MOST_RESOURCE_BYTES)
        if status == 200:
            return body
        if not (status == 404 and _problem(body).code == _NOT_THERE):
            raise refusal(status, body)
        return None

    def status(self) -> dict[str, Any]:
        """See :class:`Transport`. Raises as :meth:`get` does, and TrustError when the answer is not JSON."""
        status, body = self._exchange("GET", "/v1/status")
        if status != 200:
            raise refusal(status, body)
        try:
            return msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise TrustError(
                "the status is not JSON", hint="check [aggregator] url: is this an aggregator?", code="malformed"
            ) from error

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _exchange(
        self, method: str, path: str, *, data: bytes | None = None, most: int = MOST_BYTES, part: str | None = None
    ) -> tuple[int, bytes]:
        """One request, repeated with growing pauses while nobody answers or the server is at fault."""
        start, pause = self._clock(), 0.1
        while True:
            try:
                status, body = self._once(method, path, data, most, part)
                if status < 500 and status != 429:
                    return status, body
                fault: SiloquyError = refusal(status, body)
            except httpx2.TransportError as error:
                fault = self._unreachable(str(error) or type(error).__name__)
            if self._clock() - start + pause > self._patience_s:
                raise fault
            self._sleep(pause)
            pause = min(2 * pause, 5.0)

    def _once(self, method: str, path: str, data: bytes | None, most: int, part: str | None) -> tuple[int, bytes]:
        headers = {"accept-encoding": "identity", **({} if part is None else {"range": part})}
        if data is not None:
            headers["content-type"] = "application/octet-stream"
        with self._client.stream(method, self._url + path, content=data, headers=headers) as answer:
            if 300 <= answer.status_code < 400:
                raise MachineError(
                    f"{self._url} redirects to {_plain(answer.headers.get('location', 'nowhere'))}; redirects are not followed",
                    hint="put the final address in [aggregator] url",
                    code="redirect",
                )
            if "content-encoding" in answer.headers:  # a small body could unpack to any size
                raise MachineError(
                    f"{self._url} compresses its answers", hint="switch compression off in the proxy", code="compressed"
                )
            body = bytearray()
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > most:
                    raise MachineError(
                        f"{path} is longer than {most} bytes", hint="check [aggregator] url", code="too-large", most=most
                    )
            return answer.status_code, bytes(body)

    def _unreachable(self, why: str) -> MachineError:
        return MachineError(
            f"cannot reach the aggregator at {self._url} after {self._patience_s:g} s: {why}",
            hint="check [aggregator] url, and that `aggregator serve` runs there",
            code="unreachable",
            url=self._url,
        )


class _Problem(msgspec.Struct, frozen=True, kw_only=True):
    """RFC 9457 problem details, as far as we read them; unknown members are ignored there."""

    code: str = ""
    exit_code: int = 0
    message: str = ""
    detail: str = ""
    title: str = ""
    hint: str = ""


_BY_EXIT_CODE: dict[int, type[SiloquyError]] = {3: ConfigError, 4: TrustError, 5: PrivacyRefusal, 6: RoundError, 7: MachineError}
_BY_CODE: dict[str, type[SiloquyError]] = {
    each.default_code: each for each in (BudgetExhausted, Equivocation, LedgerBroken, NotCertified, RecordsError, Replay)
}


def refusal(status: int, body: bytes) -> SiloquyError:
    """The error that a problem+json answer stands for; its texts are cut to printable characters first."""
    problem = _problem(body)
    kind = _BY_CODE.get(problem.code) or _BY_EXIT_CODE.get(problem.exit_code) or (MachineError if status >= 500 else RoundError)
    text = _plain(problem.message or problem.detail or problem.title or f"the aggregator answered {status}")
    return kind(
        text, hint=_plain(problem.hint) or "see the aggregator's log", code=_plain(problem.code) or None, http_status=status
    )


def _problem(body: bytes) -> _Problem:
    try:
        return msgspec.json.decode(body, type=_Problem)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Problem()


def _plain(text: str) -> str:
    """At most 500 printable characters: what a server says is shown on a terminal."""
    return "".join(character if character.isprintable() else " " for character in text[:500])


def _check_url(url: str, *, insecure_http: bool) -> bool:
    """Whether ``url`` is on this machine; refuses what must not be used."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{url!r} is not an address", hint="mend [aggregator] url", code="url") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise ConfigError(f"{url!r} is not an http or https address without a query", hint="mend [aggregator] url", code="url")
    local = _is_loopback(parsed.host)
    if parsed.scheme == "http" and not (local or insecure_http):
        raise ConfigError(
            f"{url} is plain http to another machine: who takes part, and when, could be read on the way",
            hint="use https, or set [aggregator] insecure_http = true inside a protected network",
            code="insecure-http",
        )
    return local


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
