# SPDX-License-Identifier: Apache-2.0
"""The two commands as sessions: what was typed, what came out, and the exit code; bad input of every sort, and a full disk."""

from __future__ import annotations

import functools
import json
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from aggregator import defaults
from privacy.dp import ledger
from privacy.errors import MachineError
from privacy.identity import keys
from silo import commands, reading
from silo.transport import HttpTransport
from tests import sessions
from tests.sessions import Terminal

COMMANDS = [
    *(f"silo {name}" for name in ("init", "join", "train", "status", "budget", "eval", "export")),
    *(f"aggregator {n}" for n in ("init", "member", "sign", "serve", "round", "status", "budget", "report", "simulate")),
]


@pytest.fixture
def terminal(capsys):
    return Terminal(capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return sessions.tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    """An aggregator with a signed contract, and three silos that have not joined; the address is written in by each test."""
    folder = tmp_path_factory.mktemp("cli")
    words = ["--labels", "no,yes", "--units", 40, "--rounds", 3, "--rank", 4, "--delta", 1e-5, "--deadline", 1, "--port", 0]
    hub = folder / "hub"
    made = sessions.finish(
        "aggregator", "init", "--name", "trial", "--organisation", "Trial Office", "--model", model, *words, "--home", hub, "--json"
    )
    fingerprint = made.document["fingerprint"]
    for n in (1, 2, 3):
        root = folder / f"silo-{n}"
        root.mkdir()
        sessions.write_rows(root / "records.jsonl", sessions.rows(40, start_at=40 * n))
        commands.create(
            root, name=f"silo-{n}", organisation=f"Hospital {n}", url="http://127.0.0.1:1", fingerprint=fingerprint,
            records=root / "records.jsonl", epsilon=10.0, delta=1e-5, model=str(model),
        )  # fmt: skip
        added = sessions.finish("aggregator", "member", root / "identity.pub", "--home", hub, "--json")
        assert added.document["member"] == n
    signed = sessions.finish("aggregator", "sign", "--home", hub, "--json")
    assert signed.document["silos"] == 3
    return folder


@pytest.fixture
def trial(base, tmp_path):
    """A copy of it that a test may spend."""
    return Path(shutil.copytree(base, tmp_path / "trial"))


@pytest.fixture(scope="module")
def service(base, tmp_path_factory):
    """The address of a real service over its own copy of the board."""
    hub = shutil.copytree(base / "hub", tmp_path_factory.mktemp("served") / "hub")
    with sessions.serving(hub) as (_, url):
        yield url


def change(root: Path, old: str, new: str) -> None:
    """Edit a silo.toml."""
    text = (root / "silo.toml").read_text()
    assert text.count(old) == 1, old
    (root / "silo.toml").write_text(text.replace(old, new))


@pytest.fixture
def joinable(trial, service):
    """The home of silo 1, which reaches the service."""
    root = trial / "silo-1"
    change(root, "http://127.0.0.1:1", service)
    config = (root / "silo.toml").read_text()
    path = str(root / "records.jsonl")
    lines = [f'path = "{path}"' if "records.jsonl" in line else line for line in config.splitlines()]
    (root / "silo.toml").write_text("\n".join(lines) + "\n")
    return root


def refused(session, code: int, slug: str | None = None, *words: str) -> dict:
    """An error document with this exit code, and nothing else on either stream."""
    assert session.code == code, session.out + session.err
    error = session.error
    assert set(session.document) == {"error"}
    assert error["exit_code"] == code
    assert error["hint"]
    assert slug in (None, error["code"]), error
    for word in words:
        assert word in error["message"] + " " + error["hint"], error
    assert "Traceback" not in session.out + session.err
    return error


# --- Words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_before_the_options(terminal, command):
    session = terminal(command, "-h")
    assert session.code == 0
    assert session.err == ""
    lines = session.out.splitlines()
    example = next(place for place, line in enumerate(lines) if line.strip().startswith("Example"))
    assert lines[example + 1].strip().startswith(command)
    assert example < next(place for place, line in enumerate(lines) if line.startswith("Options"))
    assert terminal(command, "--help").out == session.out


@pytest.mark.parametrize("command", ["silo", "aggregator"])
def test_the_bare_command_shows_examples_and_names_every_command(terminal, command):
    session = terminal(command, "-h")
    assert session.code == 0
    assert f"{command} " in session.out.split("Options")[0]
    for name in COMMANDS:
        if name.startswith(command + " "):
            assert name.split()[1] in session.out


@pytest.mark.parametrize(
    "words",
    [
        "silo train",
        "silo nothing",
        "silo init --name x",
        "silo train --rounds none",
        "silo budget --forecast -1",
        "silo status --nope",
        "aggregator round --rounds 0",
        "aggregator simulate --silos 2",
        "aggregator member",
        "aggregator serve --port 70000",
    ],
)
def test_usage_is_2_as_text_and_as_json(terminal, words):
    text = terminal(words)
    assert text.code == 2
    assert text.out == ""
    assert text.err.startswith("error: ")
    assert "\n\nhint: " in text.err
    refused(terminal(words, "--json"), 2, "usage")


# --- Configuration and records: 3 ------------------------------------------------------------------------


def test_a_command_without_a_home_is_3(terminal, tmp_path):
    for words in ("status", "budget", "join", "train --rounds 1", "train --dry-run"):
        refused(terminal(f"silo {words}", "--home", tmp_path / "none", "--json"), 3, "no-config", "silo init")
    refused(terminal("silo eval", "--records", tmp_path / "x", "--home", tmp_path / "none", "--json"), 3)
    for words in ("sign", "serve", "round", "status", "budget", "report"):
        refused(terminal(f"aggregator {words}", "--home", tmp_path / "none", "--json"), 3, "no-home", "aggregator init")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("rows_tokens = 1024", "rows_token = 1024", ("rows_token", "did you mean `rows_tokens`?")),
        ("[limits]", "[limit]", ("limit", "did you mean `limits`?")),
        ("epsilon = 10.0", "epsilon = -1.0", ("epsilon",)),
        ("epsilon = 10.0", 'epsilon = "much"', ("epsilon",)),
        ("[compute]", "[compute", ()),
        ('device = "auto"', 'device = "abacus"', ("device",)),
    ],
)
def test_a_silo_toml_that_is_not_right_is_3_and_named(terminal, trial, old, new, words):
    root = trial / "silo-1"
    change(root, old, new)
    before = contents(root)
    for command in ("silo status", "silo join --yes", "silo train --rounds 1", "silo budget"):
        refused(terminal(command, "--home", root, "--json"), 3, "config", *words)
    assert contents(root) == before


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('{"text": "a b", "label": "no"}\n{"text": "a b", "label": \n', ("2",)),
        ('{"text": "fever", "label": "no"}\n{"text": "SECRETWORD", "label": "maybe"}\n', ("2", "label")),
        ("", ("records.jsonl",)),
        ('{"text": "fever", "label": "no"}\n', ("1 privacy units",)),
        ('{"text": "fever"}\n', ("label",)),
        ('{"text": 5, "label": "no"}\n', ("text",)),
        ("\x00\x01\x02", ("records.jsonl",)),
        (None, ("records.jsonl",)),
    ],
)
def test_records_that_cannot_be_used_are_3_before_anything_is_signed(terminal, joinable, rows, words):
    path = joinable / "records.jsonl"
    path.unlink()
    if rows is not None:
        path.write_text(rows)
    before = contents(joinable)
    session = terminal("silo join", "--yes", "--home", joinable, "--json")
    refused(session, 3, None, *words)
    assert "SECRETWORD" not in session.out + session.err
    assert "maybe" not in session.out + session.err
    after = contents(joinable)
    after.pop(".lock", None)
    assert after == before
    assert not list((joinable / "contract").iterdir())


