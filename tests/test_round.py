# SPDX-License-Identifier: Apache-2.0
"""The silo's round against an honest board in memory: real keys, ledger, files and sums; killed at every durable write."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from aggregator import admission, rounds
from privacy import envelope, federation, files, update_rule
from privacy.dp import ledger, ring
from privacy.dp.budget import Gate, Limits
from privacy.dp.entries import Commit
from privacy.errors import BudgetExhausted, Equivocation, MachineError, Replay, RoundError, SiloquyError, TrustError
from privacy.identity import keys
from privacy.messages import AGGREGATOR, Acknowledgement, decode, encode
from privacy.secure_sum import guardian_sum
from privacy.transparency import log, notes
from privacy.transparency.tree import Tree
from privacy.update_rule import State
from silo import config, membership, participation, session, settlement
from silo.home import Home
from silo.parts import Parts
from silo.round import Rounds
from silo.settlement import load_progress
from silo.upload import masked as _original_masked
from tests.federation import upload_of
from tests.terms import contract_bytes

SILOS = (1, 2, 3)
BASIS = b"b" * 32
NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


class Crash(BaseException):
    """The process is gone: nothing may catch it."""


class Hub:
    """An honest aggregator over a dictionary: it makes each next document as soon as it can, from aggregator.rounds."""

    def __init__(self, accepted, identity):
        self.accepted, self.identity = accepted, identity
        self.documents: dict[tuple[str, int, int], bytes] = {}
        self.state = update_rule.initial(accepted.terms)
        self.condition = threading.Condition()
        self.puts: list[tuple[str, int, int, bytes]] = []
        self.stopped_after: str | None = None
        self.cosigners: dict[int, keys.Identity] = {}
        self.tree: dict[str, bytes] = {}

    # the view of aggregator.rounds.Documents
    def parties(self, kind, number):
        return tuple(sorted(party for k, n, party in self.documents if (k, n) == (kind, number)))

    def latest(self, kind):
        return max((n for k, n, _ in self.documents if k == kind), default=None)

    # the silo's transport
    def get(self, kind, number, party, wait_s=0.0):
        end = time.monotonic() + min(wait_s, 2.0)
        with self.condition:
            while (kind, number, party) not in self.documents and time.monotonic() < end:
                self.condition.wait(max(0.0, end - time.monotonic()))
            return self.documents.get((kind, number, party))

    def put(self, kind, number, party, data):
        with self.condition:
            self.puts.append((kind, number, party, data))
            found = self.documents.get((kind, number, party))
            if found == data:
                return
            if found is not None:
                raise Equivocation(f"{kind} {number} {party} holds another document")
            view = View(self)
            admission.admit(kind, number, party, data, view)
            self.documents[kind, number, party] = data
            if kind != "cosignature":
                self.advance()
            self.condition.notify_all()

    def status(self):
        return {}

    def fetch(self, path):
        return self.tree.get(path)

    def publish_head(self, number):
        """The log's head of a round, over all documents of now, cosigned by all; and its one tile. There is one for a round."""
        if ("head", number, AGGREGATOR) in self.documents:
            return notes.checkpoint(notes.parse(self.documents["head", number, AGGREGATOR]).text)
        slots = [slot for slot in self.documents if slot[0] not in log.UNLOGGED]
        leaves = [
            encode(log.Leaf(kind=k, number=n, party=p, digest=hashlib.sha256(self.documents[k, n, p]).digest(), time=0))
            for k, n, p in slots
        ]
        terms, made = self.accepted.terms, Tree()
        for leaf in leaves:
            made.append(leaf)
        self.tree[log.tile_path("entries", 0, len(leaves))] = log.bundle(leaves)
        head = notes.Checkpoint(origin=log.origin(terms), size=made.size, root=made.root())
        note = notes.signed(head.text, name=head.origin, seed=self.identity.sign_seed)
        cosigned = [
            notes.cosigned(head.text, name=log.cosigner_name(terms, terms.by_id(s)), seed=each.sign_seed, time=1)
            for s, each in self.cosigners.items()
        ]
        self.documents["checkpoint", number, AGGREGATOR] = note.to_bytes()
        self.documents["head", number, AGGREGATOR] = notes.joined(note, cosigned).to_bytes()
        return head

    def publish(self, kind, number, context, message):
        body = message if isinstance(message, bytes) else encode(message)
        self.documents[kind, number, AGGREGATOR] = envelope.sign(
            self.identity, type=kind, context=context, sender=AGGREGATOR, body=body
        )
        return body

    def bodies(self, kind, number):
        found = {s: self.documents.get((kind, number, s)) for s in SILOS}
        return found if all(found.values()) else None

    def advance(self):
        """Roster, freeze, certificate and outcome as soon as all members have written what they rest on."""
        view, accepted = View(self), self.accepted
        epoch = self.latest("epoch")
        if epoch and ("roster", epoch, 0) not in self.documents and (notes := self.bodies("epoch-note", epoch)):
            self.publish("roster", epoch, accepted.digest, rounds.roster(accepted, epoch, notes))
        number = self.latest("manifest")
        if not number or ("outcome", number, 0) in self.documents:
            return
        opened = rounds.round_in(view, accepted, number)
        for kind, needs, make in (
            ("freeze", "upload", self._freeze),
            ("certificate", "consent", self._certificate),
            ("outcome", "release", self._result),
        ):
            if self.stopped_after == needs or not self.bodies(needs, number):
                return
            if (kind, number, 0) not in self.documents:
                self.publish(kind, number, opened.context, make(opened))
                if kind == "outcome":
                    self.publish_head(number + 1)

    def _freeze(self, opened):
        headers = {s: upload_of(raw).header for s, raw in self.bodies("upload", opened.number).items()}
        made, self.frozen = rounds.freeze(self.accepted, opened, headers)
        return made

    def _certificate(self, opened):
        made, self.certified = rounds.certificate(self.accepted, opened, self.frozen, self.bodies("consent", opened.number))
        return made

    def _result(self, opened):
        terms, seed = self.accepted.terms, self.identity.receive_seed
        seeds = {
            m.id: guardian_sum.open_release(
                self.documents["release", opened.number, m.id], self.certified, member=m, epoch_ctx=opened.context, seal_seed=seed
            )
            for m in terms.member
        }
        vectors = {
            s: guardian_sum.open_upload(upload_of(raw), self.frozen.headers[s], seal_seed=seed)
            for s, raw in self.bodies("upload", opened.number).items()
        }
        total = guardian_sum.unmask(vectors, seeds, self.certified)
        self.total = ring.lift(total)
        made, self.state = rounds.result(self.accepted, opened, self.state, self.certified, total, seeds, vectors)
        return made

    def call(self, number):
        with self.condition:
            self.publish("epoch", number, self.accepted.digest, rounds.call(self.accepted, number))
            self.condition.notify_all()

    def open_round(self, number, **changes):
        with self.condition:
            at = rounds.epoch_in(View(self), self.accepted, self.latest("epoch"))
            previous = self.accepted.digest
            if number > 1:
                before = rounds.round_in(View(self), self.accepted, number - 1)
                previous = hashlib.sha256(rounds.outcome_in(View(self), self.accepted, before)[0]).digest()
            head = self.publish_head(number)
            made = rounds.manifest(
                accepted=self.accepted, at=at, number=number, previous=previous, state=self.state, now=time.time(), head=head
            )
            made = type(made)(**{**{f: getattr(made, f) for f in made.__struct_fields__}, **changes})
            self.publish("manifest", number, at.context, made)
            self.condition.notify_all()

    def void(self, number, reason="absent"):
        with self.condition:
            opened = rounds.round_in(View(self), self.accepted, number)
            self.publish("outcome", number, opened.context, rounds.void(opened, self.state, reason))
            self.publish_head(number + 1)
            self.condition.notify_all()


