# SPDX-License-Identifier: Apache-2.0
"""A silo alone, a doctor and a membership audit under attack: rolled back ledgers, other contracts, damaged homes, other users."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from privacy import federation, files
from privacy.dp import unprotected
from privacy.dp.entries import Reserve
from privacy.dp.ledger import History
from privacy.errors import BudgetExhausted, LedgerBroken, MachineError, PrivacyRefusal
from silo import alone, alone_kept, commands, config, doctor, keyring, reading, succession
from silo.home import Home
from tests import sessions, test_export
from tests.federation import NoBoard
from tests.sessions import Terminal
from tests.terms import contract_bytes
from tests.test_alone import limited
from tests.test_export import copied, home_of


@pytest.fixture(scope="module")
def joined(tiny_bert, tmp_path_factory) -> Path:
    root = home_of(tmp_path_factory.mktemp("review") / "north", tiny_bert).root
    sessions.write_rows(root / "records.jsonl", sessions.rows(120))
    return root


@pytest.fixture
def north(joined, tmp_path) -> Path:
    return copied(joined, tmp_path / "north")


@pytest.fixture
def terminal(capsys):
    return Terminal(capsys)


def history(root: Path) -> History:
    return History.read(root / "ledger.jsonl", verify=keyring.verifier(Home(root)))


def accepted(root: Path) -> federation.Accepted:
    found = succession.if_joined(Home(root))
    assert found is not None
    return found


def other(root: Path, **privacy) -> Path:
    """A draft of another contract on the same model, as a file."""
    terms = accepted(root).terms
    raw = contract_bytes(
        model={"name": terms.model.name, "digest": terms.model.digest, "hidden_size": 16},
        adapter={"rank": 3, "modules": list(terms.adapter.modules)}, privacy={"lattice_bits": 14, **privacy},
    )  # fmt: skip
    path = root / "other.toml"
    path.write_bytes(raw)
    return path


def trained_alone(root: Path, rounds: int) -> None:
    """The state that a run alone of so many rounds leaves."""
    terms, run = alone.terms_alone(accepted(root).terms), alone.run_of(accepted(root).digest)
    place = alone._begin(Home(root), accepted(root))
    place.save_progress(msgspec.structs.replace(alone.progress_of(place, run, terms), round=rounds))


def charged_alone(root: Path, rounds: int) -> None:
    terms = alone.terms_alone(accepted(root).terms)
    settings = config.load(root / "silo.toml")
    with alone._gate(Home(root), settings, accepted(root), terms, instead=False) as (gate, _):
        gate.declare(run="alone")
        for number in range(1, rounds + 1):
            gate.admit(number, bytes([number]) * 16)


def federations_gate(root: Path):
    return commands._gate(Home(root), accepted(root), config.load(root / "silo.toml"), 0, NoBoard())


# --- Is epsilon ever understated? ---------------------------------------------------------------------------------------------


def test_behind_stops_a_ledger_put_back_before_a_run_alone_stops_the_federation_too(north):
    """No board knows of a run alone: before this, a cut ledger paid for the federation's rounds once more."""
    before = (north / "ledger.jsonl").read_bytes()
    charged_alone(north, 2)
    trained_alone(north, 2)
    with federations_gate(north):
        pass
    (north / "ledger.jsonl").write_bytes(before)
    with pytest.raises(LedgerBroken, match="trained round 1 alone"), federations_gate(north):
        pass
    assert (north / "ledger.jsonl").read_bytes() == before, "nothing is written"


def test_behind_stops_a_run_under_another_contract(north):
    trained_alone(north, 1)
    found = federation.parse(other(north).read_bytes())
    settings, terms = config.load(north / "silo.toml"), alone.terms_alone(found.terms)
    with pytest.raises(LedgerBroken, match="trained round 1 alone"), alone._gate(
        Home(north), settings, found, terms, instead=True
    ):  # fmt: skip
        pass


def test_behind_stops_only_what_is_behind(north):
    charged_alone(north, 2)
    trained_alone(north, 2)
    (north / "alone" / "half-made").mkdir()
    alone_kept.require_reserved(Home(north), history(north))
    trained_alone(north, 3)
    with pytest.raises(LedgerBroken, match="round 3 alone"):
        alone_kept.require_reserved(Home(north), history(north))


def test_join_after_alone_and_alone_after_join_cost_the_same_and_more_than_one(north):
    alone_first = reading.budget(north, 0)["epsilon"]
    charged_alone(north, 2)
    both = reading.budget(north, 0)["epsilon"]
    contracts = dict.fromkeys(each.contract for each in history(north).entries if isinstance(each, Reserve))
    assert len(contracts) == 2
    assert both > alone_first
    terms = accepted(north).terms
    order = reading.limits(config.load(north / "silo.toml"), accepted(north)).filter_order
    events = history(north).charged()
    assert both == unprotected.certify(events, terms.privacy.delta, order=order).epsilon
    assert both == unprotected.certify(events[::-1], terms.privacy.delta, order=order).epsilon


