# SPDX-License-Identifier: Apache-2.0
"""The digest of a base model, hostile weight files, and the names of its modules."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from privacy import base_model
from privacy.base_model import Description, describe, digest, locate, match_modules
from privacy.errors import ConfigError

CONFIG = {"hidden_size": 4, "model_type": "bert"}
TENSORS = {
    "embeddings.word_embeddings.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "encoder.layer.2.query.weight": np.ones((4, 4), np.float32),
    "encoder.layer.10.query.weight": np.zeros((4, 4), np.float32),
    "encoder.layer.2.output.dense.weight": np.ones((4, 8), np.float16),
    "encoder.layer.2.LayerNorm.weight": np.ones(4, np.float32),
    "pooler.dense.weight": np.ones((4, 4), np.float32),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model(tmp_path / "model")


def model(path: Path, tensors: dict[str, np.ndarray] = TENSORS, metadata: dict[str, str] | None = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text("{}")
    save_file(tensors, path / "model.safetensors", metadata=metadata)
    return path


def sharded(path: Path, tensors: dict[str, np.ndarray] = TENSORS) -> Path:
    model(path, tensors)
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, path / file)
    where = {name: file for file, part in parts.items() for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


def raw(path: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    """A folder whose weights are these very bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "model.safetensors").write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_equal_tensors_have_one_digest_however_they_are_cut_and_ordered(folder: Path, tmp_path: Path) -> None:
    assert digest(sharded(tmp_path / "sharded")) == digest(folder)
    assert digest(model(tmp_path / "labelled", metadata={"format": "pt"})) == digest(folder)


def test_any_bit_of_the_tensors_changes_the_digest(folder: Path) -> None:
    before, path = digest(folder), folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    for place in (len(data) - 1, len(data) - 200):
        data[place] ^= 1
        path.write_bytes(data)
        assert digest(folder) != before
        data[place] ^= 1
    path.write_bytes(data)
    assert digest(folder) == before


@pytest.mark.parametrize("change", ["name", "dtype", "shape"])
def test_the_same_bytes_under_another_name_type_or_shape_change_the_digest(folder: Path, tmp_path: Path, change: str) -> None:
    tensors = dict(TENSORS)
    query = tensors.pop("encoder.layer.10.query.weight")
    name = "encoder.layer.11.query.weight" if change == "name" else "encoder.layer.10.query.weight"
    tensors[name] = {"name": query, "dtype": query.view(np.int32), "shape": query.reshape(2, 8)}[change]
    assert digest(model(tmp_path / "other", tensors)) != digest(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "vocab.txt", "special_tokens_map.json"])
def test_configuration_and_tokenizer_enter_the_digest(folder: Path, file: str) -> None:
    before = digest(folder)
    (folder / file).write_text('{"hidden_size": 5}')
    assert digest(folder) != before


def test_other_files_do_not_enter_the_digest(folder: Path) -> None:
    before = digest(folder)
    (folder / "README.md").write_text("hello")
    assert digest(folder) == before


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "x.pth", "x.ckpt", "x.pkl"])
def test_pickled_weights_are_refused_even_beside_safetensors(folder: Path, file: str) -> None:
    (folder / file).write_bytes(b"")
    with pytest.raises(ConfigError, match="pickled weights"):
        digest(folder)


def test_an_adapter_that_transformers_would_load_along_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapter_config"):
        digest(folder)


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
        ({"a": entry(0, 4, [1])}, bytes(5)),
        ({"a": entry(0, 8, [2])}, bytes(4)),
        ({"a": entry(0, 8, [3])}, bytes(8)),
        ({"a": entry(8, 4, [-1])}, bytes(8)),
        ({"a": entry(0, 4, [True])}, bytes(4)),
        ({"a": entry(0, 4, [1], "F31")}, bytes(4)),
        ({"a": {**entry(0, 4, [1]), "extra": 1}}, bytes(4)),
        ({"a": entry(0, 0, [0, 2**64])}, b""),
        ({"a": [1, 2]}, b""),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        (b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        (b"[" * 100_000, b""),
        (b"[1]", b""),
        (b"\xff\xff", b""),
        (b"{" + b"1" * 5000, b""),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: object, body: bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        digest(raw(tmp_path / "m", header, body))
    assert caught.value.hint


@pytest.mark.parametrize("length", [0, 1, 3, 2**40, 2**64 - 1])
def test_a_header_longer_than_the_file_or_the_cap_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(ConfigError, match="header"):
        digest(raw(tmp_path / "m", b"{}", length=length))


@pytest.mark.parametrize("data", [b"", b"\x02", bytes(8)])
def test_a_file_too_short_for_a_header_is_refused(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ConfigError):
        digest(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 700), value=st.integers(0, 255))
