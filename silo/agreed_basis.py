# SPDX-License-Identifier: Apache-2.0
"""The frozen factors with which a silo builds its model, where it does not compute them alone: public ones, and those of a round.

With ``adapter.basis = "public"`` they are the coordinator's file ``basis.safetensors``, taken by the digest in the contract and
kept in this silo's home. Promised: no other factors are ever used, whoever brings a file; a silo that has the data set can make
them again and hears how far its own are from the contract's. Not promised: equal bytes on another machine (torch's floats
differ), that the data set is public, or that the file on the network is the one that was meant: its digest is all there is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from privacy import base_model, basis_file, files, orthonormal, sketch
from privacy.contract import Adapter, Aggregator, Contract, Model, Privacy, PublicBasis, Sum, Task, Training
from privacy.errors import ConfigError, TrustError
from privacy.orthonormal import Factors
from privacy.update_rule import State
from silo import fixed_basis, membership, succession
from silo.config import Compute, load
from silo.home import Home

MOST_ANGLE = 0.1
"""Radians between the contract's factors and those made again above which they are called others."""


def of(home: Home, terms: Contract, state: State) -> dict[str, Factors] | None:
    """The factors to build a model with; None where they follow from the base model or a seed, or no round fixed them yet.

    Raises:
        TrustError: the silo's file is missing, damaged, or another one.
    """
    return fixed_basis.known(home, state) if terms.public_basis is None else public(home, terms)


def pinned(home: Home, terms: Contract) -> dict[str, Factors] | None:
    """The factors that the contract pins; None where it pins none. Raises TrustError as ``of``."""
    return None if terms.public_basis is None else public(home, terms)


def public(home: Home, terms: Contract) -> dict[str, Factors]:
    """The public factors of the contract, from this silo's file. Raises TrustError as ``of``."""
    raw = fixed_basis.read(home, hint="ask the coordinator for it, then `silo join --basis FILE`, which can be run again")
    return basis_file.load_public(raw, terms)


def take(home: Home, terms: Contract, path: Path) -> None:
    """Keep the coordinator's file, once it is the one that the contract pins.

    Raises:
        TrustError: it is another one.
        ConfigError: the file cannot be read, or the contract has no public basis.
    """
    if terms.public_basis is None:
        raise ConfigError(
            f"the contract's basis is {terms.adapter.basis}: it needs no file", hint="leave --basis out", code="no-public-basis"
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="name the coordinator's file", code="no-file") from error
    basis_file.load_public(raw, terms)
    files.write_atomic(home.basis_path, raw)


# --- Made from the data set ----------------------------------------------------------------------------------------------------


class _OpenBasis(msgspec.Struct, frozen=True, kw_only=True):
    """``[public_basis]`` as a draft may have it: digests open."""

    width: int
    max_grad_norm: float


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """All of a contract, or of its draft, on which public factors depend. Other tables are not looked at."""

    task: Task
    model: Model
    adapter: Adapter
    public_basis: _OpenBasis


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """Factors made from a data set, and the two digests that a contract states."""

    raw: bytes
    data_digest: str
    digest: str


def recipe_of(path: Path) -> Recipe:
    """The recipe in a contract or a draft.

    Raises:
        ConfigError: it cannot be read, or has no public basis.
    """
    try:
        return recipe_in(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="name the draft or the contract", code="no-file") from error


def recipe_in(raw: bytes) -> Recipe:
    """The recipe in these bytes. Raises ConfigError as ``recipe_of``."""
    try:
        found = msgspec.toml.decode(raw, type=Recipe)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(
            f"no recipe of a public basis: {error}", hint='it needs adapter.basis = "public" and [public_basis]', code="contract"
        ) from error
    kind, width, norm = found.adapter.basis, found.public_basis.width, found.public_basis.max_grad_norm
    if kind != "public" or not 1 <= width <= 4096 or not 0 < norm <= 1e9:
        raise ConfigError(
            f"adapter.basis = {kind}, [public_basis] width = {width}, max_grad_norm = {norm:g}",
            hint='a public basis has basis = "public" and a width and norm above 0', code="contract",
        )  # fmt: skip
    return found


def make(data: Path, recipe: Recipe, *, model: str = "", compute: Compute | None = None) -> Made:
    """The factors of this recipe from the records in ``data``, every one of which must be public. Charged to no ledger.

    Raises:
        ConfigError: the base model is missing or another, or the records give a module too few directions.
        RecordsError: a row cannot be used, or there is none.
        MachineError: the device is not there, or the file changed meanwhile.
    """
    from silo.learning import public_basis, training

    how = compute or Compute()
    terms = _terms(recipe)
    folder = membership.base_folder(terms, model)
    layout = _layout(folder, terms, recipe.public_basis.width)
    before = _digest_of(data)
    device, _ = training.resolve(how)
    found = public_basis.from_file(
        data, folder, terms, layout, rank=terms.adapter.vectors, max_grad_norm=recipe.public_basis.max_grad_norm,
        rows_tokens=how.rows_tokens, device=device,
    )  # fmt: skip
    if _digest_of(data) != before:
        raise ConfigError(f"{data.name} changed while it was read", hint="run the command again", code="records-changed")
    return Made(raw=basis_file.save(found), data_digest=before, digest=orthonormal.digest(found).hex())


