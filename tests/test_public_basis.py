# SPDX-License-Identifier: Apache-2.0
"""The basis of a public data set: named and pinned in the contract, made by anybody, the coordinator's bytes for everybody."""

from __future__ import annotations

import functools
import hashlib
import math
import shutil
import tomllib

import numpy as np
import pytest

from aggregator import basis_draft, enrolment
from aggregator.draft import Terms, draft, entry
from aggregator.reporting import basis_words
from aggregator.simulation import settings
from privacy import base_model, basis_file, chain, federation, orthonormal
from privacy.errors import ConfigError, RecordsError, TrustError
from privacy.federation import Member
from privacy.identity import keys
from privacy.update_rule import initial
from silo import agreed_basis, alone, config, membership
from silo.home import Home
from silo.learning import card, evaluation, training
from tests import sessions, tiny_models
from tests.sessions import rows, tiny_model, write_rows
from tests.terms import contract_bytes
from tests.whole import SILOS, Whole, together

pytestmark = pytest.mark.usefixtures("quick_polls")

ZEROS = "00" * 32
TABLE = {"data": "Public notes, 2026", "data_digest": "11" * 32, "digest": "22" * 32, "width": 6, "max_grad_norm": 0.5}
PUBLIC = {"adapter": {"basis": "public"}, "public_basis": TABLE}
MODULES = tiny_models.MODULES["bert"][:3]
COMPUTE = config.Compute(device="cpu", precision="float32")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny BERT, a public data set, and what a contract says of both and of the factors made of them."""
    root = tmp_path_factory.mktemp("public")
    model = tiny_model(root / "model")
    data = write_rows(root / "public.jsonl", rows(40))
    changes = {
        "model": {"name": str(model), "digest": base_model.digest(model), "hidden_size": 16},
        "adapter": {"rank": 3, "modules": MODULES, "basis": "public"},
        "privacy": {"lattice_bits": 16, "units": 60},
    }
    table = {**TABLE, "data_digest": ZEROS, "digest": ZEROS}
    made = agreed_basis.make(data, agreed_basis.recipe_in(contract_bytes(public_basis=table, **changes)), compute=COMPUTE)
    changes["public_basis"] = {**table, "data_digest": made.data_digest, "digest": made.digest}
    (root / "basis.safetensors").write_bytes(made.raw)
    return root, data, made, changes


def accepted_of(world, **more):
    return federation.parse(contract_bytes(**{**world[3], **more}))


def other_basis(terms, seed: bytes = b"x") -> dict:
    """Orthonormal factors of the right modules and rank that nobody pinned."""
    sides = {name: (b.shape[0], a.shape[1]) for name, (b, a) in basis_of(terms).items()}
    return {
        name: (orthonormal.rows(seed + b"B" + name.encode(), 3, m).T.copy(), orthonormal.rows(seed + b"A" + name.encode(), 3, n))
        for name, (m, n) in sides.items()
    }


def basis_of(terms):
    linear = base_model.describe(base_model.locate(terms.model.name)).linear
    return {name: orthonormal.random_basis(bytes(32), name, linear[name], 3) for name in terms.adapter.modules}


def silo_home(root, world, name="silo-1", start_at=60) -> Home:
    """A silo's folder with its configuration and records; what lies there already stays."""
    folder = root / name
    folder.mkdir(exist_ok=True)
    write_rows(folder / "r.jsonl", rows(60, start_at=start_at))
    config.write_commented(
        folder / "silo.toml", name="n", organisation="N", url="https://x", fingerprint="", records="r.jsonl", epsilon=50,
        delta=1e-5, compute=COMPUTE,
    )  # fmt: skip
    return Home(folder)


# --- The contract -----------------------------------------------------------------------------------------------------------------


def test_the_table_stands_exactly_where_the_basis_is_public():
    terms = federation.parse(contract_bytes(**PUBLIC)).terms
    assert (terms.public_basis.data, terms.public_basis.width, terms.basis) == ("Public notes, 2026", 6, None)
    for changes in ({"adapter": {"basis": "public"}}, {"public_basis": TABLE}, {**PUBLIC, "adapter": {"basis": "random"}}):
        with pytest.raises(ConfigError, match="public_basis"):
            federation.parse(contract_bytes(**changes))