def test_a_changed_byte_gives_another_digest_or_a_named_refusal(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    folder = model(tmp_path_factory.mktemp("bits") / "model")
    path, before = folder / "model.safetensors", digest(folder)
    data = bytearray(path.read_bytes())
    same = data[place] == value
    data[place] = value
    path.write_bytes(data)
    try:
        after = digest(folder)
    except ConfigError as error:
        after = error.message
    assert same or after != before or _is_layout(path)


def _is_layout(path: Path) -> bool:
    """Spaces in the header, or another spelling of a character, are not part of the model."""
    from safetensors.numpy import load_file

    return all(np.array_equal(value, TENSORS[name]) for name, value in load_file(path).items())


def test_an_index_must_name_the_files_that_hold_the_tensors(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    name = next(iter(good))
    moved = {**good, name: "model-00002-of-00002.safetensors"}
    without = {key: file for key, file in good.items() if key != name}
    for where in (moved, without, {**good, "ghost.weight": good[name]}, {**good, name: "../model.safetensors"}, {}, {name: 1}):
        index.write_text(json.dumps({"weight_map": where}))
        with pytest.raises(ConfigError):
            digest(folder)


def test_a_folder_without_configuration_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        digest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="neither"):
        digest(tmp_path)


def test_the_description_lists_linear_weights_in_natural_order(folder: Path) -> None:
    found = describe(folder)
    assert (found.hidden_size, found.model_type) == (4, "bert")
    assert list(found.linear.items()) == [
        ("encoder.layer.2.output.dense", (4, 8)), ("encoder.layer.2.query", (4, 4)), ("encoder.layer.10.query", (4, 4)),
    ]  # fmt: skip


def test_a_checkpoint_with_a_task_head_gives_the_base_models_names(folder: Path, tmp_path: Path) -> None:
    tensors = {f"bert.{name}": value for name, value in TENSORS.items()} | {"classifier.weight": np.ones((2, 4), np.float32)}
    assert describe(model(tmp_path / "task", tensors)).linear == describe(folder).linear


def test_a_part_named_like_a_wrapper_is_not_stripped(tmp_path: Path) -> None:
    tensors = {"embeddings.word_embeddings.weight": np.ones((3, 4)), "transformer.layer.0.q_lin.weight": np.ones((4, 4))}
    assert list(describe(model(tmp_path / "d", tensors)).linear) == ["transformer.layer.0.q_lin"]


@pytest.mark.parametrize("config", [{}, {"hidden_size": "4"}, {"hidden_size": 0}, {"hidden_size": None}])
def test_a_configuration_without_hidden_size_is_refused(folder: Path, config: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="hidden_size"):
        describe(folder)


@pytest.mark.parametrize("which", ["minilm", "stories260K-hf", "babyllama105-hf"])
def test_module_names_and_sizes_are_those_of_automodel(which: str, minilm: Path, request: pytest.FixtureRequest) -> None:
    import torch
    from transformers import AutoConfig, AutoModel

    folder = minilm if which == "minilm" else request.getfixturevalue("shared") / "models" / which
    with torch.device("meta"):
        real = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    linear = {
        name: (module.out_features, module.in_features)
        for name, module in real.named_modules() if isinstance(module, torch.nn.Linear) and "pooler" not in name
    }  # fmt: skip
    found = describe(folder)
    assert dict(found.linear) == linear
    assert found.hidden_size == real.config.hidden_size


def test_modules_match_by_their_last_components(folder: Path) -> None:
    found = describe(folder)
    assert match_modules(found, ["query"]) == ("encoder.layer.2.query", "encoder.layer.10.query")
    assert match_modules(found, ["output.dense", "dense"]) == ("encoder.layer.2.output.dense",)
    assert match_modules(found, []) == ()


def test_all_linear_is_every_module_in_natural_order(folder: Path) -> None:
    found = describe(folder)
    assert match_modules(found, ["all-linear"]) == match_modules(found, ["query", "all-linear"]) == tuple(found.linear)
    assert match_modules(found, ["all-linear"]) == match_modules(found, ["query", "dense"])


def test_all_linear_of_minilm_is_all_of_its_layers(minilm: Path) -> None:
    found = describe(minilm)
    names = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
    assert match_modules(found, ["all-linear"]) == match_modules(found, names)
    assert len(match_modules(found, ["all-linear"])) == 36


def test_value_output_is_the_value_and_output_projections_of_attention(minilm: Path) -> None:
    found = match_modules(describe(minilm), ["value-output"])
    assert found == match_modules(describe(minilm), ["attention.self.value", "attention.output.dense"])
    assert len(found) == 12
    with_query = match_modules(describe(minilm), ["value-output", "attention.self.query"])
    assert set(with_query) == {*found, *match_modules(describe(minilm), ["query"])}


def test_value_output_is_refused_where_the_architecture_has_no_such_layers(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no value and output projections of their own") as caught:
        match_modules(describe(folder), ["value-output"])
    assert "all-linear" in caught.value.hint
    assert "dense, query" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "shape"),
    [("layer.0.rel_attn.q", (4, 2, 2)), ("encoder.experts.gate_up_proj", (2, 4, 8)), ("layer.0.experts.1.w1.weight", (4, 4)),
     ("layer.0.self_attn.in_proj_weight", (12, 4)), ("layer.0.query.weight", (4, 4, 1, 2))],
)  # fmt: skip
def test_all_linear_is_refused_where_it_would_leave_a_matrix_out(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    found = describe(model(tmp_path / "m", {**TENSORS, name: np.ones(shape, np.float32)}))
    assert found.unplaced == (name,)
    with pytest.raises(ConfigError, match=f"leave out 1 matrices of this bert .* the first is {name}") as caught:
        match_modules(found, ["all-linear"])
    assert "dense, query" in caught.value.hint
    assert match_modules(found, ["query"]) == ("encoder.layer.2.query", "encoder.layer.10.query")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("h.0.attn.bias", (1, 1, 8, 8)), ("mixer.conv1d.weight", (8, 1, 4)), ("mixer.A_log", (8, 4)), ("mix.time_key", (1, 1, 4))],
)
def test_what_is_no_linear_map_does_not_stand_in_the_way_of_all_linear(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    found = describe(model(tmp_path / "m", {**TENSORS, name: np.ones(shape, np.float32)}))
    assert match_modules(found, ["all-linear"]) == tuple(describe(model(tmp_path / "without")).linear)


@pytest.mark.parametrize(("model_type", "size"), [("gpt2", (4, 12)), ("openai-gpt", (4, 12)), ("gpt_bigcode", (12, 4))])
def test_layers_stored_the_other_way_round_are_known_by_their_architecture(
    tmp_path: Path, model_type: str, size: tuple[int, int]
) -> None:
    folder = model(tmp_path / "m", {"wte.weight": np.ones((3, 4)), "h.0.attn.c_attn.weight": np.ones((12, 4))})
    (folder / "config.json").write_text(json.dumps({"n_embd": 4, "model_type": model_type}))
    assert describe(folder).linear == {"h.0.attn.c_attn": size}


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"is_encoder_decoder": True}, "encoder-decoder"), ({"quantization_config": {"quant_method": "gptq"}}, "quantised")],
)
def test_models_that_cannot_be_adapted_are_refused_by_their_configuration(
    folder: Path, change: dict[str, object], reason: str
) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(ConfigError, match=reason):
        describe(folder)


