# SPDX-License-Identifier: Apache-2.0
"""What a guardian has bound itself to, and the documents it sends: on the disk before a byte leaves.

::

    promises/guardian-manifest-<round>   round_ctx: the only manifest of this round that it ever acts on
    promises/guardian-set-<round>        digest of U: the only set that it endorses or releases for in this round
    promises/guardian-release-<round>    the same digest again: its shares may have left
    promises/guardian-close-<round>      the same digest, or zeros for none: it does nothing more in this round
    epoch/guardian-<epoch>/              secrets of the epoch, and the signed documents of its open round as they are sent

Promised: a promise that was made stands for ever and cannot be made a second time with other content; a document is sent with the
same bytes however often. Not promised: anything when the folder is put back to an earlier time. ``broken`` sees that for the open
round, as far as the board shows what this guardian said before.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal

import msgspec

from privacy import files
from privacy.errors import Equivocation, Replay, TrustError
from privacy.messages import Kind
from privacy.secure_sum.epoch import GuardianSecrets
from silo.home import Home, remove_folder

Promise = Literal["manifest", "set", "release", "close"]
NONE: Final = bytes(32)
"""In a promise to close: no set was endorsed."""
_NAME: Final = re.compile(r"guardian-manifest-([0-9]{1,10})", re.ASCII)
_FOLDER: Final = re.compile(r"guardian-([0-9]{1,10})", re.ASCII)
_LINE: Final = re.compile(rb"[0-9a-f]{64}\n")
_NEEDED: Final[dict[Kind, Promise]] = {"list": "manifest", "endorsement": "set", "shares": "release", "close": "close"}
"""Which promise lies on the disk before a document of this kind exists."""
_RESOLVED = msgspec.msgpack.Decoder(GuardianSecrets)  # before any thread does: see privacy.messages


class Vows:
    """A guardian's promises and documents in a home; see the module docstring."""

    def __init__(self, home: Home) -> None:
        self._promises, self._epochs = home.root / "promises", home.epoch_folder
        files.make_folder(self._promises)
        files.make_folder(self._epochs, mode=0o700)

    @property
    def latest(self) -> int:
        """The highest round whose manifest it is bound to; 0 before the first."""
        names = [_NAME.fullmatch(entry.name) for entry in self._promises.iterdir()]
        return max((int(found[1]) for found in names if found), default=0)

    def bind(self, number: int, round_ctx: bytes) -> None:
        """Promise that ``round_ctx`` is this round's manifest, and that no earlier round is acted in again.

        Raises:
            Replay: a later round was promised before.
            Equivocation: this round was promised to another manifest.
        """
        if number < self.latest:
            raise Replay(
                f"a manifest for round {number}, this guardian acted in round {self.latest}",
                hint="the aggregator must go on with the next number", round=number, latest=self.latest,
            )  # fmt: skip
        self.promise("manifest", number, round_ctx)

    def promise(self, kind: Promise, number: int, digest: bytes) -> None:
        """Promise a digest, on disk first; again with the same one changes nothing.

        Raises:
            Equivocation: another one was promised.
        """
        try:
            files.write_once(self._promises / f"guardian-{kind}-{number}", digest.hex().encode() + b"\n")
        except Equivocation as error:
            before = self.promised(kind, number) or b""
            raise Equivocation(
                f"a second {kind} for round {number}: {digest.hex()[:16]}, this guardian promised {before.hex()[:16]}",
                hint="stop, and show both documents to the other guardians", round=number,
            ) from error  # fmt: skip

    def promised(self, kind: Promise, number: int) -> bytes | None:
        """What was promised, or None. Raises TrustError when the file is damaged."""
        path = self._promises / f"guardian-{kind}-{number}"
        if not path.is_file():
            return None
        text = path.read_bytes()
        if not _LINE.fullmatch(text):
            raise TrustError(f"the promise {path.name} is damaged", hint="this guardian waits for a new epoch", code="malformed")
        return bytes.fromhex(text.decode().strip())

    def broken(self, kind: Kind, number: int) -> bool:
        """Whether a document of this kind, seen on the board, was made without its promise lying here: the home was put back."""
        return self.promised(_NEEDED[kind], number) is None

    def secrets(self, epoch: int) -> GuardianSecrets | None:
        """The private half of this guardian's note for an epoch, if it lies here."""
        path = self._folder(epoch) / "secrets"
        return GuardianSecrets.from_bytes(path.read_bytes()) if path.is_file() else None

    def keep_secrets(self, secrets: GuardianSecrets) -> None:
        """Keep them, once, before the note leaves."""
        files.make_folder(self._folder(secrets.epoch), mode=0o700)
        files.write_once(self._folder(secrets.epoch) / "secrets", secrets.to_bytes(), mode=files.PRIVATE)

    def document(self, epoch: int, kind: Kind, number: int) -> bytes | None:
        """A signed document as it was kept."""
        path = self._folder(epoch) / f"{kind}-{number}"
        return path.read_bytes() if path.is_file() else None

    def keep_document(self, epoch: int, kind: Kind, number: int, document: bytes) -> None:
        """Keep a signed document, once, before it leaves."""
        files.make_folder(self._folder(epoch), mode=0o700)
        files.write_once(self._folder(epoch) / f"{kind}-{number}", document, mode=files.PRIVATE)

    def forget_documents(self, epoch: int, number: int) -> None:
        """Delete the documents of a round that has an outcome; the promises stay."""
        for kind in _NEEDED:
            (self._folder(epoch) / f"{kind}-{number}").unlink(missing_ok=True)

    def forget_epochs(self, before: int) -> None:
        """Delete the secrets of earlier epochs, all of whose rounds have an outcome."""
        for entry in self._epochs.iterdir():
            found = _FOLDER.fullmatch(entry.name)
            if found and int(found[1]) < before:
                remove_folder(entry)

    def _folder(self, epoch: int) -> Path:
        return self._epochs / f"guardian-{epoch}"
