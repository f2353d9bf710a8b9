# SPDX-License-Identifier: Apache-2.0
"""An exported causal language model in the hands of plain transformers and peft: an adapter, and a whole model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from privacy import base_model, federation, update_rule
from privacy.dp.accounting import Certificate
from privacy.errors import ConfigError
from silo.config import Compute
from silo.learning import evaluation, export
from silo.learning.card import Origin
from silo.learning.gradients import as_batch
from tests import causal_models, tiny_models
from tests.terms import contract_bytes
from tests.test_architectures import ALL_LINEAR

SPENT = Certificate(epsilon=1.25, epsilon_pld=1.25, epsilon_rdp=1.5, delta=1e-5, discretization=1e-4, orders_checked=1)
EXACT = Compute(device="cpu", precision="float32")
KINDS = ("llama", "gpt2", "gemma2")


def made(kind: str, root: Path, **task: Any) -> tuple[evaluation.Bench, Origin]:
    """A model of this kind at a state that is not zero, and where it comes from."""
    folder = root / "model"
    causal_models.base(kind, ALL_LINEAR[kind][0]).save_pretrained(folder)
    causal_models.tokenizer().save_pretrained(folder)
    described = base_model.describe(folder)
    raw = contract_bytes(
        **causal_models.changes(
            task=task,
            model={"name": str(folder), "digest": base_model.digest(folder), "hidden_size": described.hidden_size},
            adapter={"modules": list(base_model.match_modules(described, ["all-linear"])), "scale": 2.0},
        )
    )
    accepted = federation.parse(raw)
    state = update_rule.initial(accepted.terms)
    state.theta[:] = tiny_models.state(len(state.theta), scale=0.2)
    origin = Origin(accepted=accepted, silo="north", round=3, state=state, spent=SPENT, base=str(folder))
    return evaluation.open_bench(accepted.terms, compute=EXACT), origin


def written(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


def ours(bench: evaluation.Bench, ids: list[int]) -> torch.Tensor:
    unit = causal_models.EncodedUnit(id="x", rows=((tuple(ids), None, 0),))
    with torch.no_grad():
        return bench.model(as_batch([unit], len(ids), 1))


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_loads_the_adapter_and_gives_our_logits(kind: str, tmp_path: Path) -> None:
    bench, origin = made(kind, tmp_path)
    folder = written(tmp_path / "adapter", export.adapter(bench, origin))
    base = AutoModelForCausalLM.from_pretrained(bench.folder, dtype=torch.float32).eval()
    ids = [5, 9, 4, 30, 31, 7]
    with torch.no_grad():
        bare = base(torch.tensor([ids])).logits
        found = PeftModel.from_pretrained(base, folder).eval()(torch.tensor([ids])).logits
    assert close(found, ours(bench, ids))
    assert not close(found, bare), "the adapter changes something"
    stated = json.loads((folder / "adapter_config.json").read_bytes())
    assert stated["task_type"] == "CAUSAL_LM"
    assert "modules_to_save" not in stated


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_loads_the_merged_model_and_gives_our_logits(kind: str, tmp_path: Path) -> None:
    bench, origin = made(kind, tmp_path)
    folder = written(tmp_path / "merged", export.merged(bench, origin))
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [5, 9, 4, 30, 31, 7]
    with torch.no_grad():
        assert close(found(torch.tensor([ids])).logits, ours(bench, ids))
    assert AutoTokenizer.from_pretrained(folder)("w1 w2")["input_ids"] == causal_models.tokenizer()("w1 w2")["input_ids"]
    assert not base_model.describe(folder).unplaced


@pytest.mark.parametrize(("form", "merged"), [("prompt-response", False), ("messages", False), ("text", True)])
def test_the_cards_own_code_completes_a_prompt(form: str, merged: bool, tmp_path: Path, monkeypatch, capsys) -> None:
    bench, origin = made("llama", tmp_path, format=form)
    folder = written(tmp_path / "out", (export.merged if merged else export.adapter)(bench, origin))
    page = (folder / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert "siloquy" not in code.lower()
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    capsys.readouterr()
    assert names["complete"]("w1 w2", most=5) == names["complete"]("w1 w2", most=5)
    assert f"- records: {form};" in page
    assert "head" not in page


def test_a_classifier_is_not_merged(tmp_path: Path, tiny_bert: Path) -> None:
    described = base_model.describe(tiny_bert)
    model = {"name": str(tiny_bert), "digest": base_model.digest(tiny_bert), "hidden_size": described.hidden_size}
    modules = list(base_model.match_modules(described, ["query"]))
    accepted = federation.parse(contract_bytes(model=model, adapter={"modules": modules}))
    origin = Origin(
        accepted=accepted, silo="north", round=0, state=update_rule.initial(accepted.terms), spent=SPENT, base=str(tiny_bert)
    )
    with pytest.raises(ConfigError, match="this is for causal language models"):
        export.merged(evaluation.open_bench(accepted.terms, compute=EXACT), origin)
