# SPDX-License-Identifier: Apache-2.0
"""The parsers under test, one entry each: what is run on the bytes, and honest examples to start from.

A parser may give a value or raise a subclass of SiloquyError; everything else is a finding: another exception, a crash, more than
``TIMEOUT_S`` seconds, or memory far beyond its input. The same entries are run by the fuzzer and by tests/test_fuzz_findings.py.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from aggregator import service
from aggregator.config import Config as HubConfig
from aggregator.config import Home as HubHome
from aggregator.config import commented
from benchmarks.summing import Made, SharesSum
from privacy import basis_file, envelope, federation, folder, messages, orthonormal, rows, update_rule, weights
from privacy.audit import evidence
from privacy.dp import ledger
from privacy.dp.mechanism import LatticeGaussian
from privacy.errors import SiloquyError, TrustError
from privacy.identity import keys
from privacy.messages import Wire
from privacy.secure_sum import freeze, shares
from privacy.secure_sum.freeze import Certified
from privacy.transparency import log, notes  # fmt: skip
from silo import agreed_basis, config, home, transport, unit_sets, upload
from silo.home import Home, Progress
from tests.terms import contract_bytes, public, seed

assert upload  # its Persisted is a Wire
TIMEOUT_S = 10
MOST_BYTES = 8192
IDENTITY = keys.Identity(name="fuzz", sign_seed=seed(7))
CONTEXT = bytes(range(32))

Run = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """One parser and what to start from."""

    run: Run
    seeds: Callable[[], Iterable[bytes]]


def attempt(target: Target, data: bytes) -> SiloquyError | None:
    """The named refusal, or None for a value. Everything else comes out as it is."""
    try:
        target.run(data)
    except SiloquyError as error:
        found = error
    else:
        return None
    assert type(found) is not SiloquyError, f"a bare SiloquyError is a bug: {found}"
    assert str(found)
    json.dumps(found.as_json())
    return found


# --- Files -------------------------------------------------------------------------------------------------------------

_FOLDERS: list[Path] = []


@contextlib.contextmanager
def placed(name: str, data: bytes, mode: int = 0o600) -> Iterator[Path]:
    """A file of this name with these bytes; ``tests.fuzz`` says in which folder."""
    if not _FOLDERS or not _FOLDERS[0].exists():
        _FOLDERS[:] = [Path(os.environ.get("SILOQUY_FUZZ_FOLDER") or tempfile.mkdtemp(prefix="siloquy-fuzz-"))]
    path = _FOLDERS[0] / str(os.getpid()) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    try:
        yield path
    finally:
        path.unlink()


def sweep() -> None:
    """Remove the folder of ``placed``."""
    for path in _FOLDERS:
        shutil.rmtree(path, ignore_errors=True)


def from_file(name: str, read: Callable[[Path], object]) -> Run:
    def run(data: bytes) -> object:
        with placed(name, data) as path:
            return read(path)

    return run


# --- Wire types --------------------------------------------------------------------------------------------------------


def wire_types() -> list[type[Wire]]:
    """All wire types and private records, by name."""

    def below(kind: type[Any]) -> Iterator[type[Any]]:
        for each in kind.__subclasses__():
            yield each
            yield from below(each)

    return sorted({each for each in below(Wire) if each.__struct_fields__}, key=lambda kind: kind.__name__)


def example(annotation: Any) -> Any:
    """A value of a wire type's field, as small as its bounds allow."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        metas = [meta for meta in inside[1:] if isinstance(meta, msgspec.Meta)]
        least = next((m.min_length for m in metas if m.min_length is not None), 0)
        low = next((m.ge if m.ge is not None else m.gt + 1 for m in metas if m.ge is not None or m.gt is not None), 0)
        plain = inside[0]
        return bytes(least) if plain is bytes else low if plain is int else "x" * least if plain is str else example(plain)
    if origin is Literal:
        return inside[0]
    if origin is tuple:
        return (example(inside[0]),) if inside[-1] is Ellipsis else tuple(map(example, inside))
    if origin is not None:  # an alias or a union
        return example(inside[0])
    if isinstance(annotation, type) and issubclass(annotation, Wire):
        return example_of(annotation)
    return annotation()