def test_nothing_is_agreed_to_that_nobody_was_asked(terminal, joinable):
    before = contents(joinable)
    refused(terminal("silo join", "--home", joinable, "--json"), 3, "not-agreed", "agree to these terms", "--yes")
    after = contents(joinable)
    after.pop(".lock", None)
    assert after == before
    refused(terminal("silo restore", "--home", joinable, "--json"), 3, "not-agreed", "--yes")


def test_more_units_than_the_contract_is_for_are_3_and_their_number_is_not_said(terminal, joinable):
    sessions.write_rows(joinable / "records.jsonl", sessions.rows(57))
    session = terminal("silo join", "--yes", "--home", joinable, "--json")
    refused(session, 3, "too-many-units", "at most 40", "larger `units`")
    assert "57" not in session.out + session.err
    assert not list((joinable / "contract").iterdir())


def test_a_silos_figures_are_in_the_smaller_delta_of_limit_and_contract(terminal, joinable):
    """The contract's is 1e-5; with a larger limit the ledger's figure must be the report's all the same."""
    assert terminal("silo join", "--yes", "--home", joinable).code == 0
    figures = []
    for limit in ("1e-05", "0.001"):
        if limit != "1e-05":
            change(joinable, "delta = 1e-05", f"delta = {limit}")
        stated = terminal("silo status", "--home", joinable, "--json").document
        spent = terminal("silo budget", "--forecast", 3, "--home", joinable, "--json").document
        assert stated["delta"] == spent["delta"] == 1e-5
        figures.append(spent["forecast"])
    assert figures[0] == figures[1]