class View:
    """aggregator.rounds.Documents over a hub: here ``get`` does not wait."""

    def __init__(self, hub):
        self.hub, self.parties, self.latest = hub, hub.parties, hub.latest

    def get(self, kind, number, party):
        return self.hub.documents.get((kind, number, party))


def contribution(silo):
    """A silo's noiseless sum: public integers that depend on silo and state."""

    def contribute(state: State):
        draw = np.random.default_rng([silo, state.applied])
        return draw.integers(-1000, 1000, state.theta.size)

    return contribute


class Silo:
    """A silo over its home; making a new one is a restart."""

    def __init__(self, root, accepted, silo, hub, contribute=None, clock=time.time, limits=None):
        self.home = Home(root)
        self.identity = keys.load(self.home.identity_path)
        public = self.identity.public.sign_key
        self.ledger = ledger.Ledger.open(
            self.home.ledger_path, sign=self.identity.sign, clock=clock, verify=functools.partial(_verify, public)
        )
        self.gate = Gate(
            self.ledger, limits or Limits(epsilon=50.0, delta=1e-5), plan=federation.mechanism(accepted.terms),
            contract=accepted.digest.hex(), steps_per_attempt=accepted.terms.training.steps_per_round,
        )  # fmt: skip
        self.gate.declare()
        self.parts = Parts(
            home=self.home,
            transport=hub,
            identity=self.identity,
            accepted=accepted,
            member=accepted.terms.by_id(silo),
            gate=self.gate,
            contribute=contribute or contribution(silo),
            clock=clock,
        )

    def rounds(self):
        return Rounds(self.parts, session.current(self.home))

    def take_part(self, wait_s=2.0):
        try:
            return self.rounds().take_part(wait_s=wait_s)
        finally:
            self.ledger.close()

    def set_up(self, number=1):
        try:
            p = self.parts
            return session.establish(
                p.home,
                p.transport,
                p.identity,
                p.accepted,
                member=p.member,
                number=number,
                basis=BASIS,
                settled=load_progress(p.home, p.accepted).round,
                wait_s=10.0,
            )
        finally:
            self.ledger.close()