@pytest.mark.parametrize(
    "change",
    [{"width": 0}, {"width": 5000}, {"max_grad_norm": 0.0}, {"max_grad_norm": math.nan}, {"digest": "open"},
     {"data_digest": "AB" * 32}, {"data": ""}, {"data": "a\u202eb"}, {"noise_multiplier": 1.0}],
)  # fmt: skip
def test_what_no_table_may_say_is_refused(change):
    with pytest.raises(ConfigError):
        federation.parse(contract_bytes(**{**PUBLIC, "public_basis": {**TABLE, **change}}))


def test_it_costs_no_epsilon_and_needs_no_round():
    """Every event, plan and round is that of the same contract with the basis of the weights."""
    public, plain = (federation.parse(contract_bytes(**changes)) for changes in (PUBLIC, {}))
    assert federation.whole_plan(public.terms) == federation.whole_plan(plain.terms)
    assert public.at(b"") is public
    assert public.terms.planned_rounds == plain.terms.planned_rounds
    assert initial(public.terms).digest == initial(plain.terms).digest


@pytest.mark.parametrize("change", [{"digest": "33" * 32}, {"data": "Other notes"}, {"width": 7}])
def test_the_basis_does_not_change_between_versions(change):
    first = federation.parse(contract_bytes(**PUBLIC))
    later = {**PUBLIC, "version": 2, "previous": first.digest.hex()}
    same = federation.parse(contract_bytes(**later))
    lineage = chain.Lineage.begin(first)
    assert lineage.extended(same).versions[-1] is same
    with pytest.raises(TrustError, match="public_basis may not change"):
        lineage.extended(federation.parse(contract_bytes(**{**later, "public_basis": {**TABLE, **change}})))


# --- The file ---------------------------------------------------------------------------------------------------------------------


def test_the_same_data_set_gives_the_same_bytes_here_and_no_other_table_moves_one(world):
    _, data, made, _ = world
    again = accepted_of(
        world, training={"rounds": 7}, privacy={"lattice_bits": 12, "units": 9, "max_records_per_unit": 3, "unit": "who"}
    )
    once = agreed_basis.make(data, agreed_basis.recipe_in(again.raw), compute=COMPUTE)
    assert once == made
    assert made.data_digest == hashlib.sha256(data.read_bytes()).hexdigest()
    factors = basis_file.load_public(made.raw, accepted_of(world).terms)
    assert list(factors) == MODULES
    assert {(b.shape[1], a.shape[0]) for b, a in factors.values()} == {(3, 3)}


def test_one_flipped_bit_is_another_basis(world):
    terms, raw = accepted_of(world).terms, world[2].raw
    for place in range(0, len(raw), 97):
        changed = bytearray(raw)
        changed[place] ^= 1
        with pytest.raises(TrustError):
            basis_file.load_public(bytes(changed), terms)


def test_factors_of_other_modules_or_another_rank_are_refused_though_their_digest_is_pinned(world):
    """A coordinator that pins nonsense is found out by every silo."""
    factors = basis_file.load_public(world[2].raw, accepted_of(world).terms)
    cases = {
        "modules": dict(list(factors.items())[:2]),
        "order": dict(reversed(factors.items())),
        "vectors": {name: (b[:, :2], a[:2]) for name, (b, a) in factors.items()},
        "wide": {name: (b[:2].copy(), a) for name, (b, a) in factors.items()},
        "crooked": {name: (2 * b, a) for name, (b, a) in factors.items()},
    }
    for found in cases.values():
        table = {**world[3]["public_basis"], "digest": orthonormal.digest(found).hex()}
        with pytest.raises(TrustError) as refused:
            basis_file.load_public(basis_file.save(found), accepted_of(world, public_basis=table).terms)
        assert refused.value.code == "basis-file"


def test_records_that_cannot_be_used_make_no_basis(world, tmp_path):
    recipe = agreed_basis.recipe_in(accepted_of(world).raw)
    for bad in ([], [{"text": "fever", "label": "perhaps"}]):
        with pytest.raises(RecordsError):
            agreed_basis.make(write_rows(tmp_path / "bad.jsonl", bad), recipe, compute=COMPUTE)
    with pytest.raises(ConfigError):
        agreed_basis.make(tmp_path / "none.jsonl", recipe, compute=COMPUTE)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff",
        b"[adapter]",
        contract_bytes(),
        contract_bytes(**{**PUBLIC, "public_basis": {"width": 0, "max_grad_norm": 1.0}}),
    ],
)
def test_a_contract_without_a_recipe_is_refused(raw):
    with pytest.raises(ConfigError):
        agreed_basis.recipe_in(raw)


