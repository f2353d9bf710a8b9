# SPDX-License-Identifier: Apache-2.0
"""silo.toml: strict, relative to its folder, and what `silo init` writes reads back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.errors import ConfigError, Equivocation
from silo import config

GIVEN = {
    "name": "north",
    "organisation": "North Hospital",
    "url": "http://127.0.0.1:8000",
    "fingerprint": "ab12 cd34",
    "records": "data/r.jsonl",
    "epsilon": 8.0,
    "delta": 1e-6,
}


def test_written_reads_back_with_paths_from_its_folder(tmp_path):
    config.write_commented(tmp_path / "silo.toml", **GIVEN)
    loaded = config.load(tmp_path / "silo.toml")
    assert (loaded.name, loaded.organisation, loaded.limits.epsilon, loaded.limits.delta) == ("north", "North Hospital", 8.0, 1e-6)
    assert loaded.records.path == str(tmp_path / "data/r.jsonl")
    assert loaded.model.path == ""
    assert loaded.compute == config.Compute()
    assert not loaded.aggregator.insecure_http


def test_an_absolute_path_stays(tmp_path):
    config.write_commented(tmp_path / "silo.toml", **{**GIVEN, "records": "/srv/records.csv"}, model="/srv/model")
    loaded = config.load(tmp_path / "silo.toml")
    assert (loaded.records.path, loaded.model.path) == ("/srv/records.csv", "/srv/model")


@given(text=st.text(min_size=1, max_size=40).filter(lambda t: t < "\ud800" or t.isprintable()))
def test_any_text_survives_quoting(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quote")
    config.write_commented(folder / "silo.toml", **{**GIVEN, "organisation": text})
    assert config.load(folder / "silo.toml").organisation == text


def test_a_second_write_keeps_the_first(tmp_path):
    config.write_commented(tmp_path / "silo.toml", **GIVEN)
    with pytest.raises(Equivocation):
        config.write_commented(tmp_path / "silo.toml", **{**GIVEN, "epsilon": 100.0})
    assert config.load(tmp_path / "silo.toml").limits.epsilon == 8.0


@pytest.mark.parametrize(
    ("old", "new", "says", "hint"),
    [
        ("[limits]\n", "[limits]\nepsilom = 3.0\n", "epsilom", "`epsilon`"),
        ("[compute]\n", "[compute]\nzebra = 3\n", "zebra", "rows_tokens"),
        ("[records]\n", "[recordz]\n", "recordz", "`records`"),
        ('name = "north"', 'name = "North!"', "name", "silo init"),
        ("delta = 1e-06", "delta = 1", "limits.delta", "silo init"),
        ('device = "auto"', 'device = "tpu"', "compute.device", "silo init"),
        ("http://127", "ftp://127", "aggregator.url", "silo init"),
        ("[limits]", "[limits", "", "silo init"),
    ],
)
def test_a_mistake_is_named(tmp_path, old, new, says, hint):
    config.write_commented(tmp_path / "silo.toml", **GIVEN)
    text = (tmp_path / "silo.toml").read_text()
    assert old in text
    (tmp_path / "silo.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path / "silo.toml")
    assert says in caught.value.message
    assert hint in caught.value.hint


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        config.load(tmp_path / "silo.toml")


def test_a_value_that_is_not_allowed_is_not_written(tmp_path):
    with pytest.raises(ConfigError, match="name"):
        config.write_commented(tmp_path / "silo.toml", **{**GIVEN, "name": "North Hospital"})
    assert not (tmp_path / "silo.toml").exists()
