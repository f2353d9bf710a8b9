# SPDX-License-Identifier: Apache-2.0
"""``silo audit --membership``: what the best known attack finds out about who was in the data, beside what epsilon allows.

LiRA (Carlini et al. 2022, arXiv 2112.03570) on units that are made up, or held out. *Shadow* runs each train on a random half of
the units; how sure their models are of each unit's own label, on the logit scale, is fitted by two normal laws, one for the runs
that had the unit and one for those that had not. *Attacked* runs are trained the same way, and each unit is scored by how much
likelier its confidence is under the first law. A run trains a linear head, whose gradient is known exactly, by the code of a real
round: Poisson sample, clip on the lattice, integer sum, clamp, noise in the ring, update rule. The attacker sees the last model
of a run whose noise has the h shares that insiders face.

Beside it stands a control: the same attack on runs without clipping and without noise. It says what the attack can do at all.

Promised: the silo's own training file is not read, nothing leaves, no ledger is charged; and the verdict is valid: the attacked
runs' coins touch nothing but the attacked runs, so that the f-DP test of ``privacy.dp.empirical`` holds for them. Not promised:
that no better attack exists. It is a picture of what an attack finds, never the guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import msgspec
import numpy as np
import torch
from torch import Tensor

from privacy import update_rule
from privacy.dp import accounting, empirical, ring
from privacy.dp.empirical import Booleans, Floats
from privacy.dp.tradeoff import TradeOff, trade_off
from privacy.errors import ConfigError, NotCertified
from privacy.federation import Contract, mechanism, ring_plan_at
from privacy.prg import Randomness
from privacy.update_rule import State
from silo.learning.adapted import Adapted
from silo.learning.evaluation import Pooled, head_gradients
from silo.learning.sampling import Words
from silo.learning.tokens import EncodedUnit
from silo.learning.training import Contribution
from silo.upload import noisy

CONFIDENCE = 0.95
RATES = (0.001, 0.01)
"""The rates of false alarms at which an attack is reported."""

UNITS, RUNS = 128, 32
"""Units that are made up; shadow runs, and as many attacked ones."""
LEAST_UNITS, MOST_UNITS, LEAST_RUNS = 32, 512, 8
MOST_STEPS = 64
"""Of a longer plan the first steps are run, and held against the epsilon of these."""

_FEATURES = 256  # more than half of the units: a head can remember them all
_RATE = 0.05
_LEAST_SPREAD = 1e-3
_UNCLIPPED = 64.0  # times the clipping norm


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the runs train: a contract without adapters, and units by their features."""

    terms: Contract
    pooled: Pooled


@dataclass(frozen=True, kw_only=True)
class Attack:
    """The attacked runs: score and truth of every unit in every one of them, run after run, ``(runs · units,)``."""

    scores: Floats
    included: Booleans

    def found_at(self, rate: float) -> tuple[float, float, float]:
        """(part of the members found at a false alarm rate of at most ``rate``, and the ends of its interval).

        The interval takes attempts as independent; those on one run share its noise, so it is a little too short.
        """
        outside, inside = np.sort(self.scores[~self.included])[::-1], self.scores[self.included]
        threshold = outside[min(math.floor(rate * len(outside)), len(outside) - 1)]
        found = int((inside > threshold).sum())
        return (found / len(inside), *empirical.interval(found, len(inside), 1 - CONFIDENCE))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The attack on the mechanism, the same one on runs without it, and the curve and epsilon that the mechanism claims."""

    attack: Attack
    control: Attack
    curve: TradeOff
    claimed: float
    delta: float
    units: int
    runs: int
    steps: int

    @property
    def holds(self) -> bool:
        """Whether the attack is no better than the claimed curve allows, by a test that errs with probability 1 - CONFIDENCE."""
        return not refuted(self.attack, self.curve)

    def allowed(self, rate: float) -> float:
        """The most members that any attack may find at this rate of false alarms, by the claimed curve."""
        return 1 - self.curve.inverse(1 - rate)


class Head(Contribution):
    """A contribution that trains a linear head on fixed features: sample, clip, sum and clamp are the real ones.

    A head has no company in a batch, so there is nothing for the start-up tests of ``Contribution`` to look at.
    """

    def __init__(self, subject: Subject, chosen: Sequence[int], randomness: Callable[[], Words]) -> None:
        self._terms, self._pooled, self._randomness = subject.terms, subject.pooled, randomness
        self._units = tuple(EncodedUnit(id=str(number), rows=()) for number in chosen)
        self.device, self.dimension = torch.device("cpu"), subject.terms.dimension
        self.model = cast(Adapted, self)  # its dimension and device are all that a sum asks for
        self._head = head_of(subject.terms, update_rule.initial(subject.terms))

    def _load(self, state: State) -> None:
        self._head = head_of(self._terms, state)

    def _gradients(self, units: Sequence[EncodedUnit]) -> Iterator[Tensor]:
        if units:
            yield head_gradients(self._pooled, *self._head, [int(unit.id) for unit in units])


def head_of(terms: Contract, state: State) -> tuple[Tensor, Tensor]:
    """(weight ``(labels, hidden)``, bias ``(labels,)``) float32 of a state without adapters."""
    labels, hidden = len(terms.task.labels), terms.model.hidden_size
    theta = torch.from_numpy(state.theta.astype(np.float32))
    return theta[: labels * hidden].reshape(labels, hidden), theta[labels * hidden :]


def made_up(contract: Contract, *, units: int, steps: int) -> Subject:
    """Units of one record each, features and labels random: they have nothing in common, so a model knows each from it alone."""
    bits = np.random.Generator(np.random.PCG64(0))
    features = bits.standard_normal((units, _FEATURES), dtype=np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    pooled = Pooled(
        features=torch.from_numpy(features), labels=torch.from_numpy(bits.integers(0, 2, units)), owner=torch.arange(units),
        count=units,
    )  # fmt: skip
    return Subject(terms=_terms(contract, ("no", "yes"), _FEATURES, units, steps), pooled=pooled)


def of_records(contract: Contract, pooled: Pooled, *, steps: int) -> Subject:
    """Held-out units by their features under the contract's own base model, in units of their mean length."""
    terms = _terms(contract, contract.task.labels, contract.model.hidden_size, pooled.count, steps)
    length = pooled.features.norm(dim=1).mean().clamp(min=1e-6)
    return Subject(terms=terms, pooled=replace(pooled, features=pooled.features / length))