@pytest.mark.parametrize("target", ["uery", "", "layer", "pooler.dense", "nope", ".query"])
def test_a_target_that_matches_nothing_is_refused_with_what_would(folder: Path, target: str) -> None:
    with pytest.raises(ConfigError) as caught:
        match_modules(describe(folder), ["query", target])
    assert "dense, query" in caught.value.hint


def test_a_model_without_linear_modules_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no linear module"):
        match_modules(Description(hidden_size=4, model_type="", linear={}), ["query"])


def test_locate_finds_folders_and_the_packaged_model(folder: Path, minilm: Path) -> None:
    assert locate(str(folder)) == folder.resolve()
    assert locate("minilm") == minilm


def test_locating_the_packaged_model_does_not_import_it(minilm: Path) -> None:
    code = (
        "import sys; from privacy import base_model as b; b.locate('minilm')\n"
        "print([name for name in sys.modules if name.startswith(('gt_', 'torch'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["/no/such/folder", "./gone", "", "a/b/c", "../x", "~/x", "owner/"])
def test_a_path_that_is_no_folder_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match="no model folder"):
        locate(name)


def test_a_hub_name_is_found_in_the_cache_and_missed_by_name_when_offline(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "home" / "hub" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    code = (
        "from privacy import base_model as b; from privacy.errors import MachineError\n"
        "print(b.digest(b.locate('owner/tiny')))\n"
        "try: b.locate('owner/other')\n"
        "except MachineError as error: print(error.exit_code, bool(error.hint))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [digest(folder), "7", "True"]


def test_the_packaged_models_digest_is_the_one_every_party_computes(minilm: Path) -> None:
    assert digest(minilm) == "6f8bfcd1f68c16857425d58cb553555f6ad0f383b6effda5e5e1586aafa3c556"
    assert base_model.MINILM == "minilm"