def _verify(public, data, signature):
    keys.verify_signature(public, data, signature)


def in_threads(*jobs):
    """Run jobs together; the first failure that is not a planned crash is raised."""
    results, faults = {}, []

    def run(index, job):
        try:
            results[index] = job()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=run, args=(i, job), daemon=True) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not faults:
        time.sleep(0.005)
    if faults:
        raise faults[0]
    return results


@pytest.fixture(scope="module")
def established(tmp_path_factory):
    """Three joined silos with a confirmed epoch: (root, accepted, hub identity, documents). Copied by each test."""
    return establish(tmp_path_factory.mktemp("federation"))


STEPS = 3


@pytest.fixture(scope="module")
def established_alone(tmp_path_factory):
    """The same in local mode, three steps a round."""
    return establish(tmp_path_factory.mktemp("local"), training={"mode": "local", "steps_per_round": STEPS})


def establish(root, **changes):
    hub_identity = keys.create(root / "aggregator.key", name="hub", receives=True)
    identities = {}
    for silo in SILOS:
        home = Home.create(root / f"silo-{silo}")
        identities[silo] = keys.create(home.identity_path, name=f"silo-{silo}", receives=False)
    accepted = federation.parse(
        contract_bytes(
            sign_keys=[identities[s].public.sign_key.hex() for s in SILOS],
            aggregator_key=hub_identity.public.sign_key.hex(),
            seal_key=hub_identity.public.seal_key.hex(),
            privacy={"noise_multiplier": 2.0},
            sum={"deadline_s": 60, "max_void_rounds": 2},
            **changes,
        )
    )
    hub = Hub(accepted, hub_identity)
    hub.publish("contract", 1, accepted.digest, accepted.raw)
    for silo in SILOS:
        home, identity = Home(root / f"silo-{silo}"), identities[silo]
        ledger.Ledger.create(
            home.ledger_path,
            who=identity.name,
            sign=identity.sign,
            clock=time.time,
            verify=functools.partial(_verify, identity.public.sign_key),
        ).close()
        membership.countersign(
            home,
            hub,
            identity,
            membership.fetch(hub, accepted.digest.hex()).newest,
            limits=config.Limits(epsilon=50.0, delta=1e-5),
            now=NOW,
            check_local=lambda accepted: None,
        )
    hub.call(1)
    in_threads(*(lambda s=s: Silo(root / f"silo-{s}", accepted, s, hub).set_up() for s in SILOS))
    return root, accepted, hub_identity, dict(hub.documents)


class World:
    """A copy of the established federation that a test may spend."""

    def __init__(self, established, folder):
        base, self.accepted, identity, documents = established
        self.root = folder / "federation"
        shutil.copytree(base, self.root)
        self.hub = Hub(self.accepted, identity)
        self.hub.documents = dict(documents)
        self.hub.cosigners = {s: keys.load(Home(self.root / f"silo-{s}").identity_path) for s in SILOS}

    def silo(self, silo, **options):
        return Silo(self.root / f"silo-{silo}", self.accepted, silo, self.hub, **options)

    def progress(self, silo):
        return load_progress(Home(self.root / f"silo-{silo}"), self.accepted)

    def run_round(self, number, silos=SILOS):
        self.hub.open_round(number)
        return in_threads(*(lambda s=s: self.silo(s).take_part() for s in silos))


@pytest.fixture
def world(established, tmp_path):
    return World(established, tmp_path)


@pytest.fixture
def alone(established_alone, tmp_path):
    return World(established_alone, tmp_path)


@pytest.fixture(params=["world", "alone"])
def each_world(request):
    """A federation in joint mode, and one in local mode."""
    return request.getfixturevalue(request.param)


def attempts(world, silo, number):
    opened = world.silo(silo)
    opened.ledger.close()
    return opened.ledger.attempts(world.accepted.digest.hex(), number)


# --- A whole round --------------------------------------------------------------------------------------------------------


def test_two_rounds_move_all_silos_to_the_aggregators_state(each_world):
    world = each_world
    for number in (1, 2):
        settled = world.run_round(number)
        assert {s.kind for s in settled.values()} == {"result"}
        assert {s.state.digest for s in settled.values()} == {world.hub.state.digest}
    assert world.hub.state.applied == 2
    for silo in SILOS:
        said = decode(envelope.decode(world.hub.documents["acknowledgement", 2, silo], envelope.Signed).body, Acknowledgement)
        assert said.state == world.hub.state.digest
        assert len(attempts(world, silo, 1)) == len(attempts(world, silo, 2)) == 1


