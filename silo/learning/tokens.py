# SPDX-License-Identifier: Apache-2.0
"""Units of text become units of token numbers.

The tokenizer is the base model's own, pinned by the same digest, and runs offline. A record is encoded by itself: the
result does not depend on its neighbours, there is no padding, and anything longer than the contract's length is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy.errors import ConfigError, RecordsError
from privacy.federation import Task
from privacy.weights import read_json
from silo.learning import completions
from silo.learning.records import Record, Unit

Row = tuple[tuple[int, ...], tuple[int, ...] | None, int]
"""(input ids, token type ids where the tokenizer has them, label; or how many of the tokens are the prompt's)."""


@dataclass(frozen=True, kw_only=True)
class EncodedUnit:
    """A privacy unit as the model sees it; each row is one record, of 1 to ``task.max_length`` tokens."""

    id: str
    rows: tuple[Row, ...]


def encode(units: Sequence[Unit], tokenizer_folder: Path, task: Task) -> list[EncodedUnit]:
    """The units in token numbers, in the same order.

    Raises:
        ConfigError: the folder holds no fast tokenizer; or as ``completions.encoded``.
        RecordsError: a record has no token at all, or one that the model in that folder does not know; or as there.
    """
    if not units:
        return []
    records, tokenizer = [record for unit in units for record in unit.records], load(tokenizer_folder)
    encoded = completions.encoded if task.is_causal else _texts
    made = encoded(records, tokenizer, task)
    _check_known(made, tokenizer_folder)
    rows = iter(made)
    return [EncodedUnit(id=unit.id, rows=tuple(next(rows) for _ in unit.records)) for unit in units]


def _check_known(rows: Sequence[Row], folder: Path) -> None:
    """Raises RecordsError for tokens beyond the model's vocabulary, as a tokenizer has them to which words were added."""
    path = folder / "config.json"
    known = read_json(path).get("vocab_size") if path.is_file() else None
    beyond = sum(max(ids) >= known for ids, _, _ in rows) if isinstance(known, int) else 0
    if beyond:
        raise RecordsError(
            f"{beyond} of {len(rows)} records hold tokens beyond the base model's vocabulary of {known}",
            hint="the folder's tokenizer has words that the model has not: drop such records, or choose another base model",
            code="unknown-tokens", found=beyond,
        )  # fmt: skip


def _texts(records: Sequence[Record], tokenizer: Any, task: Task) -> list[Row]:  # noqa: ANN401
    """Each record's one or two texts, as the tokenizer joins them, and its label."""
    encoded = tokenizer(
        *([record.texts[place] for record in records] for place in range(2 if task.text_pair else 1)),
        truncation=True,
        max_length=task.max_length,
        padding=False,
        return_attention_mask=False,
    )
    ids, types = encoded["input_ids"], encoded.get("token_type_ids") or [None] * len(records)
    if empty := sum(not tokens for tokens in ids):
        raise RecordsError(
            f"{empty} records have no token in this model's vocabulary", hint="drop records without words", found=empty
        )
    return [
        (tuple(tokens), None if kinds is None else tuple(kinds), record.label)
        for tokens, kinds, record in zip(ids, types, records, strict=True)
    ]


def load(folder: Path) -> Any:  # noqa: ANN401 (transformers has no types here)
    """The fast tokenizer in ``folder``, from local files. Raises ConfigError when there is none."""
    # Without it transformers may make up a tokenizer that knows no word, and every text would become the same.
    if not (folder / "tokenizer.json").is_file():
        raise _no_tokenizer(folder, "there is no tokenizer.json")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _no_tokenizer(folder, str(error).split("\n", 1)[0]) from error
    if not tokenizer.is_fast:
        raise _no_tokenizer(folder, "it is not a fast one")
    return tokenizer


def _no_tokenizer(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{folder}: no usable tokenizer: {reason}",
        hint="use a model folder with tokenizer.json in it",
        code="tokenizer",
        folder=str(folder),
    )
