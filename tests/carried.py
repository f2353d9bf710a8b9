# SPDX-License-Identifier: Apache-2.0
"""The federation of tests.whole, whose silos and guardians exchange files in one folder with a mailbox in place of the board.

The same levers (power cuts, documents altered on their way to a silo) are at hand; the mailbox works until the federation is
closed. A courier carries files between folders, in any order, in part, twice, and old things back.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from pathlib import Path

from aggregator.mailbox import Mailbox
from silo.folder import FolderTransport
from tests.whole import Whole


class Line(FolderTransport):
    """A silo's transport: the folder. ``alter`` may change what this silo is shown, or raise PowerCut."""

    def __init__(self, whole: Carried):
        self.power, self.looks = whole.power, whole.store.looks
        self.alter = lambda slot, data: data
        super().__init__(whole.exchange, answer_s=0.1, sleep=self.pause)

    def pause(self, seconds: float) -> None:
        self.power.check()
        time.sleep(min(seconds, 0.02))

    def get(self, kind, number, party, *, wait_s):
        self.power.check()
        found = super().get(kind, number, party, wait_s=wait_s)
        self.looks.add(float(found is None and wait_s > 0))
        return self.alter((kind, number, party), found)

    def put(self, kind, number, party, data):
        self.power.check()
        super().put(kind, number, party, data)

    def fetch(self, path):
        self.power.check()
        return self.alter(("log", path), super().fetch(path))


class Carried(Whole):
    """A federation over a folder, ``exchange``."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.exchange, self.over, self.faults = self.root / "exchange", threading.Event(), []
        self.mailbox = Mailbox(self.exchange, home=self.home, store=self.store, board=self.board)
        self.mailbox.once()
        self.working = threading.Thread(target=self.work, daemon=True)
        self.working.start()

    def work(self) -> None:
        try:
            while not self.over.wait(0.01):
                self.mailbox.once()
        except BaseException as error:
            self.faults.append(error)

    def line(self):
        return Line(self)

    def close(self) -> None:
        self.over.set()
        self.working.join(20)
        super().close()
        assert not self.faults, self.faults


class Courier:
    """Carries files between two folders; ``trip`` leaves any part of the work undone, and some of it half done."""

    def __init__(self, hub: Path, silo: Path, luck: random.Random):
        self.hub, self.silo, self.luck, self.old = hub, silo, luck, []

    def trip(self) -> None:
        outward = [(path, self.hub / path.relative_to(self.silo)) for path in self.silo.glob("inbox/*/[!.]*")]
        homeward = [(path, self.silo / path.relative_to(self.hub)) for path in self.hub.rglob("[!.]*") if path.is_file()]
        # An inbox comes back only as old files that the silo deleted: a broken copy over the only original is nobody's to mend.
        homeward = [(source, target) for source, target in homeward if "inbox" not in source.parts or not target.exists()]
        self.old += [(source, target, source.read_bytes()) for source, target in homeward if self.luck.random() < 0.05]
        jobs = [*outward, *homeward]
        self.luck.shuffle(jobs)
        for source, target in jobs[: self.luck.randint(1, len(jobs) + 1)]:
            with contextlib.suppress(FileNotFoundError):  # a silo deletes what was accepted
                if self.luck.random() < 0.05 or not target.exists() or source.stat().st_size != target.stat().st_size:
                    self.carry(source, target, source.read_bytes())
        for source, target, data in self.luck.sample(self.old, min(3, len(self.old))):
            self.carry(source, target, data)

    def carry(self, source: Path, target: Path, data: bytes) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        way = self.luck.random()
        if way < 0.6:
            aside = target.with_name(f".{target.name}.{self.luck.randrange(10**6)}")
            aside.write_bytes(data)
            aside.rename(target)
        elif way < 0.95:  # in place, as cp does it: for a moment it is cut off
            with target.open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                time.sleep(0.001)
                file.write(data[len(data) // 2 :])
        elif not target.exists():  # the stick was pulled out
            target.write_bytes(data[: self.luck.randrange(len(data) + 1)])
