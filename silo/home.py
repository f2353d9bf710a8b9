# SPDX-License-Identifier: Apache-2.0
"""A silo is a directory: its keys, its contract, its ledger, its promises, and the state it has reached.

::

    silo.toml              what this silo decides for itself
    identity.key, .pub     who it is; identity.key.old while a new key waits for its contract; former/ has older public halves
    selection.key          32 bytes: which records of a unit are kept (a keyed choice)
    install.key            32 bytes: makes two clones of one machine differ in what they draw
    contract/v<version>/   the contract as signed, and every member's countersignature
    ledger.jsonl           what was spent
    units/                 0700; which units each run may draw, by keyed hashes (silo.unit_sets)
    promises/              one file per promise: round → manifest, round → consent, version → its one successor; never deleted
    log/                   the transparency log as this silo saw it: last head, receipts, cosignatures, evidence (silo.watch)
    epoch/                 0700; epoch keys and the files of the open round; never in a backup
    restored               after `silo restore`: the epoch up to which none is entered, until a newer one stands
    alone/                 0700; runs of this silo by itself: contract and state of each, apart from the federation's (silo.alone)
    state.safetensors      the last settled round, its outcome's digest and the model state, in one atomic file; in local
                           mode also this silo's own optimiser
    basis.safetensors      the factors that a basis round fixed, or the coordinator's public ones, held to a digest
                           (silo.agreed_basis)

Promised: a write happened whole or not at all, a promise is on the disk before the function returns and cannot be made
twice with different content, and one process at a time works in a home. Not promised: that deleted secrets are gone from the
medium, or safety when the whole directory is copied back to an earlier time (the ledger's counter tells the aggregator).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors.numpy

from privacy import files
from privacy.errors import ConfigError, Equivocation, MachineError, Replay, TrustError
from privacy.update_rule import State

SECRET_BYTES = 32
_FILES = (
    "silo.toml", "identity.key", "identity.key.old", "identity.key.new", "identity.pub", "selection.key", "install.key",
    "ledger.jsonl", "state.safetensors", "basis.safetensors", "restored",
)  # fmt: skip
"""What lies in the root itself."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a silo stands: the last settled round, its epoch, manifest and outcome (digests), the state.

    ``voids``: rounds in a row that did not move the state, void or rejected.

    ``stood``: how many silos stand in the last round's sum, this one among them; 0 when there is none or it was left out; None
    where all stand in every sum.

    ``own``: in local mode this silo's own optimiser after the last result it was part of, with zeros for a model; it never leaves.
    """

    contract: bytes
    epoch: int
    round: int
    manifest: bytes
    outcome: bytes
    voids: int
    state: State
    stood: int | None = None
    own: State | None = None


class Home:
    """The silo's directory; see the module docstring for what lies where.

    Args:
        root: the directory; it is not created here.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config_path = root / "silo.toml"
        self.identity_path = root / "identity.key"
        self.public_path = root / "identity.pub"
        self.old_identity_path = root / "identity.key.old"
        self.new_identity_path = root / "identity.key.new"
        self.former_folder = root / "former"
        self.ledger_path = root / "ledger.jsonl"
        self.units_folder = root / "units"
        self.state_path = root / "state.safetensors"
        self.basis_path = root / "basis.safetensors"
        self.epoch_folder = root / "epoch"
        self.log_folder = root / "log"
        self.restored_path = root / "restored"

    @classmethod
    def create(cls, root: Path) -> Home:
        """A new home with fresh local secrets. A half-made one is completed; existing secrets are kept.

        Raises:
            MachineError: the directory or a file in it cannot be written.
        """
        home = cls(root)
        for folder, mode in ((root, 0o755), (root / "contract", 0o755), (root / "promises", 0o755), (home.epoch_folder, 0o700)):
            files.make_folder(folder, mode=mode)
        for path in (root / "selection.key", root / "install.key"):
            if not path.exists():
                files.write_once(path, os.urandom(SECRET_BYTES), mode=files.PRIVATE)
        return home

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this home against every other process, and sweep up what a killed one left half written.

        Raises:
            ConfigError: there is no silo here.
            MachineError: another process is at work in it.
        """
        if not self.root.is_dir():
            raise ConfigError(f"there is no silo in {self.root}", hint="run `silo init` first", code="no-home")
        with files.locked(self.root / ".lock"):
            # In the root by name: an export, or anything else that takes no lock, may be writing there.
            alone = [self.root / name for name in _FILES]
            within = (self.log_folder, self.former_folder, self.units_folder, self.root / "promises")
            for path in (*alone, *within, *self.root.glob("contract/*"), *self.epoch_folder.glob("*")):
                files.sweep(path)
            yield

    @property
    def selection_key(self) -> bytes:
        """The key of the choice of records within a unit."""
        return _secret(self.root / "selection.key")

    @property
    def install_secret(self) -> bytes:
        """The per-install secret that goes into every self-mask seed."""
        return _secret(self.root / "install.key")

    def keep_contract(self, version: int, document: bytes) -> None:
        """Keep the contract's signed document. Raises Equivocation when another one of this version is there."""
        folder = self.root / "contract" / f"v{version}"
        files.make_folder(folder, mode=0o755)
        files.write_once(folder / "contract", document)

    def keep_countersignature(self, version: int, member: int, document: bytes) -> None:
        """Keep one member's countersignature. Raises Equivocation when another one is there."""
        folder = self.root / "contract" / f"v{version}"
        files.make_folder(folder, mode=0o755)
        files.write_once(folder / f"countersignature-{member}", document)

    def contract(self) -> tuple[int, bytes] | None:
        """The highest kept contract version and its signed document, or None before `silo join`."""
        kept = self.contracts()
        return kept[-1] if kept else None

    def contracts(self) -> list[tuple[int, bytes]]:
        """Every kept contract version and its signed document, ascending."""
        versions = sorted(int(found[1]) for found in map(_VERSION.fullmatch, _names(self.root / "contract")) if found)
        kept = ((version, _read(self.root / "contract" / f"v{version}" / "contract")) for version in versions)
        return [(version, document) for version, document in kept if document is not None]

    def promise_successor(self, version: int, digest: bytes) -> None:
        """Promise, on disk first, that ``digest`` is the only contract this silo signs as the one after ``version``.

        Raises:
            Equivocation: another successor was promised.
        """
        self._promise("successor", version, digest, after="version")

    def countersignature(self, version: int, member: int) -> bytes | None:
        """A member's kept countersignature."""
        return _read(self.root / "contract" / f"v{version}" / f"countersignature-{member}")

    def promise_manifest(self, round_number: int, round_ctx: bytes) -> None:
        """Promise, on disk first, that ``round_ctx`` is the only manifest of this round and no earlier round opens again.

        Raises:
            Replay: a later round was promised before.
            Equivocation: this round was promised to another manifest.
        """
        latest = self.latest_promise()
        if latest is not None and round_number < latest:
            raise Replay(
                f"a manifest for round {round_number}, this silo took part in round {latest}",
                hint="the aggregator must go on with the next number",
                round=round_number,
                latest=latest,
            )
        self._promise("manifest", round_number, round_ctx)

    def promise_consent(self, round_number: int, frozen: bytes) -> None:
        """Promise, on disk first, that ``frozen`` (a digest of U) is the only set this silo consents to in this round.

        Raises:
            Equivocation: another set was consented to.
        """
        self._promise("consent", round_number, frozen)

    def promised_manifest(self, round_number: int) -> bytes | None:
        """The round_ctx this silo is bound to in this round, or None."""
        return self._promised("manifest", round_number)

    def promised_consent(self, round_number: int) -> bytes | None:
        """The digest of U this silo consented to in this round, or None."""
        return self._promised("consent", round_number)

    def latest_promise(self) -> int | None:
        """The highest round a manifest was promised for, or None."""
        return max(self.promised_rounds(), default=None)

    def promised_rounds(self) -> list[int]:
        """Every round a manifest was promised for, ascending."""
        return sorted(int(found[1]) for found in map(_PROMISE.fullmatch, _names(self.root / "promises")) if found)

    def begin_restore(self) -> None:
        """From here on this home enters no epoch, until ``end_restore``."""
        files.write_atomic(self.restored_path, _UNFINISHED)

    def end_restore(self, epoch: int) -> None:
        """The home is restored: it enters epochs above ``epoch`` only."""
        files.write_atomic(self.restored_path, b"%d\n" % epoch)

    def restored_epoch(self) -> int:
        """The epoch up to which a restored home enters none; 0 where nothing was restored.

        Raises:
            TrustError: a restore was begun and has not ended, or the file is damaged.
        """
        text = _read(self.restored_path)
        if text is None:
            return 0
        if not _NUMBER_LINE.fullmatch(text):
            what = "was begun and has not ended" if text == _UNFINISHED else "left a damaged file `restored`"
            raise TrustError(f"a restore of this home {what}", hint="run `silo restore` again", code="restore-unfinished")
        return int(text)

    def forget_restored(self, standing: int) -> None:
        """Epoch ``standing`` stands: if it is newer than the restore, that is over."""
        if 0 < self.restored_epoch() < standing:
            self.restored_path.unlink(missing_ok=True)

    def save_progress(self, progress: Progress) -> None:
        """Replace the state file by ``progress``, atomically."""
        mode = files.PUBLIC if progress.own is None else files.PRIVATE
        files.write_atomic(self.state_path, _to_bytes(progress), mode=mode)

    def progress(self) -> Progress | None:
        """Where the silo stands, or None before its first settled round.

        Raises:
            TrustError: the file is damaged.
        """
        data = _read(self.state_path)
        return None if data is None else _from_bytes(data)

    def _promise(self, kind: str, number: int, digest: bytes, *, after: str = "round") -> None:
        try:
            files.write_once(self.root / "promises" / f"{kind}-{number}", digest.hex().encode() + b"\n")
        except Equivocation as error:
            before = self._promised(kind, number) or b""
            raise Equivocation(
                f"a second {kind} for {after} {number}: {digest.hex()[:16]}, promised was {before.hex()[:16]}",
                hint="stop, and show both documents to the other members",
                round=number,
            ) from error

    def _promised(self, kind: str, number: int) -> bytes | None:
        text = _read(self.root / "promises" / f"{kind}-{number}")
        if text is None:
            return None
        if not _DIGEST_LINE.fullmatch(text):
            raise TrustError(f"the promise {kind}-{number} is damaged", hint="restore the silo from its backup", code="malformed")
        return bytes.fromhex(text.decode().strip())


