# SPDX-License-Identifier: Apache-2.0
"""A guardian: one set a round, in order, its word on the disk first; put back or lost it refuses. Against the real board."""

from __future__ import annotations

import contextlib
import functools
import shutil

import pytest

from privacy import envelope
from privacy.errors import Equivocation, Replay, TrustError
from privacy.federation import GUARDIANS_FROM
from privacy.identity import keys
from privacy.messages import AGGREGATOR, Freeze, Listing, Signed, decode, encode
from silo.guardians.guardian import Guardian, party_of
from silo.guardians.guarding import work
from silo.guardians.vows import Vows
from silo.home import Home
from silo.watch import Watch
from tests.whole import PowerCut, Whole

FOUR = (1, 2, 3, 4)
FIVE = (1, 2, 3, 4, 5)
SHARES = {"protocol": "shares", "dropouts": 2, "corrupt_guardians": 2}
CTX, OTHER = b"c" * 32, b"o" * 32

pytestmark = pytest.mark.usefixtures("quick_polls")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Five silos of which two may be away, and five guardians in homes of their own of which one may be."""
    root = tmp_path_factory.mktemp("guardians") / "federation"
    whole = Whole.create(root, silos=FIVE, notaries=5, sum=SHARES)
    for each in FIVE:
        home = Home(root / f"notary-{each}")
        home.keep_contract(1, whole.store.get("contract", 1, AGGREGATOR))
    return whole


@pytest.fixture
def whole(made, tmp_path):
    return made.copied(tmp_path / "federation")


def notary(whole, each, *, line=None, folder="", told=None):
    """A guardian's process over its home; making a new one is a restart."""
    home, line = Home(whole.root / (folder or f"notary-{each}")), line or whole.line()
    identity = keys.load(home.identity_path)
    watch = Watch(home=home, transport=line, identity=identity, accepted=whole.accepted, clock=whole.clock)
    return Guardian(
        home=home, transport=line, identity=identity, accepted=whole.accepted, party=party_of(whole.accepted, identity),
        clock=whole.clock, watch=watch, told=told or (lambda text: None),
    )  # fmt: skip


def works(whole, each, rounds, *, line=None, **options):
    """A guardian until so many rounds are over."""
    line = line or whole.line()
    made = notary(whole, each, line=line, **options)
    work(made, line, whole.clock, lambda: made.finished >= rounds)


def run(whole, last, *, silos=FIVE, notaries=FIVE, rounds=None, lines=None, extra=()):
    """Rounds up to ``last``: how they closed."""
    lines, rounds = lines or {}, rounds or last
    jobs = [functools.partial(whole.take_part, silo, last) for silo in silos]
    jobs += [functools.partial(works, whole, each, rounds, line=lines.get(each)) for each in notaries]
    return whole.run_hurried(last, *jobs, *extra, silent=2)


def body(whole, kind, number, party, type_):
    return decode(decode(whole.store.get(kind, number, party), Signed).body, type_)


# --- Promises ---------------------------------------------------------------------------------------------------------------------


def test_a_promise_stands_for_ever_and_is_made_once(tmp_path):
    vows = Vows(Home.create(tmp_path / "home"))
    assert vows.latest == 0
    assert vows.promised("set", 3) is None
    vows.bind(3, CTX)
    vows.bind(3, CTX)
    vows.promise("set", 3, CTX)
    again = Vows(Home(tmp_path / "home"))
    assert (again.latest, again.promised("manifest", 3), again.promised("set", 3)) == (3, CTX, CTX)
    with pytest.raises(Equivocation, match="a second manifest for round 3"):
        again.bind(3, OTHER)
    with pytest.raises(Equivocation, match="a second set for round 3"):
        again.promise("set", 3, OTHER)
    with pytest.raises(Replay, match="a manifest for round 2"):
        again.bind(2, CTX)
    again.bind(4, OTHER)
    assert again.latest == 4


def test_a_damaged_promise_is_refused(tmp_path):
    vows = Vows(Home.create(tmp_path / "home"))
    vows.promise("close", 1, CTX)
    (tmp_path / "home" / "promises" / "guardian-close-1").write_bytes(b"what\n")
    with pytest.raises(TrustError, match="damaged"):
        vows.promised("close", 1)


# --- Alone ---------------------------------------------------------------------------------------------------------


def test_guardians_with_homes_of_their_own_see_rounds_through_with_two_silos_away(whole):
    closed = run(whole, 2, silos=(2, 3, 5), notaries=(1, 2, 4, 5))
    assert [c.kind for c in closed] == ["result", "result"]
    assert whole.store.parties("upload", 1) == (2, 3, 5)
    assert whole.store.parties("guardian-note", 1) == tuple(GUARDIANS_FROM + each for each in (1, 2, 4, 5))
    assert {whole.progress(s).state.digest for s in (2, 3, 5)} == {closed[-1].state}
    assert {whole.progress(s).stood for s in (2, 3, 5)} == {3}


def test_a_guardians_home_holds_no_records_and_its_secrets_are_private(whole):
    run(whole, 1)
    root = whole.root / "notary-3"
    assert not (root / "ledger.jsonl").exists()
    assert not (root / "state.safetensors").exists()
    assert {p.name for p in (root / "epoch").iterdir()} == {"guardian-1"}
    assert {p.name for p in (root / "epoch" / "guardian-1").iterdir()} == {"secrets", "guardian-note-1"}
    assert all(p.stat().st_mode & 0o077 == 0 for p in (root / "epoch").rglob("*"))