# --- The coordinator --------------------------------------------------------------------------------------------------------------


def drafted(world, root):
    """A draft of three members in an aggregator's home, its digests open."""
    from aggregator.config import Config
    from aggregator.config import Home as Hub

    terms = accepted_of(world).terms
    hub = Hub.create(root, Config(name="hub"))
    identity = keys.create(hub.identity_path, name="hub", receives=True)
    made = Terms(
        name="trial", expires="2099-12-31", labels=terms.task.labels, model=terms.model, modules=MODULES, units=60, rounds=3,
        rank=3, max_length=32, noise_multiplier=3.0, basis="public", public_data="Public notes, 2026",
    )  # fmt: skip
    text = draft(made, identity.public)
    for number in (1, 2, 3):
        text += entry(Member(id=number, name=f"s{number}", organisation=f"O{number}", sign_key=f"{number:02x}" * 32))
    hub.draft_path.write_text(text)
    return hub, identity, text


def test_a_draft_without_a_named_data_set_is_refused(world):
    with pytest.raises(ConfigError, match="which data set"):
        basis_draft.public_table("", vectors=3)
    table = tomllib.loads(basis_draft.public_table('"Ä" notes', vectors=3))["public_basis"]
    assert table["data"] == '"Ä" notes'
    assert set(table) == set(federation.PublicBasis.__struct_fields__)


def test_only_a_draft_beside_the_file_that_it_pins_is_signed(world, tmp_path):
    _, data, _, _ = world
    hub, _, text = drafted(world, tmp_path / "hub")
    with pytest.raises(ConfigError) as refused:
        enrolment.complete(text)
    assert refused.value.code == "basis-open"
    made = agreed_basis.make(data, agreed_basis.recipe_of(hub.draft_path), compute=COMPUTE)
    whole = basis_draft.stated(text, data_digest=made.data_digest, digest=made.digest)
    assert basis_draft.stated(whole, data_digest="no", digest="no") == whole, "what stands there stays"
    terms = federation.parse(enrolment.complete(whole).encode()).terms
    assert (terms.public_basis.digest, terms.public_basis.data_digest) == (made.digest, made.data_digest)
    with pytest.raises(ConfigError, match="cannot read"):
        basis_draft.check_file(hub.basis_path, terms)
    hub.basis_path.write_bytes(basis_file.save(other_basis(terms)))
    with pytest.raises(TrustError):
        basis_draft.check_file(hub.basis_path, terms)
    hub.basis_path.write_bytes(made.raw)
    basis_draft.check_file(hub.basis_path, terms)
    basis_draft.check_file(tmp_path / "none", federation.parse(contract_bytes()).terms)


def test_a_simulation_has_a_data_set_exactly_where_the_basis_is_public(tmp_path):
    for changes in ({"basis": "public"}, {"public_data": tmp_path / "p.jsonl"}):
        with pytest.raises(ConfigError, match="--public-data"):
            settings.check(settings.Settings(home=tmp_path / "s", **changes))
    settings.check(settings.Settings(home=tmp_path / "s", basis="public", public_data=tmp_path / "p.jsonl"))


# --- The silos --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(world, tmp_path_factory):
    """A federation of three silos that took the coordinator's file and trained two rounds with it."""
    root, _, _, changes = world
    whole = Whole.create(tmp_path_factory.mktemp("learned") / "federation", **changes)
    made = {}
    for silo in SILOS:
        home = silo_home(whole.root, world, f"silo-{silo}", 60 * silo)
        agreed_basis.take(home, whole.accepted.terms, root / "basis.safetensors")
        bases = agreed_basis.of(home, whole.accepted.terms, initial(whole.accepted.terms))
        made[silo] = training.build(home, config.load(home.config_path), whole.accepted.terms, bases=bases)
    jobs = [functools.partial(whole.take_part, silo, 2, contribute=made[silo]) for silo in SILOS]
    together(*jobs, functools.partial(whole.coordinate, 2))
    yield whole, made
    whole.close()


