# SPDX-License-Identifier: Apache-2.0
"""How good a model is on records of one's own, and what adapters of a classifier must beat: a private linear head alone.

The figures depend on records and are exact: printing them to the owner of the records is fine, sending them is a release
that no ledger here charges. ``private_head`` exists for the simulator, where one machine holds all data anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privacy import update_rule
from privacy.dp import noise
from privacy.dp.lattice import sum_lattice, to_lattice
from privacy.errors import ConfigError
from privacy.federation import Contract, ring_plan, ring_plan_at
from privacy.orthonormal import Factors
from privacy.prg import Randomness
from privacy.update_rule import State
from silo import membership
from silo.config import Compute
from silo.learning import models, records, tokens
from silo.learning.adapted import Adapted
from silo.learning.causal import CausalModel
from silo.learning.classifier import Classifier
from silo.learning.gradients import DUMMY, PhysicalBatch, pack
from silo.learning.records import Unit
from silo.learning.sampling import poisson
from silo.learning.tokens import EncodedUnit
from silo.learning.training import resolve, rows_for

HEAD_RATES = (1.0, 4.0, 16.0)
"""Multiples of the contract's learning rate that ``private_head`` tries."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model and its tokenizer, ready to be given states and records. Built once, by ``open_bench``."""

    terms: Contract
    model: Adapted
    folder: Path
    rows_tokens: int

    def units(self, path: Path) -> list[EncodedUnit]:
        """``records`` in token numbers."""
        return tokens.encode(self.records(path), self.folder, self.terms.task)

    def records(self, path: Path) -> tuple[Unit, ...]:
        """Every record of ``path`` as a unit of its own: an evaluation counts records and keeps all of them."""
        each = msgspec.structs.replace(self.terms.privacy, unit=records.RECORD_AS_UNIT, max_records_per_unit=1)
        return records.load(path, self.terms.task, each, selection_key=bytes(32))


    @property
    def classifier(self) -> Classifier:
        """The model, which is to be one that classifies. Raises ConfigError where it completes texts."""
        if not isinstance(self.model, Classifier):
            raise ConfigError(
                f"this is for text classification, the contract's task is {self.terms.task.kind}",
                hint="a causal language model has no head and no labels", code="task-kind",
            )  # fmt: skip
        return self.model


    @property
    def causal(self) -> CausalModel:
        """The model, which is to be one that completes texts. Raises ConfigError where it classifies."""
        if not isinstance(self.model, CausalModel):
            raise ConfigError(
                f"this is for causal language models, the contract's task is {self.terms.task.kind}",
                hint="a classifier has labels, and no likelihood of a response", code="task-kind",
            )  # fmt: skip
        return self.model


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How likely a causal language model finds responses: ``loss`` is the mean over all their ``tokens``, in nats."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where it is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """Frozen features of privacy units: row i ``(hidden,)`` float32 has ``labels[i]`` and belongs to unit ``owner[i]``."""

    features: Tensor
    labels: Tensor
    owner: Tensor
    count: int


def open_bench(
    terms: Contract, *, model: str = "", compute: Compute | None = None, bases: Mapping[str, Factors] | None = None
) -> Bench:
    """The contract's model, verified by digest, on this machine; ``bases`` as for ``silo.learning.training.build``.

    Raises:
        ConfigError: the base model is missing or another.
        MachineError: the device is not there.
    """
    how = compute or Compute()
    folder = membership.base_folder(terms, model)
    device, precision = resolve(how)
    built = models.build(folder, terms, precision=precision, device=device, bases=bases)
    return Bench(terms=terms, model=built, folder=folder, rows_tokens=how.rows_tokens)


def measure(bench: Bench, state: State | None, path: Path, suffix: str) -> dict[str, float]:
    """What ``silo eval`` states of the model at ``state`` on the records in ``path``, each figure's name ending with ``suffix``.

    ``accuracy`` of a classifier; of a causal language model ``loss`` and ``perplexity`` per response token.
    """
    if not bench.terms.task.is_causal:
        return {f"accuracy_{suffix}": evaluate(bench, state, path)}
    found = likelihood(bench, state, path)
    return {f"loss_{suffix}": found.loss, f"perplexity_{suffix}": found.perplexity}


def likelihood(bench: Bench, state: State | None, path: Path) -> Likelihood:
    """The mean loss per response token over the records in ``path``, at ``state``; None is the base model.

    Longer responses count for more here than in training, where each record's mean counts once: this is the usual perplexity.

    Raises:
        ConfigError: the task is another.
    """
    model = bench.causal
    model.write((state or update_rule.initial(bench.terms)).theta)
    total, count = 0.0, 0
    for batch in _batches(bench.units(path), bench.terms, bench.rows_tokens):
        with torch.no_grad():
            sums, counts = model.row_sums(batch.to(model.device))
        real = batch.unit != DUMMY
        total += float(sums.double().cpu()[real].sum())
        count += int(counts.cpu()[real].sum())
    return Likelihood(loss=total / count, tokens=count)


def evaluate(bench: Bench, state: State | None, path: Path) -> float:
    """The share of the records in ``path`` that the model at ``state`` classifies rightly; None is the state before round 1.

    At the initial state the head is zero: all logits are equal, and the first label is the answer to everything.
    """
    model, units = bench.classifier, bench.units(path)
    theta = (state or update_rule.initial(bench.terms)).theta
    if not theta.any():  # equal logits need no pass through the encoder
        return sum(label == 0 for unit in units for _, _, label in unit.rows) / sum(len(unit.rows) for unit in units)
    model.write(theta)
    return accuracy(model, units, terms=bench.terms, rows_tokens=bench.rows_tokens)


def accuracy(model: Classifier, units: Sequence[EncodedUnit], *, terms: Contract, rows_tokens: int) -> float:
    """The share of all records in ``units`` whose largest logit is their label; the first of equal logits counts."""
    right = total = 0
    for batch in _batches(units, terms, rows_tokens):
        with torch.no_grad():
            guesses = model(batch.to(model.device)).argmax(dim=1).cpu()
        real = batch.unit != DUMMY
        right += int((guesses == batch.labels)[real].sum())
        total += int(real.sum())
    return right / total if total else 0.0


def private_head(
    bench: Bench, train: Sequence[Path], held_out: Path, *, randomness: Callable[[], Randomness] = Randomness.from_os
) -> float:
    """Held-out accuracy of a linear head alone, trained privately on the frozen encoder over the records of all silos pooled.

    The mechanism is the contract's: the same sampling rate, rounds, clipping norm, lattice, update rule, and the noise of the
    plan's guarantee (σ against insiders); only the trainables are fewer. So it costs the same epsilon, and what is above it
    is what the adapters add. Of a contract in local mode the head is trained in *joint* mode all the same: one step on all records
    for every step that a silo takes alone, with σ in the sum and not in each silo, at the same epsilon. The step size that suits
    adapters may not suit a head: every multiple in ``HEAD_RATES`` is tried and the best on the held-out records is given, which
    flatters the head; each costs that epsilon once more.
    **Charged to no ledger**: it is for the simulator, whose one machine holds all data. On real records every one of them
    would have to be declared, reserved and composed like any other run.

    Formal guarantees of each step: a unit enters by its own coin of the contract's rate, and every coordinate of the clipped
    integer sum gets h shares of the plan's noise (none where the contract has no differential privacy). What is given for the best
    of them is exact and covered by no epsilon.

    Args:
        train: the record files of all silos; units are kept apart by file.
    """
    pooled = pool_features(bench, [unit for place, path in enumerate(train) for unit in _training_units(bench, path, place)])
    test = pool_features(bench, bench.units(held_out))
    return max(_head_alone(_head_terms(bench.terms, times), pooled, test, randomness) for times in HEAD_RATES)


def _head_terms(terms: Contract, times: float) -> Contract:
    """The contract without adapters, in joint mode, its learning rate multiplied."""
    terms = _joint(terms)
    training = msgspec.structs.replace(terms.training, learning_rate=terms.training.learning_rate * times)
    return msgspec.structs.replace(terms, training=training, adapter=msgspec.structs.replace(terms.adapter, modules=()))


def _joint(terms: Contract) -> Contract:
    """The joint contract with as many steps, at the same epsilon; a local one's lattice is chosen anew, for a sum of all silos."""
    if terms.training.mode == "joint":
        return terms
    own, each = terms.training, terms.training.steps_per_round
    training = msgspec.structs.replace(
        own, mode="joint", steps_per_round=1, rounds=own.rounds * each, warmup_rounds=own.warmup_rounds * each,
        decay_rounds=own.decay_rounds * each,
    )  # fmt: skip
    joint = msgspec.structs.replace(terms, training=training)
    plan = ring_plan_at(joint, noise_multiplier=terms.privacy.noise_multiplier, lattice_bits=None)
    return msgspec.structs.replace(joint, privacy=msgspec.structs.replace(terms.privacy, lattice_bits=plan.lattice_bits))


