# SPDX-License-Identifier: Apache-2.0
"""The silo's own report as files, and its verification. The record is ``silo-report.json``; page and PDF are views of it.

Each file has mode 0600, and a folder that is made for them 0700. The signature is Ed25519 by the silo's key, in hex, over "siloquy
silo report" NUL ‖ SHA-256(record). No message of the protocol has a field for any of it, and no digest of it goes into a log.

**Formal guarantees** of ``verify``

- *Signed*: a record that no key of this silo signed fails.
- *Of this ledger*: the ledger here contains the state that the record names, or it fails.
- *Again*: while the ledger is the record's, every figure and count is computed again and compared. Accuracy and versions of
  software are taken from it. Once this ledger, or another home's on these records, has gone on, figures are open. Each view beside
  it is made again, byte for byte.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from privacy import files
from privacy.audit.evidence import read_report
from privacy.audit.findings import Check, Status
from privacy.dp.ledger import History
from privacy.errors import SiloquyError, TrustError
from privacy.identity import keys
from privacy.reporting import page, paper
from privacy.reporting.stated import views_of
from silo import keyring, reading
from silo.home import Home
from silo.reporting import document, facts
from silo.reporting.record import SiloReport, decode, encode, is_one

JSON_NAME, SIGNATURE_NAME = "silo-report.json", "silo-report.json.sig"
HTML_NAME, PDF_NAME = "silo-report.html", "silo-report.pdf"
_FOLDER = 0o700
_OF_OTHER_HOMES = frozenset({"budget", "several", "runs", "forecast"})
"""What follows from the ledgers of other homes too, whose state no record names."""
_SIGNATURE = re.compile(rb"[0-9a-f]{128}\n")


def write(root: Path, folder: Path, report: SiloReport) -> Path:
    """Write record, signature and views into ``folder`` (made when missing); the path of the record. Each is whole or as it was.

    Raises:
        MachineError: the folder or a file cannot be written, or another process writes a report of this silo.
    """
    data, made = encode(report), views(report)
    identity = keyring.identities(Home(root))[0]
    signature = identity.under(keys.ED25519).sign(signing_input(data)).hex().encode() + b"\n"
    with files.locked(root / ".report.lock"):
        files.make_folder(folder, mode=_FOLDER)
        for name, content in {JSON_NAME: data, SIGNATURE_NAME: signature, **made}.items():
            files.sweep(folder / name)
            files.write_atomic(folder / name, content, mode=files.PRIVATE)
    return folder / JSON_NAME


def views(report: SiloReport) -> dict[str, bytes]:
    """Page and PDF, by file name."""
    shown = document.of(report, hashlib.sha256(encode(report)).hexdigest())
    return {HTML_NAME: page.render(shown).encode(), PDF_NAME: paper.render(shown)}


def signing_input(data: bytes) -> bytes:
    """What the signature of the record ``data`` covers."""
    return b"siloquy silo report\0" + hashlib.sha256(data).digest()


def is_own(path: Path) -> bool:
    """Whether ``path`` is the record of a silo's own report. Raises ConfigError when it cannot be read."""
    return is_one(read_report(path)[0])


def verify(root: Path, path: Path) -> list[Check]:
    """Check a record of this silo, what lies beside it, and what it says; see the module docstring.

    Raises:
        ConfigError: no silo, or no record.
        LedgerBroken: the ledger itself does not verify.
    """
    record, signature = read_report(path)
    home = Home(root)
    found = [_answer("signature", _signed(home, record, signature))]
    try:
        stated = decode(record)
    except TrustError as error:
        return [*found, _answer("contents", str(error))]
    history = History.read(home.ledger_path, verify=keyring.verifier(home))
    behind = _behind(history, stated)
    found.append(_answer("ledger", behind))
    if not behind:
        found += _again(root, stated, history)
    return [*found, *_views(path, stated)]


def _answer(what: str, why: str = "", status: Status = "failed") -> Check:
    return Check(kind="report", number=0, party=0, what=what, status=status if why else "ok", why=why)


def _signed(home: Home, record: bytes, signature: bytes | None) -> str:
    """Why no key of this silo signed the record; "" where one did."""
    if signature is None:
        return "no signature lies beside it"
    if not _SIGNATURE.fullmatch(signature):
        return "the signature is not one line of 128 hex digits"
    own = [identity.public.sign_key for identity in keyring.identities(home)] + keyring.former_keys(home)
    for key in own:
        try:
            keys.verify_signature(key, signing_input(record), bytes.fromhex(signature.decode("ascii")))
        except TrustError:
            continue
        return ""
    return "no key of this silo signed these bytes"


def _behind(history: History, stated: SiloReport) -> str:
    try:
        history.check_receipt(stated.ledger.entries, stated.ledger.head)
    except SiloquyError as error:
        return str(error)
    return ""


def _again(root: Path, stated: SiloReport, history: History) -> Iterator[Check]:
    """The record made again from the home, or why it cannot be."""
    if history.counter != stated.ledger.entries:
        yield _answer("figures", f"the ledger has gone on to {history.counter} entries: run `silo report` again", "open")
        return
    again = msgspec.structs.replace(
        facts.gather(root, generated_at=stated.generated_at), held_out=stated.held_out, software=stated.software
    )
    if stated.several is msgspec.UNSET:  # made before there were such rows
        again = msgspec.structs.replace(again, several=msgspec.UNSET)
    wrong = [name for name in stated.__struct_fields__ if getattr(stated, name) != getattr(again, name)]
    if wrong and _OF_OTHER_HOMES.issuperset(wrong) and reading.opened(root)[1].records.other_homes:
        yield _answer("figures", "another home on these records may have gone on: run `silo report` again", "open")
        return
    for name in wrong:
        yield _answer(name, f"it says {_short(getattr(stated, name))}, made again it is {_short(getattr(again, name))}")
    if not wrong:
        yield _answer("every figure")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 160 else f"{text[:157]}…"


def _views(path: Path, stated: SiloReport) -> Iterator[Check]:
    beside = [path.with_name(name) for name in (HTML_NAME, PDF_NAME) if path.with_name(name).is_file()]
    other = next((name for name in ("siloquy", "typst") if stated.software.get(name) != importlib.metadata.version(name)), None)
    if beside and other is not None:
        yield _answer("views", f"the record names another release of {other}: they were not compared", "open")
        return
    try:
        again = views_of(functools.partial(views, stated)) if beside else {}
    except TrustError as error:
        yield _answer("views", str(error))
        return
    for each in beside:
        same = again[each.name] == each.read_bytes()
        yield _answer(each.name, "" if same else "it is not the view of this record: believe the record, make the view again")