def test_a_federation_trains_with_the_coordinators_bytes(learned, world):
    whole, made = learned
    assert {contribution.basis_digest.hex() for contribution in made.values()} == {world[2].digest}
    states = [whole.progress(silo).state for silo in SILOS]
    assert len({state.digest for state in states}) == 1
    assert (states[0].applied, states[0].basis) == (2, b"")
    assert states[0].theta[: 3 * 9].any(), "R moved"
    event = federation.event(whole.accepted.terms)
    assert whole.history(1).charged(whole.accepted.digest.hex()) == [event.with_steps(2)], "two steps, and nothing for the basis"


def test_the_model_that_is_evaluated_has_these_factors(learned, world):
    whole, _ = learned
    terms, home = whole.accepted.terms, Home(whole.root / "silo-1")
    bench = evaluation.open_bench(terms, compute=COMPUTE, bases=agreed_basis.public(home, terms))
    assert bench.model.basis_digest.hex() == world[2].digest
    with pytest.raises(ConfigError, match="basis"):
        evaluation.open_bench(terms, compute=COMPUTE)


def test_a_silo_takes_no_other_file_and_trains_without_none(world, tmp_path):
    terms, root = accepted_of(world).terms, world[0]
    home = silo_home(tmp_path, world)
    with pytest.raises(TrustError) as refused:
        agreed_basis.pinned(home, terms)
    assert refused.value.code == "no-basis"
    assert "--basis" in refused.value.hint
    (tmp_path / "other").write_bytes(basis_file.save(other_basis(terms)))
    with pytest.raises(TrustError):
        agreed_basis.take(home, terms, tmp_path / "other")
    assert not home.basis_path.exists()
    with pytest.raises(ConfigError):
        agreed_basis.take(home, terms, tmp_path / "missing")
    plain = federation.parse(contract_bytes()).terms
    with pytest.raises(ConfigError, match="needs no file"):
        agreed_basis.take(home, plain, root / "basis.safetensors")
    agreed_basis.pinned(home, plain)
    agreed_basis.take(home, terms, root / "basis.safetensors")
    agreed_basis.pinned(home, terms)
    shutil.copy(tmp_path / "other", home.basis_path)
    with pytest.raises(TrustError):
        agreed_basis.of(home, terms, initial(terms))
    assert agreed_basis.of(home, plain, initial(plain)) is None


def test_alone_it_trains_with_the_same_factors(world):
    own = alone.terms_alone(accepted_of(world).terms)
    assert (own.adapter.basis, own.public_basis) == ("public", accepted_of(world).terms.public_basis)


# --- Made again -------------------------------------------------------------------------------------------------------------------


def checked(world, root, contract, factors, data):
    """What `silo basis --check` finds in a home that joined ``contract`` and holds ``factors``."""
    whole = Whole.create(root / "federation", **{**world[3], **contract})
    home = silo_home(whole.root, world)
    home.basis_path.write_bytes(basis_file.save(factors))
    try:
        return agreed_basis.check(home.root, data)
    finally:
        whole.close()


def test_whoever_has_the_data_set_can_make_it_again(learned, world, tmp_path):
    whole, _ = learned
    found = agreed_basis.check(whole.root / "silo-1", world[1])
    assert found["same_bytes"]
    assert found["largest_angle"] < 1e-6
    assert (found["data"], found["digest"]) == ("Public notes, 2026", world[2].digest)
    other = write_rows(tmp_path / "other.jsonl", rows(41))
    with pytest.raises(TrustError) as refused:
        agreed_basis.check(whole.root / "silo-1", other)
    assert refused.value.code == "data-digest"


def test_factors_that_did_not_come_from_the_data_set_are_found_out(world, tmp_path):
    """The contract pins them, and the digest of the data set is right: only making them again shows it."""
    factors = other_basis(accepted_of(world).terms)
    table = {**world[3]["public_basis"], "digest": orthonormal.digest(factors).hex()}
    with pytest.raises(TrustError, match="radians") as refused:
        checked(world, tmp_path, {"public_basis": table}, factors, world[1])
    assert refused.value.code == "basis-differs"
    assert refused.value.facts["angle"] > 1.0