def example_of(kind: type[Wire]) -> Wire:
    hints = get_type_hints(kind, include_extras=True)
    return kind(**{name: example(hints[name]) for name in kind.__struct_fields__})


def _wire(data: bytes) -> object:
    kinds = wire_types()
    return messages.decode(data[1:], kinds[data[0] % len(kinds)]) if data else None


def _wires() -> Iterator[bytes]:
    for index, kind in enumerate(wire_types()):
        yield bytes([index]) + messages.encode(example_of(kind))


# --- Signed documents, contracts, identities ---------------------------------------------------------------------------


def _signed(data: bytes) -> object:
    return envelope.open_signed(data, type="consent", context=CONTEXT, sender=3, key=IDENTITY.public.sign_key)


def _a_document() -> bytes:
    return envelope.sign(IDENTITY, type="consent", context=CONTEXT, sender=3, body=b"body")


def _an_outcome() -> bytes:
    body = messages.encode(example_of(messages.Outcome))
    return envelope.sign(IDENTITY, type="outcome", context=CONTEXT, sender=0, body=body)


def _contracts() -> Iterator[bytes]:
    yield contract_bytes()
    yield _public_contract()
    sides = "".join(
        f'\n[[guardian]]\nid = {2**15 + i}\nname = "notary-{i}"\norganisation = "Notary {i}"\nsign_key = "{public(50 + i)}"\n'
        for i in range(1, 6)
    )
    yield contract_bytes(5, sum={"protocol": "shares", "dropouts": 1, "corrupt_guardians": 2}) + sides.encode()


def _public_contract() -> bytes:
    table = {"data": "notes", "data_digest": "11" * 32, "digest": "22" * 32, "width": 6, "max_grad_norm": 0.5}
    return contract_bytes(adapter={"basis": "public"}, public_basis=table)


def _contract_document() -> bytes:
    raw = contract_bytes(aggregator_key=public(7))
    return envelope.sign(IDENTITY, type="contract", context=federation.parse(raw).digest, sender=0, body=raw)


def _public_identity() -> bytes:
    with placed("identity.pub", b"") as path:
        keys.write_public(path, keys.Identity(name="a", sign_seed=seed(1), receive_seed=seed(2)), "Hospital Ä")
        return path.read_bytes()


def _private_identity() -> bytes:
    with placed("made.key", b"") as path:
        path.unlink()
        keys.create(path, name="a", receives=True)
        return path.read_bytes()


# --- The ledger, records, configurations -------------------------------------------------------------------------------


def _ledger(data: bytes) -> object:
    """Any signature passes, so that what stands behind the signatures is reached."""
    with placed("ledger.jsonl", data) as path:
        history = ledger.History.read(path, verify=lambda signed, signature: None)
        return history.charged(), history.plan("00" * 32), history.attempts("00" * 32, 1), history.head


def _a_ledger() -> bytes:
    mechanism = LatticeGaussian(sampling_rate=0.1, lattice_bits=18, share_variance=2**30, shares=2, dimension=100, steps=3)
    basis = LatticeGaussian(sampling_rate=1.0, lattice_bits=16, share_variance=2**30, shares=2, dimension=9, steps=2)
    units = "22" * 32
    with placed("made.jsonl", b"") as path:
        path.unlink()
        take = {"sign": lambda data: bytes(64), "verify": lambda data, signature: None, "clock": lambda: 1.5e9}
        with ledger.Ledger.create(path, who="silo", **take) as made:
            made.declare(contract="00" * 32, run="run", mechanism=mechanism, epsilon=3.0, delta=1e-6)
            made.reserve(contract="00" * 32, round_number=1, attempt="11" * 16, mechanism=mechanism.with_steps(1))
            made.commit(contract="00" * 32, round_number=1, attempt="11" * 16)
            made.void(contract="00" * 32, round_number=1, reason="absent")
            made.declare(contract="33" * 32, run="", mechanism=mechanism, epsilon=3.0, delta=1e-6, units=units, before=basis)
            made.reserve(contract="33" * 32, round_number=1, attempt="44" * 16, mechanism=basis.with_steps(1), units=units)
            made.commit(contract="33" * 32, round_number=1, attempt="44" * 16, silos=3)
        return path.read_bytes()


