# SPDX-License-Identifier: Apache-2.0
"""A gradient's sketch, and the factors B and A that come out of a (noised) sum of sketches. Without torch.

For a weight W0 ``(m, n)`` with gradient G the sketch is GΩ ``(m, l)`` and ΨᵀG ``(l, n)`` for public orthonormal Ω ``(n, l)`` and
Ψ ``(m, l)``; it is what two zero pairs W0 + B′Ωᵀ + ΨA′ have as the gradients of B′ and A′. Where G itself has no more numbers, it
is sent whole. B is then made of the leading left vectors of GΩ, A of the leading right vectors of ΨᵀG (LoRA-SB, arXiv 2411.19557,
without its sign function; range finders: Halko, Martinsson, Tropp 2011).

Promised: who holds the sum computes the same bytes of B and A on every machine whose arithmetic is IEEE 754, so a verifier can do
it again; nothing here reads a record or a random generator. Privacy is that of the sum: with enough noise on it, all that is
computed here is post-processing; without (``raw``: the same code, a contract without differential privacy) B and A may hold
anything that the sum held. Not promised: that a sketch saves noise. It saves memory: under
equal noise a whole G keeps more of its directions than its sketch does (docs/adr/0019).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy import orthonormal
from privacy.errors import ConfigError
from privacy.jacobi import left_vectors, singular_vectors
from privacy.orthonormal import Factors, check_orthonormal, on_grid

Directions = tuple[NDArray[np.float32], NDArray[np.float32]]
"""(Ω ``(n, l)``, Ψ ``(m, l)``), each with orthonormal columns."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which numbers a sketch has, and in which order.

    Module by module in the order of ``modules``: GΩ ``(m, l)`` row by row, then ΨᵀG ``(l, n)`` row by row; or G ``(m, n)`` row by
    row where m·n ≤ l·(m + n), which is so wherever l reaches the smaller side.

    Attributes:
        modules: names, each once.
        shapes: (m, n) = (out, in) of each module's weight.
        width: l; two to four times the rank is customary.

    Raises:
        ConfigError: no modules, one twice, another number of shapes, or a side or the width below 1.
    """

    modules: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    width: int

    def __post_init__(self) -> None:
        if not 0 < len(self.modules) == len(self.shapes) == len(set(self.modules)):
            raise ConfigError(
                f"a sketch of {len(self.modules)} modules, {len(set(self.modules))} different, with {len(self.shapes)} shapes",
                hint="give each module of adapter.modules its shape (out, in), in the same order",
            )
        if self.width < 1 or any(len(shape) != 2 or min(shape) < 1 for shape in self.shapes):
            raise ConfigError("a sketch needs a width and sides of at least 1", hint="compare [basis] with the model's layers")

    @property
    def dimension(self) -> int:
        """How many numbers a sketch has."""
        return sum(self._sizes())

    def is_full(self, place: int) -> bool:
        """Whether the module at ``place`` sends G itself."""
        m, n = self.shapes[place]
        return m * n <= self.width * (m + n)

    def check_rank(self, rank: int) -> None:
        """Raises ConfigError when some module's part has no ``rank`` directions to give."""
        for place, (name, shape) in enumerate(zip(self.modules, self.shapes, strict=True)):
            most = min(shape) if self.is_full(place) else self.width
            if not 1 <= rank <= most:
                raise ConfigError(
                    f"a basis of rank {rank} from a sketch with {most} directions of module {name}",
                    hint="a sketch's width must be at least the rank; two to four times the rank is customary",
                )

    def parts(self, vector: NDArray[np.float64]) -> Iterator[tuple[str, tuple[NDArray[np.float64], ...]]]:
        """(name, (GΩ, ΨᵀG)) of each module as views of ``vector`` ``(dimension,)``; (G,) where it is whole."""
        start = 0
        for place, (size, name, (m, n)) in enumerate(zip(self._sizes(), self.modules, self.shapes, strict=True)):
            part = vector[start : start + size]
            start += size
            if self.is_full(place):
                yield name, (part.reshape(m, n),)
            else:
                cut = m * self.width
                yield name, (part[:cut].reshape(m, self.width), part[cut:].reshape(self.width, n))

    def _sizes(self) -> list[int]:
        places = enumerate(self.shapes)
        return [m * n if self.is_full(place) else self.width * (m + n) for place, (m, n) in places]


def layout(modules: Sequence[str], shapes: Sequence[Sequence[int]], width: int) -> Layout:
    """The ``Layout`` of these modules. Raises ConfigError as it does."""
    if any(len(shape) != 2 for shape in shapes):
        raise ConfigError("a shape is two numbers, (out, in)", hint="compare [basis] with the model's layers")
    return Layout(modules=tuple(modules), shapes=tuple((shape[0], shape[1]) for shape in shapes), width=width)


