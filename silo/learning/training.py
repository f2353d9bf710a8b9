# SPDX-License-Identifier: Apache-2.0
"""A silo's contribution to one step: sample units, one gradient each, clip on the lattice, sum integers.

Built once per process, called with each round's state. Promised: what comes out is the clamped integer sum of a fresh
Poisson sample, each unit's part a proved L2 norm of at most 2^p, and a function of that unit and the state alone as far as the
start-up test shows it (assumption A1). Nothing here logs, prints or stores anything that depends on a record: not the sample,
not a loss, not a norm. Not promised: that the time a step takes is independent of the records.
"""

from __future__ import annotations

import copy
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privacy.dp import ring
from privacy.dp.lattice import sum_lattice, to_lattice
from privacy.errors import ConfigError, MachineError
from privacy.federation import Contract, ring_plan
from privacy.orthonormal import Factors
from privacy.prg import Randomness
from privacy.update_rule import State
from silo import membership
from silo.config import Compute, Config
from silo.home import Home
from silo.learning import models, prefix, records, tokens
from silo.learning.adapted import Adapted
from silo.learning.gradients import PhysicalBatch, RowsFor, Tape, as_batch, bucket, buckets, length_of, pack, unit_gradients
from silo.learning.invariance import check_invariance, mixed, probe, probe_state
from silo.learning.sampling import Words, poisson
from silo.learning.tokens import EncodedUnit

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one step cost on this machine, and so all steps of a round. For its owner's eyes: it depends on the records."""

    seconds: float
    seconds_per_round: float
    peak_memory_bytes: int
    device: str
    precision: str


