# SPDX-License-Identifier: Apache-2.0
"""An aggregator is a directory, and ``aggregator.toml`` says where it listens.

::

    aggregator.toml          name, address, database; written last: without it the rest is half made
    aggregator.key, .pub     who it is: signs, and opens what is sealed to it; the service never reads the .key
    federation.draft.toml    the terms as the coordinator writes them, until they are signed
    model.json               what a report says beside the contract
    contract/v<n>.toml       the exact bytes of each signed version
    documents.sqlite         which document stands in which slot (unless [database] url names another database)
    evidence/<sha256>        the documents' bytes
    state/<n>.safetensors    model states, a cache: always derivable from the outcomes
    service.json             where the running service listens

Nothing in ``aggregator.toml`` touches the mechanism: that stands in the contract. Unknown keys are refused.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from privacy import files
from privacy.errors import ConfigError
from privacy.federation import Name

DEFAULT_PORT = 8470


class Listen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the service listens; port 0 takes a free one, which service.json then names."""

    host: Annotated[str, msgspec.Meta(min_length=1, max_length=253)] = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = DEFAULT_PORT


class Database(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An SQLAlchemy URL; empty means the SQLite file in the home."""

    url: str = ""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of ``aggregator.toml``."""

    name: Name
    listen: Listen = Listen()
    database: Database = Database()


class Home:
    """The aggregator's directory; see the module docstring for what lies where.

    Args:
        root: the directory; it is not created here.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config_path = root / "aggregator.toml"
        self.identity_path = root / "aggregator.key"
        self.public_path = root / "aggregator.pub"
        self.draft_path = root / "federation.draft.toml"
        self.basis_path = root / "basis.safetensors"
        self.contract_folder = root / "contract"
        self.evidence_folder = root / "evidence"
        self.state_folder = root / "state"
        self.log_folder = root / "log"
        self.service_path = root / "service.json"
        self.facts_path = root / "model.json"
        self.lock_path = root / "coordinator.lock"

    @classmethod
    def create(cls, root: Path, config: Config) -> Home:
        """A new home with its folders and a commented ``aggregator.toml``. Raises as ``prepared``."""
        home = cls.prepared(root)
        home.finish(config)
        return home

    @classmethod
    def prepared(cls, root: Path) -> Home:
        """A new home's folders. It is an aggregator's once it is finished; until then it may be prepared again.

        Raises:
            ConfigError: there is an aggregator already.
            MachineError: the directory cannot be made.
        """
        home = cls(root)
        if home.config_path.exists():
            raise ConfigError(
                f"{home.config_path} exists", hint="choose another folder, or use the aggregator that is there", code="home-exists"
            )
        for folder in (root, home.contract_folder, home.evidence_folder, home.state_folder):
            files.make_folder(folder)
        return home

    def finish(self, config: Config) -> None:
        """Write ``aggregator.toml``, the last file of a new home. Raises MachineError when the disk refuses."""
        files.write_atomic(self.config_path, commented(config).encode())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this home against every other command that writes in it, and sweep up what a killed one left half written.

        The service and the store are no such commands: what they write, they sweep themselves.

        Raises:
            MachineError: another process is at work in it.
        """
        with files.locked(self.lock_path):
            alone = (self.config_path, self.identity_path, self.public_path, self.draft_path, self.facts_path)
            for path in (*alone, self.contract_folder, self.state_folder):
                files.sweep(path)
            yield

    def contract_path(self, version: int) -> Path:
        """Where the exact bytes of a signed contract version stand."""
        return self.contract_folder / f"v{version}.toml"

    def database_url(self, config: Config) -> str:
        """The SQLAlchemy URL of the documents' table."""
        return config.database.url or f"sqlite:///{self.root / 'documents.sqlite'}"

    def config(self) -> Config:
        """The home's configuration.

        Raises:
            ConfigError: there is no aggregator here, or ``aggregator.toml`` is not what it must be.
        """
        try:
            raw = self.config_path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"cannot read {self.config_path}: {error.strerror}",
                hint="run `aggregator init`, or name its folder",
                code="no-home",
            ) from error
        return parse(raw)


def parse(raw: bytes) -> Config:
    """The configuration in the bytes of an ``aggregator.toml``. Raises ConfigError naming the key."""
    try:
        return msgspec.toml.decode(raw, type=Config)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(
            f"aggregator.toml: {error}", hint="the keys are name, [listen] host and port, [database] url", code="config"
        ) from error


def commented(config: Config) -> str:
    """``aggregator.toml`` for this configuration, every key explained."""
    return f"""\
# Where this aggregator listens and keeps its table. The federation's terms stand in the signed contract, not here.

# Lower-case letters, digits, dots and hyphens; the name in the contract.
name = {_quote(config.name)}

[listen]
# The address of the interface; put a TLS proxy in front of anything but loopback.
host = {_quote(config.listen.host)}
# 0 takes a free port; service.json then names it.
port = {config.listen.port}

[database]
# An SQLAlchemy URL; empty: documents.sqlite in this folder.
url = {_quote(config.database.url)}
"""


def _quote(text: str) -> str:
    if not text.isprintable():
        raise ConfigError(f"{text!r} has characters that are not printable", hint="leave them out", code="config")
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
