# SPDX-License-Identifier: Apache-2.0
"""Real commands in real processes that are really killed, at a call that the test names.

A command runs in a process of its own, forked from a server that has imported everything once, through the same entry point
as a user's. In it the calls that make something durable or visible are *sites*: creating, writing, linking, replacing and
removing a file or folder under the party's home, committing to the table of documents, and sending over the network. Each
site is the moment just after its call; the moment before it is the site before. Two calls have a moment inside: a write
("torn": half of the bytes are there) and a PUT ("cut": half of it is sent). A temporary file, which nobody reads, has that one
only. At the first site that it is not told to
``spare`` the process kills itself with SIGKILL: no handler, no ``finally``, no flush. A disk can also be full at a site.

Sites have names, with numbers and random parts replaced by N and ~, so that a walk over them ends and can be repeated.
Not covered: moments inside SQLite's own commit (its makers kill that), and power cuts: what is written stays written here,
and that it is synced before it is relied on is tests/test_files.py's part.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass
from pathlib import Path

from aggregator.simulation import processes
from privacy import federation
from privacy.dp import ledger
from privacy.identity import keys
from privacy.messages import AGGREGATOR, KINDS, EpochNote, Header, Outcome, Signed, Upload, decode
from silo import config, membership
from silo.home import Home
from silo.participation import participate
from silo.upload import Persisted
from tests import sessions, warm, whole

DUE = "! "
EVERYTHING = "SILOQUY_FULL" in os.environ


# --- In the process that dies ----------------------------------------------------------------------------------------------------


class Fate:
    """What happens at the first site that is not spared: "killed" or "full" (of the disk). Keeps every site it passes."""

    def __init__(self, home: Path, trace: Path, spare: Container[str] | None, kind: str):
        self.home, self.spare, self.kind = str(home), spare, kind
        self.trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self.lock, self.seen = threading.RLock(), set()
        self.subject = threading.local()
        self.write = os.write

    def is_due(self, site: str) -> bool:
        """Whether the process's end is here; the site is written down first."""
        with self.lock:
            if site not in self.seen:
                self.seen.add(site)
                is_due = self.spare is not None and site not in self.spare
                self.write(self.trace, (DUE * is_due + site).encode() + b"\n")
                return is_due
            return self.kind == "killed" and self.spare is not None and site not in self.spare

    def refuse(self, site: str) -> None:
        """Raise what a full disk raises, the first time."""
        if self.kind == "full" and self.is_due(site):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def at(self, site: str) -> None:
        if self.kind == "killed" and self.is_due(site):
            with self.lock:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)

    def name(self, path: object, dir_fd: int | None = None) -> str | None:
        """The name of a path under the home; None for all others."""
        folder = Path() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
        whole = str((folder / os.fsdecode(path)).absolute())
        if not whole.startswith(self.home):
            return None
        inside = re.sub(r"(^|/)\.(.+)\.[0-9a-f]{12}$", r"\1\2~", whole[len(self.home) :].lstrip("/") or ".")
        inside = re.sub(r"[0-9a-f]{64}", getattr(self.subject, "kind", "document"), inside)
        return re.sub(r"[0-9]+", "N", inside)


