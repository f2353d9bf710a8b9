# SPDX-License-Identifier: Apache-2.0
"""A federation without differential privacy: said loudly, agreed to by each silo, summed over whole blocks, with no figure."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction
from functools import cache

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from aggregator import blocks as draft_blocks
from aggregator import commands, enrolment
from aggregator import verify as hub_verify
from aggregator.draft import Terms
from aggregator.reporting import no_guarantee, report
from aggregator.store import Store
from cli import aggregator as aggregator_cli
from cli import silo as silo_cli
from privacy import chain, federation, update_rule
from privacy.dp import accounting, unprotected
from privacy.dp.budget import Account, Gate, Limits
from privacy.dp.entries import Reserve
from privacy.dp.ledger import History, Ledger
from privacy.dp.mechanism import LatticeGaussian, Unprotected
from privacy.errors import BudgetExhausted, ConfigError, PrivacyRefusal, TrustError
from privacy.federation import Model
from privacy.identity import keys
from privacy.messages import AGGREGATOR, Freeze, Outcome, Signed, decode
from privacy.prg import Randomness
from privacy.secure_sum import blocks, choice
from silo import config, membership, reading, settlement
from silo.home import Home, Progress
from silo.learning.card import Origin, card
from silo.upload import noisy
from tests.sharing import ShareRound, build_epoch, share_terms
from tests.terms import contract_bytes
from tests.whole import Whole, contribution

OFF = {"off": "no differential privacy", "noise_multiplier": None, "epsilon": None, "delta": None}
ONE = {"blocks": [[1, 2, 3]]}
DELTA = 1e-5


def off_bytes(silos: int = 3, **changes) -> bytes:
    stated = {"blocks": [list(range(1, silos + 1))], **changes.pop("sum", {})}
    return contract_bytes(silos, privacy={**OFF, **changes.pop("privacy", {})}, sum=stated, **changes)


def off_terms(silos: int = 3, **changes) -> federation.Accepted:
    return federation.parse(off_bytes(silos, **changes))


def off_shares(silos: int, stated: list[list[int]], dropouts: int) -> federation.Accepted:
    return federation.parse(share_terms(silos, 5, dropouts=dropouts, privacy=OFF, sum={"blocks": stated}))


# --- The contract ---------------------------------------------------------------------------------------------------------------


def test_a_contract_says_it_in_words_and_states_no_figure() -> None:
    terms = off_terms().terms
    assert not terms.is_private
    assert (terms.privacy.noise_multiplier, terms.privacy.epsilon, terms.privacy.delta) == (0.0, 0.0, 0.0)
    plan = federation.ring_plan(terms)
    assert (plan.share_variance, plan.headroom) == (0, 0), "the ring's plan has no noise and no room for it"
    assert federation.event(terms) == Unprotected(
        sampling_rate=0.25, lattice_bits=plan.lattice_bits, dimension=terms.dimension, steps=10
    )
    assert off_terms(training={"mode": "local", "steps_per_round": 4}).terms.steps == 40
    assert off_shares(6, [[1, 2, 3], [4, 5, 6]], 3).terms.sum.blocks == ((1, 2, 3), (4, 5, 6))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (off_bytes(sum={"blocks": []}), "no differential privacy, and no sum.blocks"),
        (off_bytes(sum={"blocks": [[1, 2]]}), "no partition of the members"),
        (off_bytes(4, sum={"blocks": [[1, 2], [3, 4]]}), "a block of 2 silos; no sum is over fewer than 4"),
        (off_bytes(privacy={"noise_multiplier": 1.0}), "privacy.off with noise_multiplier"),
        (off_bytes(privacy={"epsilon": 8.0, "delta": 1e-6}), "privacy.off with epsilon, delta"),
        (off_bytes(privacy={"noise_multiplier": 0.0}), "Expected `float` > 0.0"),
        (off_bytes(privacy={"off": "yes"}), "Invalid enum value 'yes'"),
        (off_bytes(2, sum={"two_silos_see_each_other": True, "blocks": [[1, 2]]}), "among two silos"),
        (off_bytes(privacy={"off": None}), "missing required field `noise_multiplier`"),
        (contract_bytes(privacy={"epsilon": None}), "missing required field `epsilon`"),
        (contract_bytes(privacy={"delta": None}), "missing required field `delta`"),
        (contract_bytes(sum=ONE), "consent with blocks"),
        (share_terms(5, 5, dropouts=2, privacy=OFF), "no differential privacy, and no sum.blocks"),
        (share_terms(5, 5, dropouts=2, privacy=OFF, sum={"blocks": [[1, 2, 3], [4, 5]]}), "a block of 2 silos"),
    ],
)  # fmt: skip
def test_contracts_that_contradict_themselves_are_refused(raw: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        federation.parse(raw)


def test_a_chain_has_privacy_in_every_version_or_in_none() -> None:
    for first, second in ((contract_bytes(4), off_bytes), (off_bytes(4), contract_bytes)):
        one = chain.Lineage.begin(federation.parse(first))
        with pytest.raises(TrustError, match=r"privacy\.off may not change") as caught:
            one.extended(federation.parse(second(4, version=2, previous=one.newest.digest.hex())))
        assert caught.value.code == "chain-fixed"


def test_blocks_stay_in_a_chain() -> None:
    first = off_shares(6, [[1, 2, 3], [4, 5, 6]], 3)
    before = [first.terms]
    for kept in ([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]):
        chain._check_blocks(before, off_shares(3 * len(kept), kept, 3 * len(kept) - 3).terms)
    for cut in ([[1, 2, 4], [3, 5, 6]], [[1, 2, 3, 4, 5, 6]], [[1, 2, 3, 7], [4, 5, 6]]):
        after = off_shares(sum(map(len, cut)), cut, sum(map(len, cut)) - 3).terms
        with pytest.raises(TrustError, match="the difference of their sums") as caught:
            chain._check_blocks(before, after)
        assert caught.value.code == "chain-blocks"
    lineage = chain.Lineage.begin(off_terms(4))
    smaller = off_bytes(3, version=2, previous=lineage.newest.digest.hex())
    with pytest.raises(TrustError, match="share silos and are not the same"):  # {1,2,3,4} and {1,2,3} would give silo 4 away
        lineage.extended(federation.parse(smaller))


# --- Blocks ---------------------------------------------------------------------------------------------------------------------

ATTACK = ((1, 2, 3), (1, 4, 5), (2, 3, 4, 5))


def exhaustive_rank(sets) -> int:
    """The largest square part of the matrix whose determinant is not zero."""
    rows = [[int(silo in chosen) for silo in range(1, 7)] for chosen in sets]

    def determinant(matrix):
        if not matrix:
            return 1
        return sum(
            (-1) ** place * value * determinant([row[:place] + row[place + 1 :] for row in matrix[1:]])
            for place, value in enumerate(matrix[0])
        )

    for size in range(min(len(rows), 6), 0, -1):
        for chosen in itertools.combinations(rows, size):
            for columns in itertools.combinations(range(6), size):
                if determinant([[row[column] for column in columns] for row in chosen]):
                    return size
    return 0


def test_rank_is_that_of_the_participation_matrix() -> None:
    draw = np.random.default_rng(5)
    for _ in range(40):
        sets = [tuple(silo for silo in range(1, 7) if draw.random() < 0.5) for _ in range(draw.integers(0, 5))]
        assert blocks.rank(sets) == exhaustive_rank(sets), sets
    assert blocks.rank([]) == blocks.rank([()]) == 0
    assert blocks.rank(ATTACK) == 3


def test_one_factor_a_block_in_every_combination() -> None:
    """Whatever rational factors whole sets get, the silos of a block have one; the sets of the attack are not whole."""
    parts = ((1, 2, 3), (4, 5, 6, 7))
    whole = [c for size in range(8) for c in itertools.combinations(range(1, 8), size) if blocks.is_whole(c, parts)]
    assert whole == [(), (1, 2, 3), (4, 5, 6, 7), (1, 2, 3, 4, 5, 6, 7)]
    for factors in itertools.product((-2, -1, Fraction(1, 3), 0, 1), repeat=3):
        sums = {silo: sum(f for f, c in zip(factors, whole[1:], strict=True) if silo in c) for silo in range(1, 8)}
        assert all(len({sums[silo] for silo in part}) == 1 for part in parts)
    assert blocks.rank(whole) == 2
    assert blocks.least(whole, parts) == 3
    assert [blocks.is_whole(chosen, parts) for chosen in ATTACK] == [True, False, False]


@cache
def an_off_epoch(silos: int, stated: tuple[tuple[int, ...], ...]):
    return build_epoch(off_shares(silos, [list(block) for block in stated], silos - min(map(len, stated))), range(1, silos + 1))


def test_three_overlapping_sets_give_one_silo_away_and_are_refused() -> None:
    """With noise each of the sets is a sum of its own; without it no list, no freeze and no certificate leads to one of them."""
    noisy_round = ShareRound(build_epoch(federation.parse(share_terms(5, 5, dropouts=2)), range(1, 6)))
    xs = noisy_round.xs
    shown = [sum(xs[silo].astype(object) for silo in chosen) for chosen in ATTACK]
    assert ((shown[0] + shown[1] - shown[2]) == 2 * xs[1].astype(object)).all(), "the attack, on the integers of a round"

    setup = an_off_epoch(5, ((1, 2, 3, 4, 5),))
    a_round = ShareRound(setup)
    for chosen in ATTACK:
        with_noise = noisy_round.choose({g: noisy_round.list_of(g, only=chosen) for g in noisy_round.guardians})
        assert tuple(noisy_round.check_freeze(with_noise).headers) == chosen, "the control: the rule is what refuses"
        lists = {g: a_round.list_of(g, only=chosen) for g in a_round.guardians}
        assert a_round.choose(lists) is None
        forged = Freeze(
            round_ctx=a_round.ctx, headers=tuple(a_round.made[silo].raw for silo in chosen), lists=tuple(lists.values())[:4],
            left_out=tuple((silo, "unlisted") for silo in range(1, 6) if silo not in chosen),
        )  # fmt: skip
        with pytest.raises(TrustError, match="the set has 0 silos") as caught:
            a_round.check_freeze(forged)
        assert caught.value.code == "set-too-small"
    assert tuple(a_round.certified().frozen.headers) == (1, 2, 3, 4, 5)


def test_only_whole_blocks_are_ever_frozen(monkeypatch) -> None:
    setup = an_off_epoch(6, ((1, 2, 3), (4, 5, 6)))
    a_round = ShareRound(setup, without=(5,))
    made = a_round.choose()
    assert made is not None
    assert made.left_out == ((4, "block"), (5, "absent"), (6, "block"))
    assert (a_round.total() == a_round.expected((1, 2, 3))).all()
    assert ShareRound(setup, without=(1, 5)).choose() is None, "void rather than another set"
    # If the choice itself were wrong, the set would still be refused where it is signed for.
    monkeypatch.setattr(choice, "select", lambda apart, silos, terms: tuple(sorted(silos)))
    monkeypatch.setattr(choice, "reasons", lambda *given: iter(()))
    bent = Freeze(round_ctx=made.round_ctx, headers=made.headers, lists=made.lists, left_out=((5, "absent"),))
    with pytest.raises(TrustError, match="no union of whole blocks") as caught:
        a_round.check_freeze(bent)
    assert caught.value.code == "not-whole-blocks"


# --- Mechanism, accountants, ledger, gate -----------------------------------------------------------------------------------------

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
OPEN = Unprotected(sampling_rate=0.2, lattice_bits=16, dimension=1000, steps=10)
NOISED = LatticeGaussian(sampling_rate=0.2, lattice_bits=16, share_variance=8 * 4**16, shares=1, dimension=1000, steps=10)
A, B = "aa" * 32, "bb" * 32
LIMITS = Limits(epsilon=3.0, delta=DELTA)
WORD = Limits(epsilon=3.0, delta=DELTA, without_privacy=True)


def verify(data: bytes, signature: bytes) -> None:
    KEY.public_key().verify(signature, data)


@pytest.fixture
def ledger(tmp_path):
    with Ledger.create(tmp_path / "ledger.jsonl", who="silo-1", sign=KEY.sign, verify=verify, clock=lambda: 0.0) as made:
        yield made


def gate(ledger, plan, contract=A, limits=LIMITS):
    return Gate(ledger, limits, plan=plan, contract=contract, steps_per_attempt=1)


def test_no_accountant_is_ever_asked_about_a_run_without_noise(monkeypatch) -> None:
    def asked(*_, **__):
        raise AssertionError("an accountant was asked")

    for name in ("certify", "certify_adaptive", "epsilon_rdp", "epsilon_pld", "Curve"):
        monkeypatch.setattr(accounting, name, asked)
    for order in (None, 8):
        found = unprotected.certify([NOISED, OPEN], DELTA, order=order)
        assert found.epsilon == found.epsilon_pld == found.epsilon_rdp == math.inf
    assert not hasattr(OPEN, "effective_noise_multiplier")
    terms = off_terms().terms
    for ask in (lambda: federation.mechanism(terms), lambda: federation.adversaries(terms)):
        with pytest.raises(PrivacyRefusal, match="no differential privacy"):
            ask()
    assert math.isinf(enrolment.check_plan(terms))
    assert no_guarantee.participation(terms, [(1, 2, 3)]).rank == 1


def test_infinite_composes() -> None:
    for events in itertools.permutations([NOISED, OPEN, NOISED.with_steps(3)]):
        assert math.isinf(unprotected.certify(events, DELTA).epsilon)
    assert unprotected.certify([NOISED], DELTA) is accounting.certify([NOISED], DELTA), "without one nothing is touched"
    assert unprotected.figure(math.inf) is None
    assert unprotected.in_words(math.inf) == unprotected.in_words(None) == "none: no differential privacy"
    assert unprotected.in_words(1.25) == "1.25"


@pytest.mark.parametrize(
    "values", [{"steps": 0}, {"steps": True}, {"sampling_rate": math.nan}, {"sampling_rate": 0.0}, {"dimension": -1}]
)
def test_what_has_no_noise_is_still_stated_in_range(values) -> None:
    with pytest.raises(PrivacyRefusal):
        Unprotected(**{**{name: getattr(OPEN, name) for name in OPEN.__struct_fields__}, **values})


def test_an_attempt_without_noise_is_reserved_and_counted_like_any_other(ledger, tmp_path) -> None:
    at_work = gate(ledger, OPEN, limits=WORD)
    assert math.isinf(at_work.declare().epsilon)
    for number in range(1, 11):
        assert at_work.admit(number, bytes([number]) * 16) == ledger.counter
    with pytest.raises(BudgetExhausted, match="the plan has 10"):
        at_work.admit(11, b"x" * 16)
    read = History.read(tmp_path / "ledger.jsonl", verify=verify)
    assert read.charged() == [OPEN]
    assert (at_work.attempts_left, at_work.left) == (0, 0.0)
    line = (tmp_path / "ledger.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["body"]["mechanism"]["type"] == "no-differential-privacy", "the ledger itself says it, line by line"
    assert at_work.forecast([1]) == [(1, math.inf)]


def test_the_word_of_the_silo_is_needed_once_and_stands_on_the_ledger(ledger, tmp_path) -> None:
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(PrivacyRefusal, match="NO DIFFERENTIAL PRIVACY") as caught:
        gate(ledger, OPEN).declare()
    assert caught.value.code == "no-differential-privacy"
    with pytest.raises(PrivacyRefusal, match="no plan on the ledger"):
        gate(ledger, OPEN).admit(1, b"a" * 16)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before, "a refusal writes nothing"
    gate(ledger, OPEN, limits=WORD).declare()
    later = gate(ledger, OPEN)  # `silo train`: the word was given when it joined
    later.declare()
    later.admit(1, b"a" * 16)
    with pytest.raises(PrivacyRefusal, match="NO DIFFERENTIAL PRIVACY"):
        gate(ledger, OPEN, contract=B).declare()  # another contract needs the word again


def test_a_ledger_with_a_run_without_noise_never_shows_a_finite_epsilon_again(ledger) -> None:
    """Whatever comes before or after; no credit is taken for disjoint units, which belong into another silo with its own ledger."""
    noised = gate(ledger, NOISED, contract=A)
    noised.declare()
    noised.admit(1, b"a" * 16)
    assert noised.spent().epsilon < 3.0
    declared = gate(ledger, OPEN, contract=B, limits=WORD)
    declared.declare()
    assert noised.spent().epsilon < 3.0, "what was never charged costs nothing"
    declared.admit(1, b"b" * 16)
    for account in (noised, declared, gate(ledger, NOISED.with_steps(1), contract="cc" * 32, limits=WORD)):
        assert math.isinf(account.spent().epsilon)
        assert math.isinf(account.stood().epsilon)
        assert account.left == 0.0
    for refused in (lambda: noised.admit(2, b"c" * 16), lambda: gate(ledger, NOISED, contract="cc" * 32, limits=WORD).declare()):
        with pytest.raises(BudgetExhausted, match="run without differential privacy") as caught:
            refused()
        assert caught.value.code == "no-differential-privacy"
    assert sum(isinstance(body, Reserve) for body in ledger.entries) == 2
    reading = Account(ledger, LIMITS, plan=NOISED, contract=A, steps_per_attempt=1, fewest=3)
    assert math.isinf(reading.stood().epsilon)


# --- A silo -----------------------------------------------------------------------------------------------------------------------


def test_what_a_silo_sends_is_its_exact_sum() -> None:
    terms = off_terms().terms
    total = np.random.default_rng(3).integers(-(10**6), 10**6, terms.dimension)
    assert (noisy(total, terms, Randomness.from_os()).astype(np.int32) == total).all()
    noised = federation.parse(contract_bytes(privacy={"noise_multiplier": 2.0})).terms
    assert (noisy(total, noised, Randomness.from_os()).astype(np.int32) != total).any()
    plan = federation.ring_plan(terms)
    clamped = noisy(np.full(terms.dimension, 2**40), terms, Randomness.from_os()).astype(np.int32)
    assert set(clamped.tolist()) == {plan.clamp}, "the ring still has its bound"


def test_the_terms_begin_with_one_loud_sentence() -> None:
    words = membership.terms_in_words(off_terms())
    assert words[0].startswith("NO DIFFERENTIAL PRIVACY: no noise is added")
    assert "exact sum of at least 3 silos' gradients in the clear" in words[0]
    assert "can be reconstructed from such sums" in words[0]
    text = "\n".join(words)
    assert "NOT hidden" in text
    assert "{1, 2, 3}" in text
    assert "epsilon 0" not in text
    assert "noise multiplier" not in text
    assert "changes of the model" in membership.terms_in_words(off_terms(training={"mode": "local", "steps_per_round": 2}))[0]
    assert not any("NO DIFFERENTIAL" in line for line in membership.terms_in_words(federation.parse(contract_bytes())))


def test_joining_needs_the_silos_own_word() -> None:
    limits = config.Limits(epsilon=1000.0, delta=1e-2)
    with pytest.raises(PrivacyRefusal, match="records can be reconstructed") as caught:
        membership.check_limits(off_terms(), limits)
    assert "--without-differential-privacy" in caught.value.hint
    assert math.isinf(membership.check_limits(off_terms(), msgspec.structs.replace(limits, without_privacy=True)))
    parsed = msgspec.toml.decode("epsilon = 1.0\ndelta = 1e-5\nwithout_privacy = true\n", type=config.Limits)
    assert parsed.without_privacy
    assert not limits.without_privacy


def test_r_may_stand_still_in_the_first_round_and_no_longer() -> None:
    """The head starts at zero, so R has no gradient until the head moved; noise would move it at once."""

    def progress(terms, applied):
        state = msgspec.structs.replace(update_rule.initial(terms), applied=applied)
        nothing = {"epoch": 1, "manifest": b"", "outcome": b"", "voids": 0, "stood": None, "own": None}
        return Progress(contract=bytes(32), round=applied, state=state, **nothing)

    terms, noised = off_terms().terms, federation.parse(contract_bytes()).terms
    settlement.refuse_to_go_on(progress(terms, 1), terms)
    for still in (progress(terms, 2), terms), (progress(noised, 1), noised):
        with pytest.raises(Exception, match="R has not moved"):
            settlement.refuse_to_go_on(*still)


def test_a_card_says_that_there_is_no_figure() -> None:
    accepted = off_terms()
    origin = Origin(
        accepted=accepted, silo="silo-1", round=1, state=update_rule.initial(accepted.terms),
        spent=unprotected.certify([OPEN], DELTA), base="tiny",
    )  # fmt: skip
    text = card(origin, takes_types=False, head_replaced=False)
    assert "**without differential privacy**" in text
    assert "epsilon: none: no differential privacy" in text
    assert "inf" not in text.split("## Load it")[0].replace("information", "")
    assert "delta" not in text


def test_a_head_alone_is_trained_without_noise_too() -> None:
    import torch

    from silo.learning import evaluation

    changes = {"adapter": {"modules": []}, "training": {"optimizer": "sgd", "learning_rate": 1.0}}
    terms = off_terms(privacy={"sampling_rate": 1.0}, **changes).terms
    labels = torch.tensor([0, 1, 1, 1])
    pooled = evaluation.Pooled(features=torch.zeros(4, 8), labels=labels, owner=torch.arange(4), count=4)
    state = evaluation._head_step(terms, pooled, update_rule.initial(terms), Randomness.from_os)
    again = evaluation._head_step(terms, pooled, update_rule.initial(terms), Randomness.from_os)
    assert state.digest == again.digest, "sampled at rate 1, nothing is left to chance"
    assert state.theta[-1] > 0 > state.theta[-2]
    assert not state.theta[:-2].any()


# --- A draft ----------------------------------------------------------------------------------------------------------------------

TERMS = Terms(
    name="open", expires="2099-12-31", labels=("no", "yes"), model=Model(name="tiny", digest="ab" * 32, hidden_size=8),
    modules=("query", "value"), units=200, rounds=5, rank=2, sampling_rate=0.25, max_grad_norm=10.0, without_privacy=True,
)  # fmt: skip


def test_a_draft_without_privacy_is_loud_and_signed_with_its_blocks(tmp_path) -> None:
    home, identity = enrolment.init(tmp_path / "hub", name="hub", organisation="Hub", terms=TERMS, host="127.0.0.1", port=0)
    text = home.draft_path.read_text()
    assert "# NO DIFFERENTIAL PRIVACY." in text
    assert 'off = "no differential privacy"' in text
    assert 'blocks = "auto"' in text
    assert not any(line.startswith(("noise_multiplier", "delta")) for line in text.splitlines())
    for silo in range(1, 4):
        made = keys.create(tmp_path / f"{silo}.key", name=f"silo-{silo}", receives=False)
        keys.write_public(tmp_path / f"{silo}.pub", made, "A hospital")
        enrolment.add_member(home, (tmp_path / f"{silo}.pub").read_bytes())
    store = Store(home.evidence_folder, home.database_url(home.config()))
    signed = enrolment.sign_version(home, identity, store, now=0.0)
    assert signed.terms.sum.blocks == ((1, 2, 3),)
    assert signed.terms.privacy.lattice_bits == 20
    assert enrolment.sign_version(home, identity, store, now=0.0) == signed, "again it is the same bytes"
    store.close()
    facts = commands.sign(home.root)
    assert (facts["epsilon"], facts["delta"], facts["epsilon_none"]) == (None, None, "none: no differential privacy")


@pytest.mark.parametrize(
    ("silos", "fewest", "wanted"),
    [
        (3, 3, ((1, 2, 3),)), (5, 3, ((1, 2, 3, 4, 5),)), (6, 3, ((1, 2, 3), (4, 5, 6))), (8, 3, ((1, 2, 3, 4), (5, 6, 7, 8))),
        (7, 7, ((1, 2, 3, 4, 5, 6, 7),)),
    ],
)  # fmt: skip
def test_blocks_are_as_many_as_there_can_be(silos, fewest, wanted) -> None:
    assert draft_blocks.of_members(range(1, silos + 1), fewest) == wanted


INIT = ["init", "--name", "x", "--organisation", "x", "--labels", "a,b", "--units", "9", "--rounds", "1"]


@pytest.mark.parametrize("words", [["simulate", "--data", "nowhere.jsonl"], INIT])
@pytest.mark.parametrize("figure", ["epsilon", "delta"])
def test_a_figure_and_no_privacy_contradict_each_other(words, figure, tmp_path) -> None:
    asked = [*words, "--without-privacy", f"--{figure}", "0.000001", "--home", str(tmp_path / "home")]
    found = CliRunner().invoke(aggregator_cli.app, asked)
    assert found.exit_code == 2
    assert "contradict each other" in found.output
    assert not (tmp_path / "home").exists()


# --- A whole federation -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two rounds of three silos without differential privacy: real keys, ledgers, coordinator, log."""
    made = Whole.create(tmp_path_factory.mktemp("open"), privacy=OFF, sum=ONE)
    made.run(2, limits=WORD)
    made.home.facts_path.write_text('{"lora_width": 8, "simulated": false}')
    yield made
    made.close()


