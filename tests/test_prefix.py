# SPDX-License-Identifier: Apache-2.0
"""What the frozen layers below the adapters gave is kept: no bit changes, the layers are not run again, a full disk is no end."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from privacy.errors import ConfigError
from silo.learning.classifier import assemble
from silo.learning.gradients import pack
from silo.learning.prefix import Prefix
from silo.learning.training import Contribution
from tests import tiny_models

UPPER = {kind: [name for name in names if ".1." in name] for kind, names in tiny_models.MODULES.items()}
ROOM = 2**24


def model(kind="bert", precision="float32"):
    made = assemble(tiny_models.encoder(kind), tiny_models.terms(UPPER[kind]), precision=precision)
    made.write(tiny_models.state(made.dimension))
    return made


def contribution(made, units=(), kind="bert", room=ROOM, rows_tokens=160):
    return Contribution(tiny_models.terms(UPPER[kind]), made, units, rows_tokens=rows_tokens, prefix_bytes=room)


def calls_of(layer: nn.Module) -> list[int]:
    """How often the layer's own attention ran."""
    count = [0]
    next(layer.children()).register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


UNITS = [tiny_models.unit(seed, [1 + seed % 7, 30 - seed][: 1 + seed % 2]) for seed in range(9)]


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_bit_of_any_sum_changes(kind, precision):
    plain = contribution(model(kind, precision), kind=kind, room=0)
    kept = contribution(model(kind, precision), kind=kind)
    assert kept.model.frozen.is_kept
    for units in (UNITS, UNITS[3:], UNITS[::-1], UNITS[4:5], []):
        for _ in range(2):
            assert np.array_equal(kept.sum(units), plain.sum(units))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 11), max_size=12), min_size=1, max_size=4))
def test_whatever_is_sampled_in_whatever_order(samples):
    units = [tiny_models.unit(50 + seed, [1 + 3 * seed]) for seed in range(12)]
    for chosen in samples:
        sample = [units[index] for index in dict.fromkeys(chosen)]
        assert np.array_equal(KEPT.sum(sample), PLAIN.sum(sample))


PLAIN, KEPT = contribution(model(), room=0), contribution(model())


def test_the_layers_below_run_once_for_a_record_and_those_above_at_every_step():
    made = model()
    below, above = (calls_of(made.encoder.encoder.layer[index]) for index in (0, 1))
    kept = contribution(made)
    kept.sum(UNITS)
    before, steps = below[0], above[0]
    for _ in range(3):
        kept.sum(UNITS)
        kept.sum(UNITS[2:6])
    assert below[0] == before
    assert above[0] > steps


def test_another_state_uses_what_is_kept_since_no_adapter_lies_below():
    plain, kept = contribution(model(), room=0), contribution(model())
    kept.sum(UNITS)
    for seed in (1, 2):
        for each in (plain, kept):
            each.model.write(tiny_models.state(each.model.dimension, seed))
        assert np.array_equal(kept.sum(UNITS), plain.sum(UNITS))


def test_adapters_in_the_lowest_layer_leave_nothing_to_keep():
    made = tiny_models.classifier("bert")
    assert made.frozen is None
    whole = Contribution(tiny_models.terms(tiny_models.MODULES["bert"]), made, (), rows_tokens=160, prefix_bytes=ROOM)
    assert np.array_equal(whole.sum(UNITS), whole.sum(UNITS))
    assert Prefix.below(nn.Sequential(nn.Linear(2, 2)), ["0"]) is None
    assert Prefix.below(tiny_models.encoder("bert"), []) is None


@pytest.mark.parametrize("room", [1, 500, 3_000])
def test_a_full_allowance_keeps_what_fits(room):
    plain, kept = contribution(model(), room=0), contribution(model(), room=room)
    for _ in range(2):
        assert np.array_equal(kept.sum(UNITS), plain.sum(UNITS))
    assert not kept.model.frozen.room