def _rows(name: str) -> Run:
    return from_file(name, lambda path: [None for _ in rows.read_rows(path)])


def _silo_config() -> bytes:
    with placed("written.toml", b"") as path:
        path.unlink()
        config.write_commented(
            path, name="a", organisation="A", url="https://a.example", fingerprint="00", records="r.csv", epsilon=1, delta=1e-6
        )
        return path.read_bytes()


def _hub_config(data: bytes) -> object:
    with placed("aggregator.toml", data) as path:
        return HubHome(path.parent).config()


def _unit_set(data: bytes) -> object:
    """A file of units under its own name: what it says, or nothing."""
    with placed("units/" + (digest := hashlib.sha256(data).hexdigest()), data) as path:
        found = unit_sets.read(Home(path.parents[1]), digest)
    assert found is None or (found.marks and all(len(mark) == 32 for mark in found.marks))
    return found


def _unit_sets() -> Iterator[bytes]:
    head = {"format": "siloquy-units/1", "unit": "patient_id", "key": "5f" * 16, "lasting": True}
    yield "\n".join([json.dumps(head), "00" * 32, "a3" * 32, ""]).encode()


def _a_silo_report() -> Iterator[bytes]:
    from silo.reporting import record

    def example(kind: type[Any]) -> Any:
        hints = get_type_hints(kind, include_extras=True)
        return kind(**{name: _fact(hints[name], example) for name in kind.__struct_fields__})

    yield record.encode(example(record.SiloReport))


def _fact(annotation: Any, of: Callable[[type[Any]], Any]) -> Any:
    """A value of a field of a silo's own record; a digest where it must be one."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return "ab" * 32 if inside[0] is str else 1
    if origin is tuple:
        return (_fact(inside[0], of),)
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return of(annotation)
    if origin is Literal:
        return inside[0]
    if origin is not None and origin is not dict:  # a union with None
        return _fact(inside[0], of)
    return (origin or annotation)()


def _silo_report(data: bytes) -> object:
    from silo.reporting import record

    return record.decode(data)


def _report(data: bytes) -> object:
    """A report that somebody hands over: its JSON, and, where that holds, its schema."""
    from aggregator.reporting import report
    from privacy.audit import check_budget

    found = check_budget._parsed(data)
    with contextlib.suppress(TrustError):
        report.decode(data)
    return found


# --- What comes over the network ---------------------------------------------------------------------------------------


def _refusal(data: bytes) -> object:
    error = transport.refusal(400 + data[0] % 200 if data else 500, data[1:])
    assert isinstance(error, SiloquyError)
    assert type(error) is not SiloquyError
    assert str(error).isprintable()
    assert error.hint.isprintable()
    return json.dumps(error.as_json())


def _slot(data: bytes) -> object:
    """A request line's kind, number, party and wait, as Starlette hands them over."""
    kind, number, party, wait = (data.decode("utf-8", "replace").split("/") + [""] * 4)[:4]
    request: Any = SimpleNamespace(path_params={"kind": kind, "number": number, "party": party}, query_params={"wait": wait})
    slot = service._slot(request)
    assert 0 <= slot[1] < 2**32
    assert 0 <= slot[2] < 2**16
    assert 0 <= service._wait(request) <= service.LONGEST_WAIT_S
    return slot