def test_a_missing_or_other_base_model_is_3(terminal, joinable, tmp_path, model):
    text = (joinable / "silo.toml").read_text()
    (joinable / "silo.toml").write_text(text.replace(str(model), str(tmp_path / "gone")))
    refused(terminal("silo join", "--yes", "--home", joinable, "--json"), 3)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    (joinable / "silo.toml").write_text(text.replace(str(model), str(other)))
    refused(terminal("silo join", "--yes", "--home", joinable, "--json"), 3, "model-digest")


def test_the_aggregators_files_that_are_not_right_are_3(terminal, trial, tmp_path):
    hub = trial / "hub"
    refused(terminal("aggregator init", "--name", "t", "--organisation", "T", "--labels", "a,b", "--units", 9, "--rounds", 1,
                     "--model", tmp_path / "nothing", "--home", tmp_path / "new", "--json"), 3)  # fmt: skip
    assert not (tmp_path / "new").exists()
    refused(terminal("aggregator member", tmp_path / "none.pub", "--home", hub, "--json"), 3, "no-file")
    draft = (hub / "federation.draft.toml").read_text()
    (hub / "federation.draft.toml").write_text(draft.replace("rounds = 3", "rounds = 4"))
    refused(terminal("aggregator sign", "--home", hub, "--json"), 3, "signed")
    text = (hub / "aggregator.toml").read_text()
    (hub / "aggregator.toml").write_text(text.replace("port =", "prot ="))
    refused(terminal("aggregator status", "--home", hub, "--json"), 3, "config", "prot")


def test_simulate_refuses_bad_data_and_a_folder_in_use(terminal, tmp_path, model):
    data = sessions.write_rows(tmp_path / "d.jsonl", sessions.rows(30))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "x").write_text("mine")
    common = ("--model", model, "--json")
    refused(terminal("aggregator simulate", "--data", data, "--home", taken, *common), 3, "home-exists")
    assert (taken / "x").read_text() == "mine"
    new = tmp_path / "new"
    refused(terminal("aggregator simulate", "--data", tmp_path / "gone.jsonl", "--home", new, *common), 3)
    refused(terminal("aggregator simulate", "--data", data, "--silo-column", "hospital", "--home", new, *common), 3)
    refused(terminal("aggregator simulate", "--data", data, "--mode", "central", "--home", new, *common), 3, "mode")
    refused(terminal("aggregator simulate", "--data", data, "--steps-per-round", 2, "--home", new, *common), 3, "mode", "one step")
    capped = ("--max-records-per-unit", 4, "--home", new)
    refused(terminal("aggregator simulate", "--data", data, *capped, *common), 3, "no-unit", "--unit")
    refused(terminal("aggregator simulate", "--data", data, "--delta", 1e-4, "--home", new, *common), 5, None, "1e-05")
    data.write_text("")
    refused(terminal("aggregator simulate", "--data", data, "--home", new, *common), 3)
    data.write_text('{"text": "fever"}\n' * 30)
    refused(terminal("aggregator simulate", "--data", data, "--home", new, *common), 3)
    assert not (new / "aggregator").exists()


