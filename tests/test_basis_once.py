# SPDX-License-Identifier: Apache-2.0
"""A start of `silo train` reads the factors once, and makes them again only where the file is missing or holds other bytes."""

from __future__ import annotations

import pytest

from privacy.errors import RoundError, TrustError
from silo import fixed_basis
from silo.home import Home
from tests.federation import NoBoard
from tests.test_basis_round import auditing, created

pytestmark = pytest.mark.usefixtures("quick_polls")


@pytest.fixture(scope="module")
def federated(tmp_path_factory):
    whole = created(tmp_path_factory.mktemp("once") / "federation", "joint")
    whole.run(1)
    return whole


@pytest.fixture
def whole(federated, tmp_path):
    return federated.copied(tmp_path / "federation")


def opened(whole):
    home, digest = Home(whole.root / "silo-1"), whole.progress(1).state.basis
    return home, digest, lambda: fixed_basis.load(home, digest)


def test_the_file_is_read_once_where_it_is_whole(whole, monkeypatch):
    home, digest, build = opened(whole)
    right, read, reads = home.basis_path.read_bytes(), fixed_basis.read, []
    monkeypatch.setattr(fixed_basis, "read", lambda *words, **options: reads.append(words) or read(*words, **options))
    found = fixed_basis.built(home, NoBoard(), whole.accepted.terms, digest, build)
    assert len(reads) == 1
    assert found.keys() == set(whole.accepted.terms.adapter.modules)
    assert home.basis_path.read_bytes() == right


@pytest.mark.parametrize("damage", ["lost", "flipped"])
def test_a_damaged_one_is_made_again_and_built_with(whole, damage):
    home, digest, build = opened(whole)
    right = home.basis_path.read_bytes()
    home.basis_path.unlink() if damage == "lost" else home.basis_path.write_bytes(auditing.flipped(right))
    found = fixed_basis.built(home, whole.line(), whole.accepted.terms, digest, build)
    assert home.basis_path.read_bytes() == right
    assert found.keys() == set(whole.accepted.terms.adapter.modules)
    home.basis_path.unlink()
    with pytest.raises(RoundError, match="no outcome on the board"):
        fixed_basis.built(home, NoBoard(), whole.accepted.terms, digest, build)


def test_another_refusal_is_none_of_the_basis(whole):
    home, digest, _ = opened(whole)
    built = []

    def refuses():
        built.append(None)
        raise TrustError("the model is another one", code="base-model")

    for named in (digest, b""):
        with pytest.raises(TrustError, match="the model is another one"):
            fixed_basis.built(home, NoBoard(), whole.accepted.terms, named, refuses)
    assert len(built) == 2, "it is not built again"