_DIGESTS = ("contract", "manifest", "outcome")
_NUMBERS = ("epoch", "round", "voids")
_POWERS = ("beta1_power", "beta2_power")
_ARRAYS = ("theta", "first_moment", "second_moment")
_OWN = "own_"
"""What the names of a silo's own state begin with; they are there in local mode only."""
_VERSION = re.compile(r"v([1-9][0-9]{0,9})", re.ASCII)
_PROMISE = re.compile(r"manifest-([0-9]{1,10})", re.ASCII)
_UNFINISHED = b"unfinished\n"
_NUMBER_LINE = re.compile(rb"(0|[1-9][0-9]{0,9})\n")
_DIGEST_LINE = re.compile(rb"[0-9a-f]{64}\n")


def remove_folder(path: Path) -> None:
    """Delete a folder of secrets and all that lies in it; nothing happens when it is not there.

    Raises:
        MachineError: it cannot be deleted.
    """
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise MachineError(
            f"cannot delete {path}: {error.strerror}", hint="delete it by hand: it holds secrets", code="cannot-delete"
        ) from error


def _to_bytes(progress: Progress) -> bytes:
    states = {"": progress.state} if progress.own is None else {"": progress.state, _OWN: progress.own}
    facts: dict[str, object] = {
        "format": "siloquy-state/1",
        **{name: getattr(progress, name).hex() for name in _DIGESTS},
        **{name: getattr(progress, name) for name in _NUMBERS},
    }
    if progress.stood is not None:
        facts["stood"] = progress.stood
    arrays = {}
    for prefix, state in states.items():
        facts[prefix + "applied"] = state.applied
        facts.update({prefix + name: getattr(state, name).hex() for name in _POWERS})
        facts.update({prefix + "basis": state.basis.hex()} if state.basis else {})
        arrays.update({prefix + name: np.ascontiguousarray(getattr(state, name), dtype="<f8") for name in _ARRAYS})
    facts["digest"] = _digest(facts, *states.values())
    saved: bytes = safetensors.numpy.save(arrays, metadata={"siloquy": json.dumps(facts)})
    return saved


