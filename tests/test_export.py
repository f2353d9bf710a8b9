# SPDX-License-Identifier: Apache-2.0
"""An exported adapter in the hands of plain transformers and peft: the code of its own card, run, gives our logits."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import AutoModel, BertForTokenClassification

from privacy import base_model, envelope, federation, update_rule
from privacy.dp.accounting import Certificate
from privacy.errors import ConfigError, MachineError, TrustError
from privacy.identity import keys
from privacy.messages import Countersignature, encode
from silo import commands, config, membership, reading
from silo.config import Compute
from silo.home import Home
from silo.learning import evaluation, export, gradients
from silo.learning.card import Origin, snippet
from silo.settlement import load_progress
from tests import sessions, tiny_models
from tests.federation import HUB, NoBoard, signed_by_hub
from tests.sessions import Terminal
from tests.terms import contract_bytes, public
from tests.test_architectures import ALL_LINEAR, saved

GUIDE = Path(__file__).parents[1] / "docs/guides/export.md"
SPENT = Certificate(epsilon=1.25, epsilon_pld=1.25, epsilon_rdp=1.5, delta=1e-5, discretization=1e-4, orders_checked=1)
LABELS = ("no", "yes", 'the "third" label\\')
MINILM_MODULES = [f"encoder.layer.{i}.{leaf}" for i in range(6) for leaf in ("attention.self.query", "intermediate.dense")]
TEXTS = (
    "The patient was admitted with fever, a dry cough and shortness of breath; chest X-ray showed bilateral infiltrates.",
    "No.",
    "Überweisung wegen Kopfschmerzen, seit 3 Tagen. " * 8,
    "transfer of $4,500 to an account first seen today",
)
PAIRS = ("He was given oxygen.", "Why would that be so, in view of what was said before?", "¿Y la fiebre?", "flagged")


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model ready for export, and what it is to be compared with."""

    bench: evaluation.Bench
    origin: Origin
    folder: Path

    def write(self) -> Path:
        """The adapter's folder."""
        self.folder.mkdir(parents=True)
        for name, data in export.adapter(self.bench, self.origin).items():
            (self.folder / name).write_bytes(data)
        return self.folder

    def logits(self, texts, pairs=None) -> torch.Tensor:
        """Ours, one text at a time, by the silo's own way from records to logits."""
        rows = [{"text": text, "label": LABELS[0]} for text in texts]
        rows = [row | {"text_pair": pair} for row, pair in zip(rows, pairs, strict=True)] if pairs else rows
        path = sessions.write_rows(self.folder.parent / "records.jsonl", rows)
        length = self.bench.terms.task.max_length
        batches = (next(gradients.pack([unit], lambda _: 1, max_length=length)) for unit in self.bench.units(path))
        with torch.no_grad():
            return torch.cat([self.bench.model(batch) for batch in batches])


def made(root: Path, model: Path, modules: list[str], *, pooling="mean", pair=False, name="", scale=0.3, heads=1) -> Made:
    described = base_model.describe(model)
    accepted = federation.parse(
        contract_bytes(
            task={"labels": list(LABELS), "max_length": 24, "text_pair": pair},
            model={
                "name": name or str(model), "digest": base_model.digest(model), "hidden_size": described.hidden_size,
                "pooling": pooling,
            },
            adapter={"rank": 3, "modules": modules, "scale": 1.7, "head_scale": 0.6, **({"heads": heads} if heads > 1 else {})},
            privacy={"lattice_bits": 14},
        )
    )  # fmt: skip
    bench = evaluation.open_bench(accepted.terms, compute=Compute(device="cpu", precision="float32"))
    theta = tiny_models.state(accepted.terms.dimension, scale=scale)
    state = msgspec.structs.replace(update_rule.initial(accepted.terms), theta=theta, applied=3)
    origin = Origin(accepted=accepted, silo="north", round=4, state=state, spent=SPENT, base=accepted.terms.model.name)
    return Made(bench=bench, origin=origin, folder=root / "adapter")


def code_in(folder: Path) -> str:
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def run_card(folder: Path) -> dict:
    """The card's own code, run as it stands there, in the adapter's folder."""
    found: dict = {}
    with contextlib.chdir(folder):
        exec(compile(code_in(folder), "README.md", "exec"), found)
    return found