class Contribution:
    """The callable of ``silo.round``: a state in, the clamped noiseless integer sum ``(d,)`` of one private step out.

    Args:
        terms: the contract.
        model: the model of these terms.
        units: this silo's encoded units.
        rows_tokens: tokens in one physical batch: memory and speed. Another value may change the last bits of any unit's integers
            (other shapes, other kernels); within a run it is a constant of the machine.
        randomness: gives a fresh source for every attempt's sample.
        prefix_bytes, prefix_folder: how much of what the frozen layers below the adapters give is kept on disk, and where
            (silo.learning.prefix); 0: nothing. It changes no bit, which is tested at the start, and where it would it is left out.

    Formal guarantees:
        - *Fresh Poisson sample*: every call draws its own sample with its own source (silo.learning.sampling.poisson), never cut.
        - *Bounded*: each sampled unit adds a vector of L2 norm at most 2^p, proved on integers (privacy.dp.lattice.to_lattice).
        - *Its own*: the vector of a unit is the same bits in whatever sample it falls. Tested on this machine at the start
          (silo.learning.invariance); where the slot in a batch matters, units are computed one at a time.
        - *Public layout*: what is tested at the start, and the layout that follows from it, depend on no unit.
        - *Clamped*: the sum is clamped to the contract's ±Q, and nothing else happens to it.
        - *Empty sample*: zeros, by the same path.

    Raises:
        ConfigError: the model has fewer positions than a record may have tokens.
        PrivacyRefusal: batch-mates or earlier batches change a unit's gradient.
        MachineError: the model does not respond to its own R.
    """

    def __init__(
        self,
        terms: Contract,
        model: Adapted,
        units: Sequence[EncodedUnit],
        *,
        rows_tokens: int,
        randomness: Callable[[], Words] = Randomness.from_os,
        prefix_bytes: int = 0,
        prefix_folder: Path | None = None,
    ) -> None:
        self.model = model
        self._terms = terms
        self._units = tuple(units)
        self._randomness = randomness
        self._tape = Tape(model.dimension)
        most, longest = terms.privacy.max_records_per_unit, terms.task.max_length
        self._rows_for = rows_for(rows_tokens, most)
        if model.frozen is not None:
            model.frozen.drop()  # what was kept for another layout would stand in for what is tested here
        check_responds(model, longest)
        try:
            self._together = check_invariance(model, self._rows_for, max_length=longest, most=most)
        except IndexError as error:  # learned positions end where they end
            raise ConfigError(
                f"the base model cannot take {longest} tokens", hint="agree on a smaller max_length", code="too-long"
            ) from error
        if not self._together:
            self._rows_for = rows_for(1, most)
        if model.frozen is not None and prefix_bytes and (self._together or most == 1):  # else equal records differ by their slot
            model.frozen.keep(prefix_folder, prefix_bytes)
            with probe_state(model):
                if not prefix.agrees(model.frozen, self._gradient, self._probes(longest, most)):
                    model.frozen.drop()

    @property
    def basis_digest(self) -> bytes:
        """What silos compare in an epoch's notes: digest of the factors."""
        return self.model.basis_digest

    @property
    def unit_ids(self) -> tuple[str, ...]:
        """The ids of all units that a sample is drawn from. They never leave the silo."""
        return tuple(unit.id for unit in self._units)

    def on(self, terms: Contract, units: Sequence[EncodedUnit]) -> Self:
        """The same model and layout for other ``units`` and other noise; what was tested at the start is not tested again.

        Raises:
            ConfigError: ``terms`` has another task, model, adapter or bound on the records of a unit.
        """
        mine, theirs = ((each.task, each.model, each.adapter, each.privacy.max_records_per_unit) for each in (self._terms, terms))
        if mine != theirs:
            raise ConfigError("another task, model or adapter needs a start of its own", hint="build a contribution for it")
        other = copy.copy(self)
        other._terms, other._units = terms, tuple(units)
        return other

    def __call__(self, state: State) -> NDArray[np.int64]:
        """The clamped noiseless sum ``(d,)`` int64 of one step at ``state``.

        Raises:
            MachineError: the model does not hold the state it was given.
        """
        self._load(state)
        chosen = poisson(len(self._units), self._terms.privacy.sampling_rate, self._randomness())
        return self.sum([self._units[index] for index in chosen])

    def sum(self, units: Sequence[EncodedUnit]) -> NDArray[np.int64]:
        """The clamped integer sum ``(d,)`` of these units' clipped gradients at the model's present state."""
        plan, privacy = ring_plan(self._terms), self._terms.privacy
        total = torch.zeros(self.model.dimension, dtype=torch.int64, device=self.model.device)
        for rows in self._gradients(units):
            total += sum_lattice(to_lattice(rows, max_grad_norm=privacy.max_grad_norm, lattice_bits=privacy.lattice_bits))
        return ring.clamp(total.cpu().numpy(), plan)

    def dry_run(self, state: State) -> Timing:
        """One step on this silo's own units, whose result is thrown away. Nothing is released, so nothing is charged."""
        begun = time.perf_counter()
        self(state)
        seconds = time.perf_counter() - begun
        device = self.model.device
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        return Timing(
            seconds=seconds,
            seconds_per_round=seconds * self._terms.training.steps_per_round,
            peak_memory_bytes=peak,
            device=str(device),
            precision=self.model.precision,
        )

    def _load(self, state: State) -> None:
        self.model.write(state.theta)
        if not np.array_equal(self.model.read(), state.theta.astype(np.float32).astype(np.float64)):
            raise MachineError(
                "the model does not hold the state it was given", hint="restart the silo; report the device", code="not-moved"
            )

    def _gradients(self, units: Sequence[EncodedUnit]) -> Iterator[Tensor]:
        """The unclipped gradients of ``units``, some rows ``(·, d)`` float32 at a time, a view that the next overwrites."""
        return map(self._gradient, self._batches(self._with_prefix(units)))

    def _gradient(self, batch: PhysicalBatch) -> Tensor:
        return unit_gradients(self.model, batch, self._tape)

    def _with_prefix(self, units: Sequence[EncodedUnit]) -> Sequence[EncodedUnit]:
        """``units``, first those whose prefix is kept; for the others it is computed before, as long as there is room."""
        kept, longest = self.model.frozen, self._terms.task.max_length
        if kept is None or not kept.is_kept:
            return units

        def is_missing(unit: EncodedUnit) -> bool:
            return not kept.has(unit, length_of(unit, longest))

        for batch in self._batches(list(filter(is_missing, units)) if kept.room else ()):
            self.model.keep_frozen(batch.to(self.model.device))
        return sorted(units, key=is_missing)

    def _probes(self, longest: int, most: int) -> Iterator[tuple[PhysicalBatch, PhysicalBatch]]:
        """Public units in pairs of batches of opposite orders, for every length that packing can give."""
        for length in buckets(longest):
            rows = self._rows_for(length)
            units = mixed(self.model, length, rows, most)[0] if self._together else [probe(self.model, [length], seed=0)]
            yield as_batch(units, length, rows), as_batch(units[::-1], length, rows)

    def _batches(self, units: Sequence[EncodedUnit]) -> Iterator[PhysicalBatch]:
        longest = self._terms.task.max_length
        if self._together:
            return pack(units, self._rows_for, max_length=longest)
        return (batch for unit in units for batch in pack([unit], self._rows_for, max_length=longest))


