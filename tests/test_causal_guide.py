# SPDX-License-Identifier: Apache-2.0
"""docs/guides/causal-lm.md is run: every shell block, in order, in real processes, around a tiny random Llama.

Only two things are put in: a free port and the printed fingerprint.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import causal_models, sessions, test_guides

GUIDE = Path(__file__).parents[1] / "docs/guides/causal-lm.md"

pytestmark = pytest.mark.slow


def test_the_guide_to_causal_language_models_runs_as_it_is_written(tmp_path: Path) -> None:
    port = test_guides.free_port()
    causal_models.folder(tmp_path / "models/llama")
    for place, name in enumerate(("north", "south", "west")):
        (tmp_path / name).mkdir()
        sessions.write_rows(tmp_path / name / "records.jsonl", causal_models.rows(50, start_at=50 * place))
    fingerprint, running, printed = "", [], ""
    try:
        for own_terminals, lines in test_guides.blocks(GUIDE):
            for line in lines:
                words = shlex.split(line.replace("8470", port).replace("$FINGERPRINT", fingerprint))
                words = [str(tmp_path / word) if word == "models/llama" else word for word in words]
                if own_terminals:
                    running.append(sessions.start(*words, cwd=tmp_path))
                    continue
                done = sessions.finish(*words, cwd=tmp_path, timeout_s=900)
                assert done.code == 0, f"{line}\n{done.out}{done.err}"
                printed += done.out
                if words[:2] == ["aggregator", "init"]:
                    fingerprint = re.search(r"fingerprint ([0-9a-f ]{79})", done.out)[1]
        assert all(child.wait(60) == 0 for child in running[1:]), "a silo failed"
        asked = ("silo", "eval", "--json", "--home", "north", "--records", "north/records.jsonl")
        measured = sessions.finish(*asked, cwd=tmp_path, timeout_s=900).document
        report = sessions.finish("aggregator", "report", "--home", "hub", "--json", cwd=tmp_path, timeout_s=900)
    finally:
        for child in running:
            child.terminate()
        for child in running:
            child.wait(20)
    assert "perplexity per response token before" in printed
    assert measured["perplexity_before"] != measured["perplexity_after"]
    assert measured["loss_after"] > 0
    assert report.code == 0, report.out
    draft = (tmp_path / "hub/federation.draft.toml").read_text(encoding="utf-8")
    assert 'kind = "causal-lm"' in draft
    assert "pooling" not in draft
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_bytes())["task_type"] == "CAUSAL_LM"
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert whole.config.vocab_size == 60