def test_the_sum_is_the_contributions_plus_noise_of_the_declared_size(world):
    world.run_round(1)
    state = update_rule.initial(world.accepted.terms)
    noise = world.hub.total - sum(contribution(s)(state) for s in SILOS)
    s = np.sqrt(3 * federation.ring_plan(world.accepted.terms).share_variance)
    assert 0.5 < noise.std() / s < 1.6  # 26 samples: six standard deviations either way


def test_a_round_that_ended_leaves_no_secrets(world):
    world.run_round(1)
    for silo in SILOS:
        left = {p.name for p in (world.root / f"silo-{silo}" / "epoch").rglob("*") if p.is_file()}
        assert left == {"chain"}


def test_every_secret_file_is_private(world):
    world.hub.stopped_after = "release"
    world.hub.open_round(1)
    with pytest.raises(RoundError):
        in_threads(*(lambda s=s: world.silo(s, clock=Late(world.hub)).take_part() for s in SILOS))
    found = [p for p in (world.root / "silo-1" / "epoch").rglob("*") if p.is_file()]
    assert {p.name for p in found} == {"chain", "attempt", "release"}
    assert {p.stat().st_mode & 0o777 for p in found} == {0o600}


class Late:
    """A clock that is on time until all releases are there, and then far beyond every deadline."""

    def __init__(self, hub):
        self.hub = hub

    def __call__(self):
        return time.time() + (1e6 if self.hub.bodies("release", 1) else 0)


# --- Killed at every durable write --------------------------------------------------------------------------------------------


class Killer:
    """Lets the thread of one silo make ``survive`` durable writes, then kills it before or after the next one."""

    def __init__(self, monkeypatch, survive, after):
        self.left, self.after, self.thread, self.log = survive, after, None, []
        for name in ("write_atomic", "write_once", "append_line"):
            monkeypatch.setattr(files, name, self.wrap(getattr(files, name)))

    def wrap(self, write):
        def wrapped(path: Path, *args, **kwargs):
            if threading.current_thread() is not self.thread:
                return write(path, *args, **kwargs)
            self.log.append(path.name)
            self.left -= 1
            if self.left == -1 and not self.after:
                raise Crash
            write(path, *args, **kwargs)
            if self.left == -1:
                raise Crash

        return wrapped


def killed(world, monkeypatch, survive, after, job):
    """Run ``job`` for silo 1 under a killer until it dies or ends: (what it gave or None, the names of its writes)."""
    with monkeypatch.context() as patch:
        killer = Killer(patch, survive, after)
        killer.thread = threading.current_thread()
        silo = world.silo(1)
        try:
            return job(silo), killer.log
        except Crash:
            silo.ledger.close()
            return None, killer.log


WRITES = [
    "head", "cosignature-1", "ledger.jsonl", "manifest-1", "attempt", "expect-upload-1-1", "consent-1", "release",
    "expect-outcome-1-0", "state.safetensors", "ledger.jsonl", "chain", "receipt-outcome-1", "receipt-upload-1", "head",
    "cosignature-2",
]  # fmt: skip


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("survive", range(len(WRITES)))
def test_killed_at_any_write_the_round_completes_after_a_restart(each_world, monkeypatch, survive, after):
    world, seen = each_world, {}
    steps = world.accepted.terms.training.steps_per_round
    world.hub.open_round(1)

    def first_then_again():
        gave, log = killed(world, monkeypatch, survive, after, lambda silo: silo.take_part())
        assert gave is None
        assert log == WRITES[: survive + 1], "the order of writes changed"
        path = world.root / "silo-1" / "epoch" / "1" / "attempt"
        seen["persisted"] = path.read_bytes() if path.is_file() else None
        seen["settled"] = world.progress(1).round == 1
        return world.silo(1).take_part(wait_s=0.0)

    in_threads(first_then_again, *(lambda s=s: world.silo(s).take_part() for s in (2, 3)))
    assert {world.progress(s).state.digest for s in SILOS} == {world.hub.state.digest}
    assert world.hub.state.applied == 1
    uploads = {data for kind, _, party, data in world.hub.puts if (kind, party) == ("upload", 1)}
    assert len(uploads) == 1, "one vector left, however often it was sent"
    charged = attempts(world, 1, 1)
    assert 1 <= len(charged) <= 2
    own = world.progress(1).own
    assert (None if own is None else own.applied) == (None if steps == 1 else steps), "of one attempt, never of two"
    if seen["persisted"]:
        assert len(charged) == 1
        assert uploads.pop() in seen["persisted"]
        assert own is None or own.to_bytes() in seen["persisted"]
    opened = world.silo(1)
    opened.ledger.close()
    assert sum(event.steps for event in opened.ledger.charged()) == steps * len(charged)
    assert sum(isinstance(e, Commit) for e in opened.ledger.entries) == 1
    left = {p.name for p in (world.root / "silo-1" / "epoch").rglob("*") if p.is_file()}
    assert left == {"chain"}
    world.run_round(2)
    assert {world.progress(s).state.digest for s in SILOS} == {world.hub.state.digest}
    assert own is None or world.progress(1).own.applied == 2 * steps


