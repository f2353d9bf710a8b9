# SPDX-License-Identifier: Apache-2.0
"""A restore after runs alone, of which no board knows: whatever they were, the ledger's epsilon is at least what was spent."""

from __future__ import annotations

import functools
import hashlib
import random
import shutil
import time

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy import federation
from privacy.dp import accounting, unprotected
from privacy.dp.budget import Limits
from privacy.dp.entries import Reserve
from privacy.dp.ledger import Ledger
from privacy.errors import ConfigError, LedgerBroken, PrivacyRefusal, TrustError
from privacy.federation import Accepted
from privacy.identity import keys
from silo import alone, alone_kept, recharging, restoring
from silo.home import Home
from silo.recharging import Opened, Sent
from silo.restoring import _Alone
from tests.sessions import Terminal
from tests.terms import contract_bytes
from tests.test_restore import LOST, back_up, configured, put_back, root_of
from tests.test_service import Running
from tests.whole import Whole

pytestmark = pytest.mark.usefixtures("quick_polls")

JOINED = federation.parse(contract_bytes(training={"rounds": 6}))
LITTLE = federation.parse(
    contract_bytes(name="little-noise", training={"rounds": 3}, privacy={"noise_multiplier": 1.0, "epsilon": 40.0})
)
LONG = federation.parse(contract_bytes(name="long-rounds", training={"rounds": 4, "mode": "local", "steps_per_round": 3}))
DELTA = 1e-5
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PARTS = {"sign": KEY.sign, "verify": lambda data, signature: KEY.public_key().verify(signature, data), "clock": lambda: 0.0}


def of(accepted: Accepted) -> _Alone:
    return _Alone.of(accepted)


def charged_for(ledger, each: _Alone, number: int) -> None:
    ledger.reserve(contract=each.run, round_number=number, attempt=f"{ledger.counter:032x}", mechanism=each.one)


def epsilon(ledger) -> float:
    """By the orders of RDP, of everything: monotone in what is charged, whoever composes it."""
    return accounting.epsilon_rdp(ledger.charged(), DELTA)


# --- Formal guarantees ------------------------------------------------------------------------------------------------------------


class Life:
    """A silo's ledger as it really was: rounds of the federation and runs alone, in any order, with attempts that were lost."""

    def __init__(self, path, chance: random.Random):
        self.path, self.rounds, self.begun = path, [], set()
        one = federation.event(JOINED.terms, rounds=1)
        with Ledger.create(path, who="silo-1", **PARTS) as ledger:
            for number in range(1, 6):
                for each in chance.sample([LITTLE, LONG, JOINED], k=chance.randrange(4)):
                    self._alone(ledger, each, chance.randrange(1, 3))
                for attempt in range(chance.randrange(1, 3)):
                    named = f"{number:016x}{attempt:016x}"
                    ledger.reserve(contract=JOINED.digest.hex(), round_number=number, attempt=named, mechanism=one)
                sent = Sent(attempt=named, counter=ledger.counter)
                ledger.commit(contract=JOINED.digest.hex(), round_number=number, attempt=named)
                self.rounds.append(Opened(number=number, contract=JOINED, sent=sent, ended="result"))
            self._alone(ledger, chance.choice([LITTLE, LONG]), 2)
            self.spent, self.charged = epsilon(ledger), {each: ledger.charged(each) for each in self._names()}
        self.lines = path.read_bytes().splitlines(keepends=True)

    def _names(self):
        return [JOINED.digest.hex(), *(of(each).run for each in (LITTLE, LONG, JOINED))]

    def _alone(self, ledger, accepted, most):
        each = of(accepted)
        made = [body.round for body in ledger.entries if isinstance(body, Reserve) and body.contract == each.run]
        for number in [1 + max(made, default=0)] * most:  # the second one is an attempt at the same round
            if len(made) < each.rounds:
                charged_for(ledger, each, number)
                made.append(number)


def brought_back(life: Life, path, kept: int, named) -> None:
    path.write_bytes(b"".join(life.lines[:kept]))
    recharge(life, path, named)


def recharge(life: Life, path, named) -> None:
    with Ledger.open(path, **PARTS) as ledger:
        recharging.charge(ledger, life.rounds, contracts={JOINED.digest.hex()})
        for each in map(of, named):
            recharging.charge_alone(ledger, each.run, each.one, rounds=each.rounds)