def wrapped(model: PeftModel) -> dict[str, LoraLayer]:
    return {
        name.removeprefix("base_model.model."): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize(
    ("kind", "pooling", "pair"),
    [
        ("bert", "mean", False), ("bert", "cls", True), ("bert", "last", True), ("gpt2", "mean", True), ("gpt2", "last", False),
        ("llama", "last", False), ("llama", "mean", True),
    ],
)  # fmt: skip
def test_the_cards_code_gives_our_logits(kind, pooling, pair, tmp_path, capsys):
    one = made(tmp_path, sessions.tiny_model(tmp_path / "model", kind), tiny_models.MODULES[kind], pooling=pooling, pair=pair)
    found = run_card(one.write())
    assert capsys.readouterr().out.rstrip("\n") in LABELS
    texts, pairs = ["fever cough old", "rash", "left right unheard " * 12], ["mild", "acute young old heart", "lung"]
    given = (texts, pairs) if pair else (texts,)
    ours = one.logits(*given)
    assert torch.allclose(found["logits"](*given), ours, rtol=0, atol=1e-5)
    assert ours.std(dim=0).min() > 1e-2, "the texts are told apart, or nothing was compared"
    assert found["model"].config.id2label == dict(enumerate(LABELS))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_exactly_the_contracts_modules_are_adapted_with_factor_one(kind, tmp_path):
    """Two modules of the first layer only: their names without it would fit the second too."""
    modules = tiny_models.MODULES[kind][:2]
    one = made(tmp_path, sessions.tiny_model(tmp_path / "model", kind), modules)
    found = run_card(one.write())
    prefix = export.find_host(one.bench.model, one.bench.terms).encoder
    layers = wrapped(found["model"])
    assert set(layers) == {f"{prefix}.{name}" for name in modules}
    assert all(layer.scaling == {"default": 1.0} for layer in layers.values())
    assert all(layer.fan_in_fan_out is (kind == "gpt2") for layer in layers.values())


def test_the_files_hold_the_model_and_nothing_of_the_training(tmp_path):
    """A, R·B and head, with one line of metadata: no optimiser, no step before noise, no clock."""
    one = made(tmp_path, sessions.tiny_model(tmp_path / "model"), tiny_models.MODULES["bert"])
    folder = one.write()
    assert {path.name for path in folder.iterdir()} == {"README.md", export.WEIGHTS, "adapter_config.json"}
    with safe_open(folder / export.WEIGHTS, framework="np") as weights:
        assert weights.metadata() == {"format": "pt"}
        names = set(weights.keys())
    assert len(names) == 2 * len(tiny_models.MODULES["bert"]) + 2
    assert all(re.search(r"(lora_[AB]|classifier|score)\.(weight|bias)$", name) for name in names), names


def test_an_adapter_without_modules_is_a_head(tmp_path):
    one = made(tmp_path, sessions.tiny_model(tmp_path / "model"), [])
    found = run_card(one.write())
    assert not wrapped(found["model"])
    assert torch.allclose(found["logits"](["fever cough"]), one.logits(["fever cough"]), rtol=0, atol=1e-5)


FITS = set(ALL_LINEAR) - {"modernbert", "openai-gpt", "gptj", "gemma3_text", "mamba", "mamba2"}


@pytest.mark.parametrize("kind", ALL_LINEAR)
def test_every_family_gives_our_logits_or_says_why_not(kind, tmp_path):
    saved(kind, ALL_LINEAR[kind][0], tmp_path / "model")
    modules = base_model.match_modules(base_model.describe(tmp_path / "model"), ["all-linear"])
    one = made(tmp_path, tmp_path / "model", list(modules), scale=0.1)
    if kind not in FITS:
        with pytest.raises(ConfigError, match=rf"a model on {kind} cannot be exported") as caught:
            one.write()
        assert caught.value.code == "no-export"
        assert "silo eval" in caught.value.hint
        return
    host = export.find_host(one.bench.model, one.bench.terms)
    written = json.loads((one.write() / "adapter_config.json").read_bytes())
    # The part of the card's code that needs no tokenizer.
    lines = [line for line in code_in(one.folder).split("\n\n\n")[0].splitlines() if "Tokenizer.from_pretrained" not in line]
    found: dict = {}
    with contextlib.chdir(one.folder):
        exec("\n".join(lines), found)
    assert set(wrapped(found["model"])) == set(written["target_modules"]) == {f"{host.encoder}.{name}" for name in modules}
    batch = next(gradients.pack([tiny_models.unit(n, [5 + n]) for n in range(3)], lambda _: 3, max_length=40))
    mask = batch.attention_mask
    with torch.no_grad():
        tokens = found["model"](input_ids=batch.input_ids, attention_mask=mask).logits
        theirs, ours = (tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True), one.bench.model(batch)
    assert torch.allclose(theirs, ours, rtol=1e-5, atol=1e-5)


def test_before_the_first_round_it_is_the_base_model(tmp_path):
    one = made(tmp_path, sessions.tiny_model(tmp_path / "model"), tiny_models.MODULES["bert"], scale=0.0)
    found = run_card(one.write())
    assert (found["logits"](["fever cough", "rash"]) == 0).all()
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    plain = AutoModel.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        adapted = found["model"].base_model.model.bert(**inputs).last_hidden_state
        assert torch.equal(adapted, plain(**inputs).last_hidden_state)


def test_merged_by_peft_it_is_our_merged_model(tmp_path):
    one = made(tmp_path, sessions.tiny_model(tmp_path / "model", "gpt2"), tiny_models.MODULES["gpt2"])
    merged = run_card(one.write())["model"].merge_and_unload()
    for name, layer in zip(one.bench.model.adapter.names, one.bench.model.adapter, strict=True):
        theirs = merged.transformer.get_submodule(name).weight
        assert torch.allclose(theirs, layer.merged_weight().float(), rtol=0, atol=1e-6)


def test_the_scale_is_folded_in_with_one_rounding(tmp_path):
    one = made(tmp_path, sessions.tiny_model(tmp_path / "model"), tiny_models.MODULES["bert"])
    tensors = safetensors.numpy.load(export.adapter(one.bench, one.origin)[export.WEIGHTS])
    layer = one.bench.model.adapter.layers[0]
    key = f"base_model.model.bert.{one.bench.model.adapter.names[0]}"
    exact = 1.7 * (layer.B.double().numpy() @ layer.R.detach().double().numpy())
    assert np.array_equal(tensors[f"{key}.lora_B.weight"], exact.astype(np.float32))
    assert np.array_equal(tensors[f"{key}.lora_A.weight"], layer.A.numpy())


def test_a_base_model_that_brings_a_head_for_other_labels_is_loaded_all_the_same(tmp_path):
    model = sessions.tiny_model(tmp_path / "model")
    with torch.random.fork_rng(devices=[]):
        whole = BertForTokenClassification.from_pretrained(model, num_labels=5)
    whole.save_pretrained(model)
    one = made(tmp_path, model, tiny_models.MODULES["bert"])
    found = run_card(one.write())
    assert "ignore_mismatched_sizes=True" in code_in(one.folder)
    assert torch.allclose(found["logits"](["fever cough"]), one.logits(["fever cough"]), rtol=0, atol=1e-5)


def test_a_class_that_does_more_than_its_parts_say_is_refused(tmp_path, monkeypatch):
    one = made(tmp_path, sessions.tiny_model(tmp_path / "model"), tiny_models.MODULES["bert"])
    original = BertForTokenClassification.forward

    def tempered(self, **inputs):
        found = original(self, **inputs)
        found.logits = found.logits / 2
        return found

    monkeypatch.setattr(BertForTokenClassification, "forward", tempered)
    with pytest.raises(ConfigError, match="no linear function of the encoder's output"):
        export.adapter(one.bench, one.origin)


def test_a_module_that_the_class_leaves_out_is_refused(tmp_path):
    one = made(tmp_path, sessions.tiny_model(tmp_path / "model"), ["pooler.dense"])
    with pytest.raises(ConfigError, match=r"BertForTokenClassification has no module bert\.pooler\.dense"):
        export.adapter(one.bench, one.origin)


# --- A real encoder, and nothing of ours in the process ----------------------------------------------------


@pytest.fixture(scope="module")
def minilm(tmp_path_factory) -> Made:
    """The packaged MiniLM under its short name, with text pairs."""
    one = made(tmp_path_factory.mktemp("minilm"), base_model.locate("minilm"), MINILM_MODULES, pair=True, name="minilm")
    one.write()
    return one


CHECK = """
import json, sys
assert not {name.split(".")[0] for name in sys.modules} & {"privacy", "silo", "aggregator", "cli", "siloquy"}
texts, pairs = json.loads(sys.argv[1])
print(json.dumps(logits(texts, pairs).tolist()))
"""


def test_minilm_in_a_process_without_siloquy(minilm):
    code = code_in(minilm.folder) + CHECK
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([TEXTS, PAIRS])], cwd=minilm.folder, env=sessions.ENVIRONMENT, text=True,
        capture_output=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    example, theirs = done.stdout.splitlines()
    ours = minilm.logits(TEXTS, PAIRS)
    assert torch.allclose(torch.tensor(json.loads(theirs)), ours, rtol=0, atol=1e-5)
    assert ours.std(dim=0).min() > 1e-2
    assert example in LABELS