def test_without_a_persisted_upload_everything_is_new(world, monkeypatch):
    world.hub.open_round(1)
    sent = []
    monkeypatch.setattr("silo.round.masked", lambda x, **given: sent.append((x, given["attempt"])) or _original_masked(x, **given))
    gave, _ = killed(world, monkeypatch, WRITES.index("attempt"), False, lambda silo: silo.take_part())
    assert gave is None
    assert not [p for p in world.hub.puts if p[0] == "upload"]
    in_threads(*(lambda s=s: world.silo(s).take_part() for s in SILOS))
    mine = [(x, attempt) for x, attempt in sent if attempt.hex() in attempts(world, 1, 1)]
    assert len(mine) == 2
    assert mine[0][1] != mine[1][1]
    assert not np.array_equal(mine[0][0], mine[1][0]), "noise was drawn again"


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("survive", range(4))
def test_killed_in_the_set_up_of_an_epoch_the_same_keys_go_on(world, monkeypatch, survive, after):
    world.hub.call(2)

    def first_then_again():
        gave, log = killed(world, monkeypatch, survive, after, lambda silo: silo.set_up(2))
        assert gave is None
        assert log == ["secrets", "expect-roster-2-0", "seeds", "chain"][: survive + 1]
        return world.silo(1).set_up(2)

    epochs = in_threads(first_then_again, *(lambda s=s: world.silo(s).set_up(2) for s in (2, 3)))
    assert len({e.context for e in epochs.values()}) == 1
    for kind in ("epoch-note", "pair-seeds", "confirmation"):
        assert len({data for k, n, party, data in world.hub.puts if (k, n, party) == (kind, 2, 1)}) == 1
    for silo in SILOS:
        assert {p.name for p in (world.root / f"silo-{silo}" / "epoch").iterdir()} == {"2"}
    world.run_round(1)
    assert {world.progress(s).state.digest for s in SILOS} == {world.hub.state.digest}


def test_older_epochs_go_when_a_newer_one_stands_also_after_a_crash_between(world):
    folder = world.root / "silo-1" / "epoch"
    shutil.copytree(folder / "1", folder / "3")
    assert session.current(Home(world.root / "silo-1")).number == 3
    assert [path.name for path in folder.iterdir()] == ["3"]


def test_a_silo_leaves_an_epoch_that_the_aggregator_gave_up(world, monkeypatch):
    """`aggregator epoch` was killed in its set-up and started again: it calls another one."""
    monkeypatch.setattr(session, "POLL_S", 0.05)
    world.hub.call(2)
    silos = {silo: world.silo(silo) for silo in SILOS}

    def one_round(silo):
        return next(participation.participate(silos[silo].parts, basis=BASIS, rounds=1, wait_s=20.0))

    def given_up():
        while not world.hub.parties("epoch-note", 2):
            time.sleep(0.01)
        world.hub.call(3)
        for silo in (2, 3):
            started[silo].set()
        while len(world.hub.parties("confirmation", 3)) < 3:
            time.sleep(0.01)
        world.hub.open_round(1)

    started = {silo: threading.Event() for silo in (2, 3)}
    late = [lambda s=s: started[s].wait(20) and one_round(s) for s in (2, 3)]
    settled = in_threads(lambda: one_round(1), given_up, *late)
    assert settled[0].kind == "result"
    assert session.current(Home(world.root / "silo-1")).number == 3
    for silo in silos.values():
        silo.ledger.close()


def test_after_a_restart_a_round_that_is_over_is_promised_and_sent_nothing(world, monkeypatch):
    world.hub.open_round(1)
    # Then the upload is on the disk.
    assert killed(world, monkeypatch, WRITES.index("attempt"), True, lambda silo: silo.take_part())[0] is None
    world.hub.void(1)
    before = len(world.hub.puts)
    assert world.silo(1).take_part().kind == "void"
    assert [put[0] for put in world.hub.puts[before:]] == ["cosignature", "cosignature", "acknowledgement"]
    assert Home(world.root / "silo-1").promised_consent(1) is None
    assert len(attempts(world, 1, 1)) == 1


# --- Void rounds -------------------------------------------------------------------------------------------------------------


def test_a_void_round_keeps_the_reservation_and_moves_nothing(world):
    world.hub.open_round(1)
    threading.Timer(0.3, lambda: world.hub.void(1)).start()
    settled = in_threads(*(lambda s=s: world.silo(s).take_part() for s in (1, 2)))
    assert {s.kind for s in settled.values()} == {"void"}
    assert len(attempts(world, 1, 1)) == 1
    assert attempts(world, 3, 1) == []
    assert world.silo(3).take_part().kind == "void"  # it was away, and catches up without spending
    assert attempts(world, 3, 1) == []
    world.run_round(2)
    assert {world.progress(s).state.digest for s in SILOS} == {world.hub.state.digest}
    assert {world.progress(s).voids for s in SILOS} == {0}