def _terms(contract: Contract, labels: tuple[str, ...], hidden: int, units: int, steps: int) -> Contract:
    """The contract's sampling rate, noise, silos and mode, for ``steps`` steps of a head alone on ``units`` units."""
    training = msgspec.structs.replace(
        contract.training, rounds=steps, steps_per_round=1, optimizer="adam", learning_rate=_RATE, warmup_rounds=0, decay_rounds=0
    )
    return _fitted(
        msgspec.structs.replace(
            contract, task=msgspec.structs.replace(contract.task, labels=labels), training=training, basis=None,
            model=msgspec.structs.replace(contract.model, hidden_size=hidden),
            adapter=msgspec.structs.replace(contract.adapter, modules=(), basis="weights"),
            privacy=msgspec.structs.replace(contract.privacy, units=units, max_grad_norm=1.0),
        )
    )  # fmt: skip


def _fitted(terms: Contract) -> Contract:
    """The terms with the finest lattice that they allow."""
    plan = ring_plan_at(terms, noise_multiplier=terms.privacy.noise_multiplier, lattice_bits=None)
    return msgspec.structs.replace(terms, privacy=msgspec.structs.replace(terms.privacy, lattice_bits=plan.lattice_bits))


def unprotected(subject: Subject) -> Subject:
    """The same units under terms whose clipping norm no gradient reaches."""
    privacy = msgspec.structs.replace(subject.terms.privacy, max_grad_norm=_UNCLIPPED)
    return Subject(terms=_fitted(msgspec.structs.replace(subject.terms, privacy=privacy)), pooled=subject.pooled)


def trained(subject: Subject, chosen: Sequence[int], *, noised: bool, randomness: Callable[[], Randomness]) -> State:
    """The state after all steps on the ``chosen`` units, with h shares of noise in each sum, or with none."""
    terms, contribute = subject.terms, Head(subject, chosen, randomness)
    state, nothing = update_rule.initial(terms), np.zeros(terms.dimension, dtype=np.int64)
    for _ in range(terms.training.rounds):
        total = contribute(state)
        if noised:
            words = noisy(total, terms, randomness())
            for _ in range(terms.shares - 1):
                words = words + noisy(nothing, terms, randomness())
            total = ring.lift(words)
        state = update_rule.step(state, total, terms, applied=state.applied)
    return state


def confidences(subject: Subject, state: State) -> Floats:
    """How sure a model is of each unit's own labels ``(units,)``: log p - log(1 - p), the mean over the unit's records."""
    pooled = subject.pooled
    weight, bias = head_of(subject.terms, state)
    logits = (pooled.features @ weight.T + bias).double()
    own = logits.gather(1, pooled.labels[:, None]).squeeze(1)
    others = logits.scatter(1, pooled.labels[:, None], -math.inf).logsumexp(dim=1)
    sums = torch.zeros(pooled.count, dtype=torch.float64).index_add_(0, pooled.owner, own - others)
    return cast(Floats, (sums / torch.bincount(pooled.owner, minlength=pooled.count)).numpy())


def attack(
    subject: Subject, *, shadows: int, attacked: int, noised: bool = True,
    randomness: Callable[[], Randomness] = Randomness.from_os, progress: Callable[[], None] = lambda: None,
) -> Attack:  # fmt: skip
    """LiRA on runs of ``subject``: the laws of ``shadows`` runs, the scores of ``attacked`` ones.

    Formal guarantees:
        - *Fair coins*: each unit is in each run by one bit of the operating system, which nothing but that run depends on.
        - *Apart*: the laws are fitted on shadow runs alone; of the attacked runs the scores see the models and no coin.
    """
    runs, units = shadows + attacked, subject.pooled.count
    coins = (randomness().uint64(runs * units) >> np.uint64(63)).astype(np.bool_).reshape(runs, units)
    sure = np.zeros((runs, units))
    for place, coin in enumerate(coins):
        sure[place] = confidences(subject, trained(subject, np.flatnonzero(coin).tolist(), noised=noised, randomness=randomness))
        progress()
    scores = likelihoods(sure[:shadows], coins[:shadows], sure[shadows:])
    return Attack(scores=scores.reshape(-1), included=coins[shadows:].reshape(-1))


