# SPDX-License-Identifier: Apache-2.0
"""``silo selftest``: the code of a real step on this machine, recorded, replayed and measured, without one record.

Gray box (arXiv 2602.17454): the functions that a round calls are run on made-up token units with chosen random words, and what
comes out is compared bit by bit with what one unit more or less may change; samples and noise, of the operating system's bits, are
compared with their exact laws. The contract and the base model are those of the silo, or built in where it has joined nothing.

Promised: no record is opened, nothing leaves, nothing is charged; a sound installation fails one check with the probability printed
beside it, in all below 1e-5. Not promised: that what passes is right. It is a measurement on one machine, at one state, of the
places where such code has been wrong before (docs/guides/empirical-audit.md).
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from privacy import basis_round, update_rule
from privacy.dp import ring
from privacy.errors import SiloquyError
from privacy.federation import Contract, ring_plan
from privacy.prg import Randomness
from privacy.update_rule import State
from silo import agreed_basis, membership, reading, selftest_noise, succession
from silo.config import Compute
from silo.home import Home
from silo.learning import models, training
from silo.learning.adapted import Adapted
from silo.learning.gradients import bucket
from silo.learning.invariance import probe
from silo.learning.sampling import Words
from silo.learning.tokens import EncodedUnit
from silo.learning.training import Contribution
from silo.parts import Parts
from silo.selftest_noise import Answer, need
from silo.settlement import load_progress
from silo.upload import noisy

AMPLIFIED = 2.0**24
"""Made-up gradients are multiplied by it (exactly, in float32), so that every one of them must be clipped."""

_SHORT, _UNITS = 4, 12
_ALWAYS, _NEVER = 0, 2**64 - 1  # words of units that are in the sample, and that are not (unless q is 1)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question, its answer, and the probability that a sound installation fails it; 0 where no chance is involved."""

    name: str
    asks: str
    passed: bool
    found: str
    false_alarm: float


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is tested: a contract, a model, and how this machine packs batches. ``name`` says whose they are."""

    name: str
    terms: Contract
    model: Adapted
    rows_tokens: int


class Script:
    """The random words of a replayed sample: unit i gets ``words[i]``; how many were asked for is kept."""

    def __init__(self, words: Sequence[int]) -> None:
        self._words, self.asked = list(words), list[int]()

    def uint64(self, count: int) -> NDArray[np.uint64]:
        """The first ``count`` words."""
        self.asked.append(count)
        return np.array(self._words[:count], dtype=np.uint64)


class Played(Contribution):
    """A contribution whose units, words and size of gradients are chosen; everything between them is the real one.

    ``spoiled``: one row of every block of gradients is made NaN.
    """

    spoiled = False

    def play(self, units: Sequence[EncodedUnit], words: Sequence[int], state: State) -> tuple[NDArray[np.int64], list[int]]:
        """(the sum of one step over ``units`` with these words, how many words each request asked for)."""
        script = Script(words)
        self._units, self._randomness = tuple(units), lambda: script
        return self(state), script.asked

    def _gradients(self, units: Sequence[EncodedUnit]) -> Iterator[Tensor]:
        for rows in super()._gradients(units):
            amplified = rows * AMPLIFIED
            if self.spoiled and len(amplified):
                amplified[0, 0] = math.nan
            yield amplified


class Tallied(Contribution):
    """A contribution that only notes which units a step would take: the sampling of a real step, without its gradients."""

    def __init__(self, terms: Contract, count: int, randomness: Callable[[], Words]) -> None:
        self._terms, self._randomness = terms, randomness
        self._units = tuple(EncodedUnit(id=str(number), rows=()) for number in range(count))
        self.sampled: list[list[int]] = []

    def _load(self, state: State) -> None:
        del state

    def sum(self, units: Sequence[EncodedUnit]) -> NDArray[np.int64]:
        """Notes ``units``; no sum."""
        self.sampled.append([int(unit.id) for unit in units])
        return np.zeros(0, dtype=np.int64)


class Bench:
    """A subject at a fixed state, its made-up units, and each unit's integer vector."""

    def __init__(self, subject: Subject) -> None:
        self.terms = subject.terms
        longest, most = self.terms.task.max_length, self.terms.privacy.max_records_per_unit
        self.played = Played(self.terms, subject.model, [], rows_tokens=subject.rows_tokens)
        drawn = np.random.Generator(np.random.PCG64(7)).standard_normal(self.terms.dimension)
        self.state = msgspec.structs.replace(update_rule.initial(self.terms), theta=0.05 * drawn)
        short = min(_SHORT, longest)
        several = [1 + (longest - 1) * place // most for place in range(1, most + 1)]
        self.units = [probe(subject.model, [short], seed=seed) for seed in range(10, 10 + _UNITS)]
        self.extras = [probe(subject.model, lengths, seed=seed) for seed, lengths in enumerate(([short], [longest], several), 40)]
        self.alone = {unit.id: self.sum([unit]) for unit in (*self.units, *self.extras)}

    def sum(self, units: Sequence[EncodedUnit]) -> NDArray[np.int64]:
        """The sum of a step in which exactly ``units`` are sampled."""
        return self.played.play(units, [_ALWAYS] * len(units), self.state)[0]


def run(root: Path) -> dict[str, Any]:
    """All checks of the silo in ``root``, or of a built-in model where there is none, as the document of ``silo selftest --json``.

    Raises:
        ConfigError: the silo's files, or its base model, cannot be read.
    """
    subject = chosen(root)
    checks = examine(subject)
    passed = all(check.passed for check in checks)
    return {"passed": passed, "subject": subject.name, "checks": [dataclasses.asdict(check) for check in checks]}


def examine(subject: Subject) -> list[Check]:
    """Every check of ``subject``. A check that raises has failed, and says with what."""
    benches: list[Bench] = []

    def bench() -> Bench:
        if not benches:
            benches.append(Bench(subject))
        return benches[0]

    def of(question: Callable[[Bench], Answer]) -> Callable[[], Answer]:
        return lambda: question(bench())

    terms = subject.terms
    asked: list[tuple[str, str, Callable[[], Answer]]] = [
        ("batch-mates", "nothing else in a batch changes a unit's gradient, and the model answers to its adapters", of(layout)),
        ("bound", "every unit's integer vector is clipped to 2^p, with exact integers", of(bounded)),
        ("neighbours", "one unit more changes the sum by exactly its own vector, and nothing else", of(neighbours)),
        ("composition", "a sample's sum is the sum of its units' vectors, in any order, the same each time", of(composition)),
        ("not finite", "a unit with a NaN adds nothing and disturbs nobody", of(not_finite)),
        ("empty sample", "a step that samples nobody gives zeros, and is noised like any other", of(empty)),
        ("clamp", "sums are cut to the ring before noise, never after it", lambda: selftest_noise.clamped(terms)),
        ("sampling", "units are sampled independently at the contract's rate, afresh each step", lambda: sampled(terms)),
        *selftest_noise.questions(terms, _default(Parts)),
        ("divisor", "the update divides by the contract's constant, whatever the silo holds", lambda: divisor(terms)),
    ]
    return [_answered(name, asks, question) for name, asks, question in asked]


def layout(bench: Bench) -> Answer:
    """The start-up tests of a contribution ran when the bench was made; this says how units are laid out after them."""
    together = "units share batches" if bench.played._together else "every unit has a batch of its own: here a slot matters"
    return Answer(f"{together}; up to {bucket(bench.terms.task.max_length, bench.terms.task.max_length)} tokens")


def bounded(bench: Bench) -> Answer:
    """Each unit's vector has norm at most 2^p; and near it, since every gradient was made too long."""
    p = bench.terms.privacy.lattice_bits
    parts = [math.sqrt(sum(int(z) ** 2 for z in vector)) / 2**p for vector in bench.alone.values()]
    squares = [sum(int(z) ** 2 for z in vector) for vector in bench.alone.values()]
    need(max(squares) <= 4**p, f"a unit's vector has norm {max(parts):.6g} · 2^{p}")
    need(min(parts) > 0.9, f"a gradient beyond the clipping norm became a vector of {min(parts):.3g} · 2^{p}")
    return Answer(f"{len(parts)} units: norms {min(parts):.4f} to {max(parts):.4f} of 2^{p}")


def neighbours(bench: Bench) -> Answer:
    """The same words with and without one more unit, at the end and in front, for a short, the longest and the fullest unit."""
    coins = Randomness.from_os().uint64(len(bench.units)) >> np.uint64(63)
    words = [_ALWAYS if coin else _NEVER for coin in coins.tolist()]
    before, asked = bench.played.play(bench.units, words, bench.state)
    for extra in bench.extras:
        for units, replayed in (([*bench.units, extra], [*words, _ALWAYS]), ([extra, *bench.units], [_ALWAYS, *words])):
            after, more = bench.played.play(units, replayed, bench.state)
            changed = int(np.count_nonzero(after - before - bench.alone[extra.id]))
            need(changed == 0, f"a unit of {sum(len(row[0]) for row in extra.rows)} tokens changed {changed} other numbers")
            need([count - 1 for count in more] == asked, f"a unit more asked for {more} random words instead of {asked} and one")
    return Answer(f"{2 * len(bench.extras)} pairs of neighbours, equal to the last bit")


def composition(bench: Bench) -> Answer:
    """The sum of all made-up units in three orders against the sum of their vectors."""
    units = [*bench.units, *bench.extras]
    total = np.sum([bench.alone[unit.id] for unit in units], axis=0)
    wanted = ring.clamp(total, ring_plan(bench.terms))
    for order in (units, units[::-1], units[1::2] + units[::2]):
        wrong = int(np.count_nonzero(bench.sum(order) - wanted))
        need(wrong == 0, f"{wrong} of {len(wanted)} numbers of a sum are not the sum of its units' vectors")
    return Answer(f"{len(units)} units in 3 orders")


def not_finite(bench: Bench) -> Answer:
    """With one row of the gradients spoiled, the sum lacks exactly one unit of each block."""
    bench.played.spoiled = True
    try:
        alone, several = bench.sum(bench.units[:1]), bench.sum(bench.units[:2])
    finally:
        bench.played.spoiled = False
    need(not alone.any(), "a unit whose gradient holds a NaN moved the sum")
    left = [np.zeros_like(alone), *(bench.alone[unit.id] for unit in bench.units[:2])]
    need(any(np.array_equal(several, each) for each in left), "a NaN in one unit changed another unit's part")
    return Answer("a spoiled unit adds the zero vector")


def empty(bench: Bench) -> Answer:
    """A sample of nobody: by not sampling any, where the rate allows it, and by holding none."""
    rounds = [bench.played.play([], [], bench.state)[0]]
    if bench.terms.privacy.sampling_rate < 1:
        rounds.append(bench.played.play(bench.units, [_NEVER] * len(bench.units), bench.state)[0])
    for total in rounds:
        need(total.shape == (bench.terms.dimension,) and not total.any(), "a step without units did not give zeros")
        if not bench.terms.is_private:
            continue
        still = int(np.count_nonzero(noisy(total, bench.terms, Randomness.from_os()) == 0))
        need(still < len(total) / 2, f"{still} of {len(total)} numbers of an empty step went out without noise")
    return Answer(f"{len(rounds)} empty steps")


def sampled(terms: Contract) -> Answer:
    """Four exact binomial tests on which units a few hundred real steps take."""
    return selftest_noise.sampling(terms, lambda count: Tallied(terms, count, _default(training.build)))


def divisor(terms: Contract) -> Answer:
    """One plain gradient step against the formula with q·units·n, bit for bit."""
    plain = msgspec.structs.replace(terms.training, optimizer="sgd", momentum=0.0)
    simple, privacy = msgspec.structs.replace(terms, training=plain), terms.privacy
    total = np.arange(terms.dimension, dtype=np.int64) - terms.dimension // 2
    moved = update_rule.step(update_rule.initial(simple), total, simple, applied=0).theta
    constant = privacy.sampling_rate * privacy.units * (1 if terms.is_local else terms.silos)
    gamma, rate = privacy.max_grad_norm / float(1 << privacy.lattice_bits), update_rule.learning_rate(plain, 0)
    wanted = 0.0 - (rate * ((total.astype(np.float64) * gamma) / constant))
    need(np.array_equal(moved, wanted), f"the update is not the sum divided by q·units·silos = {constant:g}")
    return Answer(f"{constant:g} = {privacy.sampling_rate:g} · {privacy.units}" + ("" if terms.is_local else f" · {terms.silos}"))


def chosen(root: Path) -> Subject:
    """The contract and model of the silo in ``root``; built-in ones where there is no silo, or it has joined nothing."""
    from silo.learning import tiny

    home = Home(root)
    if not home.config_path.exists() or home.contract() is None:
        made = tiny.model()
        return Subject(name="built-in contract and tiny model", terms=made[0], model=made[1], rows_tokens=Compute().rows_tokens)
    settings = reading.opened(root)[1]
    accepted = succession.at_work(home)[0]
    terms = accepted.terms
    device, precision = training.resolve(settings.compute)
    folder = membership.base_folder(terms, settings.model.path)
    state = load_progress(home, accepted).state
    if accepted.at(state.basis) is not accepted:  # before the basis round there are no factors of it: gradients are asked at others
        terms = basis_round.without(terms)
    bases = agreed_basis.of(home, terms, state)
    model = models.build(folder, terms, precision=precision, device=device, bases=bases)
    name = f"federation {terms.name}, {terms.model.name} on {device} in {model.precision}"
    name += "" if terms.is_private else "; it adds NO noise, so nothing about noise is asked"
    return Subject(name=name, terms=terms, model=model, rows_tokens=settings.compute.rows_tokens)


def _default(made: Callable[..., object]) -> Callable[[], Randomness]:
    """The source of random bits that ``made`` takes where nobody gives it another: the one that real rounds use."""
    source: Callable[[], Randomness] = inspect.signature(made).parameters["randomness"].default
    return source


def _answered(name: str, asks: str, question: Callable[[], Answer]) -> Check:
    try:
        answer = question()
    except SiloquyError as error:
        return Check(name=name, asks=asks, passed=False, found=error.message, false_alarm=getattr(error, "false_alarm", 0.0))
    except Exception as error:  # whatever a broken part raises: the check has failed, and the others go on
        return Check(name=name, asks=asks, passed=False, found=f"stopped with {type(error).__name__}", false_alarm=0.0)
    return Check(name=name, asks=asks, passed=True, found=answer.found, false_alarm=answer.false_alarm)
