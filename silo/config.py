# SPDX-License-Identifier: Apache-2.0
"""``silo.toml``: what a silo decides for itself, and nothing on which the federation's mechanism rests.

Epsilon, sampling, clipping and the model stand in the signed contract. Here stand the place of the records, the limits this
silo sets on its own spending, and how the machine computes. Unknown keys are refused, with the nearest known one named.
Paths are taken from the folder of the file. Not promised: that a path exists; whoever opens it says so.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from privacy import files
from privacy.errors import ConfigError
from privacy.federation import Name, Positive

FILE = "silo.toml"


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the tables of ``silo.toml``: unknown keys are refused."""


class Aggregator(Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the mailbox is, by address or in a folder, and whom to expect there.

    Documents protect themselves; https hides who talks and when.
    """

    url: Annotated[str, msgspec.Meta(pattern=r"^(https?://\S+)?$")] = ""
    folder: str = ""
    fingerprint: str
    insecure_http: bool = False

    def __post_init__(self) -> None:
        if bool(self.url) == bool(self.folder):
            raise ValueError("Give either url or folder")


class Records(Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The records this silo trains on.

    ``lasting_ids``: its word that the unit column names one unit by one id in every extract, for ever, and that each unit comes
    into an extract by a rule that looks at that unit alone (silo.unit_sets).
    ``other_homes``: this silo's other directories on the same records, whose ledgers count here (silo.other_homes).
    """

    path: Annotated[str, msgspec.Meta(min_length=1)]
    lasting_ids: bool = False
    other_homes: tuple[str, ...] = ()


class Limits(Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The most this silo spends on any of its units, whatever a contract asks for.

    ``without_privacy``: its word that it takes part where there is no differential privacy at all; no limit then holds.
    """

    epsilon: Positive
    delta: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
    without_privacy: bool = False


class Compute(Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How this machine computes. Changing it does not touch epsilon (a unit's integers are computed from that unit alone).

    ``prefix_cache_gib``: the most disk that a running ``silo train`` uses for what the frozen layers below the adapters give
    (silo.learning.prefix); 0: none.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    rows_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**24)] = 1024
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    prefix_cache_gib: Annotated[float, msgspec.Meta(ge=0.0, le=2.0**20)] = 4.0


class Model(Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A local copy of the contract's base model; empty means: found by the contract's name. The digest decides either way."""

    path: str = ""


class Config(Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of ``silo.toml``."""

    name: Name
    organisation: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    aggregator: Aggregator
    records: Records
    limits: Limits
    compute: Compute = Compute()
    model: Model = Model()


def load(path: Path) -> Config:
    """The configuration in ``path``, with its relative paths resolved against the file's folder.

    Raises:
        ConfigError: no such file, not TOML, an unknown or missing key, or a value out of range; the message names it.
    """
    try:
        config = msgspec.toml.decode(path.read_bytes(), type=Config)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}",
            hint="run `silo init` there, or name the silo's folder",
            code="no-config",
            path=str(path),
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: {_in_words(str(error))}", hint=_advice(str(error)), code="config", path=str(path)) from error
    folder = path.parent
    others = tuple(str(folder / each) for each in config.records.other_homes)
    records = msgspec.structs.replace(config.records, path=str(folder / config.records.path), other_homes=others)
    model = msgspec.structs.replace(config.model, path=str(folder / config.model.path) if config.model.path else "")
    at = config.aggregator
    aggregator = msgspec.structs.replace(at, folder=str(folder / at.folder)) if at.folder else at
    return msgspec.structs.replace(config, aggregator=aggregator, records=records, model=model)


def write_commented(
    path: Path,
    *,
    name: str,
    organisation: str,
    url: str = "",
    folder: str = "",
    fingerprint: str,
    records: str,
    epsilon: float,
    delta: float,
    compute: Compute | None = None,
    model: str = "",
) -> None:
    """Write a commented ``silo.toml``, once, and read it back. The aggregator is at ``url`` or in ``folder``, one of the two.

    Raises:
        ConfigError: a value is not allowed; nothing is left behind.
        Equivocation: the file is there with other content.
        MachineError: the disk refuses.
    """
    how = compute or Compute()
    text = _TEMPLATE.format(
        name=quote(name),
        organisation=quote(organisation),
        where="\n".join([f"url = {quote(url)}"] * bool(url) + [f"folder = {quote(folder)}"] * bool(folder)),
        fingerprint=quote(fingerprint),
        records=quote(records),
        epsilon=repr(float(epsilon)),
        delta=repr(float(delta)),
        device=quote(how.device),
        precision=quote(how.precision),
        rows_tokens=how.rows_tokens,
        threads=how.threads,
        prefix_cache_gib=how.prefix_cache_gib,
        model=quote(model),
    )
    try:
        msgspec.toml.decode(text, type=Config)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path.name}: {_in_words(str(error))}", hint="give another value", code="config") from error
    files.write_once(path, text.encode())


_TEMPLATE = """\
# What this silo decides for itself. The terms of the federation stand in its contract, which every member signs.
name = {name}
organisation = {organisation}

[aggregator]
# url = "https://…", or folder = "…": documents then travel as files, see docs/guides/air-gap.md
{where}
# The aggregator's fingerprint, or the contract's digest, compared with the coordinator over another channel.
fingerprint = {fingerprint}
# insecure_http = true     # plain http to another machine: contents stay protected, who talks and when does not

[records]
# JSON lines, CSV or Parquet. It never leaves this machine.
path = {records}
# lasting_ids = true       # your word: one unit has one id in every extract, for ever. Runs over other units then do not compose
#                          # and a unit is in an extract by a rule that looks at it alone (a date, a hash): no first thousand
# other_homes = ["…"]      # directories of this silo in other federations on the same records, each naming this one: all compose

[limits]
# The most this silo spends on any privacy unit, over all runs. A round beyond it is refused before a record is read.
epsilon = {epsilon}
delta = {delta}
# without_privacy = true   # takes part even where NO noise protects these records: docs/concepts/privacy.md says what that means

[compute]
device = {device}        # auto | cpu | cuda
precision = {precision}     # auto | float32 | bfloat16
rows_tokens = {rows_tokens}     # tokens in one physical batch: the knob for memory and speed; a GPU likes 16384
threads = {threads}
prefix_cache_gib = {prefix_cache_gib}   # disk that a running train uses to compute frozen layers once per record; 0: none

[model]
# A local copy of the base model. Empty: found by the contract's name. Its digest is compared with the contract either way.
path = {model}
"""


def quote(text: str) -> str:
    """A TOML basic string."""
    return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")


_UNKNOWN = re.compile(r"unknown field `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
_TABLES: dict[str, type[Table]] = {
    "": Config,
    "aggregator": Aggregator,
    "records": Records,
    "limits": Limits,
    "compute": Compute,
    "model": Model,
}


def _in_words(error: str) -> str:
    """msgspec's sentence with the key named as it stands in the file."""
    return error[:1].lower() + error[1:].replace("`$.", "`")


def _advice(error: str) -> str:
    found = _UNKNOWN.search(error)
    if found is None:
        return "mend that line; `silo init` writes a commented example"
    known = _TABLES.get(found[2] or "", Config).__struct_fields__
    near = difflib.get_close_matches(found[1], known, n=1)
    return f"did you mean `{near[0]}`?" if near else "known keys there: " + ", ".join(known)