def check(root: Path, data: Path) -> dict[str, Any]:
    """How far the contract's public factors are from those that this machine makes of ``data``.

    Of the contract that this silo joined, or was last shown. Nothing is charged or sent.

    Raises:
        TrustError: the data set is another file than the contract's, or the factors are others by more than ``MOST_ANGLE``.
        ConfigError: the silo joined no contract, or one without a public basis; else as ``make``.
    """
    home, settings = Home(root), load(Home(root).config_path)
    accepted = succession.at_work(home)[0]
    terms, stated = accepted.terms, accepted.terms.public_basis
    if stated is None:
        raise ConfigError(f"the contract's basis is {terms.adapter.basis}", hint="nothing is to be checked", code="no-public-basis")
    if (found := _digest_of(data)) != stated.data_digest:
        raise TrustError(
            f"{data.name} has the digest {found[:16]}…, the contract says {stated.data_digest[:16]}…",
            hint="get the very file that the contract names", code="data-digest",
        )  # fmt: skip
    theirs = public(home, terms)
    made = make(data, recipe_in(accepted.raw), model=settings.model.path, compute=settings.compute)
    angle, where = largest_angle(theirs, basis_file.load(made.raw, bytes.fromhex(made.digest)))
    if not angle <= MOST_ANGLE:
        raise TrustError(
            f"the contract's basis is {angle:.3g} radians from the one made here, at module {where}",
            hint="ask the coordinator how it was made: it did not come from this file in this way",
            code="basis-differs", angle=angle,
        )  # fmt: skip
    return {
        "data": stated.data, "data_digest": found, "digest": stated.digest, "digest_here": made.digest,
        "same_bytes": made.digest == stated.digest, "largest_angle": angle, "module": where,
    }  # fmt: skip


def largest_angle(one: Mapping[str, Factors], other: Mapping[str, Factors]) -> tuple[float, str]:
    """(radians, module) of the largest principal angle between the spaces of the columns of B, or of the rows of A.

    π/2 where a shape differs or a number is not finite. Raises ConfigError when they are of other modules.
    """
    if one.keys() != other.keys() or not one:
        raise ConfigError("the two bases are of other modules", hint="compare bases of one contract", code="contract")
    angles = [(max(_angle(b, d), _angle(a.T, c.T)), name) for name, (b, a) in one.items() for d, c in [other[name]]]
    return max(angles)


def _angle(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The largest principal angle by its sine, which is exact for small angles; columns are orthonormal."""
    if one.shape != other.shape:
        return math.pi / 2
    left, right = np.linalg.qr(one.astype(np.float64))[0], np.linalg.qr(other.astype(np.float64))[0]
    sine = float(np.linalg.norm(right - left @ (left.T @ right), ord=2))
    return math.asin(min(1.0, sine)) if math.isfinite(sine) else math.pi / 2


def _layout(folder: Path, terms: Contract, width: int) -> sketch.Layout:
    linear = base_model.describe(folder).linear
    missing = [name for name in terms.adapter.modules if name not in linear]
    if missing:
        raise ConfigError(
            f"the base model has no linear module {missing[0]}", hint="compare adapter.modules with the model", code="no-module"
        )
    return sketch.layout(terms.adapter.modules, [linear[name] for name in terms.adapter.modules], width)


def _digest_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="name the data set's file", code="no-file") from error


def _terms(recipe: Recipe) -> Contract:
    """A contract of this recipe and of nothing else: what its other tables say moves no byte of the factors."""
    privacy = Privacy(off="no differential privacy", units=1, sampling_rate=1.0, max_grad_norm=1.0, lattice_bits=1)
    public_basis = PublicBasis(
        data="public", data_digest="00" * 32, digest="00" * 32, width=recipe.public_basis.width,
        max_grad_norm=recipe.public_basis.max_grad_norm,
    )  # fmt: skip
    return Contract(
        format="siloquy/1", version=1, name="public-basis", expires="2099-12-31", task=recipe.task, model=recipe.model,
        adapter=recipe.adapter, training=Training(rounds=1, learning_rate=1.0), privacy=privacy, sum=Sum(),
        public_basis=public_basis, aggregator=Aggregator(name="none", sign_key="00" * 32, seal_key="00" * 1216), member=(),
    )  # fmt: skip