def _head_alone(terms: Contract, pooled: Pooled, test: Pooled, randomness: Callable[[], Randomness]) -> float:
    """Accuracy on ``test`` of a head trained privately on ``pooled``."""
    state = update_rule.initial(terms)
    for _ in range(terms.training.rounds):
        state = _head_step(terms, pooled, state, randomness)
    weight, bias = _head(terms, state)
    guesses = (test.features @ weight.T + bias).argmax(dim=1)
    return float((guesses == test.labels).double().mean())


def pool_features(bench: Bench, units: Sequence[EncodedUnit]) -> Pooled:
    """The head's inputs for all records, at the initial state: one pass through the frozen encoder."""
    model = bench.classifier
    model.write(update_rule.initial(bench.terms).theta)
    features, labels, owner, seen = [], [], [], 0
    for batch in _batches(units, bench.terms, bench.rows_tokens):
        with torch.no_grad():
            rows = model.features(batch.to(model.device)).cpu()
        real = batch.unit != DUMMY
        features.append(rows[real])
        labels.append(batch.labels[real])
        owner.append(batch.unit[real] + seen)
        seen = int(owner[-1].max()) + 1
    return Pooled(features=torch.cat(features), labels=torch.cat(labels), owner=torch.cat(owner), count=seen)


def head_gradients(pooled: Pooled, weight: Tensor, bias: Tensor, chosen: Sequence[int]) -> Tensor:
    """The cross-entropy gradients ``(units, labels·hidden + labels)`` float32 of the chosen units, each summed over its rows."""
    position = torch.full((pooled.count,), -1, dtype=torch.int64)
    position[list(chosen)] = torch.arange(len(chosen))
    rows = torch.nonzero(position[pooled.owner] >= 0).squeeze(1)
    inputs = pooled.features[rows]
    errors = torch.softmax(inputs @ weight.T + bias, dim=1)  # (rows, labels)
    errors[torch.arange(len(rows)), pooled.labels[rows]] -= 1.0
    flat = torch.cat([(errors[:, :, None] * inputs[:, None, :]).flatten(1), errors], dim=1)
    totals = torch.zeros(len(chosen), flat.shape[1], dtype=torch.float32)
    return totals.index_add_(0, position[pooled.owner[rows]], flat)


