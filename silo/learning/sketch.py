# SPDX-License-Identifier: Apache-2.0
"""A silo's contribution to the basis step: every unit once, its gradient sketched, clipped on the lattice, summed as integers.

Each named layer gets two zero pairs, y = base(x) + B′(Ωᵀx) + Ψ(A′x) with B′ = A′ = 0, whose gradients are the sketch GΩ and ΨᵀG of
the gradient G of its weight; or one zero matrix W′ where G itself is no larger (``privacy.sketch.Layout``). So the per-unit
machinery of training is used as it is, and its invariances hold. Promised: the encoder computes what it computes without them; the
head is ``privacy.sketch.head_of``, public and for this pass alone. Not promised: anything about noise, which is the round's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from privacy.dp import ring
from privacy.dp.lattice import sum_lattice, to_lattice
from privacy.errors import ConfigError, MachineError
from privacy.federation import Contract
from privacy.sketch import Directions, Layout, directions_of, head_of
from silo import membership
from silo.config import Config
from silo.home import Home
from silo.learning import classifier, records, tokens
from silo.learning.classifier import Classifier, Precision
from silo.learning.gradients import PhysicalBatch, Slot, Tape, as_batch, bucket, pack, rowwise_linear, unit_gradients
from silo.learning.invariance import check_invariance, probe
from silo.learning.lora_sb import Adapter, Around, Base, find_linear, matrix
from silo.learning.tokens import EncodedUnit
from silo.learning.training import resolve, rows_for

TAPE_BYTES = 1 << 28
"""Per-row gradients held at a time, unless one unit's rows alone are more: a sketch is larger than an adapter."""


