# SPDX-License-Identifier: Apache-2.0
"""From an empty folder to a published contract, and what a coordinator must not be able to sign."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace

import msgspec
import pytest

from aggregator import config, enrolment, rounds
from aggregator.config import Config, Home
from aggregator.draft import Terms
from aggregator.store import Store
from privacy import federation
from privacy.dp import accounting, ring
from privacy.errors import BudgetExhausted, ConfigError, TrustError
from privacy.federation import Contract, Model, ring_plan
from privacy.identity import keys
from privacy.identity.keys import Identity

MODEL = Model(name="tiny", digest="ab" * 32, hidden_size=8)
TERMS = Terms(
    name="oncology", expires="2099-12-31", labels=("no", "yes"), model=MODEL, modules=("query", "value"), units=200, rounds=5,
    rank=2, sampling_rate=0.25, delta=1e-5,
)  # fmt: skip


def public_of(tmp_path, name, organisation="North Hospital"):
    folder = tmp_path / "silos"
    folder.mkdir(exist_ok=True)
    identity = keys.create(folder / f"{name}.key", name=name, receives=False)
    keys.write_public(folder / f"{name}.pub", identity, organisation)
    return (folder / f"{name}.pub").read_bytes()


def made(tmp_path, terms=TERMS, silos=3):
    home, identity = enrolment.init(tmp_path / "aggregator", name="hub", organisation="Hub", terms=terms, host="127.0.0.1", port=0)
    for silo in range(1, silos + 1):
        enrolment.add_member(home, public_of(tmp_path, f"silo-{silo}", f'Hospital "{silo}" Süd'))
    return home, identity, Store(home.evidence_folder, home.database_url(home.config()))


def with_terms(**changes):
    return replace(TERMS, **changes)


def edit(home, before, after):
    text = home.draft_path.read_text()
    assert before in text
    home.draft_path.write_text(text.replace(before, after))


def test_init_makes_a_home_whose_private_key_is_private(tmp_path):
    home, identity = enrolment.init(tmp_path / "a", name="hub", organisation="Hub", terms=TERMS, host="0.0.0.0", port=8470)
    assert home.identity_path.stat().st_mode & 0o777 == 0o600
    assert home.identity_path.suffix == ".key"
    assert keys.load(home.identity_path) == identity
    assert keys.read_public(home.public_path.read_bytes()).seal_key == identity.public.seal_key
    assert home.config() == Config(name="hub", listen=config.Listen(host="0.0.0.0", port=8470))
    with pytest.raises(ConfigError, match="exists"):
        enrolment.init(tmp_path / "a", name="hub", organisation="Hub", terms=TERMS, host="127.0.0.1", port=0)
    assert keys.load(home.identity_path) == identity


def test_a_half_made_home_is_completed_and_an_edited_draft_is_not_overwritten(tmp_path):
    place = {"name": "hub", "organisation": "Hub", "host": "127.0.0.1", "port": 0}
    home, identity = enrolment.init(tmp_path / "a", terms=TERMS, **place)
    home.config_path.unlink()  # it is written last: this is what a crash leaves
    assert enrolment.init(tmp_path / "a", terms=TERMS, **place)[1] == identity
    home.config_path.unlink()
    edit(home, "rounds = 5", "rounds = 7")
    edited = home.draft_path.read_bytes()
    with pytest.raises(ConfigError, match="stands with other terms"):
        enrolment.init(tmp_path / "a", terms=TERMS, **place)
    assert home.draft_path.read_bytes() == edited


@pytest.mark.parametrize(
    "change", [{"name": "No Name"}, {"labels": ("one",)}, {"delta": 2.0}, {"expires": "soon"}, {"labels": ("a", "b\n")}]
)
def test_init_with_a_value_that_cannot_stand_makes_nothing(tmp_path, change):
    with pytest.raises(ConfigError):
        enrolment.init(tmp_path / "a", name="hub", organisation="Hub", terms=with_terms(**change), host="127.0.0.1", port=0)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("basis", "scale", "stated"), [("weights", None, 4.0), ("random", None, 1.0), ("random", 3.0, 3.0)])
def test_a_draft_has_the_scale_that_its_basis_wants_unless_another_is_given(tmp_path, basis, scale, stated):
    home, _, _ = made(tmp_path, with_terms(basis=basis, scale=scale), silos=1)
    assert tomllib.loads(home.draft_path.read_text())["adapter"]["scale"] == stated


def test_a_scale_of_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="scale"):
        made(tmp_path, with_terms(scale=0.0), silos=1)


CAUSAL = {"kind": "causal-lm", "labels": (), "format": "text"}


@pytest.mark.parametrize(("change", "of_the_other_kind"), [({}, {"format"}), (CAUSAL, {"labels", "text_pair"})])
def test_every_key_of_a_contract_stands_in_the_draft_under_a_comment(tmp_path, change, of_the_other_kind):
    home, _, _ = made(tmp_path, with_terms(**change), silos=1)
    text = home.draft_path.read_text()
    stated = tomllib.loads(text)
    absent = {"guardian", "in_force", "basis", "public_basis"}  # with shares; over one passed over; as the basis wants it
    assert set(stated) == set(Contract.__struct_fields__) - absent
    tables = ("Task", "Model", "Adapter", "Training", "Privacy", "Sum", "Aggregator")
    for table in tables:
        missing = set(getattr(federation, table).__struct_fields__) - set(stated[table.lower()])
        assert missing <= of_the_other_kind | ({"pooling", "head_scale"} if change else set()), table
        assert not set(stated[table.lower()]) & of_the_other_kind
    assert len(re.findall(r"(?m)^# ", text)) > 35


def test_members_get_the_next_free_id_and_keep_the_comments(tmp_path):
    home, _, _ = made(tmp_path)
    stated = tomllib.loads(home.draft_path.read_text())["member"]
    assert [member["id"] for member in stated] == [1, 2, 3]
    assert stated[1]["organisation"] == 'Hospital "2" Süd'
    edit(home, "id = 3", "id = 7")
    assert enrolment.add_member(home, public_of(tmp_path, "late")).id == 8
    assert "# fingerprint " in home.draft_path.read_text()


def test_a_key_or_name_enters_once_and_never_as_the_aggregators(tmp_path):
    home, identity, _ = made(tmp_path)
    before = home.draft_path.read_bytes()
    first = (tmp_path / "silos" / "silo-1.pub").read_bytes()
    assert enrolment.add_member(home, first).id == 1, "the same command again, after it was killed"
    elsewhere = Identity(name="silo-9", sign_seed=keys.load(tmp_path / "silos" / "silo-1.key").sign_seed)
    keys.write_public(tmp_path / "renamed.pub", elsewhere, "North Hospital")
    with pytest.raises(ConfigError, match="key of silo-9 stands in the draft as silo-1"):
        enrolment.add_member(home, (tmp_path / "renamed.pub").read_bytes())
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="called silo-1"):
        enrolment.add_member(home, public_of(tmp_path / "other", "silo-1"))
    with pytest.raises(ConfigError, match="stands in the draft as hub"):
        enrolment.add_member(home, home.public_path.read_bytes())
    with pytest.raises(ConfigError, match="called hub"):
        enrolment.add_member(home, public_of(tmp_path / "other", "hub"))
    assert home.draft_path.read_bytes() == before
    assert identity.name == "hub"


def test_a_member_must_prove_that_it_holds_its_key(tmp_path):
    home, _, _ = made(tmp_path, silos=0)
    public = public_of(tmp_path, "silo-1")
    for forged in (public.replace(b"North", b"South"), public[:-10], b"", b"\xff", public + b"#"):
        with pytest.raises(TrustError):
            enrolment.add_member(home, forged)
    assert "[[member]]" not in home.draft_path.read_text()


def test_signing_fills_in_what_is_computed_and_publishes_the_exact_bytes(tmp_path):
    home, identity, store = made(tmp_path)
    accepted = enrolment.sign_version(home, identity, store, now=5.0)
    raw = home.contract_path(1).read_bytes()
    assert accepted.raw == raw
    assert rounds.accepted_in(store) == accepted
    assert store.entry("contract", 1, 0).received_at == 5
    terms = accepted.terms
    assert 0.3 < terms.privacy.noise_multiplier < 5
    assert enrolment.check_plan(terms) <= terms.privacy.epsilon
    finest = ring.plan(
        silos=3, shares=2, dimension=terms.dimension, sampling_rate=0.25, units=200, noise_multiplier=terms.privacy.noise_multiplier
    )
    assert ring_plan(terms) == finest
    draft = home.draft_path.read_text().splitlines()
    assert [line for line in raw.decode().splitlines() if line.startswith("#")] == [line for line in draft if line.startswith("#")]


def test_the_calibrated_noise_is_the_least_that_keeps_the_promise(tmp_path):
    home, _, _ = made(tmp_path)
    text = enrolment.complete(home.draft_path.read_text())
    sigma = re.search(r"noise_multiplier = (\S+)", text)[1]
    less = text.replace(f"noise_multiplier = {sigma}", f"noise_multiplier = {float(sigma) - 2e-4!r}")
    enrolment.check_plan(federation.parse(text.encode()).terms)
    with pytest.raises(BudgetExhausted):
        enrolment.check_plan(federation.parse(less.encode()).terms)
    assert enrolment.complete(text) == text


def test_a_local_draft_is_calibrated_for_all_steps_and_one_silos_own_noise(tmp_path):
    home, identity, store = made(tmp_path, with_terms(mode="local", steps_per_round=3, update_bound=0.5))
    terms = enrolment.sign_version(home, identity, store, now=5.0).terms
    assert (terms.training.mode, terms.training.steps_per_round, terms.training.update_bound) == ("local", 3, 0.5)
    event = federation.mechanism(terms)
    assert (event.shares, event.steps) == (1, 15)
    sigma = terms.privacy.noise_multiplier
    assert accounting.certify([event], terms.privacy.delta).epsilon <= terms.privacy.epsilon
    less = msgspec.structs.replace(terms, privacy=msgspec.structs.replace(terms.privacy, noise_multiplier=sigma - 2e-4))
    with pytest.raises(BudgetExhausted, match="5 rounds"):
        enrolment.check_plan(less)
    finest = ring.plan(silos=1, shares=1, dimension=terms.dimension, sampling_rate=0.25, units=200, noise_multiplier=sigma)
    assert ring_plan(terms) == finest


def test_a_joint_draft_of_several_steps_a_round_is_not_signed(tmp_path):
    home, identity, store = made(tmp_path, with_terms(steps_per_round=3))
    with pytest.raises(ConfigError, match="a joint round is one step"):
        enrolment.sign_version(home, identity, store, now=5.0)
    assert not home.contract_path(1).exists()


def test_stated_noise_that_breaks_the_promise_is_not_signed(tmp_path):
    home, identity, store = made(tmp_path, with_terms(noise_multiplier=0.3, lattice_bits=16))
    with pytest.raises(BudgetExhausted, match="the draft promises 8"):
        enrolment.sign_version(home, identity, store, now=0.0)
    assert not home.contract_path(1).exists()
    assert store.latest("contract") is None
    edit(home, "noise_multiplier = 0.3", "noise_multiplier = 3.0")
    assert enrolment.sign_version(home, identity, store, now=0.0).terms.privacy.lattice_bits == 16


def test_a_second_signing_is_refused_and_changes_nothing(tmp_path):
    home, identity, store = made(tmp_path)
    accepted = enrolment.sign_version(home, identity, store, now=0.0)
    assert enrolment.sign_version(home, identity, store, now=9.0) == accepted, "the same command again, after it was killed"
    edit(home, "rounds = 5", "rounds = 50")
    with pytest.raises(ConfigError, match=f"version 1 of the contract is signed and stands .digest {accepted.digest.hex()[:16]}"):
        enrolment.sign_version(home, identity, store, now=0.0)
    with pytest.raises(ConfigError, match="stands"):
        enrolment.add_member(home, public_of(tmp_path, "late"))
    assert home.contract_path(1).read_bytes() == accepted.raw


def test_signing_again_answers_with_what_stands_whatever_calibration_would_say_today(tmp_path, monkeypatch):
    home, identity, store = made(tmp_path)
    accepted = enrolment.sign_version(home, identity, store, now=0.0)
    other = accepted.terms.privacy.noise_multiplier * 1.25
    monkeypatch.setattr(accounting, "calibrate", lambda **given: other)
    assert enrolment.complete(home.draft_path.read_text()).encode() != accepted.raw
    assert enrolment.sign_version(home, identity, store, now=9.0) == accepted
    edit(home, "rounds = 5", "rounds = 50")
    with pytest.raises(ConfigError, match="stands"):
        enrolment.sign_version(home, identity, store, now=9.0)


def test_signing_goes_on_where_publishing_was_interrupted(tmp_path):
    home, identity, store = made(tmp_path)
    accepted = enrolment.sign_version(home, identity, store, now=0.0)
    fresh = Store(tmp_path / "evidence", f"sqlite:///{tmp_path / 'fresh.sqlite'}")
    edit(home, "rounds = 5", "rounds = 50")  # too late: the kept bytes are the contract
    assert enrolment.sign_version(home, identity, fresh, now=1.0) == accepted
    assert fresh.get("contract", 1, 0) == store.get("contract", 1, 0)


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [
        ("version = 1", "version = 2", "version 2"),
        ("epsilon = 8.0", "epsilon = 1e-9", "epsilon"),
        ("units = 200", "units = 200000000", "delta|ring|units"),
        ("rank = 2", "rank = 0", "rank"),
        ("rank = 2", "rnak = 2", "rnak"),
        ('name = "oncology"', 'name = "', "federation.draft.toml"),
        ("id = 2", "id = 1", "ascending"),
        ("2099-12-31", "2099-13-31", "no date"),
        ("2099-12-31", "1969-12-31", "expired on 1969-12-31, today is 1970-01-01"),
    ],
)
def test_a_draft_that_cannot_stand_is_refused_with_its_reason(tmp_path, before, after, match):
    home, identity, store = made(tmp_path)
    edit(home, before, after)
    with pytest.raises(Exception, match=match) as caught:
        enrolment.sign_version(home, identity, store, now=0.0)
    assert caught.value.exit_code in (3, 5)
    assert caught.value.hint
    assert store.latest("contract") is None
    assert not home.contract_path(1).exists()


@pytest.mark.parametrize("silos", [0, 1, 2])
def test_too_few_members_are_refused(tmp_path, silos):
    home, identity, store = made(tmp_path, silos=silos)
    with pytest.raises(ConfigError, match=f"{silos} members"):
        enrolment.sign_version(home, identity, store, now=0.0)


def test_only_the_aggregator_of_the_draft_signs(tmp_path):
    home, _, store = made(tmp_path)
    (tmp_path / "x").mkdir()
    other = keys.create(tmp_path / "x" / "hub.key", name="hub", receives=True)
    with pytest.raises(ConfigError, match="the draft names"):
        enrolment.sign_version(home, other, store, now=0.0)
    assert not home.contract_path(1).exists()


@pytest.mark.parametrize(
    "raw",
    [b"", b"name = 3", b'name = "hub"\nport = 1', b'name = "hub"\n[listen]\nport = 70000', b"\xff", b'name = "hub"\nname = "hub"'],
)
def test_a_configuration_with_a_wrong_key_or_value_is_refused(raw):
    with pytest.raises(ConfigError, match=r"aggregator\.toml"):
        config.parse(raw)


def test_the_written_configuration_reads_back_and_a_missing_one_is_named(tmp_path):
    wanted = Config(name="hub", listen=config.Listen(host="::1", port=0), database=config.Database(url='postgresql://u:"p"@h/d'))
    assert Home.create(tmp_path / "h", wanted).config() == wanted
    with pytest.raises(ConfigError, match="nowhere"):
        Home(tmp_path / "nowhere").config()
