# SPDX-License-Identifier: Apache-2.0
"""A federation without a network: every party has a folder of its own, and somebody carries files between them, badly.

The courier copies in any order, in part, twice, and old things back. Then the same with real processes, over HTTP and over one
folder, and the guide docs/guides/air-gap.md as it is written, with `cp` for a courier.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from aggregator import commands as hub_commands
from aggregator.mailbox import Mailbox
from silo.folder import FolderTransport
from tests import sessions
from tests.carried import Courier
from tests.whole import SILOS, Whole, together

# --- A courier who does everything wrong ------------------------------------------------------------------------------------------


class Apart(Whole):
    """A federation of which every silo has a folder of its own; courier and mailbox work until the block is left."""

    @contextlib.contextmanager
    def carried(self, seed: int):
        self.exchange, self.over, luck = self.root / "hub-folder", threading.Event(), random.Random(seed)
        mailbox = Mailbox(self.exchange, home=self.home, store=self.store, board=self.board)
        couriers = [Courier(self.exchange, self.folder(silo), luck) for silo in SILOS]
        faults = []

        def work(step):
            try:
                while not self.over.is_set():
                    step()
                    time.sleep(0.005)
            except BaseException as error:
                faults.append(error)

        def trips():
            for courier in luck.sample(couriers, len(couriers)):
                courier.trip()

        threads = [threading.Thread(target=work, args=(step,)) for step in (mailbox.once, trips)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.over.set()
            for thread in threads:
                thread.join(20)
            assert not faults, faults

    def two_rounds(self, silo: int):
        with self.silo(silo, line=self.line(silo)) as running:
            return list(running.rounds(2, 300.0))

    def folder(self, silo: int) -> Path:
        return self.root / f"silo-{silo}-folder"

    def line(self, silo: int | None = None):
        return super().line() if silo is None else FolderTransport(self.folder(silo), answer_s=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_federation_apart_reaches_one_model_however_its_files_were_carried(tmp_path, seed):
    whole = Apart.create(tmp_path / "federation", sum={"deadline_s": 600})  # the machine may be slow
    with whole.carried(seed):
        jobs = [functools.partial(whole.two_rounds, silo) for silo in SILOS]
        *settled, closed = together(*jobs, functools.partial(whole.coordinate, 2))
    assert [each.kind for each in closed] == ["result", "result"]
    for number, each in enumerate(closed):
        assert {settled[place][number].state.digest for place in range(3)} == {each.state}
    assert all(len(whole.attempts(silo, number)) == 1 for silo in SILOS for number in (1, 2))
    assert not list(whole.exchange.glob("refused/*/*")), "nothing honest was refused"
    seeds = sessions.private_seeds(*(whole.root / f"silo-{silo}" for silo in SILOS), whole.home.root)
    for place in (whole.exchange, *map(whole.folder, SILOS)):
        assert not any(sessions.mentions(path.read_bytes(), seeds) for path in place.rglob("*") if path.is_file())
    whole.close()


# --- Real processes, over HTTP and over a folder ---------------------------------------------------------------------------------

ROUNDS = 2


def done(*words: object) -> sessions.Session:
    ended = sessions.finish(*words, "--json", timeout_s=240)
    assert ended.code == 0, f"{words}\n{ended.out}{ended.err}"
    return ended


@contextlib.contextmanager
def mailbox(way: str, root: Path, port: int):
    """`aggregator serve` over HTTP or over a folder: the options that say to a silo where it is."""
    exchange = root / "exchange"
    words = ["--folder", exchange] if way == "folder" else ["--port", port]
    process = sessions.start("aggregator", "serve", "--home", root / "hub", *words)
    up = root / "hub" / ("mailbox.json" if way == "folder" else "service.json")
    try:
        sessions.until(lambda: up.exists() or process.poll() is not None)
        yield process
        process.terminate()
        assert process.wait(20) == 0
        assert not up.exists()
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["http", "folder"])
def test_real_processes_from_init_to_the_same_model(tmp_path, tiny_bert, way):
    hub, port, names = tmp_path / "hub", free_port(), ("north", "south", "west")
    made = done(
        "aggregator", "init", "--home", hub, "--name", "trial", "--organisation", "Hub", "--labels", "no,yes", "--units", 60,
        "--rounds", ROUNDS, "--max-length", 16, "--delta", "1e-6", "--model", tiny_bert, "--last-layers", 0, "--rank", 4,
    ).document  # fmt: skip
    where = ("--folder", tmp_path / "exchange") if way == "folder" else ("--aggregator", f"http://127.0.0.1:{port}")
    for place, name in enumerate(names):
        records = sessions.write_rows(tmp_path / f"{name}.jsonl", sessions.rows(50, start_at=50 * place))
        done(
            "silo", "init", "--home", tmp_path / name, "--name", name, "--organisation", name.title(), *where, "--records", records,
            "--fingerprint", made["fingerprint"], "--model", tiny_bert,
        )  # fmt: skip
        done("aggregator", "member", tmp_path / name / "identity.pub", "--home", hub)
    done("aggregator", "sign", "--home", hub)
    with mailbox(way, tmp_path, port):
        for name in names:
            done("silo", "join", "--home", tmp_path / name, "--yes")
        silos = [sessions.start("silo", "train", "--home", tmp_path / name, "--rounds", ROUNDS) for name in names]
        closed = done("aggregator", "round", "--home", hub, "--rounds", ROUNDS).document["rounds"]
        assert [silo.wait(120) for silo in silos] == [0, 0, 0]
        sessions.until(lambda: not list(tmp_path.glob("exchange/inbox/*/*")) or way == "folder")
    assert [each["kind"] for each in closed] == ["result"] * ROUNDS
    stated = [done("silo", "status", "--home", tmp_path / name).document for name in names]
    assert {each["model_digest"] for each in stated} == {closed[-1]["state"]}
    assert {each["epsilon"] for each in stated} == {stated[0]["epsilon"]}
    assert done("aggregator", "status", "--home", hub).document["outcome"]["round"] == ROUNDS
    if way == "folder":
        check_folder(tmp_path / "exchange", *(tmp_path / name for name in names), hub)


def check_folder(exchange: Path, *homes: Path) -> None:
    """What a run leaves in the folder: every document of the store once, nothing refused or half written, and no secret."""
    with hub_commands.opened(homes[-1]) as at:
        leaves = at.store.leaves(0, at.store.log_size())
    posted = sorted(path.name for path in exchange.glob("board/*/*"))
    for place, leaf in enumerate(leaves):
        assert f"{place:08d}-{leaf.kind}-{leaf.number}-{leaf.party}-{leaf.digest.hex()}" in posted
    assert {int(name.split("-")[2]) for name in posted if "-head-" in name} >= set(range(1, ROUNDS + 1))
    assert not list(exchange.glob("refused/*/*"))
    assert not list(exchange.rglob(".*"))
    seeds = sessions.private_seeds(*homes)
    assert not any(sessions.mentions(path.read_bytes(), seeds) for path in exchange.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_second_mailbox_in_one_home_and_a_folder_that_cannot_be_are_refused(tmp_path, tiny_bert):
    hub = tmp_path / "hub"
    done(
        "aggregator", "init", "--home", hub, "--name", "trial", "--organisation", "Hub", "--labels", "no,yes", "--units", 60,
        "--rounds", 1, "--model", tiny_bert, "--last-layers", 0, "--rank", 4, "--delta", "1e-6",
    )  # fmt: skip
    with mailbox("folder", tmp_path, 0):
        second = sessions.finish("aggregator", "serve", "--home", hub, "--folder", tmp_path / "other", "--json")
        assert (second.code, second.error["code"]) == (7, "busy")
    (tmp_path / "file").write_text("x")
    third = sessions.finish("aggregator", "serve", "--home", hub, "--folder", tmp_path / "file" / "x", "--json")
    assert (third.code, third.error["code"]) == (7, "cannot-write")
    words = ("silo", "init", "--name", "n", "--organisation", "N", "--records", "r.jsonl", "--home", tmp_path / "n", "--json")
    for where in ((), ("--aggregator", "http://127.0.0.1:1", "--folder", "f")):
        assert (sessions.finish(*words, *where).code) == 2


# --- The guide -------------------------------------------------------------------------------------------------------------------

GUIDE = Path(__file__).parents[1] / "docs/guides/air-gap.md"


def blocks() -> list[tuple[bool, str]]:
    """(whether its lines run in terminals of their own, its text) of each shell block."""
    found = re.findall(r"^```sh( background)?\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(bool(mark), text) for mark, text in found]


OURS = re.compile(r"(silo|aggregator) .*")


@pytest.mark.slow
def test_the_guide_runs_as_it_is_written(tmp_path, tiny_bert):
    """Put in: the printed fingerprint and a tiny base model. What is no line of `silo` or `aggregator` alone is run by a shell."""
    for place, name in enumerate(("north", "south", "west")):
        (tmp_path / name).mkdir()
        sessions.write_rows(tmp_path / name / "records.jsonl", sessions.rows(50, start_at=50 * place))
    printed, known, silos, running = "", {}, [], []

    def words(line: str) -> list[str]:
        put_in = ["--model", str(tiny_bert), "--last-layers", "0", "--rank", "4"] if line.startswith("aggregator init") else []
        return [*shlex.split(line.replace("$FINGERPRINT", known.get("fingerprint", "?"))), *put_in]

    try:
        for in_terminals, text in blocks():
            lines = [line for line in text.splitlines() if line]
            if in_terminals:
                for line in lines:
                    started = sessions.start(*words(line), cwd=tmp_path) if OURS.fullmatch(line) else shell(line, tmp_path)
                    (silos if line.startswith("silo ") else running).append(started)
            elif all(OURS.fullmatch(line) for line in lines):
                for line in lines:
                    ended = sessions.finish(*words(line), cwd=tmp_path, timeout_s=240)
                    assert ended.code == 0, f"{line}\n{ended.out}{ended.err}"
                    printed += ended.out
                    if found := re.search(r"fingerprint ([0-9a-f ]{79})", ended.out):
                        known.setdefault("fingerprint", found[1])
            else:
                subprocess.run(["sh", "-ec", text], cwd=tmp_path, capture_output=True, timeout=60, check=True)
        assert [child.wait(60) for child in silos] == [0, 0, 0], "a silo failed"
    finally:
        for child in (*silos, *running):
            if isinstance(child, subprocess.Popen):
                os.killpg(child.pid, signal.SIGTERM)
            else:
                child.terminate()
            child.wait(20)
    digests = set(re.findall(r"[0-9a-f]{64}", "".join(line for line in printed.splitlines() if "model digest" in line)))
    assert len(digests) == 1
    assert digests.pop() in next(line for line in printed.splitlines() if line.startswith("outcome:"))
    assert not list(tmp_path.glob("hub/exchange/refused/*/*"))


def shell(line: str, folder: Path) -> subprocess.Popen:
    """A terminal of its own for a line that is not one of our commands."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(["sh", "-c", line], cwd=folder, start_new_session=True, **quiet)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