def test_the_mode_is_chosen_at_the_beginning(terminal, tmp_path, model):
    words = ["--name", "t", "--organisation", "T", "--labels", "a,b", "--units", 900, "--rounds", 3, "--model", model, "--json"]
    for name, steps, given in (("a", 5, ["--steps-per-round", 5]), ("c", defaults.STEPS_PER_ROUND["local"], [])):
        made = terminal("aggregator init", *words, "--mode", "local", *given, "--home", tmp_path / name)
        draft = tomllib.loads(Path(made.document["draft"]).read_text())
        assert (draft["training"]["mode"], draft["training"]["steps_per_round"], draft["training"]["rounds"]) == ("local", steps, 3)
    refused(terminal("aggregator init", *words, "--mode", "both", "--home", tmp_path / "b"), 3, "contract", "both")
    assert not (tmp_path / "b").exists()


def test_the_adapter_is_chosen_at_the_beginning(terminal, tmp_path, model):
    words = ["--name", "t", "--organisation", "T", "--labels", "a,b", "--units", 900, "--rounds", 1, "--model", model, "--json"]
    chosen = ("--targets", "all-linear", "--last-layers", 0, "--basis", "random", "--rank", 4, "--sampling-rate", 0.5)
    assert terminal("aggregator init", *words, *chosen, "--home", tmp_path / "a").code == 0
    draft = tomllib.loads((tmp_path / "a" / "federation.draft.toml").read_text())
    assert (draft["adapter"]["basis"], draft["adapter"]["rank"], draft["privacy"]["sampling_rate"]) == ("random", 4, 0.5)
    assert len(draft["adapter"]["modules"]) == 12
    assert terminal("aggregator init", *words, "--home", tmp_path / "usual").code == 0
    usual = tomllib.loads((tmp_path / "usual" / "federation.draft.toml").read_text())
    assert usual["adapter"]["basis"] == "weights"
    ends = ("attention.self.value", "attention.output.dense")
    assert usual["adapter"]["modules"] == [name for name in draft["adapter"]["modules"] if name.endswith(ends)]
    refused(terminal("aggregator init", *words, "--basis", "gradient", "--home", tmp_path / "b"), 3, "contract", "basis")
    refused(terminal("aggregator init", *words, "--targets", "uery", "--home", tmp_path / "b"), 3, "target-modules", "query")


@pytest.mark.parametrize(
    ("words", "says"),
    [("--basis private", "basis"), ("--rank 5000", "rank"), ("--sampling-rate 2", "sampling_rate"), ("--targets uery", "uery")],
)
def test_simulate_takes_the_adapter_and_the_rate_that_it_is_given(terminal, tmp_path, model, words, says):
    """What cannot stand in a contract is refused with its key: so what is given gets there."""
    data = sessions.write_rows(tmp_path / "d.jsonl", sessions.rows(90))
    common = ("--data", data, "--model", model, "--home", tmp_path / "new", "--json")
    refused(terminal(f"aggregator simulate {words}", *common), 3, None, says)


# --- Trust: 4 --------------------------------------------------------------------------------------------


def test_a_wrong_fingerprint_is_4(terminal, joinable):
    for wrong in ("0" * 64, "beef", "not a fingerprint"):
        refused(terminal("silo join", "--fingerprint", wrong, "--yes", "--home", joinable, "--json"), 4, "fingerprint")
    assert not list((joinable / "contract").iterdir())