def build(
    home: Home,
    config: Config,
    terms: Contract,
    *,
    randomness: Callable[[], Words] = Randomness.from_os,
    bases: Mapping[str, Factors] | None = None,
) -> Contribution:
    """The contribution of the silo in ``home``: model verified by digest, records read and checked, layout tested.

    ``bases``: the factors of each module, where they came out of a gradient (``silo.learning.models.build``).

    Raises:
        ConfigError: the model or the records do not fit the contract.
        PrivacyRefusal, MachineError: as :class:`Contribution`; or the device is not there.
    """
    folder = membership.base_folder(terms, config.model.path)
    units = records.load(Path(config.records.path), terms.task, terms.privacy, selection_key=home.selection_key)
    records.check_enough(units, terms.privacy)
    device, precision = resolve(config.compute)
    model = models.build(folder, terms, precision=precision, device=device, bases=bases)
    encoded = tokens.encode(units, folder, terms.task)
    return Contribution(
        terms, model, encoded, rows_tokens=config.compute.rows_tokens, randomness=randomness,
        prefix_bytes=int(config.compute.prefix_cache_gib * prefix.GIB), prefix_folder=home.root,
    )  # fmt: skip


def resolve(compute: Compute) -> tuple[torch.device, Precision]:
    """The device and precision to use, and torch set up for them: its threads, and on CUDA deterministic kernels or an error.

    ``auto`` takes CUDA where there is one, and bfloat16 where the hardware multiplies it natively.

    Raises:
        MachineError: CUDA is asked for and there is none.
    """
    torch.set_num_threads(compute.threads)
    found = torch.cuda.is_available()
    if compute.device == "cuda" and not found:
        raise MachineError("[compute] device is cuda, torch finds no CUDA device", hint='set device = "auto"', code="no-device")
    device = torch.device("cuda" if found and compute.device != "cpu" else "cpu")
    if device.type == "cuda":
        # cuBLAS reads it when it is first used, and without it its sums differ from run to run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if compute.precision != "auto":
        return device, compute.precision
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else native_bfloat16(_cpu_flags())
    return device, "bfloat16" if native else "float32"


def native_bfloat16(cpu_flags: str) -> bool:
    """Whether a CPU with these flags (/proc/cpuinfo) multiplies bfloat16 itself; elsewhere it is emulated and slower."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_flags.split()))


def rows_for(rows_tokens: int, fewest: int) -> RowsFor:
    """The constant number of rows of a physical batch of length L: ``rows_tokens``/L, at least ``fewest``."""
    return lambda length: max(fewest, rows_tokens // length)


def check_responds(model: Adapted, max_length: int) -> None:
    """Return if every R of ``model`` changes its output on a public record, and has a gradient. The model's state is put back.

    An adapter whose hooks hold stale parameters trains on, spends budget, and never changes the model (opacus #820).

    Raises:
        MachineError: R, or one of the matrices, does nothing.
    """
    length = bucket(min(16, max_length), max_length)
    batch = as_batch([probe(model, [length], seed=0)], length, 1)
    before = model.read()
    nudged = 0.05 * np.random.Generator(np.random.PCG64(1)).standard_normal(model.dimension)
    matrices = [layer.R.numel() for layer in model.adapter]
    without = nudged.copy()
    without[: sum(matrices)] = 0.0
    try:
        model.write(without)
        with torch.no_grad():
            logits = model(batch.to(model.device))
        model.write(nudged)
        with torch.no_grad():
            moved = not torch.equal(model(batch.to(model.device)), logits)
        parts = dict(zip(model.adapter.names, matrices, strict=True))
        if head := model.dimension - sum(matrices):
            parts["the head"] = head
        blocks = torch.split(unit_gradients(model, batch, Tape(model.dimension)), list(parts.values()), dim=1)
    finally:
        model.write(before)
    still = [name for name, block in zip(parts, blocks, strict=True) if not bool(block.any())]
    if (matrices and not moved) or still:
        raise MachineError(
            f"the model does not respond to its adapters: {len(still)} of {len(blocks)} parts have no gradient"
            + (f", the first is {still[0]}" if still else ""),
            hint="training would spend budget and learn nothing; leave such modules out of adapter.modules",
            code="not-moved",
        )


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))), "")
