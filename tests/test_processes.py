# SPDX-License-Identifier: Apache-2.0
"""Real processes on loopback: the simulator from end to end, and a silo that is killed at the worst moments."""

from __future__ import annotations

import functools
import json
import signal
import socket
import threading
from pathlib import Path

import msgspec
import pytest

from aggregator import commands as hub_commands
from aggregator.simulation import dealing
from aggregator.simulation.processes import children
from privacy.dp import ledger
from privacy.dp.entries import Reserve
from privacy.errors import PrivacyRefusal, RecordsError
from privacy.identity import keys
from silo import commands, reading
from silo.upload import Persisted
from tests import sessions

pytestmark = pytest.mark.slow
KEYS = {
    "silos", "rounds", "epsilon", "delta", "epsilon_per_silo", "accuracy_before", "accuracy_head", "accuracy_after",
    "upload_bytes", "model_digest", "report",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return sessions.tiny_model(tmp_path_factory.mktemp("tiny") / "model")


# --- The simulator ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(model, tmp_path_factory):
    """One run of `aggregator simulate --json` on small data: (session, home)."""
    folder = tmp_path_factory.mktemp("simulated")
    data, home = sessions.write_rows(folder / "small.jsonl", sessions.rows(150)), folder / "DIR"
    done = sessions.finish(
        "aggregator", "simulate", "--data", data, "--model", model, "--rank", 4, "--rounds", 3, "--epsilon", 6, "--home", home,
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    return done, home


def test_simulate_prints_one_document_with_every_figure(simulated):
    done, _ = simulated
    found = done.document
    assert set(found) >= KEYS
    assert (found["silos"], found["rounds"]) == (3, 3)
    assert isinstance(found["silos"], int)
    assert isinstance(found["rounds"], int)
    assert isinstance(found["upload_bytes"], int)
    assert all(0 <= found[key] <= 1 for key in ("accuracy_before", "accuracy_head", "accuracy_after"))
    assert 0 < found["epsilon"] <= 6
    assert found["epsilon"] >= max(found["epsilon_per_silo"].values()) > 0
    assert set(found["epsilon_per_silo"]) == {"silo-1", "silo-2", "silo-3"}
    assert 0 < found["delta"] <= 1e-5
    assert Path(found["report"]).is_file()
    assert json.loads(Path(found["report"]).read_bytes())
    assert set(found["digests"].values()) == {found["model_digest"]}
    assert set(found["digests"]) == {"aggregator", "silo-1", "silo-2", "silo-3"}


def test_the_simulated_folder_is_what_was_promised(simulated):
    _, home = simulated
    assert (home / "aggregator" / "aggregator.toml").is_file()
    assert all((home / f"silo-{n}" / "silo.toml").is_file() for n in (1, 2, 3))
    held_out = (home / "held-out.jsonl").read_text().splitlines()
    dealt = [line for n in (1, 2, 3) for line in (home / f"silo-{n}" / "records.jsonl").read_text().splitlines()]
    assert len(held_out) + len(dealt) == 150


def test_private_keys_end_in_key_are_private_and_stand_nowhere_else(simulated):
    done, home = simulated
    seeds = sessions.private_seeds(home)
    assert len(seeds) == 3 + 3 * 4  # the aggregator signs twice and receives; a silo signs twice, and has two local secrets
    for path in home.rglob("*"):
        if path.is_file() and path.suffix == ".key":
            assert path.stat().st_mode & 0o777 == 0o600, path
        elif path.is_file():
            assert not sessions.mentions(path.read_bytes(), seeds), path
    assert not sessions.mentions((done.out + done.err).encode(), seeds)


def test_upload_bytes_are_those_that_the_store_holds(simulated):
    done, home = simulated
    sent = 0
    with hub_commands.opened(home / "aggregator") as at:
        for kind in ("cosignature", "upload", "consent", "release", "acknowledgement"):
            for number in (1, 2, 3):
                assert at.store.parties(kind, number) == (1, 2, 3)
                sent += sum(len(at.store.get(kind, number, silo)) for silo in (1, 2, 3))
    assert done.document["upload_bytes"] == -(-sent // 9)


def test_each_ledger_holds_what_the_figure_says(simulated):
    done, home = simulated
    for number in (1, 2, 3):
        reserves = [e for e in history(home / f"silo-{number}").entries if isinstance(e, Reserve)]
        assert [e.round for e in reserves] == [1, 2, 3]
    spent = [reading.budget(home / f"silo-{number}", 0) for number in (1, 2, 3)]
    assert [each["epsilon"] for each in spent] == list(done.document["epsilon_per_silo"].values())
    assert max(each["epsilon_pld"] for each in spent) == done.document["epsilon"]
    assert {each["delta"] for each in spent} == {done.document["delta"]}


def test_the_report_is_that_of_a_simulation_and_agrees_with_the_ledgers(simulated):
    done, home = simulated
    said = Path(done.document["report"]).read_text(encoding="utf-8")
    again = hub_commands.build_report(home / "aggregator")
    for facts in (json.loads(said), msgspec.to_builtins(again)):
        assert facts["extra"]["simulated"] is True
        assert "This is a simulation" in facts["summary"][-1]
        ledgers = list(done.document["epsilon_per_silo"].values())
        assert [silo["spent"]["epsilon"] for silo in facts["silos"]] == ledgers


def test_units_of_the_simulated_contract_bound_the_largest_silo(simulated):
    _, home = simulated
    with hub_commands.opened(home / "aggregator") as at:
        terms = at.accepted.terms
    held = [len((home / f"silo-{n}" / "records.jsonl").read_text().splitlines()) for n in (1, 2, 3)]
    assert max(held) <= terms.privacy.units == dealing.rounded_up(max(held))
    assert terms.privacy.delta <= min(1e-5, 1 / (10 * terms.privacy.units * 3))


def test_simulate_in_local_mode_charges_every_step_and_all_parties_reach_one_model(model, tmp_path):
    data, home = sessions.write_rows(tmp_path / "small.jsonl", sessions.rows(150)), tmp_path / "DIR"
    done = sessions.finish(
        "aggregator", "simulate", "--mode", "local", "--rounds", 2, "--steps-per-round", 3, "--rank", 4, "--data", data,
        "--model", model, "--epsilon", 6, "--home", home, "--json", warm_children=True,
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    found = done.document
    assert (found["mode"], found["rounds"], found["steps_per_round"]) == ("local", 2, 3)
    assert set(found["digests"].values()) == {found["model_digest"]}
    assert 0 < found["epsilon"] <= 6
    for number in (1, 2, 3):
        root = home / f"silo-{number}"
        reserves = [e for e in history(root).entries if isinstance(e, Reserve)]
        assert [(e.round, e.mechanism.steps, e.mechanism.shares) for e in reserves] == [(1, 3, 1), (2, 3, 1)]
        spent = reading.budget(root, 0)
        assert (spent["steps"], spent["steps_left"], spent["rounds_left"]) == (6, 0, 0)
        assert spent["epsilon"] == found["epsilon_per_silo"][f"silo-{number}"]
        assert reading.status(root)["mode"] == "local"
    facts = json.loads(Path(found["report"]).read_bytes())
    assert facts["federation"]["mode"] == "local"
    assert [silo["spent"]["steps"] for silo in facts["silos"]] == [6, 6, 6]
    assert {each["spent"]["epsilon"] for each in facts["guarantee"]["adversaries"]} == set(found["epsilon_per_silo"].values())


@pytest.mark.parametrize(
    ("count", "figure"), [(1, 1), (9, 9), (10, 10), (11, 20), (99, 100), (100, 100), (533, 600), (1999, 2000), (9001, 10_000)]
)
def test_rounding_up_gives_the_next_figure_of_one_digit(count, figure):
    assert dealing.rounded_up(count) == figure


def test_records_that_the_cap_leaves_out_are_told_and_the_cap_is_eight_of_a_column(tmp_path):
    rows = [{**row, "who": place // 10 if place < 60 else place} for place, row in enumerate(sessions.rows(120))]
    data = sessions.write_rows(tmp_path / "d.jsonl", rows)
    dealt = dealing.deal(data, silos=3, silo_column=None, unit="who", max_records_per_unit=None)
    everybody = [row["who"] for share in dealt.shares for row in share]
    large = sum(everybody.count(who) == 10 for who in set(everybody))
    assert (dealt.max_records_per_unit, dealt.left_out) == (8, 2 * large)
    assert large > 0
    one = dealing.deal(data, silos=3, silo_column=None, unit="who", max_records_per_unit=1)
    assert (one.max_records_per_unit, one.left_out) == (1, 9 * large)
    each = dealing.deal(data, silos=3, silo_column=None, unit=None, max_records_per_unit=None)
    assert (each.max_records_per_unit, each.left_out) == (1, 0)


def test_what_a_child_refuses_for_privacy_is_a_refusal_of_the_whole(tmp_path):
    promises = tmp_path / "north" / "promises"
    promises.mkdir(parents=True)
    (promises / "manifest-1").write_text("0" * 64 + "\n")  # this silo took part before, and its ledger is gone
    words = ["--home", tmp_path / "north", "--name", "north", "--organisation", "N", "--aggregator", "http://127.0.0.1:9"]
    with children(tmp_path / "logs") as running, pytest.raises(PrivacyRefusal, match=r"exit code 5: ledger\.jsonl is missing"):
        running.answer("init-north", "silo", ["init", *words, "--records", tmp_path / "records.jsonl"])


def test_held_out_records_of_a_file_of_their_own_leave_all_others_to_the_silos(tmp_path):
    data = sessions.write_rows(tmp_path / "d.jsonl", sessions.rows(90))
    apart = sessions.write_rows(tmp_path / "h.jsonl", sessions.rows(12, start_at=90))
    dealt = dealing.deal(data, silos=3, silo_column=None, unit=None, max_records_per_unit=None, held_out=apart)
    assert [len(share) for share in dealt.shares] == [30, 30, 30]
    assert [row["text"] for row in dealt.held_out] == [row["text"] for row in sessions.rows(12, start_at=90)]


@pytest.mark.parametrize("content", ["", '{"text": "fever", "label": "neither"}\n'])
def test_held_out_records_that_cannot_be_evaluated_are_refused_before_anything_is_trained(tmp_path, content):
    data = sessions.write_rows(tmp_path / "d.jsonl", sessions.rows(90))
    (tmp_path / "h.jsonl").write_text(content)
    with pytest.raises(RecordsError):
        dealing.deal(data, silos=3, silo_column=None, unit=None, max_records_per_unit=None, held_out=tmp_path / "h.jsonl")


def test_no_process_and_no_service_file_is_left(simulated):
    _, home = simulated
    assert not (home / "aggregator" / "service.json").exists()
    assert not list(home.rglob("*.traceback"))


# --- Killed between computing and sending ----------------------------------------------------------------------------------------


def history(root: Path) -> ledger.History:
    key = keys.load(root / "identity.key").public.sign_key
    return ledger.History.read(root / "ledger.jsonl", verify=functools.partial(keys.verify_signature, key))


def reserved(root: Path, number: int) -> int:
    return (root / "ledger.jsonl").read_bytes().count(b'"kind":"reserve"')


@pytest.fixture
def federation(model, tmp_path):
    """Three joined silos whose units are computed one by one, so that a step takes a while: (home, port of the service)."""
    hub = tmp_path / "aggregator"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    table, modules, width = hub_commands.describe_model(str(model), ["all-linear"])
    terms = hub_commands.Terms(
        name="killed", expires=hub_commands.in_a_year(), labels=("no", "yes"), model=table, modules=modules, units=200, rounds=4,
        sampling_rate=0.9, epsilon=8.0, delta=1e-5, max_length=32, rank=4, deadline_s=120,
    )  # fmt: skip
    made = hub_commands.init(hub, organisation="Hub", terms=terms, lora_width=width, port=port)
    for n in (1, 2, 3):
        root = tmp_path / f"silo-{n}"
        root.mkdir()
        records = sessions.write_rows(root / "records.jsonl", sessions.rows(200, start_at=200 * n))
        commands.create(
            root, name=f"silo-{n}", organisation=f"Hospital {n}", url=f"http://127.0.0.1:{port}", fingerprint=made["fingerprint"],
            records=records, epsilon=10.0, delta=1e-5, model=str(model),
        )  # fmt: skip
        config = root / "silo.toml"
        config.write_text(config.read_text().replace("rows_tokens = 1024", "rows_tokens = 1"))
        hub_commands.add_member(hub, root / "identity.pub")
    hub_commands.sign(hub)
    with sessions.serving(hub, port):
        for n in (1, 2, 3):
            with commands.joining(tmp_path / f"silo-{n}", "") as visit:
                visit.countersign()
    return tmp_path, port


def take_part(root: Path, rounds: int) -> list[commands.Report]:
    with commands.training(root) as session:
        return list(session.take_part(rounds))


def coordinate(root: Path, rounds: int) -> list[str]:
    with hub_commands.running(root, progress=lambda event: None) as coordinator:
        coordinator.ensure_countersigned()
        coordinator.ensure_epoch()
        return [coordinator.run_round(n).state.hex() for n in range(coordinator.next_round, rounds + 1)]


def uploads(hub: Path, number: int) -> tuple[int, ...]:
    with hub_commands.opened(hub) as at:
        return at.store.parties("upload", number)


def test_a_silo_killed_between_computing_and_sending_sends_the_persisted_bytes(federation):
    home, port = federation
    hub, root = home / "aggregator", home / "silo-1"
    attempt = root / "epoch" / "1" / "attempt"
    seen = {}

    def kill_silo_1_twice():
        # First between the reservation and the upload: nothing has left, so everything is made anew.
        with sessions.serving(hub, port) as (service, _):
            seen["service"].set()
            child = sessions.start("silo", "train", "--home", root, "--rounds", 1)
            sessions.until(lambda: reserved(root, 1) == 1)
            child.send_signal(signal.SIGKILL)
            child.wait()
            seen["unpersisted"] = not attempt.exists()
            # Then with the upload on disk and the service gone: computed, and not sent.
            child = sessions.start("silo", "train", "--home", root, "--rounds", 1)
            sessions.until(lambda: reserved(root, 1) == 2 or attempt.exists())
            service.send_signal(signal.SIGKILL)
            service.wait()
            sessions.until(attempt.exists)
            child.send_signal(signal.SIGKILL)
            child.wait()
        seen["bytes"] = attempt.read_bytes()
        seen["unsent"] = 1 not in uploads(hub, 1)
        with sessions.serving(hub, port):
            child = sessions.start("silo", "train", "--home", root, "--rounds", 2)
            assert child.wait(100) == 0
            for job in others:
                job.join(60)
            runner.join(60)

    states = []
    seen["service"] = threading.Event()
    others = [threading.Thread(target=lambda n=n: (seen["service"].wait(), take_part(home / f"silo-{n}", 2))) for n in (2, 3)]
    runner = threading.Thread(target=lambda: states.extend(coordinate(hub, 2)))
    for job in (*others, runner):
        job.daemon = True
        job.start()
    kill_silo_1_twice()
    assert seen["unpersisted"]
    assert seen["unsent"]
    with hub_commands.opened(hub) as at:
        assert at.store.get("upload", 1, 1) == Persisted.from_bytes(seen["bytes"]).upload
        assert {at.store.parties("upload", number) for number in (1, 2)} == {(1, 2, 3)}
    entries = [e for e in history(root).entries if isinstance(e, Reserve)]
    assert [e.round for e in entries] == [1, 1, 2], "the attempt that was lost stays charged; the one that was sent is charged once"
    assert entries[1].attempt == Persisted.from_bytes(seen["bytes"]).attempt.hex()
    stated = [reading.status(home / f"silo-{n}") for n in (1, 2, 3)]
    assert {s["model_digest"] for s in stated} == {states[-1]}
    assert {s["round"] for s in stated} == {2}
    assert stated[0]["epsilon"] > stated[1]["epsilon"] == stated[2]["epsilon"] > 0
    left = {p.name for p in (root / "epoch").rglob("*") if p.is_file()}
    assert left == {"chain"}
