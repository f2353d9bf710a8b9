# SPDX-License-Identifier: Apache-2.0
"""The silo's own report: true counts and every run, for this user alone, signed, marked on every page, and checked again."""

from __future__ import annotations

import json

import msgspec
import pytest

from aggregator.reporting import report as consortium
from cli import silo as silo_cli
from privacy.errors import TrustError
from privacy.identity import keys
from privacy.reporting import page, paper
from silo import config, reading
from silo.home import Home
from silo.reporting import document, facts, own
from silo.reporting.record import SENTENCE, HeldOut, decode, encode
from tests.sessions import Terminal
from tests.test_report import Page
from tests.whole import Whole

NOW = 1_800_003_600
UNITS, RECORDS, CAP = 60, 150, 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Home:
    """Silo 1 of a federation after two rounds, with 60 patients of two or three records each."""
    made = Whole.create(tmp_path_factory.mktemp("own"), privacy={"unit": "patient_id", "max_records_per_unit": CAP, "units": 200})
    made.run(2)
    made.close()
    home = Home(made.root / "silo-1")
    rows = [
        {"text": f"report {number}", "label": ("no", "yes")[number % 2], "patient_id": f"p{number % UNITS}"}
        for number in range(RECORDS)
    ]
    (home.root / "records.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    config.write_commented(
        home.config_path, name="silo-1", organisation="Hospital 1", url="http://127.0.0.1:1", fingerprint="",
        records=str(home.root / "records.jsonl"), epsilon=10.0, delta=1e-5,
    )  # fmt: skip
    keys.write_public(home.public_path, keys.load(home.identity_path), "Hospital 1")
    return home


@pytest.fixture(scope="module")
def made(trained):
    return facts.gather(trained.root, generated_at=NOW)


@pytest.fixture
def written(trained, made, tmp_path):
    return own.write(trained.root, tmp_path / "own-report", made)


def answers(found) -> dict[str, str]:
    return {each.what: each.status for each in found}


def test_it_holds_what_never_leaves(made, trained):
    assert (made.records.units, made.records.records, made.records.kept) == (UNITS, RECORDS, UNITS * CAP)
    assert made.records.most_units == 200
    spent = reading.budget(trained.root, 0)
    assert (made.budget.epsilon, made.budget.epsilon_pld, made.budget.left) == (
        spent["epsilon"],
        spent["epsilon_pld"],
        spent["left"],
    )
    (run,) = made.runs
    assert (run.attempts, run.released, run.void, run.epsilon) == (2, 2, 0, made.budget.epsilon)
    assert made.federation.round == 2
    assert [each.rounds for each in made.forecast] == list(range(1, 9))
    assert made.forecast[0].epsilon > made.budget.epsilon


def test_the_record_says_first_that_it_does_not_leave(made):
    assert encode(made).startswith(b'{\n  "DOES_NOT_LEAVE_THIS_SITE": "This report does not leave this site.')
    assert decode(encode(made)) == made


@pytest.mark.parametrize("bad", [b"", b"{}", b'{\n  "DOES_NOT_LEAVE_THIS_SITE": 1}', b"\xff", b"[" * 100_000])
def test_what_is_no_silos_report_is_refused(bad):
    with pytest.raises(TrustError, match="not a silo's report"):
        decode(bad)


def test_files_are_for_one_user_alone_and_the_same_bytes_every_time(trained, made, written, tmp_path):
    folder = written.parent
    names = ["silo-report.html", "silo-report.json", "silo-report.json.sig", "silo-report.pdf"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    again = own.write(trained.root, tmp_path / "again", made).parent
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_every_page_says_that_it_does_not_leave(made):
    shown = document.of(made, "ab" * 32)
    assert shown.banner.startswith("Does not leave this site")
    html = page.render(shown)
    assert 'class="banner" role="note">Does not leave this site' in html
    assert SENTENCE in Page(html).text
    template = (paper._TEMPLATE).read_text(encoding="utf-8")
    assert "header: if d.banner" in template, "the running head of every page"
    with_it, without = (len(paper.render(each)) for each in (shown, msgspec.structs.replace(shown, banner="")))
    assert with_it > without


def test_accuracy_stands_there_only_where_a_held_out_file_was_given(made):
    assert "no accuracy is stated" in Page(page.render(document.of(made, "ab" * 32))).text
    held = HeldOut(file="own <test>.jsonl", digest="cd" * 32, records=40, accuracy_before=0.5, accuracy_after=0.825)
    text = page.render(document.of(msgspec.structs.replace(made, held_out=held), "ab" * 32))
    assert "0.825" in text
    assert "own &lt;test&gt;.jsonl" in text


def test_a_report_of_this_silo_verifies_and_views_are_made_again(trained, written):
    assert answers(own.verify(trained.root, written)) == {
        "signature": "ok", "ledger": "ok", "every figure": "ok", "silo-report.html": "ok", "silo-report.pdf": "ok",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (b'"units": 60', b'"units": 61', "records"),
        (b'"round": 2', b'"round": 3', "federation"),
        (b'"attempts": 2', b'"attempts": 1', "runs"),
    ],
)
def test_a_changed_record_fails_by_name(trained, written, old, new, named):
    data = written.read_bytes()
    assert data.count(old) >= 1
    written.write_bytes(data.replace(old, new, 1))
    found = answers(own.verify(trained.root, written))
    assert (found["signature"], found[named]) == ("failed", "failed")
    assert found["silo-report.pdf"] == "failed", "it shows the digest of another record"


def test_another_silos_signature_is_none(trained, written):
    signature = written.with_name("silo-report.json.sig")
    other = keys.Identity(name="x", sign_seed=b"x" * 32)
    signature.write_text(other.sign(own.signing_input(written.read_bytes())).hex())
    assert answers(own.verify(trained.root, written))["signature"] == "failed"
    signature.unlink()
    assert answers(own.verify(trained.root, written))["signature"] == "failed"


def test_a_changed_view_fails_and_a_ledger_that_went_on_leaves_figures_open(trained, written, made):
    view = written.with_suffix(".html")
    view.write_text(view.read_text(encoding="utf-8").replace("Hospital 1", "Hospital 2"), encoding="utf-8")
    assert answers(own.verify(trained.root, written))["silo-report.html"] == "failed"
    head = msgspec.structs.replace(made.ledger, entries=made.ledger.entries + 1)
    ahead = own.write(trained.root, written.parent, msgspec.structs.replace(made, ledger=head))
    found = answers(own.verify(trained.root, ahead))
    assert found["ledger"] == "failed", "a ledger that was cut after the report"
    assert "every figure" not in found


def test_the_commands_write_and_check_it(trained, tmp_path, capsys):
    assert silo_cli.app is not None
    terminal = Terminal(capsys)
    done = terminal("silo report", "--home", trained.root, "--output", tmp_path / "here")
    assert done.code == 0, done.err
    assert "DOES NOT LEAVE THIS SITE" in done.out
    record = tmp_path / "here" / "silo-report.json"
    checked = terminal("silo verify", "--report", record, "--home", trained.root, "--json")
    assert (checked.code, checked.document["holds"]) == (0, True)
    record.write_bytes(record.read_bytes().replace(b'"units": 60', b'"units": 59', 1))
    assert terminal("silo verify", "--report", record, "--home", trained.root).code == 4


def test_the_aggregators_record_is_none_of_a_silo(made, tmp_path):
    with pytest.raises(TrustError, match="not a report"):
        consortium.decode(encode(made))
