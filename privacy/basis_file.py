# SPDX-License-Identifier: Apache-2.0
"""The factors of a basis as bytes: one canonical safetensors file, taken only by its digest.

For a basis that not everybody can compute to the same bytes (``public``: torch's floats differ between machines) the coordinator's
bytes are used, and the digest that all have agreed on says which they are. Promised: one basis has one file, and what ``load``
gives back has the expected digest and is orthonormal. Not promised: that the factors came from the data that the contract names.
"""

from __future__ import annotations

import hmac
import json
import math
import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from privacy.contract import Contract
from privacy.errors import MachineError, TrustError
from privacy.orthonormal import Factors, check_orthonormal, digest

MOST_HEADER_BYTES = 1 << 24


def save(bases: Mapping[str, Factors]) -> bytes:
    """The canonical safetensors file: for each module, in the given order, ``name.B`` and ``name.A`` as little-endian float32.

    The header is JSON without blanks, filled up with blanks to a multiple of 8 bytes.
    """
    entries, blobs, end = {}, [], 0
    for name, pair in bases.items():
        for letter, factor in zip("BA", pair, strict=True):
            blob = factor.astype("<f4").tobytes(order="C")
            entries[f"{name}.{letter}"] = {"dtype": "F32", "shape": list(factor.shape), "data_offsets": [end, end + len(blob)]}
            blobs.append(blob)
            end += len(blob)
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([struct.pack("<Q", len(header)), header, *blobs])


def load(raw: bytes, expected: bytes) -> dict[str, Factors]:
    """The basis in ``raw``, whose digest is ``expected`` (32 bytes; ``privacy.orthonormal.digest``).

    Formal guarantees:
        - *By digest*: what is returned has this digest; otherwise nothing is.
        - *Canonical*: ``save`` of it is ``raw``, to the byte.

    Raises:
        TrustError: malformed or not canonical bytes, another digest, or factors that are not orthonormal to 1e-5.
    """
    found = _parsed(raw)
    if save(found) != raw:
        raise _refusal("is not in canonical form")
    if not hmac.compare_digest(digest(found), expected):
        raise _refusal(f"has the digest {digest(found).hex()[:16]}…, not {expected.hex()[:16]}…")
    try:
        for b, a in found.values():
            if b.shape[1] > b.shape[0] or a.shape[0] > a.shape[1]:  # and too many products to try
                raise _refusal("is not orthonormal")
            check_orthonormal(b.astype(np.float64))
            check_orthonormal(a.T.astype(np.float64))
    except MachineError as error:
        raise _refusal("is not orthonormal") from error
    return found


def load_public(raw: bytes, terms: Contract) -> dict[str, Factors]:
    """The basis in ``raw``, which is the one that ``[public_basis]`` of the contract pins, with the contract's modules and rank.

    Raises:
        TrustError: as ``load``; or it is of other modules, or of another rank.
    """
    if terms.public_basis is None:
        raise _refusal(f"is not wanted: adapter.basis is {terms.adapter.basis}")
    found = load(raw, bytes.fromhex(terms.public_basis.digest))
    if tuple(found) != terms.adapter.modules:
        raise _refusal(f"is of {len(found)} modules, which are not the {len(terms.adapter.modules)} of the contract in their order")
    vectors = terms.adapter.vectors
    if any((b.shape[1], a.shape[0]) != (vectors, vectors) for b, a in found.values()):
        raise _refusal(f"has not the {vectors} vectors of the contract for each module")
    return found


def _parsed(raw: bytes) -> dict[str, Factors]:
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or not 2 <= length <= min(MOST_HEADER_BYTES, len(raw) - 8):
        raise _refusal(f"claims a header of {length} bytes in {len(raw)}")
    try:
        header = json.loads(raw[8 : 8 + length].decode("ascii"))
        names = list(header)
        shapes = [tuple(header[name]["shape"]) for name in names]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _refusal("has a malformed header") from error
    if not names or len(names) % 2 or not all(map(_is_shape, shapes)) or sum(map(math.prod, shapes)) * 4 != len(raw) - 8 - length:
        raise _refusal("holds other bytes than its header says")
    data, found, start = np.frombuffer(raw, dtype="<f4", offset=8 + length), {}, 0
    for (b_name, b_shape), (_, a_shape) in zip(
        zip(names[::2], shapes[::2], strict=True), zip(names[1::2], shapes[1::2], strict=True), strict=True
    ):
        middle, end = start + math.prod(b_shape), start + math.prod(b_shape) + math.prod(a_shape)
        found[b_name.removesuffix(".B")] = (_matrix(data[start:middle], b_shape), _matrix(data[middle:end], a_shape))
        start = end
    return found


def _matrix(values: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    return values.reshape(shape).astype(np.float32)


def _is_shape(shape: tuple[object, ...]) -> bool:
    return len(shape) == 2 and all(type(side) is int and 0 < side < 2**31 for side in shape)


def _refusal(what: str) -> TrustError:
    return TrustError(f"the file of the basis {what}", hint="get it again from the coordinator", code="basis-file")