# --- Weights and states ------------------------------------------------------------------------------------------------


def _weights(data: bytes) -> object:
    with placed("model.safetensors", data) as path, ExitStack() as stack:
        return [(tensor.name, raw[tensor.begin : tensor.end]) for tensor, raw in weights.mapped(path.parent, stack)]


def _weights_index(data: bytes) -> object:
    with placed("model.safetensors.index.json", data) as path, placed("one", _safetensors({"w": 4})), ExitStack() as stack:
        return list(weights.mapped(path.parent, stack))


def _safetensors(sizes: dict[str, int]) -> bytes:
    header, place = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "F32", "shape": [size], "data_offsets": [place, place + 4 * size]}
        place += 4 * size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(place)


def _basis_file(data: bytes) -> object:
    """A file of factors, held to the digest of what it says: so what stands behind the digest is reached."""
    with contextlib.suppress(TrustError):
        found = basis_file._parsed(data)
        return basis_file.load(data, orthonormal.digest(found))
    return basis_file.load(data, CONTEXT)


def _a_basis() -> Iterator[bytes]:
    eye = np.eye(4, dtype=np.float32)
    yield basis_file.save({"x": (eye[:, :2], eye[:2, :3]), "layer.1": (eye, eye[:1])})


def _state() -> update_rule.State:
    return update_rule.State(
        applied=1, beta1_power=0.9, beta2_power=0.99, theta=np.ones(3), first_moment=np.zeros(3), second_moment=np.zeros(3)
    )


def _progress(data: bytes) -> object:
    with placed("state.safetensors", data) as path:
        return Home(path.parent).progress()


def _a_progress() -> Iterator[bytes]:
    nothing = bytes(32)
    for own in (None, _state()):
        made = Progress(
            contract=nothing, epoch=1, round=2, manifest=nothing, outcome=nothing, voids=0, state=_state(), stood=3, own=own
        )
        yield home._to_bytes(made)


