# SPDX-License-Identifier: Apache-2.0
"""What a run of ``benchmarks.bases`` starts from: records, terms, noise, and the factors of a basis (then ``basis_training``).

Promised: sample, per-unit gradients, clip on the lattice, exact noise of each silo's share and update rule are the library's
own, with the terms that a contract of these figures has; epsilon is certified over the basis and all rounds together. Not here:
keys, masks, ledgers, several processes. Nothing is charged and the accuracy is exact, so this is for public data sets alone.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from aggregator import commands, defaults
from aggregator.simulation import dealing
from benchmarks import refresh
from privacy import base_model, sketch
from privacy.contract import Adapter, Aggregator, Contract, Member, Privacy, Sum, Task, Training
from privacy.dp import accounting, noise, ring
from privacy.dp.mechanism import LatticeGaussian
from privacy.errors import ConfigError
from privacy.federation import mechanism, ring_plan_at
from privacy.orthonormal import Factors, random_basis
from privacy.prg import Randomness
from privacy.update_rule import State
from silo.config import Compute
from silo.learning import basis, public_basis, records, tokens
from silo.learning import sketch as sketches
from silo.learning.classifier import Classifier
from silo.learning.lora_sb import matrix
from silo.learning.tokens import EncodedUnit
from silo.learning.training import resolve

SILOS, COLLUDERS = 3, 1
LENGTHS = {"ade": 48, "sst2": 40}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run; its fields are what makes it another one. ``records`` 0: all.

    ``basis``: as in benchmarks/bases.py, with ``:h`` for h heads, ``~N`` for a new one every N rounds, ``@K`` for one after K
    rounds of the head alone.
    """

    data: str
    task: str
    basis: str
    epsilon: float
    seed: int
    rounds: int
    batch: int
    records: int = 0
    rank: int = defaults.RANK
    basis_noise: float = defaults.BASIS_NOISE_MULTIPLIER
    basis_clip: float = defaults.BASIS_GRAD_NORM
    attempts: int = defaults.BASIS_ATTEMPTS
    width: int = 0
    public: str = ""
    learning_rate: float = defaults.LEARNING_RATE
    scale: float = defaults.SCALE
    model: str = base_model.MINILM
    precision: str = "auto"
    last_layers: int = defaults.LAST_LAYERS

    @property
    def named(self) -> refresh.Basis:
        """What the name of the basis says."""
        return refresh.named(self.basis)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A finished run. ``spent``: the certified epsilon of everything, infinite where none holds; ``largest``: the share of the
    held-out records that have the most frequent label, which a model that learned nothing may reach.
    """

    run: Run
    accuracy: float
    largest: float
    spent: float
    delta: float
    noise_multiplier: float
    dimension: int
    precision: str
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Dealt:
    """A task's records, encoded, and the terms of a federation on them but for its noise."""

    terms: Contract
    train: tuple[EncodedUnit, ...]
    held_out: tuple[EncodedUnit, ...]
    folder: Path


def terms_of(run: Run, labels: Sequence[str], units: int) -> tuple[Contract, Path]:
    """(A contract of three silos, noise not yet calibrated; the model's folder)."""
    model, modules, _ = commands.describe_model(run.model, (defaults.TARGETS,), last_layers=run.last_layers)
    rank = max(1, int(run.rank / math.sqrt(run.named.heads)))
    members = tuple(Member(id=k, name=f"silo-{k}", organisation="-", sign_key=f"{k:02x}" * 32) for k in range(1, SILOS + 1))
    made = Contract(
        format="siloquy/1", version=1, name="bases", expires="9999-12-31",
        task=Task(labels=tuple(labels), max_length=LENGTHS.get(run.task, 48)), model=model,
        adapter=Adapter(rank=rank, heads=run.named.heads, modules=tuple(modules), scale=run.scale),
        training=Training(
            rounds=run.rounds, learning_rate=run.learning_rate, warmup_rounds=defaults.warmup(run.rounds, 1),
            decay_rounds=defaults.decay(run.rounds),
        ),
        privacy=Privacy(
            units=units, sampling_rate=min(1.0, run.batch / (SILOS * units)), max_grad_norm=defaults.MAX_GRAD_NORM,
            noise_multiplier=1.0, epsilon=8.0, delta=dealing.default_delta(units, SILOS), colluders=COLLUDERS, lattice_bits=1,
        ),
        sum=Sum(), aggregator=Aggregator(name="hub", sign_key="ff" * 32, seal_key="00" * 1216), member=members,
    )  # fmt: skip
    return with_noise(made, 1.0), base_model.locate(run.model)


def at_step_size(terms: Contract, run: Run) -> Contract:
    """The terms with the run's own scale and learning rate, on which neither records nor noise depend."""
    return msgspec.structs.replace(
        terms, adapter=msgspec.structs.replace(terms.adapter, scale=run.scale),
        training=msgspec.structs.replace(terms.training, learning_rate=run.learning_rate),
    )  # fmt: skip


