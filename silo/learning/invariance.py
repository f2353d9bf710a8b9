# SPDX-License-Identifier: Apache-2.0
"""The start-up test behind assumption A1: a unit's gradient is the same bits whatever else a batch, or the process, has seen.

It runs before training, on every shape that training can use, with synthetic records that anybody can make. What it finds
decides how units are laid out in batches, so it depends on the contract, the model and the machine, and on no record.
Promised: at the tested state and rows, equal float32 bits, which is stronger than equal integers after the lattice. Not
promised: a proof for every state and row. It is a measurement, and stays assumption A1 of the report.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from privacy.errors import PrivacyRefusal
from silo.learning.adapted import Adapted
from silo.learning.gradients import RowsFor, Tape, as_batch, buckets, unit_gradients
from silo.learning.tokens import EncodedUnit, Row

PROBE = "probe-{}"
"""The id of the public unit of a seed."""


def probe(model: Adapted, lengths: Sequence[int], *, seed: int) -> EncodedUnit:
    """A public unit with one record per entry of ``lengths``: a function of the model's configuration, ``lengths`` and ``seed``.

    Token types are given exactly if the encoder takes them.
    """
    config: Any = model.encoder.config
    kinds = getattr(config, "type_vocab_size", 1) if "token_type_ids" in inspect.signature(model.encoder.forward).parameters else 0
    bits = np.random.Generator(np.random.PCG64(seed))

    def row(length: int) -> Row:
        ids = tuple(bits.integers(0, config.vocab_size, length).tolist())
        return ids, tuple(i * min(kinds, 2) // length for i in range(length)) if kinds else None, model.mark(seed, length)

    return EncodedUnit(id=PROBE.format(seed), rows=tuple(map(row, lengths)))


def check_invariance(model: Adapted, rows_for: RowsFor, *, max_length: int, most: int) -> bool:
    """Whether a unit's gradient is the same bits in every slot of every shape ``(rows_for(L), L)`` that packing can give.

    Args:
        model: what is tested, at a fixed non-zero state (at zero every gradient of R vanishes); its own state is put back.
        rows_for: rows of a batch by length, at least ``most``.
        max_length, most: ``task.max_length`` and ``privacy.max_records_per_unit`` of the contract.

    At every L, the shortest first, a record that fills L is run in the first slot beside dummies, then in every slot beside
    copies of itself. Then at every L, the longest first, so that each follows longer ones, it is run in the first, last and
    (from 5 rows on) every other slot beside a record of one token, others of L and L/2, and a unit of ``most`` records.

    False: company is harmless but at one length at least the slot matters, so pack one unit per batch at *all* lengths.

    Formal guarantees:
        - *Public*: the result is a function of the arguments and the machine; no record is among them.
        - *Every shape*: every length that ``gradients.bucket`` can give is run, at its own number of rows.
        - *No memory*: no buffer of the model changes, and the tested gradients do not depend on what ran before.

    Raises:
        PrivacyRefusal: in one and the same slot, other batch-mates change a unit's gradient: the model mixes examples. Or an
            earlier batch does, or it changes a buffer: the model carries state from batch to batch.
    """
    lengths, tape = buckets(max_length), Tape(model.dimension)
    with probe_state(model):
        kept = _buffers(model)

        def run(units: Sequence[EncodedUnit], length: int) -> Tensor:
            """The bits ``(units, d)`` int32 of the gradients of ``units`` in one batch."""
            bits = unit_gradients(model, as_batch(units, length, rows_for(length)), tape).view(torch.int32)
            _check_buffers(model, kept, length)
            return bits

        alone, verdicts = {}, []
        for length in lengths:
            one = probe(model, [length], seed=0)
            alone[length] = run([one], length)[0]
            verdicts.append(_compare([one] * rows_for(length), length, alone[length], run))
        for length in reversed(lengths):
            verdicts += [_compare(units, length, alone[length], run) for units in mixed(model, length, rows_for(length), most)]
    return all(verdicts)


def _compare(units: Sequence[EncodedUnit], length: int, alone: Tensor, run: Callable[[Sequence[EncodedUnit], int], Tensor]) -> bool:
    """Whether each unit has one gradient in all its slots, the probe's being ``alone``; a probe in the first slot must have it."""
    bits, probed = run(units, length), PROBE.format(0)
    if units[0].id == probed and not torch.equal(bits[0], alone):
        if not torch.equal(run(units[:1], length)[0], alone):
            raise _carries(f"a unit of {length} tokens has another gradient after longer ones than before them", length)
        raise PrivacyRefusal(
            f"other batch-mates change {int((bits[0] != alone).sum())} of {len(alone)} numbers of a gradient at {length} tokens",
            hint="this model mixes examples (batch norm, a loss over the batch, expert capacity); choose another base model",
            code="mixes-examples", length=length,
        )  # fmt: skip
    seen = {probed: alone}
    return all(torch.equal(seen.setdefault(unit.id, row), row) for unit, row in zip(units, bits, strict=True))


def mixed(model: Adapted, length: int, rows: int, most: int) -> list[list[EncodedUnit]]:
    """Batches of the probe among others. One that begins with the probe comes first: it tells company and memory from slots."""
    one, short, long, half = (
        probe(model, [tokens], seed=seed) for seed, tokens in enumerate((length, 1, length, (length + 1) // 2))
    )
    several = probe(model, [1 + (length - 1) * i // most for i in range(1, most + 1)], seed=4)
    if rows < 5:
        mates = _filled([short, long, half, several], rows - 1)
        return [[one, *mates], [*mates, one]]
    return [[*_filled([one, several, one, short, one, long, one, half], rows - 1), one]]


def _filled(mates: Sequence[EncodedUnit], room: int) -> list[EncodedUnit]:
    """``mates`` in turn, again and again, each where it still fits, until ``room`` rows are filled."""
    chosen: list[EncodedUnit] = []
    while room > 0:
        for mate in mates:
            if len(mate.rows) <= room:
                chosen.append(mate)
                room -= len(mate.rows)
    return chosen


def _buffers(model: Adapted) -> dict[str, bytes]:
    """A digest of every buffer, also of those that a checkpoint leaves out."""
    flat = ((name, buffer.detach().cpu().contiguous().reshape(-1)) for name, buffer in model.named_buffers())
    return {name: hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).digest() for name, values in flat}


def _check_buffers(model: Adapted, kept: dict[str, bytes], length: int) -> None:
    changed = sorted({name for name, _ in kept.items() ^ _buffers(model).items()})
    if changed:
        raise _carries(f"a batch of length {length} changed {len(changed)} buffers of the model, the first is {changed[0]}", length)


def _carries(message: str, length: int) -> PrivacyRefusal:
    return PrivacyRefusal(
        message, hint="this model carries state from batch to batch; choose another base model", code="carries-state", length=length
    )


@contextlib.contextmanager
def probe_state(model: Adapted) -> Iterator[None]:
    """The model at a fixed, public, non-zero state; its own state is put back."""
    before = model.read()
    model.write(0.05 * np.random.Generator(np.random.PCG64(0)).standard_normal(model.dimension))
    try:
        yield
    finally:
        model.write(before)