# --- Put back, copied, lied to -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "endorsement", "shares"])
def test_a_guardian_that_was_put_back_says_nothing_more_in_the_epoch(whole, kind):
    """Its power goes after a document; its home is put back to before the round: it sees what it said, and refuses."""
    said = []
    run(whole, 1)
    shutil.copytree(whole.root / "notary-1", whole.root / "before")

    def falls_and_is_put_back():
        with pytest.raises(PowerCut):
            works(whole, 1, 9, line=whole.dying(kind, 2, after=True))
        shutil.rmtree(whole.root / "notary-1")
        shutil.copytree(whole.root / "before", whole.root / "notary-1")
        made, line = notary(whole, 1, told=said.append), whole.line()
        while whole.store.latest("outcome") < 2:
            slot, _ = made.step()
            line.get(*slot, wait_s=0.05)

    closed = run(whole, 2, notaries=(2, 3, 4, 5), rounds=1, extra=[falls_and_is_put_back])
    assert [c.kind for c in closed] == ["result"]
    words = [f"its {each} 2 stands on the board and no promise" for each in ("list", "endorsement", "shares")]
    over = kind == "shares" and not said  # the others' shares were enough, and the round over before it was back
    assert over or any(word in text for text in said for word in words), said
    assert Vows(Home(whole.root / "notary-1")).promised("set", 2) is None, "nothing was signed again"


def test_a_guardian_whose_secrets_are_lost_waits_for_the_next_epoch(whole):
    run(whole, 1)
    shutil.rmtree(whole.root / "notary-1" / "epoch" / "guardian-1")
    said = []
    made = notary(whole, 1, told=said.append)
    made.step()
    assert any("the secrets behind it are not here" in text for text in said)
    assert whole.store.parties("list", 1) == tuple(GUARDIANS_FROM + each for each in FIVE)


def test_two_guardians_from_one_copied_home_cannot_both_speak(whole):
    """What is sealed differs: the board takes the first one's and refuses the other's, which ends. Both promised one set."""
    run(whole, 1)
    shutil.copytree(whole.root / "notary-1", whole.root / "copy")
    ends = {}

    def twin(folder):
        line = whole.line()
        line.alter = lambda slot, data: None if slot[-1] == GUARDIANS_FROM + 1 else data  # it is not shown its twin's words
        try:
            works(whole, 1, 1, line=line, folder=folder)
        except Equivocation as error:
            ends[folder] = error

    twins = [functools.partial(twin, folder) for folder in ("notary-1", "copy")]
    closed = run(whole, 2, notaries=(2, 3, 4, 5), rounds=1, extra=twins)
    assert closed[-1].kind == "result"
    assert len(ends) <= 1, ends
    promised = {Vows(Home(whole.root / folder)).promised("set", 2) for folder in ("notary-1", "copy")} - {None}
    assert len(promised) == 1


def test_a_set_without_a_silo_that_this_guardian_saw_is_not_endorsed(whole):
    """The aggregator says of a silo that it sent nothing; whoever listed it knows better and closes without a word."""
    identity, lied = whole.identity, []

    def shown(slot, data):
        if slot[0] != "freeze" or data is None:
            return data
        signed = decode(data, Signed)
        freeze = decode(signed.body, Freeze)
        without = Freeze(
            round_ctx=freeze.round_ctx, headers=freeze.headers[1:], lists=tuple(_without_first(raw) for raw in freeze.lists),
            left_out=((1, "absent"),),
        )  # fmt: skip
        lied.append(without)
        return envelope.sign(identity, type="freeze", context=signed.context, sender=AGGREGATOR, body=encode(without))

    def _without_first(raw):
        return raw  # the guardians' own signatures stand: the aggregator cannot take a silo out of their lists

    line, said = whole.line(), []
    line.alter = shown

    def lied_to():
        made = notary(whole, 1, line=line, told=said.append)
        work(made, line, whole.clock, lambda: made.finished >= 1)

    closed = run(whole, 1, notaries=(2, 3, 4, 5), extra=[lied_to])
    assert closed[-1].kind == "result"
    assert lied
    assert any("the proposed set is refused" in text for text in said)
    assert Vows(Home(whole.root / "notary-1")).promised("set", 1) is None
    assert GUARDIANS_FROM + 1 not in whole.store.parties("endorsement", 1)


def test_a_manifest_that_skips_an_outcome_is_answered_with_nothing(whole):
    run(whole, 1)
    line = whole.line()
    first = whole.store.get("manifest", 1, AGGREGATOR)
    line.alter = lambda slot, data: first if slot == ("manifest", 2, AGGREGATOR) else data
    made = notary(whole, 1, line=line)
    with contextlib.suppress(TrustError):
        for _ in range(3):
            made.step()
    assert Vows(Home(whole.root / "notary-1")).promised("manifest", 2) is None


def test_the_list_says_what_opened_and_binds_to_nothing(whole):
    run(whole, 1)
    listing = body(whole, "list", 1, GUARDIANS_FROM + 2, Listing)
    assert [silo for silo, _ in listing.headers] == list(FIVE)
    assert listing.disputes == ()