def directions_of(model: bytes, layout: Layout) -> dict[str, Directions]:
    """The public (Ω, Ψ) of every module that is sketched, by name; those sent whole have none.

    Seeds as in ``privacy.orthonormal.random_basis`` with ``siloquy/basis/sketch/1`` NUL, and the letters N for Ω and M for Ψ:
    they are independent of the ``random`` basis of the same model, and the same bytes everywhere.
    """
    found: dict[str, Directions] = {}
    for place, (name, (m, n)) in enumerate(zip(layout.modules, layout.shapes, strict=True)):
        if not layout.is_full(place):
            context = model + struct.pack("<QQ", m, n) + name.encode()
            omega, psi = (
                orthonormal.rows(b"siloquy/basis/sketch/1\x00" + letter + context, layout.width, length)
                for letter, length in ((b"N", n), (b"M", m))
            )
            found[name] = (np.ascontiguousarray(omega.T), np.ascontiguousarray(psi.T))
    return found


def head_of(model: bytes, labels: int, hidden: int) -> NDArray[np.float32]:
    """The public head ``(labels, hidden)`` float32 of the basis step: orthonormal rows, or columns where there are more labels.

    At the start of training the head is zero, and a zero head passes no gradient on: every G would be zero. The first step of
    LoRA-SB is taken with a random head for the same reason. This one is of the seed ``siloquy/basis/head/1`` NUL, the model's
    digest, labels and hidden size (u64 each); it is used for the basis and then forgotten, so training starts where it always does.
    """
    short, long = sorted((labels, hidden))
    found = orthonormal.rows(b"siloquy/basis/head/1\x00" + model + struct.pack("<QQ", labels, hidden), short, long)
    return found if labels <= hidden else np.ascontiguousarray(found.T)


def factors_of(sums: NDArray[np.float64], layout: Layout, rank: int) -> dict[str, Factors]:
    """The factors (B ``(m, rank)``, A ``(rank, n)``) of every module, float32, from a sum of sketches ``(dimension,)``.

    B: the leading left vectors of GΩ, A: the leading right vectors of ΨᵀG, each by itself; the largest entry of each vector on the
    grid is positive (the first of equal ones). Where G is whole: its singular vectors in pairs, A's signs following B's. The
    strongest come first. Only directions count: the sum needs no division by anything.

    Formal guarantees:
        - *Post-processing*: the result is a function of the arguments alone; there is no record and no generator among them.
        - *Same bytes everywhere*: made of ``privacy.jacobi`` and a grid; no BLAS or LAPACK has a part in a byte.
        - *Orthonormal*: BᵀB and AAᵀ differ from I by at most 1e-5, checked.

    ===========================================  ================================================
    case                                         result
    ===========================================  ================================================
    a part is zero, or of fewer directions       ConfigError ``basis-too-flat``, naming the module
    numbers near the limit of float64            as any other: they are scaled by a power of two
    NaN or infinite                              ConfigError
    ===========================================  ================================================

    Raises:
        ConfigError: as above; or the sum is no float64 of ``layout.dimension`` numbers; or as ``Layout.check_rank``.
    """
    layout.check_rank(rank)
    if sums.dtype != np.float64 or sums.shape != (layout.dimension,) or not bool(np.isfinite(sums).all()):
        raise ConfigError(
            f"a sum of {sums.dtype} {sums.shape} is no sketch of {layout.dimension} finite float64 numbers",
            hint="use the sum and the [basis] of one and the same contract",
        )
    return {name: _factors(name, parts, rank) for name, parts in layout.parts(sums)}


def _factors(name: str, parts: tuple[NDArray[np.float64], ...], rank: int) -> Factors:
    try:
        if len(parts) == 1:
            left, right = map(on_grid, singular_vectors(parts[0], rank))
            signs = _signs(left)
            left, right = left * signs, right * signs
        else:
            left, right = (on_grid(left_vectors(part, rank)) for part in (parts[0], parts[1].T))
            left, right = left * _signs(left), right * _signs(right)
    except ConfigError as error:
        raise ConfigError(f"module {name}: {error.message}", hint=error.hint, code=error.code, module=name) from error
    check_orthonormal(left.T)
    check_orthonormal(right.T)
    # Adding zero makes negative zeros positive: they are other bytes.
    return (left.T + 0.0).astype(np.float32), (right + 0.0).astype(np.float32)


def _signs(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per row ``(r, 1)`` the sign of its largest entry, the first of equal ones."""
    largest = vectors[np.arange(len(vectors)), np.abs(vectors).argmax(axis=1)]
    return np.where(largest < 0, -1.0, 1.0)[:, None]


def by_name(found: Mapping[str, Factors], layout: Layout) -> dict[str, Factors]:
    """``found`` in the layout's order. Raises ConfigError when it holds other modules or shapes than the layout."""
    shapes = {name: (b.shape[0], a.shape[1]) for name, (b, a) in found.items()}
    if shapes != dict(zip(layout.modules, layout.shapes, strict=True)):
        raise ConfigError("the basis is of other modules or shapes than the contract", hint="make the basis for this contract")
    return {name: found[name] for name in layout.modules}
