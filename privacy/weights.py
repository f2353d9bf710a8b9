# SPDX-License-Identifier: Apache-2.0
"""The tensors of a model's folder, as its safetensors headers claim them and its files hold them. Without torch.

Promised: what is found is what transformers loads, ``model.safetensors`` or the shards that its index lists, and every claim of
a header is checked against the file: no overlap, no hole, no name twice. Weights that are code (pickle) are refused. Not
promised: that the weights are good.

The header is parsed here, by hand and with caps, because the bytes may come from a hub.
Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, tensors without holes).
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from privacy.errors import ConfigError

_ELSEWHERE = {"config.json": "transformers_weights", "tokenizer_config.json": "fast_tokenizer_files"}
"""Keys that have transformers take weights, or a tokenizer, from files of other names."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
}
_MAX_HEADER_BYTES = 100_000_000
_MAX_JSON_BYTES = 50_000_000
_MAX_RANK = 8


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor: its bytes lie at ``begin``..``end`` of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_folder(folder: Path) -> None:
    """Return if ``folder`` has a configuration and nothing that would load something else. Raises ConfigError otherwise."""
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        refuse(folder, f"holds pickled weights ({pickled[0]}): loading them runs code", "keep safetensors only")
    if (folder / "adapter_config.json").exists():
        refuse(
            folder,
            "holds adapter_config.json: transformers would load another model under this one",
            "name the base model's own folder",
        )
    if not (folder / "config.json").is_file():
        refuse(folder, "has no config.json", "name the folder that holds the model's config.json and model.safetensors")
    for name, key in _ELSEWHERE.items():
        if (folder / name).is_file() and key in read_json(folder / name):
            refuse(folder / name, f"has {key}: transformers would load files that no digest holds", f"leave {key} out of it")


def mapped(folder: Path, stack: ExitStack) -> Iterator[tuple[Tensor, mmap.mmap]]:
    """Every tensor that transformers would load, with the file it lies in, open as long as ``stack`` is.

    Raises:
        ConfigError: files are missing, malformed or ambiguous.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        yield from _tensors(folder / "model.safetensors", stack)
        return
    where = read_json(index).get("weight_map") if index.is_file() else None
    if (
        not isinstance(where, dict)
        or not where
        or not all(isinstance(file, str) and Path(file).name == file for file in where.values())
    ):
        refuse(folder, "has neither model.safetensors nor a usable index of shards", "use a model with safetensors weights")
    found: dict[str, str] = {}
    for file in sorted(set(where.values())):
        for tensor, data in _tensors(folder / file, stack):
            if where.get(tensor.name) != file or tensor.name in found:
                refuse(folder / file, f"holds {tensor.name!r}, which the index does not place there")
            found[tensor.name] = file
            yield tensor, data
    if found.keys() != where.keys():
        refuse(index, f"lists {len(where)} tensors, the files hold {len(found)}")


def _tensors(path: Path, stack: ExitStack) -> Iterator[tuple[Tensor, mmap.mmap]]:
    try:
        file = stack.enter_context(path.open("rb"))
        data = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        refuse(path, f"cannot be read: {getattr(error, 'strerror', None) or 'the file is empty'}")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, len(data) - 8):
        refuse(path, f"claims a header of {length} bytes in a file of {len(data)}")
    header = _parsed(path, data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
    _check_layout(path, tensors, 8 + length, len(data))
    yield from ((tensor, data) for tensor in tensors)


def _tensor(path: Path, name: str, entry: object, start: int) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        refuse(path, f"tensor {name[:80]!r} has no plain dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BITS or not _naturals(shape, 0, _MAX_RANK) or not _naturals(offsets, 2, 2):
        refuse(path, f"tensor {name[:80]!r} has an unknown dtype or a malformed shape or place")
    begin, end = offsets
    if end - begin != math.prod(shape) * _ITEM_BITS[dtype] // 8:
        refuse(path, f"tensor {name[:80]!r} takes {end - begin} bytes, its shape {shape} of {dtype} does not")
    try:
        name.encode()
    except UnicodeEncodeError:
        refuse(path, "a tensor's name is not valid Unicode")
    return Tensor(name=name, dtype=dtype, shape=tuple(shape), begin=start + begin, end=start + end)


def _naturals(value: object, fewest: int, most: int) -> bool:
    return (
        isinstance(value, list) and fewest <= len(value) <= most and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _check_layout(path: Path, tensors: Iterable[Tensor], start: int, size: int) -> None:
    """Sorted by place, each tensor begins where the one before ends, and the last ends with the file."""
    reached = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != reached:
            refuse(
                path,
                f"tensor {tensor.name[:80]!r} begins at byte {tensor.begin}, expected {reached}: tensors overlap or leave a hole",
            )
        reached = tensor.end
    if reached != size:
        refuse(path, f"tensors end at byte {reached}, the file at {size}")


def read_json(path: Path) -> dict[str, object]:
    """The object in a file of at most 50 MB, no name twice. Raises ConfigError when there is none."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            refuse(path, f"is larger than {_MAX_JSON_BYTES} bytes")
        return _parsed(path, path.read_bytes())
    except OSError as error:
        refuse(path, f"cannot be read: {error.strerror}")


def _parsed(path: Path, raw: bytes) -> dict[str, object]:
    def distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name stands twice")
        return dict(pairs)

    try:
        value = json.loads(raw.decode(), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        refuse(path, f"malformed JSON: {str(error)[:120]}")
    if not isinstance(value, dict):
        refuse(path, "malformed JSON: not an object")
    return value


def refuse(path: Path, what: str, hint: str = "download the model again, from a source you trust") -> NoReturn:
    """Raises the ConfigError that says what is wrong with ``path``."""
    raise ConfigError(f"{path}: {what}", hint=hint, code="base-model", file=str(path))