class SketchLayer(Around):
    """``y = base(x) + B′(Ωᵀx) + Ψ(A′x)``; without ``directions`` ``y = base(x) + W′x``. All zero until a test writes into them.

    ``zeros`` are B′ ``(m, l)`` and A′ ``(l, n)``, or W′ ``(m, n)``; ``slots``, one for each, are set while gradients are recorded.

    Raises:
        ConfigError: the weight of ``base`` has another shape than ``shape``.
    """

    def __init__(self, base: Base, shape: tuple[int, int], directions: Directions | None) -> None:
        super().__init__(base)
        (m, n), device = shape, base.weight.device
        if tuple(matrix(base).shape) != (m, n):
            raise ConfigError(
                f"a layer has a weight of shape {tuple(matrix(base).shape)}, the contract says {(m, n)}",
                hint="compare [basis] shapes of federation.toml with the base model",
            )
        self.slots: tuple[Slot, ...] = ()
        sides = [(m, n)]
        if directions is not None:
            omega, psi = (torch.tensor(side, dtype=torch.float32, device=device) for side in directions)
            self.register_buffer("into", omega.T.contiguous(), persistent=False)  # (l, n)
            self.register_buffer("out", psi, persistent=False)  # (m, l)
            sides = [(m, omega.shape[1]), (psi.shape[1], n)]
        self.zeros = nn.ParameterList(nn.Parameter(torch.zeros(side, device=device)) for side in sides)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output ``(rows, L, m)`` for ``x`` ``(rows, L, n)``."""
        first, *second = self.slots or (None,) * len(self.zeros)
        if not second:
            return torch.add(self.base(x), rowwise_linear(x, self.zeros[0], None, first))
        left = rowwise_linear(functional.linear(x, self.get_buffer("into")), self.zeros[0], None, first)
        right = functional.linear(rowwise_linear(x, self.zeros[1], None, second[0]), self.get_buffer("out"))
        return torch.add(self.base(x), left + right)


class SketchModel(Classifier):
    """The classifier whose trainables are the zero pairs alone, in the order of ``layout``, under a frozen public head."""

    def __init__(
        self, encoder: nn.Module, layers: Sequence[SketchLayer], head: nn.Linear, *, layout: Layout, terms: Contract,
        precision: Precision,
    ) -> None:  # fmt: skip
        super().__init__(
            encoder, Adapter(names=(), layers=()), head, pooling=terms.model.pooling, head_scale=terms.adapter.head_scale,
            precision=precision, basis_digest=b"",
        )  # fmt: skip
        self.layout = layout
        self.layers = tuple(layers)

    @property
    def dimension(self) -> int:
        """The numbers of a sketch."""
        return self.layout.dimension

    def trainables(self) -> list[Tensor]:
        """Every B′ and A′, or W′, in the order of the layout."""
        return [zero for layer in self.layers for zero in layer.zeros]

    @contextlib.contextmanager
    def recording(self, rows: Tensor) -> Iterator[None]:
        """While open, backward passes add per-row sketches to ``rows`` ``(rows, dimension)`` float32."""
        blocks = iter(torch.split(rows, [zero.numel() for zero in self.trainables()], dim=1))
        for name, layer in zip(self.layout.modules, self.layers, strict=True):
            layer.slots = tuple(Slot(weight=next(blocks).view(-1, *zero.shape), layer=name) for zero in layer.zeros)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.slots = ()


def build(
    path: str | Path, terms: Contract, layout: Layout, *, precision: Precision = "float32", device: str | torch.device = "cpu"
) -> SketchModel:
    """The model of the basis step around the base model in the folder ``path``.

    Raises:
        ConfigError: as ``silo.learning.classifier.load`` and ``assemble``.
    """
    return assemble(classifier.load(path), terms, layout, precision=precision, device=device)


def assemble(
    encoder: PreTrainedModel,
    terms: Contract,
    layout: Layout,
    *,
    precision: Precision = "float32",
    device: str | torch.device = "cpu",
) -> SketchModel:
    """The model of the basis step around ``encoder``, which becomes part of it. Draws nothing from a random generator.

    Raises:
        ConfigError: as ``silo.learning.classifier.prepared``; the layout is of other modules than the contract, or of other shapes
            than the model.
    """
    if layout.modules != terms.adapter.modules:
        raise ConfigError("the sketch is of other modules than the contract", hint="make the layout from this contract")
    digest = bytes.fromhex(terms.model.digest)
    encoder, directions = classifier.prepared(encoder, terms).to(device), directions_of(digest, layout)
    encoder.requires_grad_(False)
    bases = {name: find_linear(encoder, name) for name in layout.modules}
    layers = []
    for (name, base), shape in zip(bases.items(), layout.shapes, strict=True):
        parent, _, child = name.rpartition(".")
        layers.append(SketchLayer(base, shape, directions.get(name)))
        setattr(encoder.get_submodule(parent), child, layers[-1])
    weight = torch.from_numpy(head_of(digest, len(terms.task.labels), terms.model.hidden_size))
    head = nn.Linear(weight.shape[1], weight.shape[0], device="meta").to_empty(device=device).requires_grad_(False)
    head.weight.copy_(weight)
    nn.init.zeros_(head.bias)
    return SketchModel(encoder, layers, head, layout=layout, terms=terms, precision=precision)


class Sketch:
    """The callable of the basis step: the clamped noiseless integer sum ``(dimension,)`` of all units' sketches.

    Args:
        terms: the contract; its length of texts and records per unit are used.
        model: the model of the basis step.
        units: this silo's encoded units, all of which enter.
        plan: the integers of this step (``privacy.dp.ring.plan`` with q = 1 and ``layout.dimension``): p and Q are used.
        max_grad_norm: C of this step, over all layers of a unit together.
        rows_tokens: tokens in one physical batch, as in training; fewer rows where their sketches would take more than 256 MiB.

    Formal guarantees:
        - *Sensitivity*: adding or removing one unit changes the sum by a vector of L2 norm at most 2^p: each unit's sketch, of all
          layers together, is one row of ``privacy.dp.lattice.to_lattice``, proved on integers; the clamp is 1-Lipschitz.
        - *Unsampled*: every unit enters exactly once, so there is no amplification to be claimed, and no randomness.
        - *Its own*: a unit's integers are the same bits in whatever company. Tested on this machine at the start, as in training
          (silo.learning.invariance, at a non-zero state); where the slot in a batch matters, units are computed one at a time.
        - *No units*: zeros, by the same path. A unit whose gradient is not finite adds zeros.

    Raises:
        PrivacyRefusal: batch-mates or earlier batches change a unit's sketch.
        MachineError: a module's sketch of a public record is zero: no gradient gets there.
    """

    def __init__(
        self,
        terms: Contract,
        model: SketchModel,
        units: Sequence[EncodedUnit],
        *,
        plan: ring.Plan,
        max_grad_norm: float,
        rows_tokens: int,
    ) -> None:
        self.model = model
        self._units, self._plan, self._max_grad_norm = tuple(units), plan, max_grad_norm
        self._tape = Tape(model.dimension)
        self._longest, most = terms.task.max_length, terms.privacy.max_records_per_unit
        room = max(most, TAPE_BYTES // (4 * model.dimension))
        given = rows_for(rows_tokens, most)
        self._rows_for = lambda length: min(given(length), room)
        check_reached(model, self._longest)
        self._together = check_invariance(model, self._rows_for, max_length=self._longest, most=most)
        if not self._together:
            self._rows_for = rows_for(1, most)

    @property
    def unit_ids(self) -> tuple[str, ...]:
        """The ids of all units that enter. They never leave the silo."""
        return tuple(unit.id for unit in self._units)

    def __call__(self) -> NDArray[np.int64]:
        """The sum ``(dimension,)`` int64, clamped to the plan's ±Q."""
        return ring.clamp(self.sum(self._units), self._plan)

    def sum(self, units: Sequence[EncodedUnit]) -> NDArray[np.int64]:
        """The integer sum ``(dimension,)`` of these units' clipped sketches, not clamped."""
        total = torch.zeros(self.model.dimension, dtype=torch.int64, device=self.model.device)
        for batch in self._batches(units):
            rows = unit_gradients(self.model, batch, self._tape)
            total += sum_lattice(to_lattice(rows, max_grad_norm=self._max_grad_norm, lattice_bits=self._plan.lattice_bits))
        return total.cpu().numpy()

    def _batches(self, units: Sequence[EncodedUnit]) -> Iterator[PhysicalBatch]:
        if self._together:
            return pack(units, self._rows_for, max_length=self._longest)
        return (batch for unit in units for batch in pack([unit], self._rows_for, max_length=self._longest))


