# SPDX-License-Identifier: Apache-2.0
"""The board over HTTP: one PUT, one long-poll GET, and what an operator needs.

::

    PUT /v1/{kind}/{number}/{party}     201 created, 200 the same bytes again, else a problem
    GET /v1/{kind}/{number}/{party}     200, or 404 after ?wait=seconds (at most 30); of a vector, 206 for "Range: bytes=first-last"
    GET /v1/status                      contract, latest epoch and round: a hint for people
    GET /log/checkpoint                 the newest head of the transparency log, with its signatures
    GET /log/tile/…                     its tiles and bundles of leaves, which never change (C2SP tlog-tiles)
    GET /healthz, /readyz               the process runs; the store answers

Promised: this process holds no private key, reads no more of a body than the contract allows for its kind, and says why it
refuses (RFC 9457 problem documents with our code, exit code and hint). Not promised: secrecy of who talks and when (put TLS
before it); documents are public or sealed by themselves, so reading needs no password.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, cast

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from aggregator.board import Board
from aggregator.waiting import Waiting
from privacy import files
from privacy.errors import Equivocation, MachineError, Replay, RoundError, SiloquyError, TrustError
from privacy.messages import KINDS, Kind
from privacy.transparency import log

LONGEST_WAIT_S: Final = 30.0
BODY_TIMEOUT_S: Final = 300.0
_MOST_CONNECTIONS: Final = 2048
_HEADERS: Final = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
_FOREVER: Final = {**_HEADERS, "cache-control": "public, max-age=31536000, immutable"}
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)
_RANGE: Final = re.compile(r"bytes=(0|[1-9][0-9]{0,11})-(0|[1-9][0-9]{0,11})", re.ASCII)
_MOST_PART_BYTES: Final = 1 << 24
_WAIT: Final = re.compile(r"[0-9]{1,2}(\.[0-9]{1,3})?", re.ASCII)

# The first class that fits; a malformed document is the sender's syntax, everything else of trust its right.
_STATUS: Final[tuple[tuple[type[SiloquyError], int], ...]] = (
    (Replay, 409),
    (Equivocation, 409),
    (TrustError, 403),
    (MachineError, 503),
    (SiloquyError, 409),
)
_STATUS_BY_CODE: Final = {
    **dict.fromkeys(("malformed", "number", "wait"), 400),
    **dict.fromkeys(("no-such-route", "not-found"), 404),
    "too-large": 413,
    "range": 416,
    "evidence-damaged": 500,
}

Slot = tuple[Kind, int, int]


def create_app(board: Board, log_folder: Path | None = None, *, clock: Callable[[], float] = time.monotonic) -> Starlette:
    """The application over a board and the folder of the log, which may not be there yet.

    ``clock`` measures how long a long poll has waited; ``app.state.service.stopping`` says when they all end.
    """
    service = _Service(board, log_folder, clock)
    slot = "/v1/{kind}/{number}/{party}"
    app = Starlette(
        routes=[
            Route(slot, service.put, methods=["PUT"]),
            Route(slot, service.get, methods=["GET"]),
            Route("/v1/status", service.status, methods=["GET"]),
            Route("/log/{path:path}", service.log, methods=["GET"]),
            Route("/healthz", service.healthy, methods=["GET"]),
            Route("/readyz", service.ready, methods=["GET"]),
        ],
        exception_handlers={SiloquyError: _refused, HTTPException: _no_route, Exception: _bug},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class _Service:
    """The routes; each runs the board's work in a thread, since it verifies signatures and waits for the disk."""

    def __init__(self, board: Board, log_folder: Path | None, clock: Callable[[], float]) -> None:
        self._board = board
        self._log_folder = log_folder
        self.stopping: Callable[[], bool] = lambda: False
        self.waiting = Waiting(board, clock, self._ends)

    def _ends(self) -> bool:
        return self.stopping()

    async def put(self, request: Request) -> Response:
        kind, number, party = _slot(request)
        most = await run_in_threadpool(self._board.cap, kind)
        data = await _body(request, most, kind)
        done = await run_in_threadpool(self._board.put, kind, number, party, data)
        return Response(status_code=201 if done == "created" else 200, headers=_HEADERS)

    async def get(self, request: Request) -> Response:
        kind, number, party = _slot(request)
        if not await self.waiting.until((kind, number, party), _wait(request)):
            raise RoundError(f"there is no {kind} {number} of party {party} yet", hint="ask again", code="not-found")
        if (part := _part(request, kind)) is not None:
            some = await run_in_threadpool(self._board.part, kind, number, party, *part)
            if some is None:
                raise TrustError(f"the {kind} {number} of party {party} has no such bytes", hint="read the contract", code="range")
            return Response(some, status_code=206, media_type="application/octet-stream", headers=_HEADERS)
        data = await run_in_threadpool(self._board.get, kind, number, party)
        return Response(data, media_type="application/octet-stream", headers=_HEADERS)

    async def log(self, request: Request) -> Response:
        path = str(request.path_params["path"])
        if not log.is_resource(path):
            raise RoundError(f"there is no {path[:80]!a} in a log", hint="checkpoint, or tile/…", code="no-such-route")
        data = None if self._log_folder is None else await run_in_threadpool(_read, self._log_folder / path)
        if data is None:
            raise RoundError(f"the log has no {path} yet", hint="read the checkpoint first", code="not-found")
        if path == "checkpoint":
            return Response(data, media_type="text/plain", headers=_HEADERS)
        return Response(data, media_type="application/octet-stream", headers=_FOREVER)

    async def status(self, _request: Request) -> Response:
        return _json(await run_in_threadpool(self._board.status), 200)

    async def healthy(self, _request: Request) -> Response:
        return _json({"status": "ok"}, 200)

    async def ready(self, _request: Request) -> Response:
        await run_in_threadpool(self._board.has, "contract", 1, 0)
        return _json({"status": "ready"}, 200)


