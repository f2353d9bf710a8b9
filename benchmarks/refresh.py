# SPDX-License-Identifier: Apache-2.0
"""What a run does whose basis does not stand from the first round to the last: the parts of ``~N`` and ``@K``.

``~N``: every N rounds what was learnt is merged, W ← W + scale · B R A, R starts again at zero and B and A are made anew. ``@K``:
the first K rounds train the head alone, and the basis comes out of the gradients at that state.

Promised: each is a function of released sums and public things, but for the gradients of a basis release, which have noise of their
own; so ``~N`` costs no epsilon, and a round of the head alone costs what any round costs. Not promised: that this is a protocol.
A federation would need the merged weights in its state digests, and an order of rounds that it does not have (docs/adr/0019).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from privacy.contract import Contract
from privacy.errors import ConfigError
from privacy.orthonormal import Factors
from privacy.update_rule import State
from silo.learning.classifier import Classifier
from silo.learning.training import Contribution

KINDS = ("weights", "random", "private", "public", "raw")
REFRESHED, LATE = ("weights", "random"), ("private", "raw")
_NAME = re.compile(r"([a-z]+)(?::([1-9]\d*))?(?:~([1-9]\d*)|@([1-9]\d*))?")


@dataclass(frozen=True, kw_only=True)
class Basis:
    """A basis by its name. ``every``: N of ``~N``, 0 where it stays; ``after``: K of ``@K``, 0 where no round comes before it."""

    kind: str
    heads: int = 1
    every: int = 0
    after: int = 0


def named(words: str) -> Basis:
    """The basis ``kind[:heads]``, with ``~N`` for those of public things or ``@K`` for those of the records' gradients.

    Raises:
        ConfigError: there is no such basis.
    """
    found = _NAME.fullmatch(words)
    kind, heads, every, after = found.groups(default="0") if found else ("", "0", "0", "0")
    basis = Basis(kind=kind, heads=int(heads) or 1, every=int(every), after=int(after))
    if kind not in KINDS or (basis.every and kind not in REFRESHED) or (basis.after and kind not in LATE):
        hint = f"one of {', '.join(KINDS)}; :h for h heads; ~N for {' and '.join(REFRESHED)}, @K for {' and '.join(LATE)}"
        raise ConfigError(f"no basis {words!r}", hint=hint)
    return basis


class Step(Protocol):
    """One round: from what silos sum at a state, and the state, to the next one."""

    def __call__(self, summed: Callable[[State], NDArray[np.int64]], state: State, *, still: int = 0) -> State:
        """The next state; the first ``still`` trainables stay as they are."""
        ...


def is_due(every: int, done: int) -> bool:
    """Whether the basis is made anew before the round after ``done`` rounds; never before the first, nor where ``every`` is 0."""
    return every > 0 and done > 0 and done % every == 0


def merge(model: Classifier) -> None:
    """W ← W + scale · B R A on every adapted module, in float32, and R ← 0: the model computes what it computed.

    In bfloat16 it does so up to the rounding of W + scale · B R A to eight bits, where B R A was added in float32 before.
    """
    with torch.no_grad():
        for layer in model.adapter:
            layer.base.weight.copy_(layer.merged_weight())
            layer.R.zero_()


def rebase(model: Classifier, bases: Mapping[str, Factors]) -> None:
    """Puts other factors of the same shapes into every adapted module. R must be zero, or the model computes something else."""
    for name, layer in zip(model.adapter.names, model.adapter, strict=True):
        b, a = bases[name]
        layer.B.copy_(torch.from_numpy(b))
        layer.A.copy_(torch.from_numpy(a))


def restarted(state: State, numbers: int) -> State:
    """The state with the first ``numbers`` trainables, every R, and their moments at zero; the head and its moments go on.

    The powers of beta are one for all trainables and go on too, so the first steps of the new R are shorter than those of round 1.
    """
    zeroed = {name: getattr(state, name).copy() for name in ("theta", "first_moment", "second_moment")}
    for array in zeroed.values():
        array[:numbers] = 0.0
    return msgspec.structs.replace(state, **zeroed)


def refreshed(model: Classifier, state: State, anew: Callable[[Classifier], Mapping[str, Factors]]) -> State:
    """Merges ``state`` into ``model``, gives it the basis that ``anew`` makes of it then, and returns the state to go on with."""
    model.write(state.theta)
    merge(model)
    rebase(model, anew(model))
    return restarted(state, model.adapter.dimension)


def without_adapters(terms: Contract) -> Contract:
    """The same terms, noise and lattice for a model with nothing but a head."""
    return msgspec.structs.replace(terms, adapter=msgspec.structs.replace(terms.adapter, modules=()))


def widened(contribution: Contribution, dimension: int) -> Callable[[State], NDArray[np.int64]]:
    """The sums of a head's contribution as vectors ``(dimension,)`` of a round like any other: zeros stand in the place of every R.

    A unit's part keeps its norm, so noise and cost of the round are those of the whole vector.
    """
    size = contribution.model.dimension

    def summed(state: State) -> NDArray[np.int64]:
        total = np.zeros(dimension, dtype=np.int64)
        total[-size:] = contribution(msgspec.structs.replace(state, theta=state.theta[-size:]))
        return total

    return summed


def head_first(contribution: Contribution, state: State, rounds: int, step: Step) -> State:
    """``state`` after so many rounds of the head alone, whose ``contribution`` is that of a model without adapters."""
    summed = widened(contribution, state.theta.size)
    for _ in range(rounds):
        state = step(summed, state, still=state.theta.size - contribution.model.dimension)
    return state


def put_head(model: Classifier, theta: NDArray[np.float64]) -> None:
    """Gives ``model`` the head that stands at the end of ``theta``: weight, then bias. For a model that does not train its head."""
    values = torch.from_numpy(theta).float()
    size = model.head.bias.numel()
    with torch.no_grad():
        model.head.weight.copy_(values[-size - model.head.weight.numel() : -size].view_as(model.head.weight))
        model.head.bias.copy_(values[-size:])
