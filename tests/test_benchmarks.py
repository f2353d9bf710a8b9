# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, with tiny settings: their figures say nothing here, their sums and shapes must hold."""

from __future__ import annotations

import gzip
import importlib.util
import json
import threading

import pytest

from benchmarks import clocks, machine, noise, prefix, round, step_overhead, utility
from silo.learning import training
from silo.transport import HttpTransport
from tests import sessions, warm

pytestmark = pytest.mark.slow


def printed(capsys, run, *words):
    """What a benchmark prints with ``--json``."""
    run([*map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


def test_noise_counts_our_samples_and_opendps_where_it_is_installed(capsys):
    found = printed(capsys, noise.main, "--samples", 500, "--words", 1000, "--repeats", 1)
    assert [row["s"] for row in found["rates"]] == list(noise.STANDARD_DEVIATIONS)
    assert all(row["ours"] > 0 for row in found["rates"])
    assert all((row["opendp"] is not None) == (importlib.util.find_spec("opendp") is not None) for row in found["rates"])


def test_noise_says_so_where_opendp_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(noise, "installed", lambda package: None)
    noise.main(["--samples", "500", "--words", "1000", "--repeats", "1"])
    out = capsys.readouterr().out.partition("\n")[2]  # the first line is the machine's
    assert out.count("not installed") == len(noise.STANDARD_DEVIATIONS)
    assert "target: at least 1,000,000 exact samples/s on one core; found: " in out


def test_the_step_is_compared_on_the_real_encoder(capsys, minilm):
    assert minilm.is_dir()
    words = ("--rows", 2, "--repeats", 1, "--lengths", 8, "--precisions", "float32")
    (row,) = printed(capsys, step_overhead.main, *words)["steps"]
    assert row["ratio"] > 0
    step_overhead.main(list(map(str, words)))
    assert "times ordinary" in capsys.readouterr().out


def test_kept_layers_are_compared_on_the_real_encoder_bit_for_bit(capsys, minilm):
    assert minilm.is_dir()
    words = ("--tokens", 32, "--repeats", 1, "--lengths", 8, "--last-layers", 1, "--precisions", "float32")
    (row,) = printed(capsys, prefix.main, *words)["steps"]
    assert row["same_bits"]
    assert row["bytes_a_token"] == 4 * 384
    prefix.main(list(map(str, words)))
    assert "same" in capsys.readouterr().out.splitlines()[-1]


@pytest.fixture(scope="module")
def warm_children():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aggregator.simulation.processes._entry", warm.entry(sessions.children_server()))
        patch.setattr(utility, "get_context", lambda _: sessions.warm())
        yield


@pytest.fixture(scope="module")
def federation(tmp_path_factory, warm_children):
    """One round that counts, of tiny silos."""
    folder = tmp_path_factory.mktemp("bench")
    data = sessions.write_rows(folder / "rows.jsonl", sessions.rows(60))
    model = sessions.tiny_model(folder / "model")
    settings = round.simulate.Settings(home=folder / "home", data=data, model=str(model), rank=4)
    before = training.unit_gradients, HttpTransport.get
    found = round.run(settings, counted=1, every=1)
    assert (training.unit_gradients, HttpTransport.get) == before, "the seams are closed again"
    return found, settings


def test_a_round_is_parted_into_phases_of_every_party(federation):
    found, _ = federation
    assert found.silos == [1, 2, 3]
    assert sum(found.of_a_round(phase) for phase in round.PHASES) == pytest.approx(found.total)
    for silo in found.silos:
        did = (round.GRADIENT, round.CLIP, round.NOISE, round.MASK, round.TRANSPORT, round.SUM, round.UPDATE, round.LEDGER)
        assert all(found.seconds(silo, phase) > 0 for phase in did)
    assert all(found.seconds(0, phase) > 0 for phase in (round.TRANSPORT, round.SUM, round.UPDATE, round.REST))
    assert found.seconds(0, round.GRADIENT) == 0
    assert 0 < found.not_the_model < 1


SENT = ("cosignature", "upload", "consent", "release", "acknowledgement")


def test_its_bytes_are_those_of_the_report(federation):
    found, settings = federation
    with round.hub.opened(settings.home / "aggregator") as at:
        entries = {kind: at.store.entry(kind, 2, 1).size for kind in SENT}
        outcome = at.store.entry("outcome", 2, 0).size
    assert {kind: found.bytes(kind)[0] for kind in entries} == entries
    assert found.bytes("outcome") == (0, outcome)
    assert found.bytes_of_a_round[0] == sum(entries.values())
    assert found.lora_bytes > 4 * found.terms.dimension


def test_everything_is_printed(federation):
    found, _ = federation
    lines = [*round.time_table(found), *round.byte_table(found)]
    assert all(any(line.startswith(phase) for line in lines) for phase in (*round.PHASES, clocks.WAITING))
    assert all(any(kind in line for line in lines) for kinds in round.WHEN.values() for kind in kinds)
    assert json.loads(json.dumps(round.document(found)))["not_the_model"] == pytest.approx(found.not_the_model, abs=1e-4)


def test_each_moment_belongs_to_one_phase():
    ticks = iter([(0.0, 0.0), (1.0, 1.0), (3.0, 2.0), (7.0, 2.0), (15.0, 3.0), (31.0, 3.5)])
    line = clocks.Timeline(lambda: next(ticks))
    with line.within("outer"), line.within("inner"):
        pass
    line.move(0.5, to="inner")
    costs = {phase: (cost.wall, cost.cpu) for phase, cost in line.cut().items()}
    rest, outer, inner = (1.0 + 16.0, 1.0 + 0.5), (2.0 + 8.0, 1.0 + 1.0), (4.0 + 0.5, 0.0)
    assert costs == {clocks.REST: rest, "outer": outer, "inner": inner, clocks.WAITING: (-0.5, 0.0)}


def test_other_threads_are_not_timed():
    watch, seen = clocks.Watch(every=1), []
    double = watch.timed("phase")(lambda x: 2 * x)
    thread = threading.Thread(target=lambda: seen.append(double(2)))
    with watch.party(1) as line:
        thread.start()
        thread.join()
        assert "phase" not in line.cut()
        assert double(3) == 6
        assert "phase" in line.cut()
    assert seen == [4]


def test_a_missed_target_is_said_aloud():
    assert machine.verdict("x", "y", met=False).endswith("MISSED")
    assert machine.verdict("x", "y", met=True).endswith("met")


def test_utility_measures_a_data_set_with_and_without_privacy(tmp_path, warm_children):
    for name, rows in (("train", sessions.rows(150)), ("test", sessions.rows(40, start_at=150))):
        plain = sessions.write_rows(tmp_path / "rows.jsonl", rows)
        (tmp_path / "tiny").mkdir(exist_ok=True)
        (tmp_path / "tiny" / f"{name}.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    paths = utility.unpacked(tmp_path, "tiny", tmp_path)
    settings = {"model": str(sessions.tiny_model(tmp_path / "model")), "rank": 4, "rounds": 2, "max_length": 32}
    (row,) = utility.measured("tiny", paths, [8.0], tmp_path, compare=True, **settings)
    assert all(0 <= share <= 1 for share in (row.before, row.head, row.private, row.same, row.to_end))
    assert row.epsilon == 8.0
    assert row.upload_bytes > 0
    assert "tiny" in utility.line(row)


def test_utility_says_that_there_is_nothing_to_measure(tmp_path, capsys):
    utility.main(["--data", str(tmp_path), "--tasks", "ade"])
    assert capsys.readouterr().out == "no data sets ade in the folder --data names: nothing to measure\n"
