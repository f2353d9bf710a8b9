# SPDX-License-Identifier: Apache-2.0
"""The frozen layers below the first adapted one are computed once per record, and what they gave is kept.

Where only the upper layers carry adapters, the layers below them give a record the same activations at every step. A step then
reads them and pays for the upper layers alone. Nothing is dropped out or augmented (``classifier`` keeps the model in evaluation
mode), so a kept activation stays true as long as the process lives.

Promised: a kept row has the bits that the layers gave it, its padding apart, which is zero; what is kept never leaves the silo's
disk, in a file that has no name and is gone with the process; a full allowance ends keeping, never training, and so does a disk
that is full or fails: then what was kept is given back, for the ledger is on the same disk. Not promised: that an encoder looks at
nothing but the mask to ignore padding: ``agrees`` measures it before a cache is used. Nor that a record has the same bits in every
slot of a batch: equal records share a place here, so whoever keeps must know it (``silo.learning.invariance``).

A file that is read with ``pread`` and not a memory map: with a map, a disk that is full ends the process by a signal.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from silo.learning.gradients import PhysicalBatch
from silo.learning.tokens import EncodedUnit, Row

GIB = 2**30


class _ReachedError(Exception):
    """The last frozen layer has given its output; the rest of the pass is not wanted."""


class Prefix:
    """The layers of ``encoder`` below the first of the adapted ``layers``, and a file for what they give.

    Off until ``keep`` is called. Its layers are ``stack[:depth]``.
    """

    def __init__(self, stack: nn.ModuleList, depth: int) -> None:
        self.depth = depth
        self._file: int | None = None
        self._places: dict[bytes, tuple[int, int]] = {}
        self._end = 0
        self._most = 0
        self._format: tuple[int, torch.dtype] | None = None
        self._replayed: Tensor | None = None
        self._recorded = False
        for index, layer in enumerate(stack[:depth]):
            layer.forward = partial(self._through, layer.forward, index == depth - 1)

    @classmethod
    def below(cls, encoder: nn.Module, modules: Sequence[str]) -> Self | None:
        """The prefix under the adapted ``modules``; None where no whole layer lies below all of them."""
        stacks = {name: stack for name, stack in encoder.named_modules() if isinstance(stack, nn.ModuleList)}
        around = {name for name in stacks if modules and all(module.startswith(f"{name}.") for module in modules)}
        if not around:
            return None
        outermost = min(around, key=len)
        depth = min(int(module.removeprefix(f"{outermost}.").partition(".")[0]) for module in modules)
        return cls(stacks[outermost], depth) if depth else None

    @property
    def is_kept(self) -> bool:
        """Whether activations are kept."""
        return self._file is not None

    @property
    def room(self) -> bool:
        """Whether more may be kept."""
        return self._end < self._most

    @property
    def size(self) -> int:
        """How many bytes are kept."""
        return self._end

    def keep(self, folder: Path | None, most_bytes: int) -> None:
        """From now on, keep at most ``most_bytes`` in a nameless file in ``folder`` (the system's own for temporary files: None).

        What was kept before is forgotten. Where there can be no such file, nothing is kept.
        """
        self.drop()
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
            self._file = os.dup(file.fileno())
        self._most = most_bytes

    def drop(self) -> None:
        """Keep nothing any more, and forget what was kept."""
        if self._file is not None:
            os.close(self._file)
        self._file, self._end, self._most = None, 0, 0
        self._places.clear()

    __del__ = drop

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """While open, passes are plain ones: nothing is read and nothing kept."""
        kept, self._file = self._file, None
        try:
            yield
        finally:
            self._file = kept

    def has(self, unit: EncodedUnit, length: int) -> bool:
        """Whether every record of ``unit`` is kept as computed in batches of ``length``."""
        return all(_key(row, length) in self._places for row in unit.rows)

    def run(self, encode: Callable[[], Any], batch: PhysicalBatch) -> Any:  # noqa: ANN401  (what transformers' encoders give)
        """``encode()``, the encoder's pass over ``batch``; where all of its rows are kept, without the layers of the prefix."""
        if not self.is_kept:
            return encode()
        if (found := self._fetched(batch)) is None:
            self.fill(encode, batch)
            if (found := self._fetched(batch)) is None:
                return encode()
        self._replayed = found.to(batch.input_ids.device)
        try:
            return encode()
        finally:
            self._replayed = None

    def fill(self, encode: Callable[[], Any], batch: PhysicalBatch) -> None:
        """Run the layers of the prefix over ``batch`` and keep what its rows do not have yet, as far as there is room."""
        if not (self.is_kept and self.room):
            return
        self._recorded = True
        try:
            with torch.no_grad():
                encode()
        except _ReachedError as reached:
            self._store(batch, reached.args[0])
        finally:
            self._recorded = False

    def _through(self, forward: Callable[..., Any], is_last: bool, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """A layer of the prefix: itself, or what is kept in the place of all of them."""
        if self._replayed is not None:
            return self._replayed
        found = forward(*args, **kwargs)
        if is_last and self._recorded:
            raise _ReachedError(found)
        return found

    def _store(self, batch: PhysicalBatch, hidden: Any) -> None:  # noqa: ANN401  (some layers give more than a tensor)
        rows, length = batch.input_ids.shape
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != (rows, length):
            self.drop()
            return
        values, self._format = hidden.detach().cpu().contiguous(), (hidden.shape[2], hidden.dtype)
        for index, (key, count) in enumerate(_keys(batch)):
            words = values[index, :count].reshape(-1).view(torch.uint8).numpy().tobytes()
            if key in self._places or not self._fits(len(words)):
                continue
            if not self._wrote(words):
                self.drop()
                return
            self._places[key] = (self._end, len(words))
            self._end += len(words)

    def _wrote(self, words: bytes) -> bool:
        try:
            return self._file is not None and os.pwrite(self._file, words, self._end) == len(words)
        except OSError:
            return False

    def _fits(self, size: int) -> bool:
        if self._end + size > self._most:
            self._most = min(self._most, self._end)
        return self._end + size <= self._most

    def _fetched(self, batch: PhysicalBatch) -> Tensor | None:
        """The kept activations ``(rows, L, width)``, zero at padding; None where a row is missing."""
        places = [self._places[key] for key, _ in _keys(batch) if key in self._places]
        if self._file is None or self._format is None or len(places) < len(batch.input_ids):
            return None
        width, dtype = self._format
        found = torch.zeros(*batch.input_ids.shape, width, dtype=dtype)
        words = found.view(len(found), -1).view(torch.uint8).numpy()
        for row, (start, size) in zip(words, places, strict=True):
            try:
                read = os.pread(self._file, size, start)
            except OSError:
                self.drop()
                return None
            if len(read) != size:
                return None
            row[:size] = np.frombuffer(read, dtype=np.uint8)
        return found


def agrees(
    prefix: Prefix, gradients: Callable[[PhysicalBatch], Tensor], pairs: Iterable[tuple[PhysicalBatch, PhysicalBatch]]
) -> bool:
    """Whether units have the same bits of gradient in a plain pass and with kept activations.

    The two batches of a pair hold the same units in opposite orders: the first is computed plainly, the second from the cache,
    which it fills first.
    """
    for batch, turned in pairs:
        with prefix.aside():
            plain = gradients(batch).flip(0).view(torch.int32).clone()
        if not torch.equal(gradients(turned).view(torch.int32), plain):
            return False
    return True


def _key(row: Row, length: int) -> bytes:
    """The name of a record in a batch of ``length``: 32 bytes that its tokens, its token types and the length give."""
    ids, types, _ = row
    return _digest(np.asarray(ids, dtype=np.int64), None if types is None else np.asarray(types, dtype=np.int64), length)


def _keys(batch: PhysicalBatch) -> Iterator[tuple[bytes, int]]:
    """(Name, tokens) of every row; padding is on the right."""
    ids, length = batch.input_ids.cpu().numpy(), batch.input_ids.shape[1]
    types = None if batch.token_type_ids is None else batch.token_type_ids.cpu().numpy()
    for index, count in enumerate(batch.attention_mask.sum(dim=1).tolist()):
        yield _digest(ids[index, :count], None if types is None else types[index, :count], length), count


def _digest(ids: np.ndarray[Any, np.dtype[np.int64]], types: np.ndarray[Any, np.dtype[np.int64]] | None, length: int) -> bytes:
    found = hashlib.sha256(length.to_bytes(8, "big") + len(ids).to_bytes(8, "big") + ids.tobytes())
    if types is not None:
        found.update(types.tobytes())
    return found.digest()
