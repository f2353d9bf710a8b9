# SPDX-License-Identifier: Apache-2.0
"""One run of ``benchmarks.bases``: a joint federation of three silos in this process, and the accuracy at the end.

A model is built, and tested as every silo tests it, once for all runs that differ in basis, noise and seed alone: each gets its
own factors, while what the frozen layers below gave the records stays.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks import refresh
from benchmarks.basis_runs import Dealt, Row, Run, anew, bases_of, data_of, dealt, planned, shares_of_noise
from privacy import update_rule
from privacy.contract import Contract
from privacy.errors import ConfigError
from privacy.federation import ring_plan
from privacy.orthonormal import Factors
from privacy.update_rule import State
from silo.config import Compute
from silo.learning import classifier, evaluation, prefix
from silo.learning.classifier import Classifier
from silo.learning.tokens import EncodedUnit
from silo.learning.training import Contribution, resolve


def largest_class(units: Sequence[EncodedUnit]) -> float:
    """The share of the most frequent label."""
    labels = [label for unit in units for _, _, label in unit.rows]
    return max(map(labels.count, set(labels))) / len(labels)


@functools.lru_cache(maxsize=6)
def started(here: Dealt, scale: float, compute: Compute) -> tuple[Contribution, Mapping[str, Factors]]:
    """(A model on these records, its own ``weights`` factors); its records' frozen layers are computed once."""
    adapter = msgspec.structs.replace(here.terms.adapter, scale=scale)
    contribution = fresh(here, msgspec.structs.replace(here.terms, adapter=adapter), compute, None)
    model = contribution.model
    factors = {
        name: (layer.B.numpy().copy(), layer.A.numpy().copy())
        for name, layer in zip(model.adapter.names, model.adapter, strict=True)
    }
    return contribution, factors


def fresh(here: Dealt, terms: Contract, compute: Compute, bases: Mapping[str, Factors] | None) -> Contribution:
    """A model of its own on these records."""
    device, precision = resolve(compute)
    model = classifier.build(here.folder, terms, bases=bases, precision=precision, device=device)
    return Contribution(terms, model, here.train, rows_tokens=compute.rows_tokens, prefix_bytes=16 * prefix.GIB)


def trained(run: Run, here: Dealt, terms: Contract, cache: Path, compute: Compute) -> Classifier:
    """The model after all rounds. It is the next run's too, unless its basis was made anew."""
    name = run.named
    step = functools.partial(stepped, terms=terms, noised=not math.isinf(run.epsilon))
    state = update_rule.initial(terms)
    if name.after:
        state = refresh.head_first(fresh(here, refresh.without_adapters(terms), compute, None), state, name.after, step)
    bases = bases_of(run, here, cache, compute, state if name.after else None)
    if name.every:
        contribution = fresh(here, terms, compute, bases)
    else:
        begun, own = started(here, terms.adapter.scale, compute)
        refresh.rebase(begun.model, bases or own)
        contribution = begun.on(terms, here.train)
    for done in range(name.after, terms.training.rounds):
        if refresh.is_due(name.every, done):
            state = refresh.refreshed(contribution.model, state, functools.partial(anew, run, here, done // name.every))
        state = step(contribution, state)
    contribution.model.write(state.theta)
    return contribution.model


def stepped(summed: Callable[[State], NDArray[np.int64]], state: State, *, terms: Contract, noised: bool, still: int = 0) -> State:
    """The state after one round of all silos. ``still``: how many of the first trainables stay as they are, whatever is released.

    Raises:
        ConfigError: the sum is beyond what one silo's clamp would let through.
    """
    plan, total = ring_plan(terms), summed(state)
    if int(np.abs(total).max()) >= plan.clamp:
        raise ConfigError("a sum of all silos reached the clamp of one", hint="a smaller --batch")
    if noised:
        total = total + shares_of_noise(terms.dimension, plan.share_variance)
    total[:still] = 0
    return update_rule.advance(state, total, terms)


def measured(run: Run, cache: Path, compute: Compute) -> Row:
    """The run, on this device and in physical batches of so many tokens; its own precision counts."""
    begun = time.perf_counter()
    here = dealt(data_of(run))
    terms, spent = planned(replace(run, seed=0))
    compute = msgspec.structs.replace(compute, precision=run.precision)
    model = trained(run, here, terms, cache, compute)
    accuracy = evaluation.accuracy(model, here.held_out, terms=terms, rows_tokens=compute.rows_tokens)
    return Row(
        run=run, accuracy=accuracy, largest=largest_class(here.held_out),
        spent=spent, delta=terms.privacy.delta, dimension=terms.dimension, precision=model.precision,
        noise_multiplier=0.0 if math.isinf(run.epsilon) else terms.privacy.noise_multiplier, seconds=time.perf_counter() - begun,
    )  # fmt: skip
