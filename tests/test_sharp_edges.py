# SPDX-License-Identifier: Apache-2.0
"""docs/concepts/sharp-edges.md names tests that exist; and the edges that no other file holds: refused, or without any effect."""

from __future__ import annotations

import ast
import random
import re
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from aggregator.reporting import assumptions
from privacy import federation, update_rule
from privacy.dp import noise
from privacy.errors import ConfigError, TrustError
from privacy.messages import Acknowledgement, decode, encode
from privacy.prg import Randomness
from silo import config, membership, upload
from silo.learning import classifier
from silo.learning.training import Contribution
from tests import tiny_models
from tests.sessions import Terminal
from tests.terms import contract_bytes
from tests.test_silo_config import GIVEN
from tests.test_without_privacy import off_bytes

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/concepts/sharp-edges.md").read_text(encoding="utf-8")
EDGES = (
    "mixes examples", "loss over a batch", "δ of 1/units", "private count", "empty sample", "gradient accumulation", "weight decay",
    "dropout", "global seed", "metric", "fewer than three silos",
)  # fmt: skip


# --- The page ----------------------------------------------------------------------------------------------------------------


@cache
def functions(name: str) -> frozenset[str]:
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_edge_has_a_row_and_every_row_a_test_that_exists() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| **")]
    assert len(rows) == len(EDGES)
    for words, row in zip(EDGES, rows, strict=True):
        assert len(row) == 4, row[0]
        assert words in row[0].lower(), (words, row[0])
        named = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", row[3])
        assert named, row[0]
        for name, test in named:
            assert test in functions(name), f"{name}::{test}"


# --- Keys that would make an edge: there is none ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("training", "weight_decay", 0.01), ("training", "gradient_accumulation_steps", 4), ("training", "microbatch", 8),
        ("training", "seed", 42), ("training", "loss", "mean"), ("training", "early_stopping", True), ("adapter", "dropout", 0.1),
        ("adapter", "lora_dropout", 0.1), ("privacy", "seed", 42), ("privacy", "batch_size", 64), ("privacy", "divisor", 117.0),
        ("privacy", "sampler", "shuffle"), ("privacy", "adaptive_clipping", True), ("sum", "report_metrics", True),
    ],
)  # fmt: skip
def test_a_contract_has_no_key_for_it_and_says_so(table, key, value) -> None:
    with pytest.raises(ConfigError, match=f"unknown field `{key}`"):
        federation.parse(contract_bytes(**{table: {key: value}}))


@pytest.mark.parametrize("line", ["seed = 42", "batch_size = 8", "send_metrics = true", "accumulate = 4", "noise_multiplier = 0.1"])
@pytest.mark.parametrize("table", ["compute", "limits"])
def test_a_silo_cannot_choose_it_for_itself_either(tmp_path, table, line) -> None:
    config.write_commented(tmp_path / "silo.toml", **GIVEN)
    text = (tmp_path / "silo.toml").read_text()
    (tmp_path / "silo.toml").write_text(text.replace(f"[{table}]\n", f"[{table}]\n{line}\n", 1))
    with pytest.raises(ConfigError, match=line.split()[0]):
        config.load(tmp_path / "silo.toml")


# --- Delta and counts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("units", "silos"), [(200, 3), (10**5, 3), (10**4, 5)])
def test_a_delta_of_one_over_units_is_refused(units, silos) -> None:
    """Also a tenth of that, of the units of *all* silos: the ceiling is 1/(10 · all units), and 1e-5 where that is smaller."""
    ceiling = min(1e-5, 1 / (10 * units * silos))
    privacy = {"units": units, "lattice_bits": 14, "sampling_rate": 0.01}
    assert federation.parse(contract_bytes(silos=silos, privacy={**privacy, "delta": ceiling})).terms.privacy.delta == ceiling
    for delta in (1 / units, 1 / (units * silos), 1.01 * ceiling):
        with pytest.raises(ConfigError, match="delta = "):
            federation.parse(contract_bytes(silos=silos, privacy={**privacy, "delta": delta}))


def test_rate_and_divisor_are_public_constants_whatever_a_silo_holds() -> None:
    terms = federation.parse(contract_bytes()).terms
    assert terms.divisor == terms.privacy.sampling_rate * terms.privacy.units * terms.silos
    for missing in ("sampling_rate", "units", "max_grad_norm"):
        with pytest.raises(ConfigError, match=missing):
            federation.parse(contract_bytes(privacy={missing: None}))
    for derived in ({"sampling_rate": "auto"}, {"units": "auto"}, {"units": 0}, {"sampling_rate": 0.0}):
        with pytest.raises(ConfigError):
            federation.parse(contract_bytes(privacy=derived))


# --- Noise once, for however many physical batches --------------------------------------------------------------------------------


class Everybody:
    def uint64(self, count: int) -> np.ndarray:
        return np.zeros(count, dtype=np.uint64)