def _head_step(terms: Contract, pooled: Pooled, state: State, randomness: Callable[[], Randomness]) -> State:
    """One private step of the head on the pooled units."""
    plan, privacy = ring_plan(terms), terms.privacy
    chosen = poisson(pooled.count, privacy.sampling_rate, randomness()).tolist()
    rows = head_gradients(pooled, *_head(terms, state), chosen)
    total = sum_lattice(to_lattice(rows, max_grad_norm=privacy.max_grad_norm, lattice_bits=plan.lattice_bits)).numpy()
    clamped = np.clip(total, -plan.clamp * terms.silos, plan.clamp * terms.silos)
    if not terms.is_private:
        return update_rule.advance(state, clamped, terms)
    # h shares of the plan's noise: what the guarantee counts on; a real sum holds the colluders' shares too.
    drawn = noise.discrete_gaussian(terms.dimension, plan.share_variance * terms.shares, randomness())
    return update_rule.advance(state, clamped + drawn, terms)


def _head(terms: Contract, state: State) -> tuple[Tensor, Tensor]:
    """(weight ``(labels, hidden)``, bias ``(labels,)``) float32 of a state with no adapters."""
    labels, hidden = len(terms.task.labels), terms.model.hidden_size
    theta: NDArray[np.float32] = state.theta.astype(np.float32)
    return torch.from_numpy(theta[: labels * hidden].reshape(labels, hidden)), torch.from_numpy(theta[labels * hidden :])


def _training_units(bench: Bench, path: Path, place: int) -> list[EncodedUnit]:
    """The units of one silo's file under the contract's own terms; the selection key is the place, public here."""
    terms = bench.terms
    units = records.load(path, terms.task, terms.privacy, selection_key=place.to_bytes(32, "big"))
    return tokens.encode(units, bench.folder, terms.task)


def _batches(units: Sequence[EncodedUnit], terms: Contract, rows_tokens: int) -> list[PhysicalBatch]:
    most = max((len(unit.rows) for unit in units), default=1)
    return list(pack(units, rows_for(rows_tokens, most), max_length=terms.task.max_length))