def test_silos_stop_after_max_void_rounds(world):
    for number in (1, 2):
        world.hub.open_round(number)
        world.hub.void(number)
        if number == 1:
            assert world.silo(1).take_part().kind == "void"
    with pytest.raises(RoundError, match="2 rounds in a row were void"):
        world.silo(1).take_part()
    with pytest.raises(RoundError, match="2 rounds in a row were void"):
        world.silo(1).take_part()


def test_rejected_sums_count_like_void_rounds_and_stop_the_silos(world, monkeypatch):
    with monkeypatch.context() as bounds:
        bounds.setattr(update_rule, "accepts", lambda total, terms, **_: False)
        assert {settled.kind for settled in world.run_round(1).values()} == {"rejected"}
    assert {world.progress(silo).voids for silo in SILOS} == {1}
    world.hub.open_round(2)
    world.hub.void(2)
    with pytest.raises(RoundError, match="2 rounds in a row were void or rejected"):
        world.silo(1).take_part()
    with pytest.raises(RoundError, match="2 rounds in a row were void or rejected"):
        world.silo(1).take_part()


def test_after_the_deadline_nothing_is_spent(world):
    past, lasts = int(time.time()) - 1, world.hub.accepted.terms.sum.deadline_s
    world.hub.open_round(1, opened_at=past - lasts, deadline_at=past)
    world.hub.void(1)
    assert world.silo(1).take_part().kind == "void"
    assert attempts(world, 1, 1) == []


# --- The optimiser of a silo in local mode -----------------------------------------------------------------------------------


def test_a_void_round_and_a_rejected_sum_leave_the_moments_where_they_were(alone, monkeypatch):
    alone.run_round(1)
    before = {silo: alone.progress(silo).own.to_bytes() for silo in SILOS}
    alone.hub.open_round(2)
    threading.Timer(0.5, lambda: alone.hub.void(2)).start()
    settled = in_threads(*(lambda s=s: alone.silo(s).take_part() for s in (1, 2)))
    assert {s.kind for s in settled.values()} == {"void"}
    assert len(attempts(alone, 1, 2)) == 1
    assert alone.silo(3).take_part().kind == "void"
    assert {silo: alone.progress(silo).own.to_bytes() for silo in SILOS} == before
    alone.run_round(3)
    before = {silo: alone.progress(silo).own.to_bytes() for silo in SILOS}
    monkeypatch.setattr(update_rule, "accepts", lambda total, terms, **_: False)
    assert {s.kind for s in alone.run_round(4).values()} == {"rejected"}
    assert {silo: alone.progress(silo).own.to_bytes() for silo in SILOS} == before
    monkeypatch.undo()
    alone.run_round(5)
    assert [alone.progress(silo).own.applied for silo in SILOS] == [3 * STEPS] * 3


def test_a_step_that_runs_away_says_so_and_the_attempt_stays_charged(alone, monkeypatch):
    monkeypatch.setattr(update_rule, "learning_rate", lambda training, applied: 1e300 * 1e300)
    alone.hub.open_round(1)
    with pytest.raises(RoundError, match="not finite"):
        alone.silo(1).take_part()
    opened = alone.silo(1)
    opened.ledger.close()
    assert sum(event.steps for event in opened.ledger.charged()) == STEPS
    assert not [p for p in alone.hub.puts if p[0] == "upload"]
    assert alone.progress(1).own is None


def test_a_state_with_an_optimiser_of_its_own_is_private(alone):
    alone.run_round(1)
    assert alone.silo(1).home.state_path.stat().st_mode & 0o777 == 0o600


# --- Refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous", b"x" * 32),
        ("base_state", b"x" * 32),
        ("dimension", 27),
        ("lattice_bits", 19),
        ("clamp", 5),
        ("deadline_at", 2**40),
        ("round", 2),
        ("epoch", 2),
        ("epoch_ctx", b"x" * 32),
    ],
)
def test_a_manifest_that_differs_is_refused_before_anything_is_spent(world, field, value):
    world.hub.open_round(1, **{field: value})
    with pytest.raises(TrustError) as caught:
        world.silo(1).take_part()
    assert caught.value.code == f"manifest-{field.replace('_', '-')}"
    assert attempts(world, 1, 1) == []


def test_a_second_manifest_costs_no_reservation(world):
    world.hub.open_round(1)
    world.silo(1).home.promise_manifest(1, b"another".ljust(32))
    with pytest.raises(Equivocation, match="second manifest for round 1"):
        world.silo(1).take_part()
    assert attempts(world, 1, 1) == []