def test_no_fingerprint_anywhere_is_3(terminal, joinable):
    lines = (joinable / "silo.toml").read_text().splitlines()
    (joinable / "silo.toml").write_text("\n".join('fingerprint = ""' if line.startswith("fingerprint") else line for line in lines))
    refused(terminal("silo join", "--yes", "--home", joinable, "--json"), 3, "fingerprint")


def test_another_key_than_the_contracts_is_4(terminal, joinable, tmp_path):
    (joinable / "identity.key").unlink()
    keys.create(joinable / "identity.key", name="silo-1", receives=False)
    refused(terminal("silo join", "--yes", "--home", joinable, "--json"), 4, "not-a-member")


def test_a_forged_identity_is_4_and_a_readable_key_is_refused(terminal, trial):
    public = trial / "silo-1" / "identity.pub"
    raw = public.read_bytes()
    public.write_bytes(raw.replace(b"Hospital 1", b"Hospital 9"))
    hub = trial / "fresh"
    shutil.copytree(trial / "hub", hub, ignore=shutil.ignore_patterns("documents.sqlite*", "evidence", "v1.toml"))
    assert terminal("aggregator member", public, "--home", hub, "--json").code == 4
    (trial / "silo-1" / "identity.key").chmod(0o644)
    refused(terminal("silo status", "--home", trial / "silo-1", "--json"), 3, "open-key", "chmod 600")


def test_a_contract_changed_after_joining_is_4(terminal, joinable):
    assert terminal("silo join", "--yes", "--home", joinable, "--json").document["member"] == 1
    path = joinable / "contract" / "v1" / "contract"
    path.write_bytes(path.read_bytes().replace(b"rounds = 3", b"rounds = 9"))
    for command in ("silo status", "silo budget", "silo train --rounds 1", "silo train --dry-run"):
        assert terminal(command, "--home", joinable, "--json").code == 4, command


# --- Privacy: 5 ------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_a_step_and_a_round_take_and_spends_nothing(terminal, joinable):
    assert terminal("silo join", "--yes", "--home", joinable).code == 0
    before = contents(joinable)
    said = terminal("silo train --dry-run", "--home", joinable, "--json").document
    assert set(said) == {"seconds", "seconds_per_round", "peak_memory_bytes", "device", "precision"}
    assert said["seconds_per_round"] == said["seconds"] > 0
    assert contents(joinable) == before


def test_a_plan_above_the_silos_limit_is_5_and_nothing_is_signed(terminal, joinable):
    change(joinable, "epsilon = 10.0", "epsilon = 0.5")
    refused(terminal("silo join", "--yes", "--home", joinable, "--json"), 5, "budget-exhausted", "0.5")
    assert not list((joinable / "contract").iterdir())
    change(joinable, "epsilon = 0.5", "epsilon = 10.0")
    change(joinable, "delta = 1e-05", "delta = 1e-09")
    refused(terminal("silo join", "--yes", "--home", joinable, "--json"), 5, "budget-exhausted", "delta")


def test_a_broken_ledger_is_5_and_the_mended_one_goes_on(terminal, joinable):
    assert terminal("silo join", "--yes", "--home", joinable).code == 0
    path = joinable / "ledger.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"sequence":0', b'"sequence":1'))
    for command in ("silo status", "silo budget", "silo train --rounds 1"):
        refused(terminal(command, "--home", joinable, "--json"), 5, "ledger-broken", "line 1")
    path.write_bytes(whole)
    assert terminal("silo budget", "--home", joinable, "--json").document["epsilon"] == 0


# --- Rounds: 6 -------------------------------------------------------------------------------------------


