# SPDX-License-Identifier: Apache-2.0
"""One gradient per privacy unit, at the price of one ordinary backward pass.

For z = y Rᵀ the ordinary gradient of R is a sum over rows of dzᵀ y; taking that product row by row (one ``bmm``) costs the
same and gives every record its own gradient. The rows of a unit are summed before anything is
clipped, so the unit and not the record is what one vector stands for.

Promised: the losses are one per row and never averaged over rows; batches of one length bucket have one shape, whoever is
in them; a unit is never split; nothing is drawn from a random generator. Not promised: that a given model and kernel give
a unit the same bits in any company. That is measured by ``silo.learning.invariance`` before training, and it is assumption A1 of
the report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from privacy.errors import ConfigError
from silo.learning.tokens import EncodedUnit

RowsFor = Callable[[int], int]
"""The constant number of rows of a physical batch of a given length; at least max_records_per_unit for every length."""

DUMMY = -1
"""The unit index of a row that belongs to no unit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhysicalBatch:
    """Rows that pass through the model together; ``unit`` says whose they are.

    ``input_ids``, ``attention_mask`` and ``token_type_ids`` are ``(rows, L)`` int64, ``labels`` and ``unit`` ``(rows,)`` int64;
    ``labels`` is the last place of ``tokens.Row``; ``unit`` counts the batch's units from 0 and is ``DUMMY`` for a filler row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    labels: Tensor
    unit: Tensor

    def to(self, device: torch.device) -> Self:
        """The same batch with the model's inputs on ``device``; ``unit`` stays on the CPU, where rows are assigned."""
        types = None if self.token_type_ids is None else self.token_type_ids.to(device)
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            token_type_ids=types,
            labels=self.labels.to(device),
        )


class Rowwise(Protocol):
    """A model whose rows are independent and whose trainables are recorded row by row; ``adapted.Adapted`` is one."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def dimension(self) -> int:
        """d, the number of trainables."""
        ...

    def read(self) -> NDArray[np.float64]:
        """The trainables, flat ``(d,)``."""
        ...

    def write(self, theta: NDArray[np.float64]) -> None:
        """Set the trainables."""
        ...

    def row_losses(self, batch: PhysicalBatch) -> Tensor:
        """One loss per row ``(rows,)``; a row's loss depends on that row alone."""
        ...

    def recording(self, rows: Tensor) -> AbstractContextManager[None]:
        """While open, each row's gradient is written to ``rows`` ``(rows, d)`` in the backward pass."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one layer's per-row gradients go: ``weight`` ``(rows, out, in)`` and ``bias`` ``(rows, out)`` or None, float32.

    A layer of several heads has ``weight`` ``(rows, heads, out, in)``, of which each head has its part. ``layer``: for people.
    """

    weight: Tensor
    bias: Tensor | None = None
    layer: str = "an adapted layer"

    def parts(self) -> list[Slot]:
        """One slot for each head, in order, of the same memory."""
        return [Slot(weight=weight, layer=self.layer) for weight in self.weight.unbind(dim=1)]


class Tape:
    """A reusable float32 buffer ``(rows, dimension)`` for the per-row gradients of all trainables."""

    def __init__(self, dimension: int) -> None:
        self._buffer = torch.empty(0, dimension, dtype=torch.float32)

    def start(self, rows: int, device: torch.device) -> Tensor:
        """A zeroed view ``(rows, dimension)`` on ``device``; it ends the life of the view given before."""
        if len(self._buffer) < rows or self._buffer.device != device:
            self._buffer = torch.empty(rows, self._buffer.shape[1], dtype=torch.float32, device=device)
        return self._buffer[:rows].zero_()