def _slot(request: Request) -> Slot:
    kind, number, party = (str(request.path_params[name]) for name in ("kind", "number", "party"))
    if kind not in KINDS:
        raise RoundError(f"there is no kind of document {kind[:40]!r}", hint=f"one of {', '.join(KINDS)}", code="no-such-route")
    for text, most in ((number, 2**32), (party, 2**16)):
        if not _NUMBER.fullmatch(text) or int(text) >= most:
            raise TrustError(
                f"{text[:40]!r} is no number below {most}", hint="plain decimal digits, no leading zero", code="number"
            )
    return cast(Kind, kind), int(number), int(party)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise MachineError(f"cannot read {path.name}: {error.strerror}", hint="mend the folder log/", code="cannot-read") from error


def _wait(request: Request) -> float:
    text = request.query_params.get("wait", "0")
    if not _WAIT.fullmatch(text) or float(text) > LONGEST_WAIT_S:
        raise TrustError(
            f"wait = {text[:40]!r}, at most {LONGEST_WAIT_S:g} seconds", hint="ask again after each answer", code="wait"
        )
    return float(text)


def _part(request: Request, kind: Kind) -> tuple[int, int] | None:
    """The first byte and the number of bytes that are asked for, of a masked vector; None for a whole document."""
    text = request.headers.get("range", "")
    if kind != "vector" or not text:
        return None
    found = _RANGE.fullmatch(text)
    if found is None or not 0 <= (size := int(found[2]) - int(found[1]) + 1) <= _MOST_PART_BYTES:
        raise TrustError(f"range = {text[:60]!a}", hint=f"bytes=first-last, at most {_MOST_PART_BYTES} bytes", code="range")
    return int(found[1]), size