def test_a_manifest_for_a_number_below_a_promise_costs_no_reservation(world):
    world.hub.open_round(1)
    world.silo(1).home.promise_manifest(7, b"later".ljust(32))
    with pytest.raises(Replay, match="took part in round 7"):
        world.silo(1).take_part()
    assert attempts(world, 1, 1) == []


def test_a_manifest_signed_by_another_is_refused(world):
    world.hub.open_round(1)
    world.hub.documents["manifest", 1, 0] = bytearray(world.hub.documents["manifest", 1, 0])
    world.hub.documents["manifest", 1, 0][-1] ^= 1
    world.hub.documents["manifest", 1, 0] = bytes(world.hub.documents["manifest", 1, 0])
    with pytest.raises(TrustError):
        world.silo(1).take_part()


def test_the_gate_refuses_before_any_record_is_read(world):
    world.hub.open_round(1)
    read = []
    silo = world.silo(1, contribute=lambda state: read.append(1))

    class Closed:
        def admit(self, round, attempt):
            raise BudgetExhausted.for_round(round_number=round, epsilon_after=2, limit=1, delta=1e-5)

        def settle(self, round, outcome):
            raise AssertionError

    object.__setattr__(silo.parts, "gate", Closed())
    with pytest.raises(BudgetExhausted):
        silo.take_part()
    assert read == []
    assert silo.home.promised_manifest(1) is None


def test_a_second_set_in_one_round_is_not_consented_to(world):
    world.hub.open_round(1)
    world.silo(1).home.promise_consent(1, b"another".ljust(32))
    with pytest.raises(Equivocation, match="second consent"):
        in_threads(*(lambda s=s: world.silo(s, clock=time.time).take_part() for s in SILOS[:1]), *_quiet(world, (2, 3)))
    assert ("consent", 1, 1) not in world.hub.documents


def _quiet(world, silos):
    """Silos whose waiting ends with the round void, so that a test of another silo does not wait for them."""

    def run(silo):
        with contextlib.suppress(SiloquyError):
            world.silo(silo).take_part()

    threading.Timer(1.0, lambda: world.hub.void(1)).start()
    return [functools.partial(run, s) for s in silos]


def test_an_outcome_with_another_state_stops_the_silo(world):
    original = rounds.result

    def lie(*args):
        made, after = original(*args)
        return type(made)(**{**{f: getattr(made, f) for f in made.__struct_fields__}, "next_state": b"x" * 32}), after

    world.hub.open_round(1)
    rounds.result = lie
    try:
        with pytest.raises(TrustError, match="this silo computed"):
            in_threads(*(lambda s=s: world.silo(s).take_part() for s in SILOS))
    finally:
        rounds.result = original
    assert {world.progress(s).round for s in SILOS} == {0}


def test_a_sum_beyond_its_bounds_is_rejected_by_everyone(world):
    def wild(state):
        return np.full(state.theta.size, 2**40)  # clamped: stays inside

    world.hub.open_round(1)
    settled = in_threads(*(lambda s=s: world.silo(s, contribute=wild).take_part() for s in SILOS))
    assert {s.kind for s in settled.values()} == {"result"}
    total = np.full(world.accepted.terms.dimension, 2**31 - 1)
    state = world.progress(1).state
    assert settlement.next_state(state, total, world.accepted.terms) is state


def test_a_step_of_another_shape_is_refused(world):
    world.hub.open_round(1)
    with pytest.raises(MachineError, match="a step gave"):
        world.silo(1, contribute=lambda state: np.zeros(3, dtype=np.int64)).take_part()


def test_matrices_that_do_not_move_stop_the_silo(world):
    world.run_round(1)
    progress, terms = world.progress(1), world.accepted.terms
    settlement.refuse_to_go_on(progress, terms)
    theta = progress.state.theta.copy()
    theta[:8] = 0.0  # two 2×2 matrices; the head moved
    stuck = {f: getattr(progress, f) for f in progress.__struct_fields__} | {"state": _with_theta(progress.state, theta)}
    with pytest.raises(MachineError, match="R has not moved"):
        settlement.refuse_to_go_on(type(progress)(**stuck), terms)


def _with_theta(state, theta):
    return State(**{**{f: getattr(state, f) for f in state.__struct_fields__}, "theta": theta})


# --- Joining, and going on for many rounds ------------------------------------------------------------------------------------


