# SPDX-License-Identifier: Apache-2.0
"""Reports under attack: every byte changed, records swapped, values no view can show, names that hide, two writers, other homes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import msgspec
import pytest

from aggregator import commands
from aggregator.reporting import recheck, registry, report
from cli import output
from privacy import files
from privacy.audit import check_budget
from privacy.audit.evidence import read_report
from privacy.audit.findings import Findings, Slot
from privacy.dp.ledger import Ledger
from privacy.errors import ConfigError, MachineError, PrivacyRefusal, TrustError
from privacy.federation import event
from privacy.identity import keys
from privacy.reporting import page, paper
from privacy.reporting.stated import views_of
from privacy.visible import MISSING, visible
from silo import config, keyring, succession
from silo.home import Home
from silo.reporting import document, facts, own
from silo.reporting.record import decode, encode
from tests.sample_report import contract as terms_of
from tests.sample_report import make, run, sample
from tests.sessions import Terminal
from tests.test_crosswalk import Nowhere
from tests.whole import Whole

NOW = 1_800_003_600
HIDING = ("\u202e", "\u2066", "\u200b", "\u200f", "\ufeff", "\x1b", "\x00", "\x85", "\u2028", "\ue000")


def member(root: Path, number: int) -> Home:
    """A silo of a federation after a round, as `silo init` would have made its settings."""
    home = Home(root / f"silo-{number}")
    rows = [{"text": f"report {place}", "label": ("no", "yes")[place % 2], "patient_id": f"p{place % 60}"} for place in range(90)]
    (home.root / "records.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    config.write_commented(
        home.config_path, name=f"silo-{number}", organisation=f"Hospital {number}", url="http://127.0.0.1:1", fingerprint="",
        records="records.jsonl", epsilon=10.0, delta=1e-5,
    )  # fmt: skip
    keys.write_public(home.public_path, keys.load(home.identity_path), f"Hospital {number}")
    return home


@pytest.fixture(scope="module")
def silos(tmp_path_factory) -> tuple[Home, Home]:
    made = Whole.create(tmp_path_factory.mktemp("reports"), privacy={"unit": "patient_id", "units": 200})
    made.run(1)
    made.close()
    return member(made.root, 1), member(made.root, 2)


@pytest.fixture(scope="module")
def made(silos):
    return facts.gather(silos[0].root, generated_at=NOW)


@pytest.fixture(scope="module")
def first(silos, made, tmp_path_factory) -> Path:
    return own.write(silos[0].root, tmp_path_factory.mktemp("written") / "own", made)


@pytest.fixture
def written(first, tmp_path) -> Path:
    """A report of silo 1 that a test may spoil."""
    return shutil.copytree(first.parent, tmp_path / "report") / first.name


def answers(found) -> dict[str, str]:
    return {each.what: each.status for each in found}


def verified(home: Home, record: Path) -> dict[str, str]:
    return answers(own.verify(home.root, record))


# --- One byte at a time -------------------------------------------------------------------------------------------------------


def test_signed_no_byte_of_the_signature_can_be_another(silos, written):
    """Hex in capitals, or with a blank for its line feed, is another file: it passed."""
    record, signature = read_report(written)
    assert signature is not None
    for place in range(len(signature)):
        for other in (signature[place] ^ 0x20, signature[place] ^ 1, 0x20):
            spoilt = signature[:place] + bytes([other]) + signature[place + 1 :]
            if spoilt != signature:
                assert own._signed(silos[0], record, spoilt), (place, other)
    assert own._signed(silos[0], record, signature[:-1])
    assert own._signed(silos[0], record, signature) == ""


def test_signed_no_byte_of_the_record_can_be_another(silos, written):
    record, signature = read_report(written)
    for place in random.sample(range(len(record)), 300):
        spoilt = record[:place] + bytes([record[place] ^ (1 << place % 8)]) + record[place + 1 :]
        assert own._signed(silos[0], spoilt, signature), place


def test_no_byte_of_a_view_can_be_another(silos, written, made):
    again = own.views(made)
    for name in (own.HTML_NAME, own.PDF_NAME):
        content = again[name]
        assert content == written.with_name(name).read_bytes()
        place = random.randrange(len(content))
        written.with_name(name).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    found = verified(silos[0], written)
    assert (found[own.HTML_NAME], found[own.PDF_NAME], found["every figure"]) == ("failed", "failed", "ok")


def test_no_byte_of_a_consortiums_signature_can_be_another():
    accepted, identity = terms_of(rounds=1), keys.Identity(name="x", sign_seed=b"x" * 32)
    good = identity.sign(b"siloquy report\0").hex().encode() + b"\n"
    for spoilt in (good.upper(), good.replace(b"\n", b" "), b" " + good, good[:64] + b" " + good[64:], "٣".encode() * 128, b""):
        with pytest.raises(TrustError, match="not one line of hex"):
            check_budget._check_signature(b"{}", spoilt, accepted)


# --- Swapped ------------------------------------------------------------------------------------------------------------------


def test_another_silos_report_and_its_views_are_not_this_ones(silos, written):
    assert verified(silos[1], written) | {"signature": "failed", "ledger": "failed"} == verified(silos[1], written)
    theirs = own.write(silos[1].root, written.parent / "theirs", facts.gather(silos[1].root, generated_at=NOW))
    for name in (own.JSON_NAME, own.SIGNATURE_NAME):
        shutil.copy(theirs.with_name(name), written.with_name(name))
    found = verified(silos[1], written)
    assert (found["signature"], found["every figure"]) == ("ok", "ok")
    assert (found[own.HTML_NAME], found[own.PDF_NAME]) == ("failed", "failed"), "the views are still silo 1's"


def test_the_signature_of_a_consortiums_report_is_none_of_a_silos(silos, written):
    record = written.read_bytes()
    for domain in (report.signing_input(record), record):
        signature = keyring.identities(silos[0])[0].under(keys.ED25519).sign(domain).hex().encode() + b"\n"
        assert own._signed(silos[0], record, signature)


def test_what_does_not_leave_is_no_consortiums_report_whatever_it_begins_with(silos, written):
    record = written.read_bytes()
    for data in (b" " + record, record.replace(b"DOES_NOT_LEAVE_THIS_SITE", b"NO_DIFFERENTIAL_PRIVACY")):
        written.write_bytes(data)
        assert not own.is_own(written)
        with pytest.raises(TrustError):
            report.decode(data)
        assert verified(silos[0], written)["contents"] == "failed"


def test_no_question_is_dropped_in_silence(silos, written, capsys):
    """`verify --report own --rounds-at-least 40` asked about the report alone, and ended with 0."""
    terminal = Terminal(capsys)
    assert terminal("silo verify --report", written, "--home", silos[0].root, "--json").code == 0
    for words in ("--rounds-at-least 40", "--round 1", "--all", "--fingerprint ab", "--url http://x", "--folder ."):
        assert terminal(f"silo verify {words} --json --report", written, "--home", silos[0].root).code == 2, words


# --- Values that no view can show ---------------------------------------------------------------------------------------------


def leaves(node, path=()):
    if isinstance(node, dict):
        for key in node:
            yield from leaves(node[key], (*path, key))
    elif isinstance(node, list):
        yield path
        for place, each in enumerate(node[:1]):
            yield from leaves(each, (*path, place))
    else:
        yield path


def put(tree, path, value):
    copied = json.loads(json.dumps(tree))
    node = copied
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return json.dumps(copied).encode()


EVIL = (0, -1, 1e308, 10**17, -(10**17), 10**400, [])


def test_refused_or_shown_whatever_a_silos_record_holds(made):
    """Dates beyond the calendar, a limit of nothing, epsilons of 300 digits: a traceback, where an answer was promised."""
    tree, refused, shown = json.loads(encode(made)), 0, 0
    for path in leaves(tree):
        for value in EVIL:
            try:
                stated = decode(encode(msgspec.json.decode(put(tree, path, value), type=type(made))))
            except (msgspec.ValidationError, TrustError):
                continue
            try:
                views_of(lambda stated=stated: {"html": page.render(document.of(stated, "ab" * 32)).encode()})
                shown += 1
            except TrustError:
                refused += 1
    assert refused >= 5
    assert shown > 10


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (rb'"generated_at": \d+', b'"generated_at": 99999999999999'), (rb'"limit": [\d.]+', b'"limit": 0.0'),
        (rb'"epsilon_rdp": [\d.]+', b'"epsilon_rdp": 1e300'), (rb'"left": [\d.]+', b'"left": -1e300'),
    ],
)  # fmt: skip
def test_a_silos_record_that_no_view_can_show_fails_by_name(silos, written, old, new):
    data, count = re.subn(old, new, written.read_bytes(), count=1)
    assert count == 1
    stated = msgspec.json.decode(data, type=type(decode(written.read_bytes())))
    written.write_bytes(encode(stated))
    found = verified(silos[0], written)
    assert (found["signature"], found["views"]) == ("failed", "failed")


@pytest.mark.parametrize(
    "change",
    [
        {"generated_at": 10**15}, {"generated_at": -(10**15)}, {"silos": ()}, {"burn_down": ()}, {"summary": ()},
    ],
)  # fmt: skip
def test_a_consortiums_record_that_no_view_can_show_fails_by_name(change):
    stated = msgspec.structs.replace(sample(), software=commands.software(), **change)
    found = Findings(Nowhere())
    recheck._check_views(found, Slot("report", 0, 0), stated, {report.REGISTRY_NAME: b""})
    assert [(each.what, each.status) for each in found.checks] == [("views", "failed")]


def test_numbers_have_a_size():
    """A count of 400 digits is no float: comparing traffic with it ended in a traceback."""
    tree = json.loads(report.encode(sample()))
    for path in (("rounds", 0, "bytes_in"), ("traffic", "lora_bytes"), ("accounting", "spent", "rounds")):
        with pytest.raises(TrustError, match="not a report"):
            report.decode(put(tree, path, 10**400))


def test_a_report_is_a_file_of_a_size_that_reports_have(tmp_path, written, monkeypatch):
    for path in (tmp_path, tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(ConfigError):
            read_report(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="no file"):
        read_report(tmp_path / "pipe")
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match="no file"):
        read_report(large)
    assert read_report(written)[1] is not None


# --- Names that hide or move --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("char", HIDING)
def test_nothing_moves_and_nothing_hides(char):
    assert visible(f"a{char}b") == f"a{MISSING}b" == visible(visible(f"a{char}b"))
    assert visible("Krankenhaus „Nord“ · 東京 · مستشفى\n\u00a0é") == "Krankenhaus „Nord“ · 東京 · مستشفى\n\u00a0é"


def test_no_name_moves_what_stands_beside_it_in_a_page_a_pdf_or_an_entry(made):
    name = "North " + "".join(HIDING) + " Hospital"
    silo = msgspec.structs.replace(made.silo, organisation=name)
    html = page.render(document.of(msgspec.structs.replace(made, silo=silo), "ab" * 32))
    stated = make(terms_of(rounds=2), run(1), software={"siloquy": name}, extra={name: name})
    for text in (html, report.render(stated), registry.entry(stated, "ab" * 32).decode(), paper.shown(name)):
        assert not any(char in text for char in HIDING if char != "\u200b"), "of its own, a PDF has places to break"
    assert "\u200b" not in html
    assert paper.shown("ab\u200bcd") == f"ab{MISSING}cd", "two names that look the same are the same"


def test_a_record_cannot_write_on_the_terminal_that_shows_its_faults(capsys):
    made = output.Output(json=False)
    made.result({}, ["✗ silo: it says \x1b[2K\r✓ all is well\u202e", output.table("", ("a",), [("\x1b]0;x\x07",)])])
    made.say("\x1b[1A")
    out = "".join(capsys.readouterr())
    assert not any(char in out for char in "\x1b\r\u202e\x07")
    assert out.count(MISSING) >= 5


# --- What a silo's own report says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["itself", "symlink", "hardlink"])
def test_the_training_file_is_not_held_out(silos, tmp_path, link):
    """Its accuracy would have stood there as one on records that were not trained on."""
    path, source = tmp_path / "held-out.jsonl", silos[0].root / "records.jsonl"
    if link == "itself":
        path = source
    else:
        (path.symlink_to if link == "symlink" else path.hardlink_to)(source)
    with pytest.raises(PrivacyRefusal, match="trains on"):
        facts.gather(silos[0].root, held_out=path, generated_at=NOW)


def ledger(home: Home) -> Ledger:
    identity = keys.load(home.identity_path)
    return Ledger.open(home.ledger_path, sign=identity.sign, verify=keyring.verifier(home), clock=lambda: 0.0)


@pytest.fixture
def pair(silos, tmp_path) -> tuple[Home, Home]:
    """Copies of both homes, as two homes of one silo on the same records."""
    roots = [shutil.copytree(each.root, tmp_path / each.root.name) for each in silos]
    for root, other in zip(roots, roots[::-1], strict=True):
        text = (root / "silo.toml").read_text()
        line = next(line for line in text.splitlines() if line.lstrip("# ").startswith("other_homes"))
        (root / "silo.toml").write_text(text.replace(line, f'other_homes = ["{other}"]'))
    return Home(roots[0]), Home(roots[1])


def test_runs_of_another_home_stand_there_with_how_they_ended(pair):
    """They stood there as attempts of which none was released and none was void."""
    terms = succession.at_work(pair[1])[0].terms
    with ledger(pair[1]) as there:
        for number in (1, 2):
            there.reserve(contract="cd" * 32, round_number=number, attempt="ab" * 16, mechanism=event(terms, rounds=1))
        there.commit(contract="cd" * 32, round_number=1, attempt="ab" * 16)
        there.void(contract="cd" * 32, round_number=2, reason="x")
    (found,) = (each for each in facts.gather(pair[0].root, generated_at=NOW).runs if each.contract == "cd" * 32)
    assert (found.attempts, found.released, found.void) == (2, 1, 1)


def test_again_when_another_home_goes_on_figures_are_open_and_not_false(pair, tmp_path):
    record = own.write(pair[0].root, tmp_path / "own", facts.gather(pair[0].root, generated_at=NOW))
    assert verified(pair[0], record)["every figure"] == "ok"
    terms = succession.at_work(pair[1])[0].terms
    with ledger(pair[1]) as there:
        there.reserve(contract="cd" * 32, round_number=1, attempt="ab" * 16, mechanism=event(terms, rounds=1))
    found = verified(pair[0], record)
    assert (found["signature"], found["figures"]) == ("ok", "open")
    assert "failed" not in found.values()


def test_figures_of_two_moments_are_never_one_record(silos, tmp_path, monkeypatch):
    home = Home(shutil.copytree(silos[0].root, tmp_path / "home"))
    real = facts.reading.budget

    def meanwhile(root, forecast):
        found = real(root, forecast)
        with ledger(home) as open_:
            open_.void(contract="ab" * 32, round_number=1, reason="x")
        return found

    monkeypatch.setattr(facts.reading, "budget", meanwhile)
    with pytest.raises(MachineError, match="went on"):
        facts.gather(home.root, generated_at=NOW)


# --- Two writers, other users, links ------------------------------------------------------------------------------------------


def test_two_reports_at_once_are_never_mixed(silos, made, tmp_path, monkeypatch):
    """The record of one with the signature of the other was no report of this silo."""
    real, others = files.write_atomic, []

    def meanwhile(path, data, **options):
        real(path, data, **options)
        if not others:
            others.append("begun")
            with pytest.raises(MachineError, match="another process"):
                own.write(silos[0].root, tmp_path / "own", msgspec.structs.replace(made, generated_at=NOW + 1))
            others.append("refused")

    monkeypatch.setattr(files, "write_atomic", meanwhile)
    record = own.write(silos[0].root, tmp_path / "own", made)
    assert others == ["begun", "refused"]
    assert "failed" not in verified(silos[0], record).values()


def test_two_reports_of_a_consortium_at_once_are_never_mixed(silos, tmp_path):
    hub = silos[0].root.parent / "aggregator"
    (hub / "model.json").write_text('{"lora_width": 1, "simulated": false}')
    with files.locked(hub / ".report.lock"), pytest.raises(MachineError, match="another process"):
        commands.write_report(hub, tmp_path / "report", commands.build_report(hub))
    assert not (tmp_path / "report").exists()


def test_a_link_in_the_way_is_replaced_and_what_it_names_stays(silos, made, tmp_path):
    target = tmp_path / "diary.txt"
    target.write_text("dear diary")
    folder = tmp_path / "own"
    folder.mkdir(mode=0o777)
    for name in (own.JSON_NAME, own.SIGNATURE_NAME, own.HTML_NAME, own.PDF_NAME):
        (folder / name).symlink_to(target)
    before = os.umask(0)
    try:
        own.write(silos[0].root, folder, made)
    finally:
        os.umask(before)
    assert target.read_text() == "dear diary"
    assert {path.lstat().st_mode & 0o170777 for path in folder.iterdir()} == {0o100600}


def test_a_full_disk_leaves_the_report_before_whole(silos, made, written, monkeypatch):
    before = {path.name: path.read_bytes() for path in written.parent.iterdir()}

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write_all", full)
    with pytest.raises(MachineError, match="No space left"):
        own.write(silos[0].root, written.parent, msgspec.structs.replace(made, generated_at=NOW + 1))
    assert {path.name: path.read_bytes() for path in written.parent.iterdir()} == before