@pytest.mark.parametrize("seed", range(8))
def test_never_understated_over_runs_alone_under_several_contracts(tmp_path, seed):
    chance = random.Random(seed)
    life = Life(tmp_path / "whole.jsonl", chance)
    for kept in chance.sample(range(1, len(life.lines) + 1), k=3):
        path = tmp_path / f"kept-{kept}.jsonl"
        brought_back(life, path, kept, [LITTLE, LONG, JOINED])
        with Ledger.open(path, **PARTS) as ledger:
            assert epsilon(ledger) >= life.spent
            for name, charged in life.charged.items():
                steps = {event.with_steps(1): event.steps for event in ledger.charged(name)}
                for event in charged:
                    assert steps[event.with_steps(1)] >= event.steps, "every part of it, so in every composition"
            before = list(ledger.entries)
        recharge(life, path, [LITTLE, LONG, JOINED])
        with Ledger.open(path, **PARTS) as ledger:
            assert list(ledger.entries) == before, "repeatable"


def test_lost_lines_at_the_federations_own_price_were_too_little(tmp_path):
    """What was done before a contract could be named: the run alone had a third of the noise."""
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, who="silo-1", **PARTS) as ledger:
        charged_for(ledger, of(LITTLE), 1)
        charged_for(ledger, of(LITTLE), 2)
        ledger.reserve(
            contract=JOINED.digest.hex(), round_number=1, attempt="ab" * 16, mechanism=federation.event(JOINED.terms, rounds=1)
        )
        truth, rounds = epsilon(ledger), [Opened(number=1, contract=JOINED, sent=Sent(attempt="ab" * 16, counter=ledger.counter))]
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with Ledger.open(path, **PARTS) as ledger:
        recharging.charge(ledger, rounds, contracts={JOINED.digest.hex()})
        assert epsilon(ledger) < truth
        each = of(LITTLE)
        recharging.charge_alone(ledger, each.run, each.one, rounds=each.rounds)
        assert epsilon(ledger) > truth


def test_a_plan_that_was_used_up_is_charged_no_further(tmp_path):
    each = of(LITTLE)
    with Ledger.create(tmp_path / "ledger.jsonl", who="silo-1", **PARTS) as ledger:
        for number in (1, 1, 2):
            charged_for(ledger, each, number)
        recharging.charge_alone(ledger, each.run, each.one, rounds=each.rounds)
        assert ledger.charged(each.run) == [each.one.with_steps(3 * each.one.steps)]
        assert not ledger.attempts(each.run, 3), "the plan pays for three attempts, and two were at the first round"


# --- The whole restore ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def federated(tmp_path_factory):
    """Two rounds; a backup of after the first; a run alone after it, with less noise, and one more when both are over."""
    whole = Whole.create(tmp_path_factory.mktemp("apart") / "federation")
    whole.run(1)
    back_up(whole)
    apart(whole, LITTLE, (1, 2))
    whole.run(2)
    apart(whole, LONG, (1,))
    shutil.copytree(root_of(whole), whole.root / "as-it-was")
    (whole.root / "little.toml").write_bytes(LITTLE.raw)
    (whole.root / "long.toml").write_bytes(LONG.raw)
    return whole


@pytest.fixture
def whole(federated, tmp_path):
    return federated.copied(tmp_path / "federation")


def ledger_of(home: Home) -> Ledger:
    identity = keys.load(home.identity_path)
    verify = functools.partial(keys.verify_signature, identity.public.sign_key)
    return Ledger.open(home.ledger_path, sign=identity.sign, verify=verify, clock=time.time)


def apart(whole, accepted, rounds):
    """Reserve rounds of a run alone, and leave the state that it leaves."""
    home, each = Home(root_of(whole)), of(accepted)
    with ledger_of(home) as ledger:
        for number in rounds:
            charged_for(ledger, each, number)
    place = alone._begin(home, accepted)
    begun = alone.progress_of(place, bytes.fromhex(each.run), alone.terms_alone(accepted.terms))
    place.save_progress(msgspec.structs.replace(begun, round=max(rounds)))


def restored(whole, **options):
    home = Home(root_of(whole))
    with home.locked():
        return restoring.restored(home, whole.line(), **options)


