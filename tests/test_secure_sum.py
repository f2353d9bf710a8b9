# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the secure sum with tiny vectors: its sums are right by its own assertions, its tables and its picture stand."""

from __future__ import annotations

import json
import stat
import sys
from xml.etree import ElementTree

import pytest

from benchmarks import plots, secure_sum
from benchmarks.plots import Curve, Panel
from privacy.secure_sum import merkle

pytestmark = pytest.mark.slow

SMALL = ("--silos", "3", "8", "--dimensions", "10", "300000", "--repeats", "1")


@pytest.fixture(scope="module")
def costs() -> list[secure_sum.Cost]:
    made = [secure_sum.MODES[mode](silos, d, 1) for mode in secure_sum.MODES for silos in (3, 8) for d in (10, 300_000)]
    return [cost for each in made for cost in each]


def test_every_size_is_measured_with_and_without_a_missing_silo(costs) -> None:
    found = [(cost.mode, cost.silos, cost.dropped, cost.dimension) for cost in costs]
    sizes = [("consent", 3, 0), ("consent", 8, 0), ("shares", 3, 0), ("shares", 8, 0), ("shares", 8, 1)]
    assert sorted(found) == sorted((*size, d) for size in sizes for d in (10, 300_000))
    assert all(getattr(cost, part) > 0 for cost in costs for part in ("upload", "receive", "freeze", "sum"))
    assert all((cost.agree > 0) == (cost.mode == "consent") == (cost.guardian == 0) for cost in costs)


def test_an_upload_is_four_bytes_a_number_and_a_fixed_part(costs) -> None:
    for short, long in zip(costs[::2], costs[1::2], strict=True):
        assert 0 <= (long.sent - 4 * long.dimension) - (short.sent - 4 * short.dimension) < 32
        assert short.sent - 4 * short.dimension < 10_000


def test_memory_of_the_sum_is_linear_in_d_and_independent_of_n(costs) -> None:
    """It streams: beside the total it holds the vectors that are read, hashed and added, however many there are (to within 5 %)."""
    for mode in secure_sum.MODES:
        peaks = {cost.silos: cost.peak for cost in costs if cost.mode == mode and cost.dimension == 300_000}
        for silos, peak in peaks.items():
            held = 1 + min(silos, merkle.THREADS + 2)
            assert peak < 1.05 * held * 4 * 300_000 + 100_000
    assert "bytes per number" in secure_sum.memory(costs)


def test_tables_targets_and_picture_are_printed(capsys, tmp_path) -> None:
    secure_sum.main([*SMALL, "--plot", str(tmp_path / "picture.svg")])
    out = capsys.readouterr().out
    assert out.count("consent") == 4
    assert out.count("shares") == 6
    drawn = ElementTree.parse(tmp_path / "picture.svg").getroot()
    text = " ".join(drawn.itertext())
    assert all(word in text for word in ("What a secure sum costs", "milliseconds", "n = 8", "d = 300,000", "receive one"))
    secure_sum.main([*SMALL, "--modes", "consent", "--json"])
    assert len(json.loads(capsys.readouterr().out)["costs"]) == 4


def test_targets_are_judged_at_their_own_size_only(costs) -> None:
    assert list(secure_sum.verdicts(costs)) == []
    (modes, silos, d, up, silo_s, sum_s), *_ = secure_sum.TARGETS
    some = {"agree": 0.0, "guardian": 0.0, "receive": 0.0, "freeze": 0.0, "dropped": 0, "peak": 1, "mode": modes[0]}
    for upload, words in ((silo_s, "met"), (silo_s + 0.001, "MISSED")):
        cost = secure_sum.Cost(silos=silos, dimension=d, upload=upload, sum=sum_s, sent=int(up * 1e6), **some)
        assert [line.rsplit(" ", 1)[1] for line in secure_sum.verdicts([cost])] == ["met", words, "met"]


def test_the_peer_is_run_in_an_environment_of_its_own(capsys, tmp_path, monkeypatch) -> None:
    """With a program in place of the other Python: what it prints stands beside ours."""
    found = {"version": "0.0", "client_s": 0.1, "server_s": 0.2, "encoding_s": 0.3, "sent_bytes": 4e6}
    other = tmp_path / "python"
    check = 'import sys; assert sys.argv[1].endswith("peer_secagg.py")'
    lines = [f"#!{sys.executable}", check, f"print({json.dumps(found)!r})"]
    other.write_text("\n".join(lines) + "\n")
    other.chmod(other.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(secure_sum, "PEER_DIMENSION", 10)
    secure_sum.main(["--silos", "8", "--dimensions", "10", "--repeats", "1", "--modes", "shares", "--peer", str(other)])
    out = capsys.readouterr().out
    assert out.count("Flower 0.0 SecAgg+") == 2
    assert out.count("ours, shares") == 2


def test_a_picture_escapes_its_words_and_stands_alone() -> None:
    curves = (Curve(label="a<b", points=((1.0, 0.01), (1000.0, 20.0))), Curve(label="c", points=((1.0, 5.0), (1000.0, 20.0))))
    text = plots.picture([Panel(title="t & u", x="x", y="y", curves=curves)], title="<T>", desc="d")
    root = ElementTree.fromstring(text)
    labels = [node for node in root.iter("{http://www.w3.org/2000/svg}text") if node.get("class") == "end"]
    assert [node.text for node in labels] == ["a<b", "c"]
    assert abs(float(labels[0].get("y")) - float(labels[1].get("y"))) >= 12
    assert {"0.01", "0.1", "1", "10", "100", "1,000"} <= set(root.itertext())
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
