# SPDX-License-Identifier: Apache-2.0
"""The LoRA-SB layer: a frozen linear layer plus scale · B R A, where only the small square R trains.

Promised: the bytes of the base weights never change, R starts at zero so that an attached model computes what the base
model computes, and attaching draws nothing from any random generator. Source: LoRA-SB, arXiv 2411.19557; Fed-SB,
arXiv 2502.15436. Not promised: anything about privacy; see ``silo/gradients.py`` and ``privacy/lattice.py``.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from privacy.errors import ConfigError
from silo.basis import Factors
from silo.gradients import Slot, rowwise_linear


class LoraSb(nn.Module):
    """``y = base(x) + scale · B(R(A x))`` with B ``(m, r)``, A ``(r, n)`` and R ``(r, r)``, all float32.

    ``slot`` is set while per-unit gradients are recorded: then backward fills it and R gets no gradient of its own.

    Raises:
        ConfigError: the factors do not fit the base layer.
    """

    A: Tensor
    B: Tensor

    def __init__(self, base: nn.Linear, factors: Factors, scale: float) -> None:
        super().__init__()
        b, a = factors
        wanted = ((base.out_features, a.shape[0]), (a.shape[0], base.in_features))
        if (b.shape, a.shape) != wanted:
            raise ConfigError(
                f"factors of shapes {b.shape} and {a.shape} do not fit a linear layer that needs {wanted[0]} and {wanted[1]}",
                hint="compute the basis from this layer's own weight",
            )
        device = base.weight.device
        self.base = base.requires_grad_(False)
        self.register_buffer("B", torch.tensor(b, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("A", torch.tensor(a, dtype=torch.float32, device=device), persistent=False)
        self.R = nn.Parameter(torch.zeros(a.shape[0], a.shape[0], dtype=torch.float32, device=device))
        self.scale = scale
        self.slot: Slot | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output ``(rows, L, m)`` for ``x`` ``(rows, L, n)``."""
        core = rowwise_linear(functional.linear(x, self.A), self.R, None, self.slot)  # (rows, L, r)
        return torch.add(self.base(x), functional.linear(core, self.B), alpha=self.scale)

    def merged_weight(self) -> Tensor:
        """W0 + scale · B R A, ``(m, n)`` float64: what a plain linear layer needs to compute the same."""
        with torch.no_grad():
            delta = self.B.double() @ self.R.double() @ self.A.double()
            return self.base.weight.double() + self.scale * delta


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


def find_linear(model: nn.Module, name: str) -> nn.Linear:
    """The ``nn.Linear`` called ``name`` in ``model``.

    Raises:
        ConfigError: there is no such module, or it is of another kind; the message lists the nearest linear layers.
    """
    modules = dict(model.named_modules())
    found = modules.get(name)
    if isinstance(found, nn.Linear):
        return found
    linear = [known for known, module in modules.items() if isinstance(module, nn.Linear)]
    near = ", ".join(difflib.get_close_matches(name, linear, n=3, cutoff=0.0)) or "none: the model has no linear layer"
    what = f"a {type(found).__name__}, not a linear layer" if found is not None else "not in the model"
    raise ConfigError(
        f"module {name!r} is {what}", hint=f"nearest linear layers: {near}", code="no-such-module", module=name
    )  # fmt: skip


def attach(model: nn.Module, modules: Sequence[str], bases: Mapping[str, Factors], scale: float) -> Adapter:
    """Freezes ``model`` and puts a LoraSb around each of ``modules``; afterwards exactly the R of these are trainable.

    Raises:
        ConfigError: a module does not exist, is no ``nn.Linear``, has no basis, or stands twice.
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
        layer = LoraSb(base, bases[name], scale)
        setattr(model.get_submodule(parent), child, layer)
        layers.append(layer)
    return Adapter(names=tuple(modules), layers=tuple(layers))