def kept(whole) -> dict[str, str]:
    """The digest of every file of the home but locks."""
    found = (path for path in root_of(whole).rglob("*") if path.is_file() and not path.name.endswith("lock"))
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def truth_of(whole) -> float:
    """What was really spent, by the filter."""
    with ledger_of(Home(whole.root / "as-it-was")) as ledger:
        return spent(ledger)


def spent(ledger) -> float:
    return unprotected.certify(ledger.charged(), DELTA, order=Limits(epsilon=50.0, delta=DELTA).filter_order).epsilon


def test_runs_alone_that_are_named_are_charged_to_the_end_of_their_plans(whole):
    put_back(whole)
    facts = restored(whole, alone=[LITTLE, LONG])
    assert facts["charged_alone"] == [{"run": "little-noise", "attempts": 3}, {"run": "long-rounds", "attempts": 4}]
    assert spent(whole.history(LOST)) >= truth_of(whole)
    before = whole.history(LOST).entries
    assert restored(whole, alone=[LITTLE, LONG])["charged_alone"] == []
    assert whole.history(LOST).entries == before


def test_a_run_alone_whose_folder_is_newer_than_the_ledger_is_charged_unasked(whole):
    """Before this, the home could not train again until somebody brought a ledger that had the run."""
    put_back(whole)
    shutil.copytree(whole.root / "as-it-was" / "alone", root_of(whole) / "alone", dirs_exist_ok=True)
    home = Home(root_of(whole))
    with pytest.raises(LedgerBroken, match="round 1 alone"):
        alone_kept.require_reserved(home, whole.history(LOST))
    assert {each["run"] for each in restored(whole)["charged_alone"]} == {"little-noise", "long-rounds"}
    alone_kept.require_reserved(home, whole.history(LOST))
    assert spent(whole.history(LOST)) >= truth_of(whole)


def test_a_run_alone_whose_contract_is_lost_is_charged_once_somebody_names_it(whole):
    """Its folder is newer than the ledger and says how far it came, not at what price: nothing ends until a person knows."""
    put_back(whole)
    shutil.copytree(whole.root / "as-it-was" / "alone", root_of(whole) / "alone", dirs_exist_ok=True)
    home = Home(root_of(whole))
    for contract in home.root.glob("alone/*/contract"):
        contract.unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        restored(whole, alone=[LITTLE])
    with pytest.raises(TrustError, match="has not ended"):
        home.restored_epoch()
    assert [each["run"] for each in restored(whole, alone=[LITTLE, LONG])["charged_alone"]] == ["long-rounds"]
    alone_kept.require_reserved(home, whole.history(LOST))
    assert spent(whole.history(LOST)) >= truth_of(whole)


def test_a_contract_that_nobody_can_train_alone_under_changes_nothing(whole):
    put_back(whole)
    before, private = kept(whole), msgspec.structs.replace(JOINED.terms.privacy, off="no differential privacy")
    off = msgspec.structs.replace(JOINED.terms, privacy=private)
    with pytest.raises(PrivacyRefusal, match="no differential privacy"):
        restored(whole, alone=[msgspec.structs.replace(JOINED, terms=off)])
    with pytest.raises(ConfigError, match="cannot read"):
        alone_kept.read_contract(whole.root / "missing.toml")
    assert kept(whole) == before


@pytest.fixture
def served(whole):
    """The board over HTTP, and a silo.toml that says where; the home is that of the backup."""
    put_back(whole)
    running = Running(whole)
    configured(root_of(whole), url=f"http://127.0.0.1:{running.port}")
    yield whole
    running.stop()


def test_the_command_wants_a_word_of_runs_alone_and_charges_those_that_are_named(served, capsys):
    home, little, terminal = root_of(served), served.root / "little.toml", Terminal(capsys)
    before = (home / "ledger.jsonl").read_bytes()
    for words in ([], ["--never-alone", "--alone", little]):
        refused = terminal("silo restore --yes --json", *words, "--home", home)
        assert (refused.code, refused.error["code"]) == (3, "alone-not-said")
        assert "--never-alone" in refused.error["hint"]
    assert (home / "ledger.jsonl").read_bytes() == before
    done = terminal("silo restore --yes --alone", little, "--home", home)
    assert done.code == 0, done.err
    assert "alone under little-noise: 3 attempts charged" in done.out
