# SPDX-License-Identifier: Apache-2.0
"""The LoRA-SB layer: a frozen linear layer plus scale · B R A, where only the small square R trains.

With several heads R is that many blocks on a diagonal: Σ_k B_k R_k A_k, B_k and A_k being groups of consecutive vectors.

The frozen layer is an ``nn.Linear``, or a ``Conv1D`` of transformers (GPT-2), which stores the same matrix transposed.

Promised: the bytes of the base weights never change, R starts at zero so that an attached model computes what the base
model computes, and attaching draws nothing from any random generator. Source: LoRA-SB, arXiv 2411.19557; Fed-SB,
arXiv 2502.15436. Not promised: anything about privacy; see ``silo/learning/gradients.py`` and ``privacy/dp/lattice.py``.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from privacy.errors import ConfigError
from silo.learning.basis import Factors
from silo.learning.gradients import Slot, rowwise_linear

Base: TypeAlias = "nn.Linear | Conv1D"
"""A layer that can be adapted: y = x Wᵀ + b."""

_ADAPTABLE = (nn.Linear, Conv1D)


def matrix(base: Base) -> Tensor:
    """W ``(out, in)`` of ``base``, whichever way round it is stored."""
    weight: Tensor = base.weight.detach()
    return weight.T if isinstance(base, Conv1D) else weight


class Around(nn.Module):
    """A layer in the place of ``base``, which it freezes and calls.

    ``weight`` and ``bias`` are the base's own, for models that look at them before they call a layer.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """The base's own weight, as it stores it."""
        weight: Tensor = self.base.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's own bias."""
        bias: Tensor | None = self.base.bias
        return bias


class LoraSb(Around):
    """``y = base(x) + scale · B(R(A x))`` with B ``(m, r)``, A ``(r, n)`` and R ``(r, r)``, all float32.

    With h > 1 ``heads`` the parameter R is ``(h, r/h, r/h)``: the blocks of a block-diagonal R, which ``core`` shows whole.

    m is ``out`` and n is ``in``, also where ``base`` stores its weight as ``(in, out)``. ``slot`` is set while per-unit gradients
    are recorded: then backward fills it and R gets no gradient of its own. ``weight`` and ``bias`` are the base's, for models that
    look at a layer's type before they call it; a model that computes with them goes round the adapter, and
    ``silo.learning.training.check_responds`` finds it.

    Raises:
        ConfigError: the factors do not fit the base layer, or their vectors do not part into so many heads.
    """

    A: Tensor
    B: Tensor

    def __init__(self, base: Base, factors: Factors, scale: float, heads: int = 1) -> None:
        super().__init__(base)
        b, a = factors
        m, n = matrix(base).shape
        wanted = ((m, a.shape[0]), (a.shape[0], n))
        if (b.shape, a.shape) != wanted:
            raise ConfigError(
                f"factors of shapes {b.shape} and {a.shape} do not fit a linear layer that needs {wanted[0]} and {wanted[1]}",
                hint="compute the basis from this layer's own weight",
            )
        size, rest = divmod(len(a), heads)
        if rest:
            raise ConfigError(f"{len(a)} vectors do not part into {heads} heads", hint="compute a basis of heads x rank vectors")
        device = base.weight.device
        self.register_buffer("B", torch.tensor(b, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("A", torch.tensor(a, dtype=torch.float32, device=device), persistent=False)
        shape = (size, size) if heads == 1 else (heads, size, size)
        self.R = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
        self.scale = scale
        self.slot: Slot | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output ``(rows, L, m)`` for ``x`` ``(rows, L, n)``."""
        inner = functional.linear(x, self.A)  # (rows, L, r)
        core = rowwise_linear(inner, self.R, None, self.slot) if self.R.ndim == 2 else self._by_head(inner)
        return torch.add(self.base(x), functional.linear(core, self.B), alpha=self.scale)

    def _by_head(self, inner: Tensor) -> Tensor:
        """``inner`` ``(rows, L, r)``, each head's share of it times that head's core."""
        shares = torch.split(inner, self.R.shape[-1], dim=-1)
        slots = [None] * len(shares) if self.slot is None else self.slot.parts()
        return torch.cat([rowwise_linear(y, r, None, slot) for y, r, slot in zip(shares, self.R, slots, strict=True)], dim=-1)

    @property
    def core(self) -> Tensor:
        """R ``(r, r)`` whole, also where it is kept as blocks."""
        if self.R.ndim == 2:
            return self.R
        whole: Tensor = torch.block_diag(*self.R)  # type: ignore[no-untyped-call]
        return whole

    def merged_weight(self) -> Tensor:
        """W0 + scale · B R A float64, in the base's own orientation: the ``weight`` with which ``base`` alone computes the same.

        ``(m, n)`` for an ``nn.Linear``, ``(n, m)`` for a ``Conv1D``.
        """
        with torch.no_grad():
            delta = self.scale * (self.B.double() @ self.core.double() @ self.A.double())
            return self.base.weight.double() + (delta.T if isinstance(self.base, Conv1D) else delta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """The attached layers in contract order, with their names in the model."""

    names: tuple[str, ...]
    layers: tuple[LoraSb, ...]

    def __iter__(self) -> Iterator[LoraSb]:
        return iter(self.layers)

    @property
    def dimension(self) -> int:
        """Trainable numbers of all R together."""
        return sum(layer.R.numel() for layer in self.layers)


def find_linear(model: nn.Module, name: str) -> Base:
    """The ``nn.Linear`` or ``Conv1D`` called ``name`` in ``model``.

    Subclasses are refused: quantised, grouped and routed layers are such, and that of ``nn.MultiheadAttention``, which is never
    called; nothing tells them from one that computes x Wᵀ + b.

    Raises:
        ConfigError: there is no such module, or it is of another kind; the message lists the nearest linear layers.
    """
    modules = dict(model.named_modules())
    found = modules.get(name)
    if type(found) in _ADAPTABLE:
        return found
    linear = [known for known, module in modules.items() if type(module) in _ADAPTABLE]
    near = ", ".join(difflib.get_close_matches(name, linear, n=3, cutoff=0.0)) or "none: the model has no linear layer"
    what = f"a {type(found).__name__}, not a plain linear layer" if found is not None else "not in the model"
    raise ConfigError(
        f"module {name!r} is {what}", hint=f"nearest linear layers: {near}", code="no-such-module", module=name
    )  # fmt: skip


def attach(model: nn.Module, modules: Sequence[str], bases: Mapping[str, Factors], scale: float, heads: int = 1) -> Adapter:
    """Freezes ``model`` and puts a LoraSb around each of ``modules``; afterwards exactly the R of these are trainable.

    Raises:
        ConfigError: a module does not exist, is no plain linear layer, has no basis, or stands twice.
    """
    bases_of = {name: find_linear(model, name) for name in modules}
    missing = [name for name in modules if name not in bases]
    if missing or len(bases_of) != len(modules):
        raise ConfigError(
            f"{len(modules)} modules are named, {len(bases_of)} differ and {len(modules) - len(missing)} have a basis",
            hint="name each module once and compute a basis for each",
        )
    model.requires_grad_(False)
    layers = []
    for name, base in bases_of.items():
        parent, _, child = name.rpartition(".")
        layer = LoraSb(base, bases[name], scale, heads)
        setattr(model.get_submodule(parent), child, layer)
        layers.append(layer)
    return Adapter(names=tuple(modules), layers=tuple(layers))