def test_joining_refuses_what_does_not_fit(world, tmp_path):
    accepted, hub = world.accepted, world.hub
    home = Home.create(tmp_path / "stranger")
    stranger = keys.create(home.identity_path, name="stranger", receives=False)
    limits, fine = config.Limits(epsilon=50.0, delta=1e-5), lambda accepted: None
    with pytest.raises(TrustError, match="no member"):
        membership.countersign(home, hub, stranger, accepted, limits=limits, now=NOW, check_local=fine)
    own = keys.load(world.root / "silo-1" / "identity.key")
    for given, message in (
        (config.Limits(epsilon=0.1, delta=1e-5), "costs epsilon"),
        (config.Limits(epsilon=50.0, delta=1e-9), "delta is"),
    ):
        with pytest.raises(BudgetExhausted, match=message):
            membership.countersign(home, hub, own, accepted, limits=given, now=NOW, check_local=fine)
    with pytest.raises(TrustError, match="expired"):
        membership.countersign(home, hub, own, accepted, limits=limits, now=NOW.replace(year=2100), check_local=fine)
    assert home.contract() is None


def test_the_fingerprint_decides(world):
    accepted = world.accepted
    grouped = keys.fingerprint(membership.aggregator_identity(accepted.terms))
    for good in (grouped, grouped.replace(" ", ""), grouped.upper(), accepted.digest.hex()):
        assert membership.fetch(world.hub, good).newest.digest == accepted.digest
    for bad in ("", "00" * 32, grouped[:-1], accepted.digest.hex()[:32]):
        with pytest.raises(TrustError, match="fingerprint"):
            _ = membership.fetch(world.hub, bad).newest


def test_every_countersignature_is_verified_here(world):
    home = Home(world.root / "silo-1")
    assert membership.verify_all_countersigned(world.hub, world.accepted, home=home) == SILOS
    signed = world.hub.documents["countersignature", 1, 3]
    other = Home.create(world.root / "auditor")
    world.hub.documents["countersignature", 1, 3] = world.hub.documents["countersignature", 1, 2]
    with pytest.raises(TrustError):
        membership.verify_all_countersigned(world.hub, world.accepted, home=other)
    del world.hub.documents["countersignature", 1, 3]
    with pytest.raises(RoundError, match=r"silo-3 \(3\)"):
        membership.verify_all_countersigned(world.hub, world.accepted, home=other)
    world.hub.documents["countersignature", 1, 3] = signed
    assert membership.verify_all_countersigned(world.hub, world.accepted, home=other) == SILOS


def test_joined_is_verified_again_at_every_start(world):
    home = Home(world.root / "silo-2")
    assert membership.joined(home, now=NOW)[1].id == 2
    path = home.root / "contract" / "v1" / "contract"
    path.write_bytes(path.read_bytes().replace(b"rounds = 10", b"rounds = 99"))
    with pytest.raises(TrustError):
        membership.joined(home, now=NOW)


def test_the_terms_name_everything_a_silo_agrees_to(world):
    text = "\n".join(membership.terms_in_words(world.accepted))
    for wanted in ("epsilon 8", "delta 1e-05", "10 rounds", "one record", "Hospital 2", "what never leaves", "104 bytes"):
        assert wanted in text
    assert "shared among the silos" in text


def test_the_terms_of_local_mode_rest_on_no_other_silo(alone):
    text = "\n".join(membership.terms_in_words(alone.accepted))
    for wanted in ("10 rounds of 3 steps that this silo takes alone, against everyone", "in full by this silo", "104 bytes"):
        assert wanted in text
    for unwanted in ("shared among", "together with"):
        assert unwanted not in text


def test_participate_goes_through_epochs_and_rounds(world):
    def coordinate():
        for number in (1, 2, 3):
            if number == 3:
                world.hub.call(2)
                while world.hub.bodies("confirmation", 2) is None:
                    time.sleep(0.02)
            world.hub.open_round(number)
            while ("outcome", number, 0) not in world.hub.documents or world.hub.bodies("acknowledgement", number) is None:
                time.sleep(0.02)

    def run(silo):
        opened = world.silo(silo)
        try:
            return list(participation.participate(opened.parts, basis=BASIS, rounds=3, wait_s=20))
        finally:
            opened.ledger.close()

    done = in_threads(*(functools.partial(run, s) for s in SILOS), coordinate)
    assert [s.round for s in done[0]] == [1, 2, 3]
    assert {world.progress(s).state.digest for s in SILOS} == {world.hub.state.digest}
    assert {session.current(Home(world.root / f"silo-{s}")).number for s in SILOS} == {2}


def test_participate_says_that_nothing_came(world):
    opened = world.silo(1)
    with pytest.raises(RoundError, match="no round was opened"):
        list(participation.participate(opened.parts, basis=BASIS, rounds=1, wait_s=0.1))


def test_another_basis_in_one_epoch_is_refused(world):
    world.hub.call(2)
    silo = world.silo(1)
    (silo.home.epoch_folder / "2").mkdir()
    made, _ = session.epochs.new_note(world.accepted.digest, 2, 1, b"another basis".ljust(32))
    files.write_once(silo.home.epoch_folder / "2" / "secrets", made.to_bytes())
    with pytest.raises(TrustError, match="basis"):
        silo.set_up(2)