def test_a_full_disk_ends_keeping_and_not_the_step():
    full = os.open("/dev/full", os.O_RDWR)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        os.pwrite(full, b"x", 0)
    plain, kept = contribution(model(), room=0), contribution(model())
    kept.sum(UNITS[:2])
    os.dup2(full, kept.model.frozen._file)
    os.close(full)
    assert np.array_equal(kept.sum(UNITS[2:]), plain.sum(UNITS[2:]))
    assert not kept.model.frozen.room


def test_a_file_that_lost_its_content_is_computed_again():
    plain, kept = contribution(model(), room=0), contribution(model())
    kept.sum(UNITS)
    os.ftruncate(kept.model.frozen._file, 100)
    assert np.array_equal(kept.sum(UNITS), plain.sum(UNITS))


def test_the_file_has_no_name_and_its_descriptor_is_closed(tmp_path):
    made = model()
    Contribution(tiny_models.terms(UPPER["bert"]), made, (), rows_tokens=160, prefix_bytes=ROOM, prefix_folder=tmp_path).sum(UNITS)
    number = made.frozen._file
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(number).st_nlink == 0
    assert os.fstat(number).st_size > 0
    made.frozen.drop()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)


class Leaky(nn.Module):
    """A layer that adds the mean over all positions, padding too: what lies at padding then counts."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, *args, **kwargs):
        return self.layer(hidden + hidden.mean(dim=1, keepdim=True), *args, **kwargs)


def test_an_encoder_that_looks_at_padding_is_found_out_and_nothing_is_kept():
    encoders = [tiny_models.encoder("bert") for _ in range(2)]
    for encoder in encoders:
        inner = encoder.encoder.layer[1].attention
        encoder.encoder.layer[1].attention = Leaky(inner)
    terms = tiny_models.terms([name.replace("attention.self", "attention.layer.self") for name in UPPER["bert"]])
    plain, kept = (
        Contribution(terms, assemble(encoder, terms), (), rows_tokens=160, prefix_bytes=room)
        for encoder, room in zip(encoders, (0, ROOM), strict=True)
    )
    assert kept.model.frozen is not None
    assert not kept.model.frozen.is_kept
    assert np.array_equal(kept.sum(UNITS), plain.sum(UNITS))


class Pair(nn.Module):
    """A layer that gives a tuple, as many gave before transformers 5."""

    def forward(self, hidden):
        return hidden + 1, None


def test_a_layer_that_gives_more_than_a_tensor_is_left_alone():
    stack, hidden = nn.ModuleList([Pair(), Pair()]), torch.ones(160 // 8, 8, 4)
    prefix = Prefix(stack, 1)
    prefix.keep(None, ROOM)
    batch = next(pack(UNITS[:1], lambda length: 160 // length, max_length=tiny_models.MAX_LENGTH))
    assert torch.equal(prefix.run(lambda: stack[1](stack[0](hidden)[0])[0], batch), hidden + 2)
    assert not prefix.is_kept


def test_on_other_units_and_noise_the_same_model_serves():
    begun = contribution(model())
    terms = tiny_models.terms(UPPER["bert"])
    other = begun.on(terms, UNITS)
    assert other.unit_ids == tuple(unit.id for unit in UNITS)
    assert begun.unit_ids == ()
    assert np.array_equal(other.sum(UNITS), begun.sum(UNITS))
    with pytest.raises(ConfigError, match="another task, model or adapter"):
        begun.on(tiny_models.terms(tiny_models.MODULES["bert"]), UNITS)


def test_rows_are_kept_with_the_very_bits_and_zero_at_padding():
    made = model()
    kept = contribution(made)
    seen = {}
    layer = made.encoder.encoder.layer[1]
    layer.register_forward_pre_hook(lambda _, args: seen.setdefault("in", args[0].detach().clone()))
    batch = next(iter(kept._batches(UNITS[:3])))
    with made.frozen.aside(), torch.no_grad():
        made.features(batch)
    plain = seen.pop("in")
    with torch.no_grad():
        made.features(batch)
    real = batch.attention_mask.bool()
    assert torch.equal(seen["in"][real].view(torch.int32), plain[real].view(torch.int32))
    assert not seen["in"][~real].any()