def outcome(whole, number) -> Outcome:
    return decode(decode(whole.board.get("outcome", number, AGGREGATOR), Signed).body, Outcome)


def test_the_sum_equals_the_plain_integer_sum(finished) -> None:
    terms, state = finished.accepted.terms, update_rule.initial(finished.accepted.terms)
    for number in (1, 2):
        plain = sum(contribution(silo)(state) for silo in finished.silos)
        assert (np.frombuffer(outcome(finished, number).total, dtype="<i4") == plain).all()
        state = update_rule.advance(state, plain, terms)
        assert outcome(finished, number).next_state == state.digest
    assert finished.progress(1).state.digest == state.digest


def test_every_silos_ledger_says_so(finished) -> None:
    for silo in finished.silos:
        history = finished.history(silo)
        assert history.charged() == [federation.event(finished.accepted.terms, rounds=2)]
        assert len(history.attempts(finished.accepted.digest.hex(), 1)) == 1


def test_the_report_says_first_that_there_is_no_differential_privacy(finished, tmp_path) -> None:
    facts = commands.build_report(finished.home.root)
    assert isinstance(facts, no_guarantee.OpenReport)
    data = report.encode(facts)
    assert report.decode(data) == facts
    assert data.startswith(b'{\n  "NO_DIFFERENTIAL_PRIVACY": "No differential privacy.')
    stated = json.loads(data)
    assert stated["guarantee"]["delta"] is None
    rows = (stated["accounting"], *stated["silos"], *stated["guarantee"]["adversaries"])
    for spent in (row["spent"] for row in rows):
        assert spent["epsilon"] is spent["epsilon_pld"] is spent["epsilon_rdp"] is None
        assert (spent["reason"], spent["rounds"]) == ("none: no differential privacy", 2)
    seen = {"sums": 2, "silos": 3, "rank": 1, "least": 3, "blocks": [[1, 2, 3]], "sets": [[1, 2, 3]]}
    assert stated["participation"] == seen
    page = report.render(facts)
    shown = page[page.index("<body>") :]
    assert shown.index("<h1>No differential privacy</h1>") < shown.index("records can be reconstructed") < 600
    assert "<script" not in page
    assert "Rank of the participation matrix: 1." in page
    for words in ("noise multiplier", "δ</dt>", "plus noise", "noise in full"):
        assert words not in page
    record, _ = report.write(facts, tmp_path, sign=finished.identity.sign)
    assert record.read_bytes() == data