def test_the_same_state_gives_the_same_bytes(minilm):
    kept = {path.name: path.read_bytes() for path in minilm.folder.iterdir()}
    again = made(minilm.folder.parent, base_model.locate("minilm"), MINILM_MODULES, pair=True, name="minilm")
    assert export.adapter(again.bench, again.origin) == kept
    other = replace(minilm.origin, state=msgspec.structs.replace(minilm.origin.state, theta=-minilm.origin.state.theta))
    assert export.adapter(minilm.bench, other)[export.WEIGHTS] != kept[export.WEIGHTS]


def test_the_card_says_what_it_is_and_what_it_cost(minilm):
    page, terms = (minilm.folder / "README.md").read_text(encoding="utf-8"), minilm.bench.terms
    for fact in (
        terms.name, minilm.origin.accepted.digest.hex(), "minilm", terms.model.digest, "4 of 10", minilm.origin.state.digest.hex(),
        "no, yes", "pooling: mean", "epsilon: 1.25, against the aggregator together with 1 of the 3 silos", "delta: 1e-05",
        "silo north",
    ):  # fmt: skip
        assert fact in page, fact
    assert page.startswith('---\nbase_model: "minilm"\nlibrary_name: peft\n---\n')
    assert str(minilm.folder.parent) not in page