def test_the_largest_angle_is_that_of_a_known_turn():
    """One vector of two turned by a known angle, in one factor of one module; small ones to seven digits."""
    eye = np.eye(5)
    for turn in (0.0, 1e-5, 0.3, math.pi / 2):
        b = eye[:, :2].copy()
        b[:, 1] = math.cos(turn) * eye[:, 1] + math.sin(turn) * eye[:, 4]
        plain = {"x": (eye[:, :2], eye[:2]), "y": (eye[:, :2], eye[:2])}
        angle, where = agreed_basis.largest_angle(plain, {**plain, "y": (b, eye[:2])})
        assert angle == pytest.approx(turn, abs=1e-7)
        assert where == "y"
    swapped = {**plain, "y": (eye[:, [1, 0]], eye[:2])}
    assert agreed_basis.largest_angle(plain, swapped)[0] < 1e-7, "the same space is the same basis"
    assert agreed_basis.largest_angle(plain, {**plain, "x": (eye[:, :1], eye[:1])})[0] == math.pi / 2
    with pytest.raises(ConfigError):
        agreed_basis.largest_angle(plain, {"x": plain["x"]})


# --- Words ------------------------------------------------------------------------------------------------------------------------


def test_join_report_and_card_name_the_data_set_and_both_digests(learned, world):
    whole, _ = learned
    made, accepted = world[2], whole.accepted
    said = "\n".join(membership.terms_in_words(accepted))
    assert "Public notes, 2026" in said
    assert made.digest[:16] in said
    assert made.data_digest[:16] in said
    stated = {str(value) for _, _, value, _ in basis_words.rows(accepted.terms)}
    assert {"public", "Public notes, 2026", made.digest, made.data_digest} <= stated
    assert "spends nothing" in basis_words.in_composition(accepted.terms)
    assert basis_words.left(accepted.terms) == []
    origin = card.Origin(accepted=accepted, silo="a", round=2, state=whole.progress(1).state, spent=None, base="b")
    assert card._basis(origin) == (
        f"public, of the data set Public notes, 2026 (file digest {made.data_digest}); digest {made.digest}"
    )


# --- By commands ------------------------------------------------------------------------------------------------------------------


def test_by_commands_from_a_draft_to_a_silo_that_joined(world, tmp_path, capsys):
    """init, basis, sign, join without the file, join with it, check: each as people type it; the service is the real one."""
    root, data, _, _ = world
    run, hub = sessions.Terminal(capsys), tmp_path / "hub"
    words = ["--labels", "no,yes", "--units", 60, "--rounds", 3, "--rank", 3, "--port", 0, "--max-length", 32]
    public = ["--basis", "public", "--public-data", "Public notes, 2026", "--without-privacy"]  # an accountant would take seconds
    who = ["--name", "trial", "--organisation", "Office", "--model", root / "model"]
    begun = run("aggregator init", *who, *words, *public, "--home", hub, "--json").document
    word = "--without-differential-privacy"
    homes = [tmp_path / f"silo-{number}" for number in (1, 2, 3)]
    for home in homes:
        home.mkdir()
        write_rows(home / "r.jsonl", rows(60, start_at=60))
    hub_draft = hub / "federation.draft.toml"
    assert run("aggregator sign", "--home", hub, "--json").code == 3
    with sessions.serving(hub) as (_, url):
        for home in homes:
            named = ["--name", home.name, "--organisation", home.name, "--aggregator", url, "--fingerprint", begun["fingerprint"]]
            assert run("silo init", *named, "--records", home / "r.jsonl", "--home", home).code == 0
            assert run("aggregator member", home / "identity.pub", "--home", hub).code == 0
        assert run("aggregator sign", "--home", hub, "--json").error["code"] == "basis-open"
        made = run("silo basis", "--data", data, "--contract", hub_draft, "--out", tmp_path / "b.safetensors", "--json").document
        lines = {name: made[name] for name in ("data_digest", "digest")}
        hub_draft.write_text(basis_draft.stated(hub_draft.read_text(), **lines))
        assert run("aggregator sign", "--home", hub, "--json").error["code"] == "no-basis"
        shutil.copy(tmp_path / "b.safetensors", hub / "basis.safetensors")
        assert run("aggregator sign", "--home", hub, "--json").code == 0
        without = run("silo join", "--yes", word, "--home", homes[0], "--json")
        assert (without.code, without.error["code"]) == (4, "no-basis")
        joined = run("silo join", "--yes", word, "--basis", tmp_path / "b.safetensors", "--home", homes[0])
        assert joined.code == 0, joined.out + joined.err
        assert "the data set Public notes, 2026" in joined.out + joined.err
    found = run("silo basis", "--check", "--data", data, "--home", homes[0], "--json").document
    assert found["same_bytes"]
    assert run("silo basis", "--data", data, "--home", homes[0]).code == 2