def test_a_silo_shows_none_and_never_an_infinity(finished) -> None:
    home = Home(finished.root / "silo-1")
    config.write_commented(
        home.config_path, name="silo-1", organisation="Hospital 1", url="http://127.0.0.1:1", fingerprint="", records="r.jsonl",
        epsilon=10.0, delta=1e-5,
    )  # fmt: skip
    for command, words in (("status", "epsilon none: none: no differential privacy"), ("budget", "epsilon none: no differential")):
        found = CliRunner().invoke(silo_cli.app, [command, "--home", str(home.root), "--json"])
        stated = json.loads(found.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert (stated["epsilon"], stated["delta"], stated["epsilon_none"]) == (None, None, "none: no differential privacy")
        shown = CliRunner().invoke(silo_cli.app, [command, "--home", str(home.root)])
        assert shown.exit_code == 0
        assert words in shown.output
        assert "inf" not in shown.output.replace("fingerprint", "")
    assert reading.budget(home.root, 4)["forecast"][-1] == {"rounds": 4, "epsilon": None, "refused": None}
    with pytest.raises(PrivacyRefusal, match="NO DIFFERENTIAL PRIVACY"):
        membership.check_limits(finished.accepted, config.load(home.config_path).limits)


def test_a_set_that_is_not_whole_has_no_report(finished) -> None:
    with pytest.raises(ConfigError, match="no union of whole blocks"):
        no_guarantee.participation(finished.accepted.terms, [(1, 2)])


def test_verify_takes_it_and_refuses_a_figure(finished, tmp_path) -> None:
    facts = commands.build_report(finished.home.root)
    written, _ = commands.write_report(finished.home.root, tmp_path, facts)
    genuine = hub_verify.verify(finished.home.root, report=(written.read_bytes(), written.with_suffix(".json.sig").read_bytes()))
    assert genuine.holds
    assert {check.status for check in genuine.checks if check.kind == "report"} <= {"ok", "note"}, "nothing is left unanswered"
    assert [each.round for each in genuine.spent] == [1, 2]
    assert all(each.insiders is each.delta is None for each in genuine.spent)
    assert "no differential privacy" in {check.what for check in genuine.checks}

    def failed(made) -> set[str]:
        record = report.encode(made)
        signature = finished.identity.sign(report.signing_input(record)).hex().encode()
        found = hub_verify.verify(finished.home.root, report=(record, signature))
        return {check.what for check in found.checks if check.status == "failed" and check.kind == "report"} - {"in the log"}

    rank = msgspec.structs.replace(facts.participation, rank=2)
    assert failed(msgspec.structs.replace(facts, participation=rank)) == {"contents", "participation.rank"}
    reason = msgspec.structs.replace(facts.accounting, spent=msgspec.structs.replace(facts.accounting.spent, reason="small"))
    assert failed(msgspec.structs.replace(facts, accounting=reason)) == {"no differential privacy", "accounting.spent.reason"}
    figure = msgspec.structs.replace(facts.silos[0], spent=msgspec.structs.replace(facts.silos[0].spent, epsilon=1.0))
    assert failed(msgspec.structs.replace(facts, silos=(figure, *facts.silos[1:]))) == {"no differential privacy", "contents"}
    assert failed(msgspec.structs.replace(facts, warning="")) == {"no differential privacy", "NO_DIFFERENTIAL_PRIVACY"}
    stated = json.loads(written.read_bytes())
    stated["guarantee"]["delta"] = 1e-6
    bent = json.dumps(stated).encode()
    found = hub_verify.verify(finished.home.root, report=(bent, None))
    assert "contents" in {check.what for check in found.checks if check.status == "failed"}


def test_settings_clip_generously(tmp_path) -> None:
    from aggregator.simulation.settings import Settings

    usual = Settings(home=tmp_path / "nowhere")
    assert usual.clips_at == 1.0
    assert replace(usual, without_privacy=True).clips_at == 10.0
    assert replace(usual, without_privacy=True, max_grad_norm=3.0).clips_at == 3.0