def test_the_guide_shows_the_cards_own_code():
    terms = federation.parse(contract_bytes(task={"labels": ["no", "yes"], "max_length": 128}, privacy={"lattice_bits": 14})).terms
    shown = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert shown == [snippet(terms, base="sentence-transformers/all-MiniLM-L6-v2", takes_types=True, head_replaced=False)]


# --- The command, in a home --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return sessions.tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def copied(root: Path, to: Path) -> Path:
    """A copy of a silo's home that a test may spend; its settings name files of the copy."""
    shutil.copytree(root, to)
    (to / "silo.toml").write_text((to / "silo.toml").read_text().replace(str(root), str(to)))
    return to


def home_of(root: Path, model: Path, *, expires: str = "2099-12-31") -> Home:
    """A silo that joined, settled three rounds and paid for them."""
    commands.create(
        root, name="north", organisation="North Hospital", url="http://127.0.0.1:1", fingerprint="", records=root / "records.jsonl",
        epsilon=40.0, delta=1e-5, model=str(model),
    )  # fmt: skip
    home, identity = Home(root), keys.load(root / "identity.key")
    settings = config.load(home.config_path)
    accepted = federation.parse(
        contract_bytes(
            expires=expires,
            sign_keys=[identity.public.sign_key.hex(), public(2), public(3)],
            aggregator_key=HUB.public.sign_key.hex(),
            seal_key=HUB.public.seal_key.hex(),
            model={"name": str(model), "digest": base_model.digest(model), "hidden_size": 16},
            adapter={"rank": 3, "modules": tiny_models.MODULES["bert"]},
            privacy={"lattice_bits": 14},
        )
    )
    home.keep_contract(1, signed_by_hub("contract", accepted.digest, accepted.raw))
    agreed = encode(Countersignature(contract=accepted.digest, member=1))
    signature = envelope.sign(identity, type="countersignature", context=accepted.digest, sender=1, body=agreed)
    home.keep_countersignature(1, 1, signature)
    with commands._gate(home, accepted, settings, 0, NoBoard()) as gate:
        gate.declare()
        for number in (1, 2, 3):
            gate.admit(number, bytes([number]) * 32)
    start = load_progress(home, accepted)
    state = msgspec.structs.replace(start.state, theta=tiny_models.state(accepted.terms.dimension), applied=3)
    home.save_progress(msgspec.structs.replace(start, epoch=1, round=3, state=state))
    sessions.write_rows(root / "records.jsonl", sessions.rows(20))
    return home


@pytest.fixture(scope="module")
def north(tiny, tmp_path_factory) -> Home:
    return home_of(tmp_path_factory.mktemp("home") / "north", tiny)