def sketched(home: Home, config: Config, terms: Contract, layout: Layout, *, plan: ring.Plan, max_grad_norm: float) -> Sketch:
    """The ``Sketch`` of the silo in ``home``: model verified by digest, records read and checked, layout tested.

    Raises:
        ConfigError: the model or the records do not fit the contract or the layout.
        PrivacyRefusal, MachineError: as ``Sketch``; or the device is not there.
    """
    folder = membership.base_folder(terms, config.model.path)
    units = records.load(Path(config.records.path), terms.task, terms.privacy, selection_key=home.selection_key)
    records.check_enough(units, terms.privacy)
    device, precision = resolve(config.compute)
    model = build(folder, terms, layout, precision=precision, device=device)
    encoded = tokens.encode(units, folder, terms.task)
    return Sketch(terms, model, encoded, plan=plan, max_grad_norm=max_grad_norm, rows_tokens=config.compute.rows_tokens)


def check_reached(model: SketchModel, max_length: int) -> None:
    """Return if every zero pair of ``model`` has a gradient on a public record.

    Raises:
        MachineError: one has none, so nothing could be learned of its basis.
    """
    length = bucket(min(16, max_length), max_length)
    batch = as_batch([probe(model, [length], seed=0)], length, 1)
    sizes = [sum(zero.numel() for zero in layer.zeros) for layer in model.layers]
    blocks = torch.split(unit_gradients(model, batch, Tape(model.dimension)), sizes, dim=1)
    still = [name for name, block in zip(model.layout.modules, blocks, strict=True) if not bool(block.any())]
    if still:
        raise MachineError(
            f"no gradient reaches {len(still)} of {len(blocks)} modules, the first is {still[0]}",
            hint="the release would spend budget for nothing; leave such modules out of adapter.modules",
            code="not-moved",
        )
