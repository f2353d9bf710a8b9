# SPDX-License-Identifier: Apache-2.0
"""docs/guides/members.md, run as it is written: a silo comes, one goes, one rotates its key, and the federation goes on."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from privacy import chain
from privacy.chain import Version
from privacy.dp.ledger import History
from privacy.errors import TrustError
from privacy.messages import AGGREGATOR
from silo import keyring
from silo.home import Home
from silo.transport import HttpTransport
from tests import sessions
from tests.test_guides import free_port

GUIDE = Path(__file__).parents[1] / "docs/guides/members.md"
FIRST = ("north", "south", "west", "east")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Desk:
    """Terminals in one folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.running, self.fingerprint, self.port = root, [], "", free_port()

    def words(self, line: str) -> list[str]:
        return shlex.split(line.replace("8470", self.port).replace("$FINGERPRINT", self.fingerprint))

    def run(self, line: str) -> str:
        done = sessions.finish(*self.words(line), cwd=self.root, timeout_s=240)
        assert done.code == 0, f"{line}\n{done.out}{done.err}"
        return done.out + done.err

    def start(self, line: str) -> sessions.Started:
        child = sessions.start(*self.words(line), cwd=self.root, out=self.root / f"terminal-{len(self.running)}.txt")
        self.running.append(child)
        return child

    def close(self) -> None:
        for child in self.running:
            child.terminate()
        for child in self.running:
            child.wait(20)


@pytest.fixture
def desk(tmp_path):
    made = Desk(tmp_path)
    yield made
    made.close()


def begin(desk: Desk, *options: str) -> None:
    """Four silos that trained two rounds under version 1."""
    model = sessions.tiny_model(desk.root / "model")
    for place, name in enumerate((*FIRST, "late")):
        (desk.root / name).mkdir()
        sessions.write_rows(desk.root / name / "records.jsonl", sessions.rows(50, start_at=50 * place))
    made = desk.run(
        'aggregator init --home hub --name trial --organisation "Trial Office" --labels no,yes --units 60 --rounds 5 '
        f"--max-length 16 --epsilon 6 --delta 1e-6 --port 8470 --model {model} --last-layers 0 --rank 4 {' '.join(options)}"
    )
    desk.fingerprint = re.search(r"fingerprint ([0-9a-f ]{79})", made)[1]
    for name in FIRST:
        desk.run(
            f'silo init --home {name} --name {name} --organisation "{name.title()} Hospital" --aggregator http://127.0.0.1:8470 '
            f"--records {name}/records.jsonl"
        )
        desk.run(f"aggregator member --home hub {name}/identity.pub")
    desk.run("aggregator sign --home hub")
    serving = desk.start("aggregator serve --home hub")
    sessions.until(lambda: sessions.address(desk.root / "hub", serving))
    for name in FIRST:
        desk.run(f'silo join --home {name} --fingerprint "$FINGERPRINT" --yes')
    train(desk, FIRST, 2)


def train(desk: Desk, names, rounds: int) -> None:
    children = [desk.start(f"silo train --home {name} --rounds {rounds}") for name in names]
    desk.run(f"aggregator round --home hub --rounds {rounds}")
    assert all(child.wait(120) == 0 for child in children), "a silo failed"


def blocks() -> list[tuple[bool, list[str]]]:
    found = re.findall(r"^```sh( background)?\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(bool(mark), [line for line in text.splitlines() if line and not line.startswith("#")]) for mark, text in found]


def test_members_come_go_and_change_keys_as_the_guide_says(desk: Desk) -> None:
    begin(desk)
    before = {name: (desk.root / name / "identity.key").read_bytes() for name in FIRST}
    digests = [json.loads(desk.run(f"silo status --home {name} --json"))["model_digest"] for name in FIRST]
    children, printed = [], []
    for own_terminals, lines in blocks():
        for line in lines:
            if own_terminals:
                children.append(desk.start(line))
            else:
                printed.append(desk.run(line))
    assert all(child.wait(120) == 0 for child in children), "a silo failed"
    said = "".join(printed)
    for words in (
        "silo 3, west (West Hospital) leaves",
        "silo 5, late (Late Hospital) joins: ",
        "silo 2, south (South Hospital) has a new key: ",
    ):
        assert words in said, words
    status = {name: json.loads(desk.run(f"silo status --home {name} --json")) for name in ("north", "south", "east", "late")}
    assert len({each["model_digest"] for each in status.values()}) == 1
    assert status["late"]["model_digest"] not in digests
    assert {(each["round"], each["version"]) for each in status.values()} == {(4, 2)}
    assert status["late"]["epsilon"] < status["north"]["epsilon"]
    # Nobody else's identity changed; the old key is gone; the ledger goes on under both.
    for name in ("north", "east", "west"):
        assert (desk.root / name / "identity.key").read_bytes() == before[name]
    south = Home(desk.root / "south")
    assert south.identity_path.read_bytes() != before["south"]
    assert not south.old_identity_path.exists()
    history = History.read(south.ledger_path, verify=keyring.verifier(south))
    assert len({body.contract for body in history.entries if hasattr(body, "attempt")}) == 2
    with pytest.raises(Exception, match="not signed by this silo's key"):
        History.read(south.ledger_path, verify=keyring.ordered([keyring.identities(south)[0].public.sign_key]))
    check_chain(desk)


def check_chain(desk: Desk) -> None:
    """The chain on the board, verified from the fingerprint alone."""
    transport = HttpTransport(f"http://127.0.0.1:{desk.port}")
    versions = []
    for number in (1, 2):
        document = transport.get("contract", number, AGGREGATOR, wait_s=0)
        signed = {member: transport.get("countersignature", number, member, wait_s=0) for member in range(1, 6)}
        versions.append(Version(document=document, countersignatures={m: raw for m, raw in signed.items() if raw is not None}))
    transport.close()
    walked = chain.walk(versions, pinned=desk.fingerprint)
    assert [[member.id for member in each.terms.member] for each in walked] == [[1, 2, 3, 4], [1, 2, 4, 5]]
    with pytest.raises(TrustError):
        chain.walk(versions[1:], pinned=desk.fingerprint)
