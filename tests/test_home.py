# SPDX-License-Identifier: Apache-2.0
"""The silo's directory: secrets stay 0600, promises hold, the state file is whole or refused."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import numpy as np
import pytest

from privacy.errors import ConfigError, Equivocation, MachineError, Replay, TrustError
from privacy.update_rule import State
from silo.home import Home, Progress, remove_folder


def some_progress(round_number=3, seed=0):
    draw = np.random.default_rng(seed)
    state = State(
        applied=round_number,
        beta1_power=0.9**3,
        beta2_power=0.99**3,
        theta=draw.normal(size=7),
        first_moment=draw.normal(size=7),
        second_moment=draw.normal(size=7) ** 2,
    )
    return Progress(contract=b"c" * 32, epoch=1, manifest=b"m" * 32, round=round_number, outcome=b"o" * 32, voids=1, state=state)


@pytest.fixture
def home(tmp_path):
    return Home.create(tmp_path / "silo-1")


def test_secrets_are_private_distinct_and_kept(home):
    assert len(home.selection_key) == len(home.install_secret) == 32
    assert home.selection_key != home.install_secret
    before = (home.selection_key, home.install_secret)
    again = Home.create(home.root)
    assert (again.selection_key, again.install_secret) == before
    assert {p.stat().st_mode & 0o777 for p in home.root.glob("*.key")} == {0o600}
    assert home.epoch_folder.stat().st_mode & 0o777 == 0o700


def test_an_open_or_cut_secret_is_refused(home):
    (home.root / "install.key").chmod(0o644)
    with pytest.raises(ConfigError, match="read by others"):
        _ = home.install_secret
    (home.root / "selection.key").write_bytes(b"short")
    with pytest.raises(ConfigError, match="32 bytes"):
        _ = home.selection_key


def test_a_manifest_promise_is_kept(home):
    home.promise_manifest(5, b"a" * 32)
    home.promise_manifest(5, b"a" * 32)
    assert home.promised_manifest(5) == b"a" * 32
    with pytest.raises(Equivocation, match="second manifest for round 5"):
        home.promise_manifest(5, b"b" * 32)
    assert home.promised_manifest(5) == b"a" * 32


def test_an_earlier_round_is_never_opened_again(home):
    home.promise_manifest(5, b"a" * 32)
    with pytest.raises(Replay, match="round 4"):
        home.promise_manifest(4, b"c" * 32)
    home.promise_manifest(12, b"d" * 32)
    assert home.latest_promise() == 12
    with pytest.raises(Replay):
        home.promise_manifest(5, b"a" * 32)


def test_a_consent_promise_is_kept(home):
    home.promise_consent(2, b"u" * 32)
    home.promise_consent(2, b"u" * 32)
    with pytest.raises(Equivocation, match="second consent"):
        home.promise_consent(2, b"v" * 32)
    assert home.promised_consent(2) == b"u" * 32
    assert home.promised_consent(3) is None


def test_a_damaged_promise_is_not_taken_for_none(home):
    home.promise_consent(2, b"u" * 32)
    (home.root / "promises" / "consent-2").write_bytes(b"zz\n")
    with pytest.raises(TrustError, match="damaged"):
        home.promised_consent(2)


def test_progress_reads_back_to_the_bit(home):
    assert home.progress() is None
    home.save_progress(some_progress())
    found = home.progress()
    assert found.state.digest == some_progress().state.digest
    assert (found.round, found.outcome, found.voids, found.contract) == (3, b"o" * 32, 1, b"c" * 32)
    home.save_progress(some_progress(4, seed=1))
    assert home.progress().state.digest == some_progress(4, seed=1).state.digest


def test_progress_with_an_optimiser_of_its_own_reads_back_to_the_bit_and_is_private(home):
    public, own = some_progress(), some_progress(seed=7).state
    home.save_progress(public)
    assert home.progress().own is None
    assert home.state_path.stat().st_mode & 0o777 == 0o644
    home.save_progress(msgspec.structs.replace(public, own=own))
    found = home.progress()
    assert (found.own.digest, found.state.digest) == (own.digest, public.state.digest)
    assert home.state_path.stat().st_mode & 0o777 == 0o600
    whole = home.state_path.read_bytes()
    for position in range(0, len(whole), 41):
        home.state_path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(TrustError, match="damaged"):
            home.progress()


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: b"", lambda d: d[:-3] + bytes([d[-3] ^ 1]) + d[-2:], lambda d: b"\xff" * 64]
)
def test_a_damaged_state_is_refused(home, damage):
    home.save_progress(some_progress())
    home.state_path.write_bytes(damage(home.state_path.read_bytes()))
    with pytest.raises(TrustError, match="damaged"):
        home.progress()


def test_the_highest_contract_version_is_the_one(home):
    assert home.contract() is None
    home.keep_contract(1, b"one")
    home.keep_contract(10, b"ten")
    home.keep_contract(9, b"nine")
    assert home.contract() == (10, b"ten")
    with pytest.raises(Equivocation):
        home.keep_contract(10, b"another ten")
    home.keep_countersignature(10, 2, b"signed")
    assert home.countersignature(10, 2) == b"signed"
    assert home.countersignature(10, 3) is None


def test_one_process_at_a_time(home):
    program = (
        "import sys, pathlib; from silo.home import Home; from privacy.errors import MachineError\n"
        "try:\n    Home(pathlib.Path(sys.argv[1])).locked().__enter__()\nexcept MachineError as e:\n    sys.exit(e.exit_code)"
    )
    with home.locked():
        assert subprocess.run([sys.executable, "-c", program, str(home.root)], check=False).returncode == 7
    with home.locked():
        pass


def test_taking_the_lock_sweeps_what_the_silo_writes_and_no_strangers_folder(home):
    home.keep_contract(1, b"one")
    own = [home.root / f".{name}.0123456789ab" for name in ("silo.toml", "identity.pub", "ledger.jsonl", "state.safetensors")]
    own += [home.root / name for name in ("promises/.manifest-1.0123456789ab", "contract/v1/.contract.0123456789ab")]
    for path in own:
        path.write_bytes(b"half")
    foreign = home.root / ".adapter.0123456789ab"
    foreign.mkdir()
    (foreign / "README.md").write_bytes(b"an export is writing")
    with home.locked():
        assert not [path for path in own if path.exists()]
        assert (foreign / "README.md").read_bytes() == b"an export is writing"


def test_no_home_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no silo"), Home(tmp_path / "nowhere").locked():
        pass


def test_create_where_a_file_stands(tmp_path):
    (tmp_path / "silo").write_text("a file")
    with pytest.raises(MachineError, match="cannot make"):
        Home.create(tmp_path / "silo")


def test_remove_folder_is_repeatable(home):
    (home.epoch_folder / "1").mkdir()
    (home.epoch_folder / "1" / "secret").write_bytes(b"x")
    remove_folder(home.epoch_folder / "1")
    remove_folder(home.epoch_folder / "1")
    assert not (home.epoch_folder / "1").exists()