def watch_files(fate: Fate) -> None:
    """Make every change under the home a site."""
    opened: dict[int, str] = {}
    real = {name: getattr(os, name) for name in ("open", "close", "write", "fsync", "ftruncate")}

    def open_(path, flags, mode=0o777, *, dir_fd=None):
        name = fate.name(path, dir_fd) if flags & (os.O_WRONLY | os.O_RDWR) else None
        is_new = name is not None and not Path(path).exists()
        if is_new:
            fate.refuse(f"create {name}")
        descriptor = real["open"](path, flags, mode, dir_fd=dir_fd)
        if name is not None:
            opened[descriptor] = name
        if is_new and not name.endswith("~"):
            fate.at(f"create {name}")
        return descriptor

    def close(descriptor):
        opened.pop(descriptor, None)
        real["close"](descriptor)

    def write(descriptor, data):
        name = opened.get(descriptor)
        if name is None:
            return real["write"](descriptor, data)
        if fate.is_due(f"torn {name}"):
            real["write"](descriptor, bytes(data)[: len(data) // 2])
            if fate.kind == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fate.at(f"torn {name}")
        done = real["write"](descriptor, data)
        if not name.endswith("~"):
            fate.at(f"write {name}")
        return done

    def fsync(descriptor):
        if descriptor in opened:
            fate.refuse(f"sync {opened[descriptor]}")
        real["fsync"](descriptor)

    def ftruncate(descriptor, size):
        real["ftruncate"](descriptor, size)
        fate.at(f"truncate {opened.get(descriptor)}")

    os.open, os.close, os.write, os.fsync, os.ftruncate = open_, close, write, fsync, ftruncate
    for call in ("link", "replace", "rename"):
        setattr(os, call, _renaming(fate, call))
    for call in ("unlink", "remove", "mkdir", "rmdir"):
        setattr(os, call, _changing(fate, call))


def _renaming(fate: Fate, call: str):
    real = getattr(os, call)

    def wrapped(source, target, **options):
        name = fate.name(target)
        if name:
            fate.refuse(f"{call} {name}")
        real(source, target, **options)
        if name:
            fate.at(f"{call} {name}")

    return wrapped


def _changing(fate: Fate, call: str):
    real = getattr(os, call)

    def wrapped(path, *rest, dir_fd=None):
        name = fate.name(path, dir_fd)
        real(path, *rest, dir_fd=dir_fd)
        if name:
            fate.at(f"{call} {name}")

    return wrapped


def watch_table(fate: Fate) -> None:
    """Make every commit a site before and after, and give what is written for a document the name of its kind."""
    from sqlalchemy.engine.default import DefaultDialect

    from aggregator.store import Store

    commit, put_once = DefaultDialect.do_commit, Store.put_once

    def do_commit(dialect, connection):
        kind = getattr(fate.subject, "kind", "table")
        try:
            fate.refuse(f"commit of {kind}")
        except OSError as error:
            raise sqlite3.OperationalError("database or disk is full") from error
        fate.at(f"commit of {kind} begins")
        commit(dialect, connection)
        fate.at(f"commit of {kind}")

    def put(store, kind, number, party, data, **options):
        fate.subject.kind = kind
        try:
            return put_once(store, kind, number, party, data, **options)
        finally:
            del fate.subject.kind

    DefaultDialect.do_commit, Store.put_once = do_commit, put


def watch_network(fate: Fate) -> None:
    """Make every request of a silo a site: sent; and of a PUT also cut in its body, and answered."""
    import socket

    from silo.transport import HttpTransport

    once, send = HttpTransport._once, socket.socket.send

    def exchange(transport, method, path, *rest):
        fate.subject.request = re.sub(r"[0-9]+", "N", f"{method} {path.removeprefix('/v1/').partition('?')[0]}")
        fate.subject.part = 0
        try:
            answer = once(transport, method, path, *rest)
        finally:
            request = fate.subject.__dict__.pop("request")
        if method == "PUT":
            fate.at(f"answered {request}")
        return answer

    def sending(self, data, *flags):
        request = getattr(fate.subject, "request", None)
        if request is None:
            return send(self, data, *flags)
        fate.subject.part += 1
        if request.startswith("PUT") and fate.subject.part == 1:  # its head alone says nothing
            return send(self, data, *flags)
        if request.startswith("PUT") and fate.kind == "killed" and fate.is_due(f"cut {request}"):
            send(self, bytes(data)[: len(data) // 2], *flags)
            fate.at(f"cut {request}")
        sent = send(self, data, *flags)
        fate.at(f"sent {request}")
        return sent

    HttpTransport._once, socket.socket.send = exchange, sending


def _live(words: tuple[str, ...], log: str, home: str, spare: Container[str] | None, kind: str, children: str) -> None:
    """The child: the command as ``silo`` or ``aggregator`` runs it; its own children come from ``children``, see tests/warm.py."""
    processes._entry = warm.entry(children)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = io.TextIOWrapper(io.FileIO(output, "w", closefd=False), encoding="utf-8", line_buffering=True)
    faulthandler.enable(file=output)
    faulthandler.register(signal.SIGUSR1, file=output, all_threads=True)
    from cli import errors

    fate = Fate(Path(home), Path(log + ".trace"), spare, kind)
    watch_files(fate)
    watch_table(fate)
    watch_network(fate)
    code = errors.run(sessions.APPS[words[0]], words[1:])
    sys.stdout.flush()
    os._exit(code)


# --- In the test -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended. ``sites`` are those it passed, the last one where it died if it did."""

    code: int
    out: str
    sites: tuple[str, ...]

    @property
    def killed(self) -> bool:
        assert self.code == 0 or self.code == -signal.SIGKILL, self.out
        return self.code != 0

    @property
    def due(self) -> list[str]:
        """The sites that met this process's fate."""
        return [site.removeprefix(DUE) for site in self.sites if site.startswith(DUE)]

    @property
    def document(self) -> dict:
        """The last line, as the command's answer under ``--json``."""
        return json.loads(self.out.splitlines()[-1])


class Command:
    """A running command."""

    def __init__(self, process, log: Path):
        self.process, self.log = process, log

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    def ended(self, timeout_s: float = 240.0) -> Ended:
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(1)
            raise AssertionError(f"still running after {timeout_s:g} s\n{self.log.read_text()}")
        trace = Path(f"{self.log}.trace")
        return Ended(
            code=self.process.exitcode,
            out=self.log.read_text(errors="replace") if self.log.exists() else "",
            sites=tuple(trace.read_text().splitlines()) if trace.exists() else (),
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class Commands:
    """Starts commands from the warm server. ``folder`` takes their output."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.running = folder, 0, []
        folder.mkdir(parents=True, exist_ok=True)
        self.context = sessions.warm()

    def start(
        self, *words: object, home: Path, spare: Container[str] | None = None, fate: str = "killed", watch: Path | None = None
    ) -> Command:
        """Start a command. What it changes under ``watch``, its home unless given, are its sites."""
        self.count += 1
        log = self.folder / f"{self.count}-{words[1]}.log"
        children = sessions.children_server() if words[1] == "simulate" else ""
        given = ([*map(str, words), "--home", str(home)], str(log), str(watch or home), spare, fate, children)
        process = self.context.Process(target=_live, args=given, daemon=True)
        process.start()
        command = Command(process, log)
        self.running.append(command)
        return command

    def run(self, *words: object, home: Path, **options) -> Ended:
        return self.start(*words, home=home, **options).ended()

    def done(self, *words: object, home: Path) -> Ended:
        """A command that must end well."""
        ended = self.run(*words, home=home)
        assert ended.code == 0, ended.out
        return ended

    def walk(self, *words: object, home: Path, after: Callable[[], None] = lambda: None, spare: Collection[str] = ()) -> list[str]:
        """Start the same command again and again, each time killed at a site where it was not killed before, until it ends well.

        Gives where it was killed. ``after`` looks at what each death left.
        """
        sites: list[str] = []
        while (ended := self.run(*words, home=home, spare=frozenset((*spare, *sites)))).killed:
            sites += ended.due
            after()
        return sites

    def end(self) -> None:
        for command in self.running:
            if command.is_running:
                command.kill()


@contextlib.contextmanager
def commands(folder: Path):
    made = Commands(folder)
    try:
        yield made
    finally:
        made.end()


# --- A federation of commands ----------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "concepts" / "crashes.md"
ROUNDS = 24
UNITS = 50


class Thinned:
    """Sites to spare on a disk that is full: these, and of a file that is written aside by chance half of the four others.

    With SILOQUY_FULL=1 none of those: creating, writing, syncing and renaming it fail, each once.
    """

    def __init__(self, spare: Collection[str], luck: bytes):
        self.spare, self.luck = frozenset(spare), luck

    def __contains__(self, site: object) -> bool:
        call, _, name = str(site).partition(" ")
        if site in self.spare or EVERYTHING or not (name.endswith("~") or call in ("link", "replace", "rename")):
            return site in self.spare
        first, second = hashlib.sha256(self.luck + name.rstrip("~").encode()).digest()[:2]
        chosen = (("create", "torn")[first % 2], *(("sync",) if second % 2 else ("link", "replace", "rename")))
        return call not in chosen


class OfRounds:
    """Sites to spare in a walk over rounds: these; what only reads; what every round does alike with the log; and sweeping.

    tests/test_killed_silo.py and tests/test_killed_aggregator.py kill there. Of each other file and document one site is taken by
    chance, of those that ``matter`` every one. With SILOQUY_FULL=1 nothing but ``spare`` is spared. ``attempt``: no further attempt
    may be lost, so nothing dies between its reservation and its upload.
    """

    def __init__(self, spare: Collection[str], luck: bytes, *, matter: Collection[str], attempt: bool = False):
        self.spare, self.luck, self.matter, self.attempt = frozenset(spare), luck, frozenset(matter), attempt

    def __contains__(self, site: object) -> bool:
        call, _, name = str(site).partition(" ")
        file = name.rstrip("~")
        if site in self.spare or (self.attempt and file in ATTEMPTED):
            return True
        if EVERYTHING or (file in self.matter and call != "unlink"):
            return False
        words = set(re.split("[/ ~]", name))
        if words & {"GET", "log", "cosignature", "acknowledgement", "checkpoint", "head"} or call in ("unlink", "create", "rmdir"):
            return True
        both = ("cut", "sent", "answered") if name.startswith("PUT ") else ("torn", "link") if call in ("torn", "link") else (call,)
        return call != both[hashlib.sha256(self.luck + file.encode()).digest()[0] % len(both)]


ATTEMPTED = frozenset({"ledger.jsonl", "promises/manifest-N", "epoch/N/attempt"})
"""What is written from an attempt's reservation to its upload; the last of them, once it stands, is sent whatever happens."""


def names(sites: Collection[str]) -> set[str]:
    """The files that were written at these sites; locks are empty, and what is swept was never read."""
    written = {
        site.split(" ", 1)[1].rstrip("~") for site in sites if site.split(" ", 1)[0] in ("create", "torn", "link", "replace")
    }
    return {name for name in written if not name.endswith(".lock")}


def page(command: str) -> set[str]:
    """The files that docs/concepts/crashes.md says this command writes."""
    section = next(part for part in PAGE.read_text(encoding="utf-8").split("\n### ") if f"`{command}`" in part.splitlines()[0])
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def litter(*folders: Path) -> list[Path]:
    """What a crash in the middle of a write left under these folders."""
    return [path for folder in folders for path in folder.rglob(".*.*") if re.search(r"\.[0-9a-f]{12}$", path.name)]


def history(root: Path) -> ledger.History:
    key = keys.load(root / "identity.key").public.sign_key
    return ledger.History.read(root / "ledger.jsonl", verify=functools.partial(keys.verify_signature, key))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Places:
    """Where the parties of a federation are; ``port`` is where its service listens."""

    SILOS = 3

    def __init__(self, root: Path, model: Path, port: int):
        self.root, self.model, self.port = root, model, port
        self.hub, self.silos = root / "aggregator", tuple(root / f"silo-{number}" for number in range(1, self.SILOS + 1))
        self.records = tuple(model.with_name(f"records-{number}.jsonl") for number in range(1, self.SILOS + 1))

    @classmethod
    def create(cls, root: Path, model: Path) -> Places:
        for place in range(cls.SILOS):
            sessions.write_rows(model.with_name(f"records-{place + 1}.jsonl"), sessions.rows(UNITS, start_at=UNITS * place))
        return cls(root, model, free_port())

    def copied(self, root: Path) -> Places:
        shutil.copytree(self.root, root)
        return type(self)(root, self.model, self.port)

    def init_hub(self) -> tuple[object, ...]:
        """Noise for a small epsilon at rate 1: the accountant is quick there."""
        given = {"name": "killed", "organisation": "Hub", "labels": "no,yes", "units": 50, "rounds": ROUNDS, "model": self.model}
        given |= {"last-layers": 0, "rank": 2, "max-length": 16, "epsilon": 0.8, "delta": "1e-5", "sampling-rate": "1.0"}
        given |= {"deadline": 600, "port": self.port}  # no test waits for it, however slow the machine
        return ("aggregator", "init", *options(given), "--json")

    def init_silo(self, number: int, fingerprint: str) -> tuple[object, ...]:
        given = {"name": f"silo-{number}", "organisation": f"Hospital {number}", "aggregator": f"http://127.0.0.1:{self.port}"}
        given |= {"fingerprint": fingerprint, "records": self.records[number - 1], "model": self.model, "epsilon": 50}
        return ("silo", "init", *options(given))


def options(given: dict[str, object]) -> list[object]:
    return [word for key, value in given.items() for word in (f"--{key}", value)]


@contextlib.contextmanager
def serving(run: Commands, places: Places):
    """`aggregator serve`, unharmed."""
    service = run.start("aggregator", "serve", home=places.hub)
    try:
        sessions.until(lambda: listens(service, places))
        yield service
    finally:
        service.kill()


def listens(service: Command, places: Places) -> bool:
    path = places.hub / "service.json"
    return path.exists() and json.loads(path.read_bytes())["pid"] == service.process.pid


def enrolled(run: Commands, places: Places) -> None:
    """Everything up to a published contract."""
    made = run.done(*places.init_hub(), home=places.hub)
    for number, root in enumerate(places.silos, start=1):
        run.done(*places.init_silo(number, made.document["fingerprint"]), home=root)
        run.done("aggregator", "member", root / "identity.pub", home=places.hub)
    run.done("aggregator", "sign", home=places.hub)


def joined(run: Commands, places: Places) -> None:
    with serving(run, places):
        for root in places.silos:
            run.done("silo", "join", "--yes", home=root)


class Others(whole.Whole):
    """The parties that live: library silos and coordinator on the same disk, in threads of the test, over synthetic sums.

    The silos take the basis from silo 1's epoch note, or all the same one where no silo has a model.
    """

    def __init__(self, places: Places):
        contract = (places.hub / "contract" / "v1.toml").read_bytes()
        super().__init__(places.root, federation.parse(contract))
        self.places, self.faults, self.threads = places, [], []
        self.calls_epoch, self.is_last = threading.Event(), threading.Event()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.power.is_out = True
        for thread in self.threads:
            thread.join(20)
        self.close()
        assert not self.faults, self.faults

    def basis(self) -> bytes:
        """What silo 1 computed from its model."""
        self.wait_for("epoch", 1, AGGREGATOR)
        number = self.store.latest("epoch")
        while (note := self.store.get("epoch-note", number, 1)) is None:
            self.power.check()
            time.sleep(0.01)
        return decode(decode(note, Signed).body, EpochNote).basis

    def same_basis(self) -> bytes:
        return whole.BASIS

    def join(self, silo: int, transport) -> None:
        """Countersign, as a silo without a model."""
        home = self.places.silos[silo - 1]
        membership.countersign(
            Home(home), transport, keys.load(home / "identity.key"), self.accepted, limits=config.Limits(epsilon=50.0, delta=1e-5),
            now=whole.NOW, check_local=lambda accepted: None,
        )  # fmt: skip

    def live(self, job, *given) -> threading.Thread:
        """Run a job beside the test, at the longest until the power is out."""

        def run():
            try:
                job(*given)
            except whole.PowerCut:
                pass
            except BaseException as error:
                self.faults.append(error)

        thread = threading.Thread(target=run, daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread

    def take_part_forever(self, silo: int, basis: Callable[[], bytes]) -> None:
        with self.silo(silo) as running:
            for _ in participate(running.parts, basis=basis(), rounds=None, wait_s=300.0):
                pass

    def coordinate_on(self) -> None:
        """Round after round, with a new epoch when the test calls for one, until it says that this round is the last."""
        with self.coordinator() as coordinator:
            coordinator.ensure_countersigned()
            coordinator.ensure_epoch()
            while not self.is_last.is_set():
                if self.calls_epoch.is_set():
                    self.calls_epoch.clear()
                    coordinator.new_epoch()
                coordinator.run_round(coordinator.next_round)

    def check(self, *silos: int) -> None:
        """Nothing left a silo that its ledger had not reserved, and a round that is over moved everybody to the same state."""
        for silo in silos or whole.SILOS:
            history = self.history(silo)
            for number in range(1, (self.store.latest("upload") or 0) + 1):
                if (raw := self.store.get("upload", number, silo)) is not None:
                    header = decode(decode(decode(decode(raw, Signed).body, Upload).header, Signed).body, Header)
                    assert header.attempt.hex() in history.attempts(self.accepted.digest.hex(), number)

    def settled(self, last: int) -> None:
        """Every party stands after round ``last``, in the state that its outcome names, and has swept up."""
        outcome = decode(decode(self.store.get("outcome", last, AGGREGATOR), Signed).body, Outcome)
        assert {self.progress(silo).round for silo in whole.SILOS} == {last}
        assert {self.progress(silo).state.digest for silo in whole.SILOS} == {outcome.next_state}
        assert {path.name for root in self.places.silos for path in root.glob("epoch/*/*")} == {"chain"}
        assert {len(list(root.glob("epoch/*"))) for root in self.places.silos} == {1}

    def check_evidence(self) -> None:
        """Every row of the table has its file, with the bytes that its digest names."""
        for kind in KINDS:
            for number in range((self.store.latest(kind) or 0) + 1):
                for party in self.store.parties(kind, number):
                    assert self.store.get(kind, number, party)


class Watched:
    """What silo 1 must keep through its deaths: the upload it once had on disk is the only one that is ever sent."""

    def __init__(self, others: Others):
        self.others, self.root, self.uploads = others, others.places.silos[0], {}

    def check(self) -> None:
        for path in self.root.glob("epoch/*/attempt"):
            found = Persisted.from_bytes(path.read_bytes())
            assert self.uploads.setdefault(found.round, found.upload) == found.upload
        for number, upload in self.uploads.items():
            assert self.others.store.get("upload", number, 1) in (None, upload)
        self.others.check(1)

    def attempts(self) -> int:
        """How often the next round was tried."""
        return len(self.others.attempts(1, self.others.progress(1).round + 1))