def test_noise_is_drawn_once_for_however_many_physical_batches_and_nothing_is_scaled_by_them(monkeypatch) -> None:
    terms = tiny_models.terms(tiny_models.MODULES["bert"])
    units = [tiny_models.unit(seed, [3 + seed % 5]) for seed in range(12)]
    state = msgspec.structs.replace(update_rule.initial(terms), theta=tiny_models.state(terms.dimension))
    drawn, draw, sums, batches = [], noise.discrete_gaussian, {}, {}
    monkeypatch.setattr(noise, "discrete_gaussian", lambda *given: drawn.append(given[:2]) or draw(*given))
    for rows_tokens in (16, 320):
        one = Contribution(terms, tiny_models.classifier("bert"), units, rows_tokens=rows_tokens, randomness=Everybody)
        batches[rows_tokens] = len(list(one._batches(one._units)))
        sums[rows_tokens] = one(state)
        assert not drawn, "the step itself adds none"
        upload.noisy(sums[rows_tokens], terms, Randomness.from_os())
        assert drawn == [(terms.dimension, federation.ring_plan(terms).share_variance)]
        drawn.clear()
    assert batches[16] > 4 * batches[320]
    apart = np.abs(sums[16] - sums[320]).max()
    assert apart <= 2 * len(units), "the last bits of each unit's own vector, and no factor"
    assert np.abs(sums[16]).max() > 100 * apart


# --- Weight decay, dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_nothing_pulls_the_model_but_the_sum(optimizer) -> None:
    terms = federation.parse(contract_bytes(training={"optimizer": optimizer, "momentum": 0.5})).terms
    start = msgspec.structs.replace(update_rule.initial(terms), theta=np.linspace(-3, 3, terms.dimension))
    after = update_rule.advance(start, np.zeros(terms.dimension, dtype=np.int64), terms)
    assert after.theta.tobytes() == start.theta.tobytes()


def test_a_base_model_full_of_dropout_gives_the_same_gradient_every_time() -> None:
    encoder = tiny_models.encoder("bert")
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    model = classifier.assemble(encoder.train(), tiny_models.terms(tiny_models.MODULES["bert"]))
    model.write(tiny_models.state(model.dimension))
    model.train()
    first, second = (tiny_models.gradients(model, [tiny_models.unit(1, [7]), tiny_models.unit(2, [9])]) for _ in range(2))
    assert torch.equal(first, second)
    assert first.any()


# --- A global seed ----------------------------------------------------------------------------------------------------------------


def test_a_global_seed_moves_neither_samples_nor_noise() -> None:
    """The reference implementation seeded everything with 42 before each step: equal silos then drew equal noise."""
    terms = tiny_models.terms(tiny_models.MODULES["bert"])
    units = [tiny_models.unit(seed, [4]) for seed in range(40)]
    one = Contribution(terms, tiny_models.classifier("bert"), units, rows_tokens=160)
    state = msgspec.structs.replace(update_rule.initial(terms), theta=tiny_models.state(terms.dimension))
    seen = set()
    kept = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        for _ in range(3):
            torch.manual_seed(42), np.random.seed(42), random.seed(42)
            total = one(state)
            seen |= {total.tobytes(), upload.noisy(np.zeros_like(total), terms, Randomness.from_os()).tobytes()}
    finally:
        torch.random.set_rng_state(kept[0]), np.random.set_state(kept[1]), random.setstate(kept[2])
    assert len(seen) == 6


# --- Metrics that would leave ---------------------------------------------------------------------------------------------------


def test_a_message_with_a_loss_beside_its_fields_is_refused() -> None:
    said = Acknowledgement(round_ctx=bytes(32), silo=1, outcome=bytes(32), state=bytes(32))
    fields = msgspec.msgpack.decode(encode(said))
    assert isinstance(fields, list)
    assert decode(msgspec.msgpack.encode(fields), Acknowledgement) == said
    for extra in (0.693, 117, b"loss"):
        with pytest.raises(TrustError):
            decode(msgspec.msgpack.encode([*fields, extra]), Acknowledgement)


# --- Fewer than three silos -------------------------------------------------------------------------------------------------------


def test_two_silos_are_refused_without_the_word_and_told_with_it() -> None:
    with pytest.raises(ConfigError, match="a sum hides nobody below 3"):
        federation.parse(contract_bytes(silos=2))
    for one in (contract_bytes(silos=1), contract_bytes(silos=1, sum={"two_silos_see_each_other": True}), off_bytes(2)):
        with pytest.raises(ConfigError):
            federation.parse(one)
    accepted = federation.parse(contract_bytes(silos=2, sum={"two_silos_see_each_other": True}))
    assert any(line.startswith("ONLY TWO SILOS") for line in membership.terms_in_words(accepted))
    three = federation.parse(contract_bytes())
    assert not any("ONLY TWO SILOS" in line for line in membership.terms_in_words(three))


def test_the_word_on_the_command_line_is_written_into_the_draft(tiny_bert, tmp_path, capsys) -> None:
    given = "aggregator init --name two --organisation Hub --labels no,yes --units 50 --rounds 4 --last-layers 0 --rank 2 --json"
    for place, word in (("with", "--two-silos-see-each-other"), ("without", "")):
        made = Terminal(capsys)(f"{given} {word} --model", tiny_bert, "--home", tmp_path / place)
        assert made.code == 0, made.out
        draft = (tmp_path / place / "federation.draft.toml").read_text()
        assert f"two_silos_see_each_other = {'true' if word else 'false'}" in draft


# --- Timing --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [contract_bytes(), contract_bytes(training={"mode": "local"})])
@pytest.mark.parametrize("simulated", [True, False])
def test_every_report_says_that_timing_is_not_covered(raw, simulated) -> None:
    found = [
        each for each in assumptions.of(federation.parse(raw).terms, simulated=simulated) if "Timing is not covered" in each.text
    ]
    assert [each.severity for each in found] == ["scope"]
    assert "not in padded slots" in found[0].text
    assert "upload" in found[0].if_wrong