def likelihoods(shadows: Floats, coins: Booleans, attacked: Floats) -> Floats:
    """The scores ``(runs, units)`` of attacked confidences, from shadow confidences and coins ``(shadows, units)``.

    Two normal laws for each unit: their means from the runs with and without it, their spreads pooled over the units, as the
    paper does where there are few shadows.
    """
    inside, outside = _means(shadows, coins), _means(shadows, ~coins)
    spread_in, spread_out = _spread(shadows - inside, coins), _spread(shadows - outside, ~coins)

    def log_density(mean: Floats, spread: float) -> Floats:
        return -((attacked - mean) ** 2) / (2 * spread**2) - math.log(spread)

    return log_density(inside, spread_in) - log_density(outside, spread_out)


def _means(values: Floats, where: Booleans) -> Floats:
    """By unit, the mean over the runs where it holds; for one that was in all of them, or in none, the mean over all units."""
    counts = where.sum(axis=0)
    overall = values[where].mean() if where.any() else 0.0
    return cast(Floats, np.where(counts > 0, (values * where).sum(axis=0) / np.maximum(counts, 1), overall))


def _spread(differences: Floats, where: Booleans) -> float:
    """The pooled standard deviation about each unit's own mean."""
    freedom = int(where.sum()) - int(where.any(axis=0).sum())
    return max(_LEAST_SPREAD, math.sqrt(float((differences[where] ** 2).sum()) / max(1, freedom)))


def refuted(found: Attack, curve: TradeOff) -> bool:
    """Whether the attack's guesses refute that the runs were as private as ``curve`` says.

    Formal guarantees: true with probability at most 1 - ``CONFIDENCE`` for a mechanism that is: the attacked runs stand side by
    side, each unit of each being one canary with a fair coin of its own, and the scores depend on these coins through the models
    alone.
    """
    outcomes, count = empirical.outcomes(found.scores, found.included), len(found.scores)
    each = (1 - CONFIDENCE) / len(outcomes)
    return any(empirical.refutes(one, curve.inverse, canaries=count, significance=each) for one in outcomes)


def audit(subject: Subject, *, runs: int = RUNS, progress: Callable[[], None] = lambda: None) -> Finding:
    """The attack on ``runs`` runs with the laws of as many, its control, and the claim they are held against.

    Raises:
        ConfigError: too few runs or units, or too many units.
        PrivacyRefusal: the contract adds no noise.
        NotCertified: no certified epsilon, or a curve too large to be tabulated.
    """
    terms, units = subject.terms, subject.pooled.count
    if runs < LEAST_RUNS or not LEAST_UNITS <= units <= MOST_UNITS:
        raise ConfigError(
            f"an attack on {runs} runs over {units} units",
            hint=f"at least {LEAST_RUNS} runs, and {LEAST_UNITS} to {MOST_UNITS} units", code="audit",
        )  # fmt: skip
    event = mechanism(terms)
    curve = trade_off(event, terms.privacy.delta)
    if curve is None:
        raise NotCertified("this plan's losses are too large for a curve", hint="audit fewer steps with --steps", code="no-curve")
    return Finding(
        attack=attack(subject, shadows=runs, attacked=runs, progress=progress),
        control=attack(unprotected(subject), shadows=runs, attacked=runs, noised=False, progress=progress),
        curve=curve, claimed=accounting.certify([event], terms.privacy.delta).epsilon, delta=terms.privacy.delta, units=units,
        runs=runs, steps=terms.training.rounds,
    )  # fmt: skip


def as_facts(finding: Finding) -> dict[str, Any]:
    """The finding as one JSON document. Of made-up units it may be shown to anybody; of held-out records it stays here."""

    def figures(rate: float) -> dict[str, float]:
        found, low, high = finding.attack.found_at(rate)
        return {
            "false_positive_rate": rate, "true_positive_rate": found, "low": low, "high": high,
            "allowed": finding.allowed(rate), "without_protection": finding.control.found_at(rate)[0],
        }  # fmt: skip

    attacked, control = (empirical.roc(each.scores, each.included).area for each in (finding.attack, finding.control))
    return {
        "holds": finding.holds,
        "epsilon_claimed": finding.claimed,
        "delta": finding.delta,
        "confidence": CONFIDENCE,
        "steps": finding.steps,
        "units": finding.units,
        "shadow_runs": finding.runs,
        "attacked_runs": finding.runs,
        "roc_area": attacked,
        "roc_area_without_protection": control,
        "at": [figures(rate) for rate in RATES],
    }