def _with_header(header: bytes, tensors: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + tensors


def _weights_header(data: bytes) -> object:
    """The bytes as the JSON header of a file that has the right length for them."""
    return _weights(_with_header(data, bytes(64)))


def _progress_facts(data: bytes) -> object:
    """The bytes as what a state file says of itself, its arrays and frame being whole."""
    *_, raw = _a_progress()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header["__metadata__"]["siloquy"] = data.decode("utf-8", "replace")
    text = json.dumps(header).encode()
    return _progress(_with_header(text + b" " * (-len(text) % 8), raw[end:]))


def _facts() -> Iterator[bytes]:
    for raw in _a_progress():
        yield json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["siloquy"].encode()


# --- The secure sum ------------------------------------------------------------------------------------------------------


@functools.cache
def _sum() -> tuple[SharesSum, dict[int, Made], Certified]:
    """A round of three silos and three guardians, one silo missing, up to the certificate."""
    at = SharesSum(4, 8, Path(), dropped=1, guardians=3, corrupt=1)
    made = {silo: at.upload(silo, at.x(silo), at.chain(silo)) for silo in at.here}
    frozen = at.frozen(at.proposed(made, {guardian: at.listed(guardian, made)[1] for guardian in at.guardians}))
    word = {guardian: freeze.endorsement(frozen, guardian=guardian) for guardian in at.guardians}
    endorsements = {guardian: at.said(guardian, "endorsement", message) for guardian, message in word.items()}
    return at, made, at.certified(at.certificate(frozen, endorsements), frozen)


def _bundle_payload(data: bytes) -> object:
    """What a silo sealed to a guardian: shares, or a dispute that blames nobody."""
    at, made, _ = _sum()
    silo, guardian = at.here[0], next(iter(at.guardians))
    honest = at.header(silo, made[silo].header)
    where = shares._where(honest, guardian)
    sealed = envelope.seal(at.guardian_keys[guardian], data, info=shares._bundle_info(**where))
    stated = (guardian, hashlib.sha256(sealed).digest(), honest.bundles[0][2])
    header = msgspec.structs.replace(honest, bundles=(stated, *honest.bundles[1:]))
    seed = at.guardians[guardian].receive_seed or b""
    found = shares.receive_bundle(sealed, made[silo].header, header, guardian=guardian, seal_seed=seed)
    assert (found.shares is None) == (found.dispute is not None)
    return found


def _bundle_payloads() -> Iterator[bytes]:
    at, made, _ = _sum()
    received, _ = at.listed(next(iter(at.guardians)), made)
    yield received[at.here[0]].shares.tobytes()


def _shares_payload(data: bytes) -> object:
    """What a guardian sealed to the aggregator: proven shares, or a guilty guardian."""
    at, _, certified = _sum()
    guardian = next(iter(at.guardians))
    sealed = envelope.seal(at.hub.public.seal_key or b"", data, info=shares._shares_info(certified.frozen, guardian))
    message = messages.Shares(
        round_ctx=certified.frozen.round_ctx, guardian=guardian, frozen=certified.frozen.digest, sealed=sealed
    )
    return shares.open_shares(
        at.said(guardian, "shares", message), certified, guardian=at.accepted.terms.by_guardian(guardian), epoch_ctx=at.context,
        seal_seed=at.hub.receive_seed or b"",
    )  # fmt: skip


def _shares_payloads() -> Iterator[bytes]:
    at, made, certified = _sum()
    guardian = next(iter(at.guardians))
    received, _ = at.listed(guardian, made)
    message = shares.release(certified, received, guardian=guardian, seal_key=at.hub.public.seal_key or b"")
    info = shares._shares_info(certified.frozen, guardian)
    yield envelope.open_sealed(at.hub.receive_seed or b"", message.sealed, info=info)


# --- The log -----------------------------------------------------------------------------------------------------------


def _note(data: bytes) -> object:
    """A note: parsed, its checkpoint, and verified under a key of the same name as every line's."""
    note = notes.parse(data)
    assert note.to_bytes() == data, "one note has one spelling"
    known = [notes.VerifierKey(name=line.name, key=IDENTITY.public.sign_key, type=kind) for line in note.lines for kind in (1, 4)]
    notes.verified(note, known)
    return notes.checkpoint(note.text)


def _a_note() -> Iterator[bytes]:
    text = notes.Checkpoint(origin="example.org/log", size=5, root=CONTEXT).text
    first = notes.signed(text, name="example.org/log", seed=IDENTITY.sign_seed)
    yield first.to_bytes()
    yield notes.joined(first, [notes.cosigned(text, name="witness", seed=IDENTITY.sign_seed, time=1_700_000_000)]).to_bytes()


def _verifier_key(data: bytes) -> object:
    text = data.decode("utf-8", "replace")
    made = notes.VerifierKey.parse(text)
    assert made.text == text
    return made


def _log_path(data: bytes) -> object:
    """A path is a resource only if it stays below the log's folder."""
    path = data.decode("utf-8", "replace")
    if log.is_resource(path):
        assert ".." not in path
        assert not path.startswith("/")
        assert path.isascii()
        assert path.isprintable()
    return path


def _bundle(data: bytes) -> object:
    leaves = log.unbundle(data[1:], data[0] if data else 1)
    assert log.bundle(leaves) == data[1:]
    return leaves


TERMS = federation.parse(contract_bytes(aggregator_key=public(7))).terms


def _receipt(data: bytes) -> object:
    return log.open_receipt(data, TERMS)


def _a_receipt() -> Iterator[bytes]:
    leaf = messages.encode(example_of(log.Leaf))
    text = notes.Checkpoint(origin=log.origin(TERMS), size=1, root=log.proofs.leaf_hash(leaf)).text
    note = notes.signed(text, name=log.aggregator_key(TERMS).name, seed=IDENTITY.sign_seed)
    tiles: Any = SimpleNamespace(leaf=lambda index: leaf, node=None, size=1)
    yield log.receipt(tiles, 0, note)


def _names(data: bytes) -> object:
    """Names of files in a shared folder: what they say spells them."""
    name = data.decode("utf-8", "replace")
    for kind in (folder.Sent, folder.Posted):
        found = kind.named(name)
        assert found is None or found.name == name
    return folder.party(name), folder.is_shard(name)


TARGETS: dict[str, Target] = {
    "wire": Target(_wire, _wires),
    "signed": Target(_signed, lambda: [_a_document()]),
    "contract": Target(federation.parse, _contracts),
    "contract-document": Target(envelope.open_contract, lambda: [_contract_document()]),
    "identity-public": Target(keys.read_public, lambda: [_public_identity()]),
    "identity-private": Target(from_file("identity.key", keys.load), lambda: [_private_identity()]),
    "ledger": Target(_ledger, lambda: [_a_ledger()]),
    "unit-set": Target(_unit_set, _unit_sets),
    "silo-report": Target(_silo_report, _a_silo_report),
    "report": Target(_report, lambda: [b'{"schema": "siloquy-report/2", "generated_at": 1, "contract": {"name": "\xc3\xa4"}}']),
    "basis-file": Target(_basis_file, _a_basis),
    "basis-recipe": Target(agreed_basis.recipe_in, lambda: [_public_contract()]),
    "jsonl": Target(_rows("r.jsonl"), lambda: [b'{"text": "a", "label": 1, "x": [null, 1e3]}\n\n{"text": "\\u00e4"}']),
    "jsonl-gz": Target(_rows("r.jsonl.gz"), lambda: [gzip.compress(b'{"text": "a"}\n', mtime=0)]),
    "csv": Target(_rows("r.csv"), lambda: [b'text,label\n"a ""b"",\n c",1\r\nd,2\n']),
    "silo-config": Target(from_file("silo.toml", config.load), lambda: [_silo_config()]),
    "aggregator-config": Target(_hub_config, lambda: [commented(HubConfig(name="hub")).encode()]),
    "refusal": Target(_refusal, lambda: [b'\0{"code":"replay","exit_code":4,"message":"a","hint":"b"}', b'\1{"title":"x"}']),
    "slot": Target(_slot, lambda: [b"upload/1/3/2.5", b"pair-seeds/4294967295/0/30"]),
    "weights": Target(_weights, lambda: [_safetensors({"a": 2, "b": 0})]),
    "weights-index": Target(_weights_index, lambda: [b'{"metadata": {}, "weight_map": {"w": "one"}}']),
    "state": Target(update_rule.State.from_bytes, lambda: [_state().to_bytes()]),
    "progress": Target(_progress, _a_progress),
    "weights-header": Target(_weights_header, lambda: [_safetensors({"a": 16})[8:-64]]),
    "progress-facts": Target(_progress_facts, _facts),
    "bundle-payload": Target(_bundle_payload, _bundle_payloads),
    "shares-payload": Target(_shares_payload, _shares_payloads),
    "note": Target(_note, _a_note),
    "verifier-key": Target(_verifier_key, lambda: [log.aggregator_key(TERMS).text.encode()]),
    "log-path": Target(_log_path, lambda: [b"tile/0/x001/234.p/5", b"tile/entries/000", b"checkpoint"]),
    "log-bundle": Target(_bundle, lambda: [b"\2" + log.bundle([b"ab", b""])]),
    "log-receipt": Target(_receipt, _a_receipt),
    "folder-names": Target(_names, lambda: [f"upload-1-{'0' * 64}".encode(), f"00000000-list-2-32769-{'a' * 64}".encode()]),
    "remnant": Target(evidence.remnant_of, lambda: [_an_outcome()]),
}