def test_room_to_join_is_asked_at_the_smaller_delta_of_the_two_contracts(tiny_bert, tmp_path, monkeypatch):
    """A draft with a larger delta said that the federation's plan still fits, at a delta that is not the federation's."""

    def stricter(**changes):
        return contract_bytes(**{**changes, "privacy": {**changes["privacy"], "delta": 1e-7}})

    monkeypatch.setattr(test_export, "contract_bytes", stricter)
    root = home_of(tmp_path / "strict", tiny_bert).root
    loose, settings = federation.parse(other(root).read_bytes()), config.load(root / "silo.toml")
    terms, limits = alone.terms_alone(loose.terms), reading.limits(settings, accepted(root))
    assert (reading.limits(settings, loose).delta, limits.delta) == (1e-5, 1e-7)
    with alone._gate(Home(root), settings, loose, terms, instead=True) as (_, then):
        ahead = [*history(root).charged(), federation.event(terms), federation.event(accepted(root).terms, rounds=7)]
        assert then == pytest.approx(unprotected.certify(ahead, 1e-7, order=limits.filter_order).epsilon, rel=1e-6)


def test_two_at_once_are_one(north):
    begun = history(north).counter
    with Home(north).locked(), pytest.raises(MachineError, match="another process"), alone.training(north):
        pass
    with ledger_of(north), pytest.raises(MachineError, match="another process"), alone.training(north):
        pass
    assert history(north).counter == begun


def ledger_of(root: Path):
    return files.locked(root / "ledger.lock")


def test_a_folder_that_was_brought_back_open_is_closed_again(north):
    (north / "alone" / accepted(north).digest.hex()).mkdir(parents=True)
    (north / "alone").chmod(0o755)
    trained_alone(north, 1)
    assert {path.stat().st_mode & 0o777 for path in (north / "alone").rglob("*") if path.is_dir()} == {0o700}
    assert (north / "alone").stat().st_mode & 0o777 == 0o700


def test_beside_a_federation_without_privacy_the_answer_is_still_one_json_document(north, terminal, monkeypatch):
    """Infinity is no JSON: the rounds were spent, and then the command ended with a traceback."""
    monkeypatch.setattr(reading, "plan_left", lambda *_: [without_noise(north)])
    done = terminal("silo train --alone --rounds 1 --instead-of-joining --json --home", north)
    assert done.code == 0, done.out
    assert done.document["epsilon_with_federation"] is None
    refused = terminal("silo train --alone --rounds 1 --json --home", north)
    assert refused.code == 5
    assert json.loads(refused.out, parse_constant=pytest.fail)["error"]["epsilon_after"] is None
    words = terminal("silo train --alone --rounds 1 --instead-of-joining --home", north).out
    assert "no differential privacy: too much to join" in words


def without_noise(root: Path):
    from privacy.dp.mechanism import Unprotected

    terms = accepted(root).terms
    return Unprotected(sampling_rate=0.25, lattice_bits=14, dimension=terms.dimension, steps=10)


def test_a_note_of_the_latest_run_that_is_no_text_is_no_traceback(north, terminal):
    (north / "alone").mkdir()
    (north / "alone" / "latest").write_bytes(b"\xff\x00\n")
    found = terminal("silo eval --alone --json --records", north / "records.jsonl", "--home", north)
    assert (found.code, found.error["code"]) == (3, "not-alone")


# --- The doctor sees what a start would trip over -----------------------------------------------------------------------------


def failing(root: Path) -> list[str]:
    return [each["name"] for each in doctor.examine(root, quick=True)["checks"] if not each["passed"]]


def unfinished_restore(root: Path) -> None:
    Home(root).begin_restore()


def cut_after_a_run_alone(root: Path) -> None:
    trained_alone(root, 1)


def cut_after_a_promise(root: Path) -> None:
    Home(root).promise_manifest(9, bytes(32))


def without_the_install_key(root: Path) -> None:
    (root / "install.key").unlink()


def an_install_key_for_everybody(root: Path) -> None:
    (root / "install.key").chmod(0o644)


def without_its_contract(root: Path) -> None:
    (root / "contract" / "v1" / "countersignature-1").unlink()


def too_little_left(root: Path) -> None:
    charged_alone(root, 10)
    limited(root, 2.5)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (unfinished_restore, "ledger"), (cut_after_a_run_alone, "ledger"), (cut_after_a_promise, "ledger"),
        (too_little_left, "limits"), (without_the_install_key, "keys"), (an_install_key_for_everybody, "keys"),
        (without_its_contract, "contract"),
    ],
)  # fmt: skip
def test_what_a_start_would_trip_over_is_seen(north, spoil, named):
    spoil(north)
    assert failing(north) == [named]


def test_a_fit_silo_stays_fit_with_a_run_alone_on_its_ledger(north):
    charged_alone(north, 1)
    trained_alone(north, 1)
    assert failing(north) == []


def test_the_gate_and_the_doctor_refuse_the_same(north):
    too_little_left(north)
    with federations_gate(north) as gate, pytest.raises(BudgetExhausted):
        gate.admit(4, bytes(32))


# --- The membership audit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["symlink", "hardlink"])
def test_the_training_file_under_another_name_is_not_held_out(north, link):
    from silo import empirical_audit

    path = north / "held-out.jsonl"
    (path.symlink_to if link == "symlink" else path.hardlink_to)(north / "records.jsonl")
    with pytest.raises(PrivacyRefusal, match="trains on"):
        empirical_audit.membership(north, runs=8, steps=1, records=path, plot=None)


def test_a_picture_of_held_out_records_is_for_one_user_alone(north, tmp_path):
    from silo import empirical_audit

    held_out = sessions.write_rows(tmp_path / "held-out.jsonl", sessions.rows(40, start_at=500))
    empirical_audit.membership(north, runs=8, steps=1, records=held_out, plot=tmp_path / "held-out.svg")
    assert (tmp_path / "held-out.svg").stat().st_mode & 0o777 == 0o600