def with_noise(terms: Contract, sigma: float) -> Contract:
    """The terms with this noise multiplier and the finest lattice that fits it."""
    plan = ring_plan_at(terms, noise_multiplier=sigma, lattice_bits=None)
    private = msgspec.structs.replace(terms.privacy, noise_multiplier=sigma, lattice_bits=plan.lattice_bits)
    return msgspec.structs.replace(terms, privacy=private)


@functools.lru_cache(maxsize=4)
def dealt(run: Run) -> Dealt:
    """The records of ``run.task``; the first ``run.records`` of a shuffle that is the same for all runs."""
    with_labels = [json.loads(line) for line in lines(run, "train")]
    labels = sorted({str(row["label"]) for row in with_labels})
    count = min(run.records or len(with_labels), len(with_labels))
    terms, folder = terms_of(run, labels, dealing.rounded_up(-(-count // SILOS)))
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(with_labels))[:count]
    train = encoded([with_labels[index] for index in order], terms, folder)
    held_out = encoded([json.loads(line) for part in ("dev", "test") for line in lines(run, part)], terms, folder)
    return Dealt(terms=terms, train=train, held_out=held_out, folder=folder)


def lines(run: Run, part: str) -> list[bytes]:
    """The records of one part of a data set as they stand in its file; none where there is no such file."""
    path = Path(run.data) / run.task / f"{part}.jsonl.gz"
    return gzip.decompress(path.read_bytes()).splitlines() if path.exists() else []


def encoded(rows: Sequence[dict[str, Any]], terms: Contract, folder: Path) -> tuple[EncodedUnit, ...]:
    """The rows, single texts or premises with hypotheses, as units of one record each, by the silo's own reader and tokenizer."""

    def record(row: dict[str, Any]) -> dict[str, str]:
        texts = {"text": row["premise"], "text_pair": row["hypothesis"]} if terms.task.text_pair else {"text": row["text"]}
        return {**texts, "label": str(row["label"])}

    text = "".join(json.dumps(record(row)) + "\n" for row in rows)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "records.jsonl"
        path.write_text(text, encoding="utf-8")
        found = records.load(path, terms.task, terms.privacy, selection_key=bytes(32))
    return tuple(tokens.encode(found, folder, terms.task))


# --- The basis ----------------------------------------------------------------------------------------------------------


def layout_of(run: Run, here: Dealt) -> sketch.Layout:
    """The sketch of the contract's modules: ``run.width`` columns, as many as a draft asks for unless it says so."""
    names, known = here.terms.adapter.modules, base_model.describe(here.folder).linear
    return sketch.layout(names, [known[name] for name in names], run.width or defaults.BASIS_WIDTH * here.terms.adapter.vectors)


def basis_plan(run: Run, here: Dealt, layout: sketch.Layout) -> ring.Plan:
    """The integers of the basis step: every unit once."""
    return ring.plan(
        silos=SILOS, shares=here.terms.shares, dimension=layout.dimension, sampling_rate=1.0, units=here.terms.privacy.units,
        noise_multiplier=run.basis_noise,
    )  # fmt: skip


def basis_event(run: Run, here: Dealt) -> tuple[LatticeGaussian, ...]:
    """What the basis costs: as many attempts as a contract pays for, or nothing."""
    if run.named.kind != "private" or math.isinf(run.epsilon):
        return ()
    layout = layout_of(run, here)
    plan = basis_plan(run, here, layout)
    return (
        LatticeGaussian(
            sampling_rate=1.0, lattice_bits=plan.lattice_bits, share_variance=plan.share_variance, shares=here.terms.shares,
            dimension=layout.dimension, steps=run.attempts,
        ),
    )  # fmt: skip


def random_of(run: Run, here: Dealt, again: int) -> dict[str, Factors]:
    """The ``random`` factors of every module, made anew for the time ``again``; the first ones are those of time 0."""
    words = f"{here.terms.model.digest} {run.seed}" + (f" {again}" if again else "")
    seed, layout = hashlib.sha256(words.encode()).digest(), layout_of(run, here)
    shapes = zip(layout.modules, layout.shapes, strict=True)
    return {name: random_basis(seed, name, shape, here.terms.adapter.vectors) for name, shape in shapes}


def anew(run: Run, here: Dealt, again: int, model: Classifier) -> dict[str, Factors]:
    """The factors that ``~N`` goes on with: the next seed's, or the top singular vectors of the weights as they are now."""
    if run.named.kind == "random":
        return random_of(run, here, again)
    weights = {name: matrix(layer.base) for name, layer in zip(model.adapter.names, model.adapter, strict=True)}
    vectors = here.terms.adapter.vectors
    return {name: basis.weights_basis(weight.double().cpu().numpy(), vectors) for name, weight in weights.items()}


def bases_of(run: Run, here: Dealt, cache: Path, compute: Compute, state: State | None = None) -> dict[str, Factors] | None:
    """The factors of every module; None for ``weights``, which the model computes itself.

    ``state``: its head takes the place of the public one in the gradients of ``private`` and ``raw``; None: the public head.
    """
    if run.named.kind == "weights":
        return None
    if run.named.kind == "random":
        return random_of(run, here, 0)
    layout = layout_of(run, here)
    vectors = here.terms.adapter.vectors
    device, precision = resolve(compute)
    how: Any = {"max_grad_norm": run.basis_clip, "rows_tokens": compute.rows_tokens}
    if run.named.kind == "public":
        return public_basis.public_factors(
            here.folder, here.terms, layout, borrowed(run, here), rank=vectors, precision=precision, device=device, **how
        )  # fmt: skip
    plan = basis_plan(run, here, layout)

    def summed() -> NDArray[np.int64]:
        model = sketches.build(here.folder, here.terms, layout, precision=precision, device=device)
        if state is not None:
            refresh.put_head(model, state.theta)
        return sketches.Sketch(here.terms, model, here.train, plan=plan, **how).sum(here.train)

    total = kept(run, layout, cache, summed) if state is None else summed()
    if run.named.kind == "private" and not math.isinf(run.epsilon):
        total = total + shares_of_noise(layout.dimension, plan.share_variance)
    return sketch.factors_of(total.astype(np.float64), layout, vectors)


def kept(run: Run, layout: sketch.Layout, cache: Path, compute: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64]:
    """The noiseless sum, which is the same for all seeds and epsilons: from ``cache`` where an earlier run left it there."""
    what = (run.data, run.task, run.records, run.basis_clip, run.basis_noise, run.model, run.precision, layout)
    path = cache / f"sketch-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part.npy")
        np.save(part, compute(), allow_pickle=False)
        part.replace(path)
    found: NDArray[np.int64] = np.load(path, allow_pickle=False)
    return found


def borrowed(run: Run, here: Dealt) -> list[EncodedUnit]:
    """Records of the task ``run.public``, their labels matched to this task's by place; what is beyond or too long is left out."""
    other = dealt(replace(run, task=run.public, basis="weights", records=run.records))
    most, longest = len(here.terms.task.labels), here.terms.task.max_length
    return [unit for unit in other.train if all(label < most and len(ids) <= longest for ids, _, label in unit.rows)]


def shares_of_noise(dimension: int, variance: int) -> NDArray[np.int64]:
    """The sum ``(dimension,)`` of every silo's share, each drawn by itself as in a federation."""
    drawn = [noise.discrete_gaussian(dimension, variance, Randomness.from_os()) for _ in range(SILOS)]
    total: NDArray[np.int64] = sum(drawn[1:], start=drawn[0])
    return total


# --- Its plan -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def calibrated(terms: Contract, before: tuple[LatticeGaussian, ...], epsilon: float) -> tuple[Contract, float]:
    """(The terms with so little noise that basis and rounds together cost at most ``epsilon``, to a thousandth; their cost).

    Raises:
        ConfigError: the basis alone costs more.
    """
    delta = terms.privacy.delta

    def cost(sigma: float) -> float:
        return accounting.certify([*before, mechanism(with_noise(terms, sigma))], delta).epsilon

    if before and accounting.certify(before, delta).epsilon >= epsilon:
        raise ConfigError("the basis alone costs that epsilon", hint="a larger --basis-noise")
    low, high = 0.5, 1.0
    while (least := cost(high)) > epsilon:
        low, high = high, 2 * high
    most = cost(low)
    while high > 1.001 * low and most > epsilon:
        # A straight line in logarithms, a little on the safe side, so that the next one closes in from below.
        share = math.log(most / epsilon) / math.log(most / least)
        middle = min(max(low * (high / low) ** share * 1.0003, low * 1.0005), high / 1.0005)
        if (found := cost(middle)) <= epsilon:
            high, least = middle, found
        else:
            low, most = middle, found
    if most <= epsilon:
        high, least = low, most
    return with_noise(terms, high), least


@functools.lru_cache(maxsize=64)
def planned(run: Run) -> tuple[Contract, float]:
    """(Terms with noise, epsilon of everything) of a run, the same for all seeds; without noise the plain terms, and infinity."""
    here = dealt(data_of(run))
    if math.isinf(run.epsilon):
        return at_step_size(here.terms, run), math.inf
    terms, spent = calibrated(here.terms, basis_event(run, here), run.epsilon)
    return at_step_size(terms, run), math.inf if run.named.kind == "raw" else spent


def data_of(run: Run) -> Run:
    """The part of a run that its records and terms depend on: one key for all epsilons and seeds."""
    return replace(
        run, epsilon=8.0, seed=0, basis=f"weights:{run.named.heads}", basis_noise=1.0, basis_clip=1.0, width=0, public="",
        scale=defaults.SCALE, learning_rate=defaults.LEARNING_RATE,
    )  # fmt: skip