def test_training_before_everybody_joined_is_6_and_names_who_is_missing(terminal, joinable):
    assert terminal("silo join", "--yes", "--home", joinable).code == 0
    refused(terminal("silo train", "--rounds", 1, "--home", joinable, "--json"), 6, "not-countersigned", "silo-2 (2)", "silo-3 (3)")
    facts = terminal("silo status", "--home", joinable, "--json").document
    assert (facts["joined"], facts["round"], facts["epsilon"]) == (True, 0, 0)


def test_a_round_without_the_silos_is_6_and_names_them(terminal, trial):
    refused(terminal("aggregator round", "--home", trial / "hub", "--json"), 6, "absent", "[1, 2, 3]")


def test_joining_before_the_contract_stands_is_6(terminal, trial, joinable):
    empty = trial / "empty"
    shutil.copytree(trial / "hub", empty, ignore=shutil.ignore_patterns("documents.sqlite*", "evidence", "v1.toml"))
    with sessions.serving(empty) as (_, url):
        text = (joinable / "silo.toml").read_text()
        address = next(line for line in text.splitlines() if line.startswith("url"))
        (joinable / "silo.toml").write_text(text.replace(address, f'url = "{url}"'))
        refused(terminal("silo join", "--yes", "--home", joinable, "--json"), 6, "no-contract")


# --- The machine: 7 --------------------------------------------------------------------------------------


def test_an_unreachable_aggregator_is_7(terminal, trial, monkeypatch):
    original = HttpTransport.__init__
    monkeypatch.setattr(HttpTransport, "__init__", lambda self, url, **given: original(self, url, **{**given, "patience_s": 0.2}))
    refused(terminal("silo join", "--yes", "--home", trial / "silo-1", "--json"), 7, "unreachable", "http://127.0.0.1:1")


def test_a_port_in_use_is_7(terminal, trial):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused(terminal("aggregator serve", "--port", port, "--home", trial / "hub", "--json"), 7, "port-in-use", str(port))
    assert not (trial / "hub" / "service.json").exists()


