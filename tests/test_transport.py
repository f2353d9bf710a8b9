# SPDX-License-Identifier: Apache-2.0
"""The board over HTTP: retries, caps, redirects, and problem documents that come back as our errors.

What does not depend on the carrier is tested over HTTP and over a folder, each with its real other end; what only a folder has is
in tests/test_folder.py.
"""

from __future__ import annotations

import functools
import json

import httpx2
import pytest

from privacy import envelope, errors
from privacy.messages import EpochCall, encode
from privacy.secure_sum import epoch
from silo import transport
from silo.transport import HttpTransport
from tests.federation import START, Federation, signed_by_hub, silo_identity
from tests.test_folder import Hub, countersignature
from tests.test_service import Running

LOCAL = "http://127.0.0.1:9"


def missing():
    return httpx2.Response(404, json={"code": "not-found", "exit_code": 6, "message": "there is none yet"})


class Clock:
    """Seconds that pass only when somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def board(answer, *, patience_s=10.0, url=LOCAL, **options):
    """A transport whose server is the function ``answer(request)``, and its clock."""
    clock = Clock()
    carrier = httpx2.MockTransport(answer)
    return HttpTransport(url, carrier=carrier, clock=clock, sleep=clock.sleep, patience_s=patience_s, **options), clock


def test_get_and_put_name_the_document():
    seen = []

    def answer(request):
        seen.append((request.method, request.url.path, request.url.params.get("wait"), request.read()))
        return httpx2.Response(200 if request.method == "GET" else 201, content=b"body")

    wire, _ = board(answer)
    assert wire.get("freeze", 4, 0, wait_s=0) == b"body"
    wire.put("upload", 4, 2, b"data")
    assert seen == [("GET", "/v1/freeze/4/0", "0.000", b""), ("PUT", "/v1/upload/4/2", None, b"data")]


def test_a_missing_document_is_none_after_the_wait():
    clock = Clock()
    waits = []

    def answer(request):
        waits.append(float(request.url.params["wait"]))
        clock.now += waits[-1]
        return missing()

    wire = HttpTransport(LOCAL, carrier=httpx2.MockTransport(answer), clock=clock, sleep=clock.sleep)
    assert wire.get("outcome", 1, 0, wait_s=70) is None
    assert max(waits) <= 30
    assert 69 <= clock.now <= 71


def test_a_server_that_ignores_wait_is_not_asked_in_a_tight_loop():
    asked = []
    wire, clock = board(lambda request: asked.append(1) or missing())
    assert wire.get("freeze", 1, 0, wait_s=10) is None
    assert len(asked) < 400
    assert clock.now >= 9


def test_connection_errors_are_retried_until_patience_ends():
    def refuse(request):
        raise httpx2.ConnectError("connection refused", request=request)

    wire, clock = board(refuse, patience_s=20)
    with pytest.raises(errors.MachineError, match=r"cannot reach the aggregator at http://127\.0\.0\.1:9 after 20 s") as caught:
        wire.put("consent", 1, 1, b"x")
    assert caught.value.exit_code == 7
    assert caught.value.hint
    assert 10 < clock.now <= 20


def test_a_server_that_comes_back_is_found():
    calls = []

    def answer(request):
        calls.append(1)
        if len(calls) < 3:
            raise httpx2.ReadError("reset", request=request)
        return httpx2.Response(503) if len(calls) == 3 else httpx2.Response(200, content=b"there")

    wire, _ = board(answer)
    assert wire.get("roster", 1, 0, wait_s=0) == b"there"
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("code", "exit_code", "kind"),
    [
        ("config", 3, errors.ConfigError),
        ("trust", 4, errors.TrustError),
        ("replay", 4, errors.Replay),
        ("equivocation", 4, errors.Equivocation),
        ("privacy-refused", 5, errors.PrivacyRefusal),
        ("budget-exhausted", 5, errors.BudgetExhausted),
        ("round", 6, errors.RoundError),
        ("machine", 7, errors.MachineError),
        ("something-new", 4, errors.TrustError),
    ],
)
def test_a_problem_document_comes_back_as_its_class(code, exit_code, kind):
    body = {
        "type": "about:blank",
        "status": 409,
        "code": code,
        "exit_code": exit_code,
        "detail": "what",
        "hint": "do",
        "extra": [1],
    }
    wire, _ = board(lambda request: httpx2.Response(409, content=json.dumps(body).encode()))
    with pytest.raises(errors.SiloquyError) as caught:
        wire.put("consent", 1, 1, b"x")
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.hint, caught.value.code) == ("what", "do", code)


def test_a_refusal_without_a_problem_document_is_still_an_error():
    wire, _ = board(lambda request: httpx2.Response(400, content=b"<html>"))
    with pytest.raises(errors.RoundError, match="answered 400"):
        wire.put("consent", 1, 1, b"x")


def test_a_404_that_is_not_an_aggregators_is_not_waited_for():
    for body in (b"<html>not found</html>", b'{"code": "no-such-route", "exit_code": 6, "message": "no such route"}'):
        wire, clock = board(lambda request, body=body: httpx2.Response(404, content=body))
        with pytest.raises(errors.RoundError):
            wire.get("freeze", 1, 0, wait_s=60)
        assert clock.now == 0


def test_what_a_server_says_cannot_move_the_cursor():
    found = transport.refusal(400, json.dumps({"detail": "a\x1b[2Jb\n" + "x" * 900, "exit_code": 4}).encode())
    assert "\x1b" not in found.message
    assert "\n" not in found.message
    assert len(found.message) <= 500


def test_a_persistent_server_fault_keeps_its_reason():
    body = json.dumps({"code": "cannot-write", "exit_code": 7, "detail": "disk full"}).encode()
    wire, _ = board(lambda request: httpx2.Response(507, content=body), patience_s=2)
    with pytest.raises(errors.MachineError, match="disk full"):
        wire.put("upload", 1, 1, b"x")


def test_a_redirect_is_not_followed():
    hosts = []

    def answer(request):
        hosts.append(request.url.host)
        return httpx2.Response(302, headers={"location": "http://elsewhere.example/v1/x"})

    wire, _ = board(answer)
    with pytest.raises(errors.MachineError, match="redirects to http://elsewhere"):
        wire.get("contract", 1, 0, wait_s=0)
    assert hosts == ["127.0.0.1"]


def test_no_more_than_the_cap_is_read(monkeypatch):
    monkeypatch.setattr(transport, "MOST_BYTES", 1000)
    read = []

    def endless():
        while True:
            read.append(1)
            yield b"x" * 400

    wire, _ = board(lambda request: httpx2.Response(200, content=endless()))
    wire._exchange.__func__.__kwdefaults__["most"] = 1000
    try:
        with pytest.raises(errors.MachineError, match="longer than 1000 bytes"):
            wire.get("roster", 1, 0, wait_s=0)
    finally:
        wire._exchange.__func__.__kwdefaults__["most"] = 16 << 20
    assert len(read) <= 4


def test_status_is_an_object():
    wire, _ = board(lambda request: httpx2.Response(200, content=b'{"round": 3}'))
    assert wire.status() == {"round": 3}
    wire, _ = board(lambda request: httpx2.Response(200, content=b"[1]"))
    with pytest.raises(errors.TrustError):
        wire.status()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://localhost:1/base", "http://[::1]:1", "https://hub.example"])
def test_addresses_that_are_fine(url):
    HttpTransport(url).close()


def test_plain_http_to_another_machine_must_be_asked_for():
    with pytest.raises(errors.ConfigError, match="plain http"):
        HttpTransport("http://hub.example")
    HttpTransport("http://hub.example", insecure_http=True).close()


@pytest.mark.parametrize("url", ["ftp://x", "hub.example", "http://", "http://x/?a=1", "http://127.0.0.1.evil.example"])
def test_addresses_that_are_not(url):
    with pytest.raises(errors.ConfigError):
        HttpTransport(url)


# --- Over HTTP and over a folder -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["http", "folder"])
def carried(request, tmp_path):
    """(a federation with its board, a silo's transport to it)."""
    if request.param == "folder":
        hub = Hub(tmp_path)
        yield hub.federation, hub.line()
        hub.federation.store.close()
        return
    running = Running(Federation(tmp_path))
    wire = HttpTransport(f"http://127.0.0.1:{running.port}")
    yield running.federation, wire
    wire.close()
    running.stop()
    running.federation.store.close()


def test_what_is_put_stands_and_may_be_put_again(carried):
    federation, wire = carried
    data = countersignature(federation)
    for _ in range(3):
        wire.put("countersignature", 1, 1, data)
        assert federation.store.get("countersignature", 1, 1) == wire.get("countersignature", 1, 1, wait_s=5) == data
    assert wire.get("countersignature", 1, 2, wait_s=0) is None
    assert wire.get("contract", 1, 0, wait_s=0) == federation.store.get("contract", 1, 0)
    assert wire.get("contract", 2, 0, wait_s=0) is None


def test_what_the_coordinator_stores_is_found_by_who_waits_for_it(carried):
    federation, wire = carried
    assert wire.get("epoch", 1, 0, wait_s=0.05) is None
    call = signed_by_hub("epoch", federation.accepted.digest, EpochCall(contract=federation.accepted.digest, epoch=1))
    federation.store.put_once("epoch", 1, 0, call, received_at=START)
    assert wire.get("epoch", 1, 0, wait_s=5) == call


def test_a_refusal_comes_back_as_its_class_whatever_carried_it(carried):
    federation, wire = carried
    data = countersignature(federation)
    for slot, sent, kind, code in (
        (("countersignature", 1, 2), data, errors.TrustError, "wrong-sender"),
        (("countersignature", 1, 9), data, errors.TrustError, "unknown-member"),
        (("countersignature", 2, 1), data, errors.TrustError, "wrong-contract-version"),
        (("countersignature", 1, 1), data[:-1], errors.TrustError, "malformed"),
        (("countersignature", 1, 1), bytes(2000), errors.TrustError, "too-large"),
        (("contract", 2, 1), data, errors.TrustError, "not-yours"),
        (("freeze", 1, 0), data, errors.TrustError, "not-yours"),
    ):
        for _ in range(2):
            with pytest.raises(errors.SiloquyError) as caught:
                wire.put(*slot, sent)
            assert (type(caught.value), caught.value.code, caught.value.exit_code) == (kind, code, 4), slot
            assert caught.value.hint
        assert federation.store.entry(*slot) is None
    wire.put("countersignature", 1, 1, data)


def test_a_second_note_of_one_silo_is_equivocation_and_what_is_settled_is_a_replay(carried):
    federation, wire = carried
    digest = federation.accepted.digest
    call = signed_by_hub("epoch", digest, EpochCall(contract=digest, epoch=1))
    federation.store.put_once("epoch", 1, 0, call, received_at=START)
    notes = [epoch.note_of(epoch.new_note(digest, 1, 1, bytes(32))[0]) for _ in range(3)]
    first, second, third = (
        envelope.sign(silo_identity(1), type="epoch-note", context=digest, sender=1, body=encode(note)) for note in notes
    )
    wire.put("epoch-note", 1, 1, first)
    with pytest.raises(errors.Equivocation, match="a second epoch-note"):
        wire.put("epoch-note", 1, 1, second)
    assert wire.get("epoch-note", 1, 1, wait_s=5) == first
    again = signed_by_hub("epoch", digest, EpochCall(contract=digest, epoch=2))
    federation.store.put_once("epoch", 2, 0, again, received_at=START)
    with pytest.raises(errors.Replay, match="epoch 1 is over"):
        wire.put("epoch-note", 1, 1, third)


def test_the_status_is_the_boards(carried):
    federation, wire = carried
    wire.put("countersignature", 1, 1, countersignature(federation))
    assert wire.status()["countersigned"] == [1]
    assert wire.status()["contract"]["digest"] == federation.accepted.digest.hex()


def test_a_whole_federation(carried):
    federation, wire = carried

    class Carried:
        get = staticmethod(functools.partial(wire.get, wait_s=0.02))  # over a folder the mailbox works while a silo sleeps
        put = staticmethod(wire.put)

    for silo in federation.silos:
        silo.board = Carried()
    closed = federation.ready().run_round(1)
    assert closed.state == federation.reached([1]).digest
    assert {silo.state.digest for silo in federation.silos} == {closed.state}