class _RowwiseLinear(torch.autograd.Function):
    """z = y Wᵀ + b whose backward adds each row's own dW and db to a slot and returns none for W and b."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor | None, slot: Slot) -> Tensor:  # noqa: ANN401  (torch's own object)
        ctx.save_for_backward(y, weight)
        ctx.slot = slot
        return functional.linear(y.to(weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, None, None, None]:  # noqa: ANN401
        y, weight = ctx.saved_tensors
        # Added, not assigned: a layer that the model uses twice has two contributions.
        ctx.slot.weight.add_(torch.bmm(dz.float().transpose(1, 2), y.float()))
        if ctx.slot.bias is not None:
            ctx.slot.bias.add_(dz.float().sum(dim=1))
        dy = (dz @ weight).to(y.dtype) if ctx.needs_input_grad[0] else None
        return dy, None, None, None


def rowwise_linear(y: Tensor, weight: Tensor, bias: Tensor | None, slot: Slot | None) -> Tensor:
    """``y`` ``(rows, T, in)`` times ``weight`` ``(out, in)`` transposed, plus ``bias``, in the precision of ``weight``.

    With a ``slot``, backward adds dW ``(rows, out, in)`` and db ``(rows, out)`` to it and none to ``weight`` and ``bias``.
    Without one it is an ordinary linear layer.

    Raises:
        ConfigError: recording, and ``y`` is not one block of T vectors per row of the batch.
    """
    with torch.autocast(y.device.type, enabled=False):
        if slot is None:
            return functional.linear(y.to(weight.dtype), weight, bias)
        if y.ndim != 3 or len(y) != len(slot.weight):
            raise ConfigError(
                f"{slot.layer} got an input of shape {tuple(y.shape)}, not (rows, tokens, features) of {len(slot.weight)} rows",
                hint="leave layers that mix or reshape the batch out of adapter.modules",
            )
        recorded: Tensor = _RowwiseLinear.apply(y, weight, bias, slot)  # type: ignore[no-untyped-call]
        return recorded


def unit_gradients(model: Rowwise, batch: PhysicalBatch, tape: Tape) -> Tensor:
    """The gradient ``(units, d)`` float32 of every unit in ``batch``: the sum of its rows' cross-entropy gradients, unclipped.

    Order of the d columns: ``Adapted.read``. No parameter's ``.grad`` is touched.

    Formal guarantees (what they rest on is checked by ``silo.learning.invariance``):

    1. Row i's loss is a function of row i: one cross entropy per row, summed and never averaged.
    2. A unit's rows are added in ascending order, one ordinal at a time, never by atomic additions.

    ===============================  ==========================================
    case                             result
    ===============================  ==========================================
    dummy rows                       contribute to no unit
    no unit in the batch             an empty ``(0, d)`` tensor
    a row with a non-finite loss     a non-finite row, which the lattice zeroes
    ===============================  ==========================================
    """
    batch = batch.to(model.device)
    rows = tape.start(len(batch.labels), model.device)
    with torch.enable_grad(), model.recording(rows):
        model.row_losses(batch).sum().backward()  # type: ignore[no-untyped-call]
    return _sum_rows(rows, batch.unit.tolist())


def _sum_rows(rows: Tensor, unit: Sequence[int]) -> Tensor:
    """Per-unit sums ``(units, d)`` of ``rows`` ``(rows, d)``; each indexed addition has distinct targets."""
    members: dict[int, list[int]] = {}
    for row, owner in enumerate(unit):
        if owner != DUMMY:
            members.setdefault(owner, []).append(row)
    totals = rows.new_zeros(len(members), rows.shape[1])
    for ordinal in range(max(map(len, members.values()), default=0)):
        owners = [owner for owner, its in members.items() if len(its) > ordinal]
        totals[owners] += rows[[members[owner][ordinal] for owner in owners]]
    return totals


def bucket(length: int, max_length: int) -> int:
    """The padded length L of a unit whose longest record has ``length`` tokens.

    A multiple of 8 up to 32, of 16 up to 128, of 32 beyond, never above ``max_length``.

    Raises:
        ConfigError: ``length`` is not in 1..max_length.
    """
    if not 1 <= length <= max_length:
        raise ConfigError(f"a record of {length} tokens does not fit max_length = {max_length}", hint="truncate while encoding")
    step = 8 if length <= 32 else 16 if length <= 128 else 32
    return min(-(-length // step) * step, max_length)


def buckets(max_length: int) -> list[int]:
    """Every L that ``bucket`` can give, ascending."""
    return sorted({bucket(length, max_length) for length in range(1, max_length + 1)})


def pack(units: Sequence[EncodedUnit], rows_for: RowsFor, *, max_length: int) -> Iterator[PhysicalBatch]:
    """The physical batches that hold ``units``, each unit whole and in the fullest batch of its length bucket that it still fits.

    A unit's L is ``bucket`` of its own longest record; a batch of that L always has ``rows_for(L)`` rows, the missing ones
    dummies. No units: no batches. A unit costs at most ``rows_for(L)`` look-ups, however many batches are open.

    Raises:
        ConfigError: a unit has no rows, or more than ``rows_for`` of its bucket, or a record above ``max_length``.
    """
    waiting: dict[tuple[int, bool, int], list[list[EncodedUnit]]] = {}  # (length, typed, room left): batches that wait for more
    for unit in units:
        length, rows = _shape(unit, rows_for, max_length)
        # Whether token types are passed is a property of the unit, so that no batch-mate can decide it.
        typed = unit.rows[0][1] is not None
        room = next((room for room in range(len(unit.rows), rows) if waiting.get((length, typed, room))), rows)
        batch = waiting[length, typed, room].pop() if room < rows else []
        batch.append(unit)
        left = room - len(unit.rows)
        if left:
            waiting.setdefault((length, typed, left), []).append(batch)
        else:
            yield as_batch(batch, length, rows)
    for (length, _, _), batches in sorted(waiting.items(), key=lambda item: item[0]):
        yield from (as_batch(batch, length, rows_for(length)) for batch in batches)


def length_of(unit: EncodedUnit, max_length: int) -> int:
    """L of the physical batch that ``unit`` goes into: the bucket of its longest record."""
    return bucket(max(len(input_ids) for input_ids, _, _ in unit.rows), max_length)


def _shape(unit: EncodedUnit, rows_for: RowsFor, max_length: int) -> tuple[int, int]:
    """(L, rows) of the physical batch that ``unit`` goes into."""
    if not unit.rows:
        raise ConfigError("a privacy unit without records was sampled", hint="drop units without records while reading")
    length = length_of(unit, max_length)
    rows = rows_for(length)
    if len(unit.rows) > rows:
        raise ConfigError(
            f"a unit of {len(unit.rows)} records does not fit a physical batch of {rows} rows",
            hint="let rows_for give at least max_records_per_unit rows",
        )
    return length, rows


def as_batch(units: Sequence[EncodedUnit], length: int, rows: int) -> PhysicalBatch:
    """``units`` in consecutive rows of a ``(rows, length)`` batch, into which they must fit; the first decides on token types.

    The missing rows are dummies that see one token, so that no row has an empty mask.
    """
    ids, mask, types = (np.zeros((rows, length), dtype=np.int64) for _ in range(3))
    labels, owners = np.zeros(rows, dtype=np.int64), np.full(rows, DUMMY, dtype=np.int64)
    mask[:, 0] = 1
    flat = [(owner, row) for owner, unit in enumerate(units) for row in unit.rows]
    for index, (owner, (input_ids, token_types, label)) in enumerate(flat):
        ids[index, : len(input_ids)] = input_ids
        mask[index, : len(input_ids)] = 1
        if token_types is not None:
            types[index, : len(token_types)] = token_types
        labels[index], owners[index] = label, owner
    typed = units[0].rows[0][1] is not None
    return PhysicalBatch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        token_type_ids=torch.from_numpy(types) if typed else None,
        labels=torch.from_numpy(labels),
        unit=torch.from_numpy(owners),
    )