async def _body(request: Request, most: int, kind: Kind) -> bytes:
    """The body, never more than ``most`` bytes of it, whatever its headers say."""
    stated = request.headers.get("content-length", "0")
    if not stated.isascii() or not stated.isdecimal() or int(stated[:20]) > most:
        raise _too_large(kind, stated[:20], most)
    received = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                received += chunk
                if len(received) > most:
                    raise _too_large(kind, f"more than {most}", most)
    except (ClientDisconnect, TimeoutError):
        raise TrustError(f"the {kind} broke off after {len(received)} bytes", hint="send it again", code="malformed") from None
    return bytes(received)


def _too_large(kind: Kind, size: str, most: int) -> TrustError:
    return TrustError(
        f"a {kind} of {size} bytes, at most {most} are allowed now", hint="check the contract and the kind", code="too-large"
    )


# --- Answers -------------------------------------------------------------------------------------------------------------


async def _refused(_request: Request, error: Exception) -> Response:
    known = cast(SiloquyError, error)
    status = _STATUS_BY_CODE.get(known.code) or next((code for kind, code in _STATUS if isinstance(known, kind)), 500)
    return _problem(status, code=known.code, exit_code=known.exit_code, message=known.message, hint=known.hint)


async def _no_route(_request: Request, error: Exception) -> Response:
    status = cast(HTTPException, error).status_code
    what = http.HTTPStatus(status).phrase.lower()
    return _problem(
        status, code="no-such-route", exit_code=6, message=what, hint="the routes are /v1/{kind}/{number}/{party} and /v1/status"
    )


async def _bug(_request: Request, _error: Exception) -> Response:
    return _problem(500, code="bug", exit_code=1, message="the aggregator failed", hint="the traceback is in its log")


def _problem(status: int, *, code: str, exit_code: int, message: str, hint: str) -> Response:
    """RFC 9457: about:blank, our code and hint as extension members."""
    body = {
        "type": "about:blank", "title": http.HTTPStatus(status).phrase, "status": status, "detail": message,
        "code": code, "exit_code": exit_code, "message": message, "hint": hint,
    }  # fmt: skip
    # After 413 an unread body is on the line: the connection cannot serve another request.
    more = {"connection": "close"} if status == 413 else {}
    return _json(body, status, media_type="application/problem+json", **more)


def _json(body: dict[str, object], status: int, media_type: str = "application/json", **more: str) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, media_type=media_type, headers={**_HEADERS, **more})


# --- Serving -------------------------------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        MachineError: the port is in use, or the address is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        # The protocol is named so that asyncio sets TCP_NODELAY: it saves 40 ms for each answer.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(_MOST_CONNECTIONS)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        raise MachineError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            hint="stop the other program, or set another [listen] port" if in_use else "set another [listen] host or port",
            code="port-in-use" if in_use else "listen",
        ) from error
    return listener


def server(app: Starlette) -> uvicorn.Server:
    """A uvicorn server for the app that ends its long polls when it is told to stop. Run it with ``run(sockets=[listen(…)])``."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, date_header=False, lifespan="off", http="h11", ws="none",
        limit_concurrency=_MOST_CONNECTIONS, timeout_graceful_shutdown=5,
    )  # fmt: skip
    made = uvicorn.Server(config)
    app.state.service.stopping = lambda: made.should_exit
    return made


def serve(app: Starlette, host: str, port: int, *, service_file: Path) -> None:
    """Serve until SIGTERM or SIGINT. ``service_file`` names the address while the service runs.

    Raises:
        MachineError: the port is in use, or the file cannot be written.
        KeyboardInterrupt: stopped by SIGINT.
    """
    with listen(host, port) as listener, _termination_ends_quietly():
        chosen = listener.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        where = {"url": f"http://{shown}:{chosen}", "host": host, "port": chosen, "pid": os.getpid()}
        files.sweep(service_file)
        files.write_atomic(service_file, msgspec.json.encode(where) + b"\n")
        try:
            server(app).run(sockets=[listener])
        finally:
            service_file.unlink(missing_ok=True)


@contextlib.contextmanager
def _termination_ends_quietly() -> Iterator[None]:
    """uvicorn raises a signal again after its shutdown; SIGTERM is then no error but the ordinary end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