@pytest.fixture
def terminal(capsys):
    return Terminal(capsys)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a reading command opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_command_writes_the_adapter_and_says_what_is_in_it(terminal, north, tmp_path, no_network):
    before, spent = contents(north.root), reading.budget(north.root, 0)
    facts = terminal("silo export", tmp_path / "deep/adapter", "--home", north.root, "--json").document
    folder = Path(facts["path"])
    assert facts["files"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    assert set(facts["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    stated = terminal("silo status", "--home", north.root, "--json").document
    assert (facts["round"], facts["model_digest"]) == (3, stated["model_digest"])
    assert facts["epsilon"] == spent["epsilon"] > 0
    assert contents(north.root) == before, "reading changes nothing and costs nothing"
    (tmp_path / ".again.0123456789ab").mkdir()  # what an export that was killed leaves
    again = terminal("silo export", tmp_path / "again", "--home", north.root, "--json").document
    assert again["files"] == facts["files"]
    assert repr(spent["epsilon"]) in (folder / "README.md").read_text(encoding="utf-8")
    run_card(folder)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_as_text_it_names_the_card_and_the_base_can_be_named_anew(terminal, north, tmp_path):
    (tmp_path / "empty").mkdir()
    session = terminal("silo export", tmp_path / "empty", "--base", "owner/model", "--home", north.root)
    assert session.code == 0
    assert f"next: {tmp_path / 'empty' / 'README.md'} has the code" in session.out
    assert json.loads((tmp_path / "empty/adapter_config.json").read_bytes())["base_model_name_or_path"] == "owner/model"
    assert 'base = "owner/model"\n' in code_in(tmp_path / "empty")


def test_what_is_in_the_way_is_3_and_stays(terminal, north, tmp_path):
    taken, file = tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    for path in (taken / "mine", file):
        path.write_text("mine")
    for target in (taken, file):
        session = terminal("silo export", target, "--home", north.root, "--json")
        assert (session.code, session.error["code"]) == (3, "folder-exists")
    assert [path.read_text() for path in (taken / "mine", file)] == ["mine", "mine"]
    odd = terminal("silo export", tmp_path / "odd", "--base", "two\nlines", "--home", north.root, "--json")
    assert (odd.code, odd.error["code"]) == (3, "base")
    unjoined = terminal("silo export", tmp_path / "odd", "--home", tmp_path / "none", "--json")
    assert (unjoined.code, unjoined.error["code"]) == (3, "no-config")
    assert not (tmp_path / "odd").exists()


def test_a_folder_that_fills_up_meanwhile_is_7_and_stays(north, tmp_path, monkeypatch):
    original = export.adapter

    def slow(bench, origin):
        (tmp_path / "target").mkdir()
        (tmp_path / "target/mine").write_text("mine")
        return original(bench, origin)

    monkeypatch.setattr(export, "adapter", slow)
    with pytest.raises(MachineError, match="cannot write"):
        reading.export(north.root, tmp_path / "target", "")
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "mine"]


def test_after_the_contract_expired_everything_can_be_read_and_nothing_trained(terminal, tiny, tmp_path, no_network):
    home = home_of(tmp_path / "north", tiny, expires="2020-01-31")
    records = home.root / "records.jsonl"
    for command in ("status", "budget", f"eval --records {records}", f"export {tmp_path / 'adapter'}"):
        session = terminal(f"silo {command}", "--home", home.root, "--json")
        assert session.code == 0, session.out
    stated = terminal("silo status", "--home", home.root, "--json").document
    assert (stated["joined"], stated["expires"], stated["round"]) == (True, "2020-01-31", 3)
    for command in ("train --rounds 1", "train --dry-run"):
        session = terminal(f"silo {command}", "--home", home.root, "--json")
        assert (session.code, session.error["code"]) == (4, "expired")
    with pytest.raises(TrustError, match="expired"):
        membership.joined(home, now=datetime.datetime.now(datetime.UTC))


def test_in_local_mode_the_silos_own_state_stays_at_home(north, tiny, tmp_path):
    """What is exported is the federation's state and nothing of the silo's own."""
    home = home_of(tmp_path / "north", tiny)
    wanted = reading.export(home.root, tmp_path / "before", "")["files"]["adapter_model.safetensors"]
    progress = home.progress()
    own = msgspec.structs.replace(progress.state, theta=progress.state.theta + 1.0)
    home.save_progress(msgspec.structs.replace(progress, own=own))
    assert reading.export(home.root, tmp_path / "after", "")["files"]["adapter_model.safetensors"] == wanted