def test_a_home_in_use_is_7(terminal, joinable):
    from silo.home import Home

    with Home(joinable).locked():
        refused(terminal("silo join", "--yes", "--home", joinable, "--json"), 7, "busy")


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = ["silo", *sys.argv[2:]]
from cli.silo import main
main()
"""


def on_a_full_disk(room: int, *words: object) -> subprocess.CompletedProcess:
    """`silo` in a process whose files may not grow beyond ``room`` bytes."""
    command = [sys.executable, "-c", LIMITED, str(room), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=sessions.ENVIRONMENT, timeout=100, check=False)


def test_a_full_disk_in_init_leaves_nothing_half_made_and_the_next_run_completes_it(terminal, tmp_path):
    words = ["--name", "north", "--organisation", "North", "--aggregator", "http://127.0.0.1:1", "--records", tmp_path / "r.jsonl",
             "--home", tmp_path / "north", "--json"]  # fmt: skip
    for room in (0, 20, 100, 300, 700):
        done = on_a_full_disk(room, "init", *words)
        assert done.returncode == 7, (room, done.stdout, done.stderr)
        assert json.loads(done.stdout)["error"]["code"] == "cannot-write"
        assert not [p for p in (tmp_path / "north").rglob(".*.*") if p.is_file()], "no half-written file"
    assert terminal("silo init", *words).document["name"] == "north"
    assert terminal("silo status", "--home", tmp_path / "north", "--json").document["joined"] is False


def test_a_full_disk_at_the_ledger_leaves_it_whole_and_the_next_run_works(terminal, joinable):
    path, identity = joinable / "ledger.jsonl", keys.load(joinable / "identity.key")
    verify = functools.partial(keys.verify_signature, identity.public.sign_key)
    with ledger.Ledger.open(path, sign=identity.sign, verify=verify, clock=lambda: 0.0) as book:
        for number in range(30):  # longer than anything else that a join writes, so that only its own next line finds no room
            book.void(contract="00", round_number=number, reason="x" * 400)
    whole = path.read_bytes()
    done = on_a_full_disk(len(whole) + 40, "join", "--yes", "--home", joinable, "--json")
    assert done.returncode == 7, done.stdout + done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "cannot-write"
    assert "ledger.jsonl" in error["message"]
    assert path.read_bytes() == whole
    assert terminal("silo join", "--yes", "--home", joinable, "--json").document["member"] == 1
    assert path.read_bytes().startswith(whole)
    history = ledger.History.read(path, verify=verify)
    assert [body.kind for body in history.entries if body.kind != "void"] == ["open", "plan"]


# --- Init, and secrets -----------------------------------------------------------------------------------


def test_init_never_overwrites(terminal, trial):
    root = trial / "silo-1"
    before = contents(root)
    words = ["--name", "other", "--organisation", "O", "--aggregator", "http://127.0.0.1:1", "--records", "r"]
    session = terminal("silo init", *words, "--home", root, "--json")
    assert session.code in (3, 4)
    assert session.error["hint"]
    refused(terminal("aggregator init", "--name", "t", "--organisation", "T", "--labels", "a,b", "--units", 9, "--rounds", 1,
                     "--model", _model_of(root), "--home", trial / "hub", "--json"), 3, "home-exists")  # fmt: skip
    assert contents(root) == before


def test_a_whole_evening_of_commands_says_no_secret(terminal, joinable, trial, tmp_path, monkeypatch):
    seeds = sessions.private_seeds(trial)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for suffix in ((), ("--json",)):
        for words in ("status", "join --yes", "budget --forecast 2", "status", "train", "train --rounds 1"):
            terminal(f"silo {words}", "--home", joinable, *suffix)
        for words in ("status", "sign", "budget", "round"):
            terminal(f"aggregator {words}", "--home", trial / "hub", *suffix)
    monkeypatch.setattr(reading, "status", lambda home: (_ for _ in ()).throw(ZeroDivisionError("a bug")))
    bug = terminal("silo status", "--home", joinable, "--json")
    assert (bug.code, bug.error["code"]) == (1, "bug")
    traceback = Path(bug.error["traceback"])
    assert traceback.stat().st_mode & 0o777 == 0o600
    assert "a bug" in traceback.read_text()
    assert not sessions.mentions("".join(terminal.said).encode() + traceback.read_bytes(), seeds)
    for path in trial.rglob("*"):
        if path.is_file() and path.suffix != ".key":
            assert not sessions.mentions(path.read_bytes(), seeds), path


def test_status_before_and_after_joining_is_one_document(terminal, joinable):
    assert terminal("silo status", "--home", joinable, "--json").document["joined"] is False
    joined = terminal("silo join", "--yes", "--home", joinable, "--json").document
    facts = terminal("silo status", "--home", joinable, "--json").document
    assert facts["joined"] is True
    assert facts["contract"] == joined["contract"]
    budget = terminal("silo budget", "--forecast", 3, "--home", joinable, "--json").document
    assert budget["forecast"][-1]["rounds"] == 3
    assert 0 < budget["forecast"][0]["epsilon"] <= budget["forecast"][-1]["epsilon"] <= 8.0


def test_an_error_as_text_goes_to_stderr_with_a_hint(terminal, tmp_path):
    session = terminal("silo status", "--home", tmp_path)
    assert session.code == 3
    assert session.out == ""
    first, blank, hint = session.err.rstrip("\n").split("\n")
    assert first.startswith("error: cannot read")
    assert (blank, hint[:6]) == ("", "hint: ")


def test_patience_ends(trial):
    now = [0.0]
    transport = HttpTransport(
        "http://127.0.0.1:1", patience_s=3.0, clock=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s)
    )
    with pytest.raises(MachineError, match="cannot reach"):
        transport.get("manifest", 1, 0, wait_s=0)
    assert 1.0 < now[0] <= 3.0


def contents(root: Path) -> dict[str, bytes]:
    """Every file under a folder, by relative path."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


def _model_of(root: Path) -> str:
    from silo import config

    return config.load(root / "silo.toml").model.path