def _from_bytes(data: bytes) -> Progress:
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts = json.loads(header["__metadata__"]["siloquy"])
        arrays = safetensors.numpy.load(data)
        state = _state_in(facts, arrays, "")
        own = _state_in(facts, arrays, _OWN) if _OWN + "applied" in facts else None
        digests: dict[str, Any] = {name: bytes.fromhex(facts[name]) for name in _DIGESTS}
        numbers = {name: facts[name] for name in _NUMBERS}
        progress = Progress(state=state, own=own, stood=facts.get("stood"), **digests, **numbers)
        written = str(facts.pop("digest"))
        found = _digest(facts, state, *([] if own is None else [own]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, struct.error, safetensors.SafetensorError) as error:
        raise _damaged("it is no state file") from error
    if found != written:
        raise _damaged(f"its digest is {found[:16]}, written was {written[:16]}")
    return progress


def _state_in(facts: dict[str, Any], arrays: dict[str, Any], prefix: str) -> State:
    powers: dict[str, Any] = {name: float.fromhex(facts[prefix + name]) for name in _POWERS}
    basis = bytes.fromhex(facts.get(prefix + "basis", ""))
    return State(applied=facts[prefix + "applied"], basis=basis, **powers, **{name: arrays[prefix + name] for name in _ARRAYS})


def _digest(facts: dict[str, object], *states: State) -> str:
    """Hex SHA-256 over everything in the state file but this digest."""
    content = b"".join(state.to_bytes() for state in states)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + b"\0" + content).hexdigest()


def _damaged(why: str) -> TrustError:
    return TrustError(f"state.safetensors is damaged: {why}", hint="restore the silo from its backup", code="malformed")


def _secret(path: Path) -> bytes:
    data = _read(path)
    if data is None or len(data) != SECRET_BYTES:
        raise ConfigError(
            f"{path} is missing or not {SECRET_BYTES} bytes", hint="restore it from the backup of this silo", code="no-key"
        )
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} can be read by others", hint=f"chmod 600 {path}", code="open-key")
    return data


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}", hint="mend the permissions", code="cannot-read") from error


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
