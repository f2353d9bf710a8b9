# SPDX-License-Identifier: Apache-2.0
"""The service on loopback: a real uvicorn, a real store, real silos' bytes, and everything a stranger may send."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from aggregator import service
from privacy.envelope import sign
from privacy.errors import MachineError, Replay
from privacy.messages import Countersignature, decode, encode
from privacy.transparency import log, notes
from silo.transport import HttpTransport
from tests import sessions
from tests.federation import START, Federation, signed_by_hub, silo_identity


class Running:
    """A service in a thread, on a free port, and a client of it."""

    def __init__(self, federation):
        self.federation = federation
        self.app = service.create_app(federation.board, federation.home.log_folder)
        self.listener = service.listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.server = service.server(self.app)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=10, trust_env=False)

    def stop(self):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(10)
        self.listener.close()
        assert not self.thread.is_alive()


@pytest.fixture
def running(tmp_path):
    made = Running(Federation(tmp_path))
    yield made
    made.stop()
    made.federation.store.close()


def countersignature(federation, silo=1):
    digest = federation.accepted.digest
    body = encode(Countersignature(contract=digest, member=silo))
    return sign(silo_identity(silo), type="countersignature", context=digest, sender=silo, body=body)


def problem(answer, status, code):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["code"] == code
    assert body["status"] == status
    assert body["detail"]
    assert body["hint"]
    assert body["exit_code"] in (1, 4, 6, 7)
    guarded(answer)
    return body


def guarded(answer):
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "server" not in answer.headers


def test_put_is_201_then_200_and_get_gives_the_bytes(running):
    data = countersignature(running.federation)
    for status in (201, 200, 200):
        answer = running.client.put("/v1/countersignature/1/1", content=data)
        assert (answer.status_code, answer.content) == (status, b"")
        guarded(answer)
    answer = running.client.get("/v1/countersignature/1/1")
    assert (answer.status_code, answer.content) == (200, data)
    assert answer.headers["content-type"] == "application/octet-stream"
    guarded(answer)


def test_refusals_are_problem_documents(running):
    data = countersignature(running.federation)
    problem(running.client.put("/v1/countersignature/1/2", content=data), 403, "wrong-sender")
    problem(running.client.put("/v1/countersignature/1/9", content=data), 403, "unknown-member")
    problem(running.client.put("/v1/countersignature/1/1", content=b""), 400, "malformed")
    problem(running.client.put("/v1/countersignature/1/1", content=data[:-1]), 400, "malformed")
    problem(running.client.put("/v1/consent/1/1", content=data), 409, "not-open")
    problem(running.client.put("/v1/epoch-note/1/1", content=data), 409, "not-open")
    problem(running.client.get("/v1/consent/1/1"), 404, "not-found")
    assert problem(running.client.put("/v1/upload/1/1", content=b"x"), 409, "not-open")["exit_code"] == 6


@pytest.mark.parametrize("kind", ["contract", "manifest", "freeze", "outcome"])
def test_the_aggregators_kinds_are_refused_over_http(running, kind):
    data = signed_by_hub(kind, running.federation.accepted.digest, b"")
    for party in (0, 1):
        problem(running.client.put(f"/v1/{kind}/1/{party}", content=data), 403, "not-yours")
    assert running.federation.store.entry(kind, 1, 1) is None


def test_another_document_in_a_taken_slot_is_409_and_comes_back_as_its_class(running):
    running.federation.ready().run_round(1)
    other = running.federation.silos[1]
    body = problem(running.client.put("/v1/consent/1/2", content=other.sent["upload", 1][:300]), 409, "replay")
    assert "round 1 is settled" in body["detail"]
    with pytest.raises(Replay):
        HttpTransport(f"http://127.0.0.1:{running.port}").put("consent", 1, 2, b"anything")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/consent/1",
        "/v1/consent/1/1/1",
        "/v1/consent/1/1/",
        "/v1/nothing/1/1",
        "/v1/CONSENT/1/1",
        "/v2/consent/1/1",
        "/v1/header/1/1",
    ],
)
def test_wrong_paths_are_404(running, path):
    problem(running.client.get(path), 404, "no-such-route")
    assert running.client.put(path, content=b"x").status_code in (404, 405)


@pytest.mark.parametrize(
    "text", ["１２", "01", "+1", "-1", "1_0", "1.0", "0x1", "%201", "1%20", "1e1", "4294967296", "9" * 400, "a"]
)
def test_numbers_in_paths_are_plain_ascii_decimals(running, text):
    for path in (f"/v1/consent/{text}/1", f"/v1/consent/1/{text}"):
        problem(running.client.get(path), 400, "number")
        problem(running.client.put(path, content=b"x"), 400, "number")


@pytest.mark.parametrize("wait", ["-1", "31", "1e1", "nan", "inf", "", "٣", "1,5"])
def test_a_wait_is_at_most_thirty_seconds_in_decimals(running, wait):
    problem(running.client.get("/v1/consent/1/1", params={"wait": wait}), 400, "wait")


def test_methods_other_than_get_and_put_are_405(running):
    for method in ("POST", "DELETE", "PATCH"):
        problem(running.client.request(method, "/v1/consent/1/1"), 405, "no-such-route")
    problem(running.client.put("/v1/status", content=b""), 405, "no-such-route")


def exchange(running, head: bytes, body: bytes = b"", *, hang_up: bool = True) -> bytes:
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as line:
        line.sendall(head + body)
        if hang_up:
            line.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := line.recv(65536):
            answer += chunk
    return answer


def test_a_stated_length_above_the_cap_is_413_before_the_body(running):
    cap = running.federation.board.cap("upload")
    for length in (cap + 1, 10**15):
        head = b"PUT /v1/upload/1/1 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length
        answer = exchange(running, head, hang_up=False)  # which ends although we neither send the body nor hang up
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"too-large" in answer


def test_a_stream_that_grows_above_the_cap_is_413(running):
    def endless():
        for _ in range(1000):
            yield bytes(4096)

    with contextlib.suppress(httpx2.TransportError):  # the server may hang up while we are still sending
        problem(running.client.put("/v1/consent/1/1", content=endless()), 413, "too-large")
    assert running.client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "head", [b"Content-Length: -1", b"Content-Length: 1_0", b"Content-Length: x", b"Transfer-Encoding: nonsense"]
)
def test_broken_lengths_are_refused(running, head):
    answer = exchange(running, b"PUT /v1/consent/1/1 HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n", b"12345")
    assert answer.split(b" ", 2)[1].startswith((b"4", b"5"))
    assert running.client.get("/healthz").status_code == 200


def test_a_body_that_breaks_off_leaves_nothing(running):
    data = countersignature(running.federation)
    exchange(running, b"PUT /v1/countersignature/1/1 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data), data[:-5])
    problem(running.client.get("/v1/countersignature/1/1"), 404, "not-found")
    assert running.client.put("/v1/countersignature/1/1", content=data).status_code == 201


def test_a_long_poll_answers_when_the_document_arrives(running):
    data = countersignature(running.federation, 2)
    timer = threading.Timer(0.3, running.federation.board.put, ("countersignature", 1, 2, data))
    timer.start()
    start = time.monotonic()
    answer = running.client.get("/v1/countersignature/1/2", params={"wait": "9"})
    assert answer.content == data
    assert 0.2 < time.monotonic() - start < 3
    timer.join()


def test_a_long_poll_gives_up_after_its_wait(running):
    start = time.monotonic()
    problem(running.client.get("/v1/consent/1/1", params={"wait": "0.4"}), 404, "not-found")
    assert 0.4 <= time.monotonic() - start < 3


def test_many_long_polls_wait_together_and_end_when_the_service_stops(running):
    answers = []

    def poll():
        with httpx2.Client(base_url=f"http://127.0.0.1:{running.port}", timeout=40, trust_env=False) as client:
            answers.append(client.get("/v1/consent/1/1", params={"wait": "30"}).status_code)

    threads = [threading.Thread(target=poll) for _ in range(60)]  # more than the thread pool has
    for thread in threads:
        thread.start()
    waiting = running.app.state.service.waiting
    sessions.until(lambda: waiting.count == 60)
    start = time.monotonic()
    assert running.client.get("/v1/status").status_code == 200
    assert time.monotonic() - start < 5
    running.server.should_exit = True
    for thread in threads:
        thread.join(10)
    assert answers == [404] * 60
    assert time.monotonic() - start < 10


def test_the_log_is_served_as_immutable_files_and_one_changing_head(running):
    federation = running.federation
    problem(running.client.get("/log/checkpoint"), 404, "not-found")
    federation.ready().run_round(1)
    wire = HttpTransport(f"http://127.0.0.1:{running.port}")
    answer = running.client.get("/log/checkpoint")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    guarded(answer)
    head = log.open_checkpoint(notes.parse(answer.content), federation.accepted.terms)
    assert wire.fetch("checkpoint") == answer.content
    tiles = log.Tiles(head.size, wire.fetch)
    tiles.check(head.root)
    assert decode(tiles.leaf(0), log.Leaf).kind == "contract"
    answer = running.client.get("/log/" + log.tile_path(0, 0, head.size))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert len(answer.content) == 32 * head.size
    problem(running.client.get("/log/tile/0/000"), 404, "not-found")
    assert wire.fetch("tile/0/000") is None


@pytest.mark.parametrize(
    "path",
    ["", "signed", "../aggregator.key", "%2e%2e/aggregator.key", "tile/0/../../signed", "tile/0/000.p/0", "checkpoint/", "tile"],
)
def test_nothing_but_the_log_lies_under_log(running, path):
    running.federation.ready().run_round(1)
    answer = running.client.get(f"/log/{path}")
    assert answer.status_code == 404
    assert b"seed" not in answer.content


def test_status_and_health(running):
    answer = running.client.get("/v1/status")
    guarded(answer)
    assert answer.json() == running.federation.board.status()
    for path in ("/healthz", "/readyz"):
        assert running.client.get(path).status_code == 200


def test_damaged_evidence_is_a_500_with_its_reason(running):
    digest = running.federation.store.entry("contract", 1, 0).digest.hex()
    (running.federation.home.evidence_folder / digest).write_bytes(b"")
    problem(running.client.get("/v1/contract/1/0"), 500, "evidence-damaged")
    problem(running.client.get("/v1/status"), 500, "evidence-damaged")


def test_a_bug_is_a_500_that_says_nothing_of_the_inside(tmp_path):
    class Broken:
        def status(self):
            raise ZeroDivisionError("secret")

    from starlette.testclient import TestClient

    try:
        client = TestClient(service.create_app(Broken()), raise_server_exceptions=False)
    except RuntimeError as error:
        pytest.skip(str(error))
    answer = client.get("/v1/status")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["code"] == "bug"


def test_a_whole_federation_over_http(running):
    federation = running.federation

    class Carried:
        def __init__(self):
            self.wire = HttpTransport(f"http://127.0.0.1:{running.port}")

        def get(self, kind, number, party):
            return self.wire.get(kind, number, party, wait_s=0)

        def put(self, kind, number, party, data):
            self.wire.put(kind, number, party, data)

    for silo in federation.silos:
        silo.board = Carried()
    closed = federation.ready().run_round(1)
    assert closed.state == federation.reached([1]).digest
    assert {silo.state.digest for silo in federation.silos} == {closed.state}


def test_a_port_in_use_is_a_machine_error(running):
    with pytest.raises(MachineError) as caught:
        service.listen("127.0.0.1", running.port)
    assert caught.value.code == "port-in-use"
    assert str(running.port) in caught.value.message
    with pytest.raises(MachineError):
        service.listen("192.0.2.1", 0)
    with pytest.raises(MachineError):
        service.listen("no.such.host.invalid", 0)


SERVE = """
import signal, sys, time
from pathlib import Path
from aggregator import admission, service
from aggregator.board import Board
from aggregator.config import Home
from aggregator.store import Store
home = Home(Path(sys.argv[1]))
store = Store(home.evidence_folder, home.database_url(home.config()))
listen = home.config().listen
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal: a shell's background jobs ignore it
app = service.create_app(Board(store, admission.admit, time.time))
service.serve(app, listen.host, listen.port, service_file=home.service_path)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, -2)])
def test_serve_names_its_port_and_ends_on_a_signal(tmp_path, number, code):
    federation = Federation(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(federation.home.root)], stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 30
        while not federation.home.service_path.exists() and time.monotonic() < end:
            time.sleep(0.02)
        where = json.loads(federation.home.service_path.read_text())
        assert where["pid"] == process.pid
        wire = HttpTransport(where["url"])
        data = countersignature(federation)
        wire.put("countersignature", 1, 1, data)
        assert federation.store.get("countersignature", 1, 1) == data  # two processes, one store
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == code, said
    assert number != signal.SIGTERM or said == ""
    assert not federation.home.service_path.exists()


def test_the_clock_of_the_board_is_used(running):
    running.client.put("/v1/countersignature/1/3", content=countersignature(running.federation, 3))
    assert running.federation.store.entry("countersignature", 1, 3).received_at == int(START)
