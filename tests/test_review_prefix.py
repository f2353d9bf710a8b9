# SPDX-License-Identifier: Apache-2.0
"""What a review of the kept prefix found: who may share a record, what its start-up test sees, and what a disk may do to it."""

from __future__ import annotations

import errno
import os

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from silo.learning import prefix as kept_prefix
from silo.learning.classifier import assemble
from silo.learning.gradients import as_batch
from silo.learning.prefix import Prefix
from silo.learning.tokens import EncodedUnit
from silo.learning.training import Contribution
from tests import tiny_models

UPPER = [name for name in tiny_models.MODULES["bert"] if ".1." in name]
ROOM = 2**24
UNITS = [tiny_models.unit(seed, [1 + seed % 7, 30 - seed][: 1 + seed % 2]) for seed in range(9)]


def model(change=None):
    encoder = tiny_models.encoder("bert")
    if change is not None:
        change(encoder)
    return assemble(encoder, tiny_models.terms(UPPER), precision="float32")


def contribution(made, room=ROOM, folder=None, most=2):
    terms = tiny_models.terms(UPPER)
    terms = msgspec.structs.replace(terms, privacy=msgspec.structs.replace(terms.privacy, max_records_per_unit=most))
    return Contribution(terms, made, (), rows_tokens=160, prefix_bytes=room, prefix_folder=folder)


def moved(contribution):
    contribution.model.write(tiny_models.state(contribution.model.dimension))
    return contribution


class Slotted(nn.Module):
    """A layer that gives a row other bits in another slot, as some kernels do, and looks at no other row."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, *args, **kwargs):
        slots = torch.arange(len(hidden), dtype=hidden.dtype)[:, None, None]
        return self.layer(hidden * (1 + slots * 2**-12), *args, **kwargs)


def by_slot(encoder):
    encoder.encoder.layer[0].attention = Slotted(encoder.encoder.layer[0].attention)


def test_where_the_slot_matters_no_unit_has_the_bits_of_another_ones_slot():
    first = tiny_models.unit(1, [5])
    second = EncodedUnit(id="second", rows=(*tiny_models.unit(2, [5]).rows, *first.rows))
    plain, kept = moved(contribution(model(by_slot), room=0)), moved(contribution(model(by_slot)))
    assert not plain._together
    kept.sum([first])
    assert np.array_equal(kept.sum([second]), plain.sum([second]))


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, hidden):
        ctx.save_for_backward(hidden)
        return out.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + ctx.saved_tensors[0].square().mean(dim=(1, 2), keepdim=True)), None


class Crooked(nn.Module):
    """A layer that looks at padding in its backward pass alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, out, hidden):
        return self.layer(_Turned.apply(out, hidden), hidden)


def test_a_layer_whose_backward_pass_looks_at_padding_is_found_out():
    def crooked(encoder):
        encoder.encoder.layer[1].attention.output = Crooked(encoder.encoder.layer[1].attention.output)

    plain, kept = moved(contribution(model(crooked), room=0)), moved(contribution(model(crooked)))
    assert np.array_equal(kept.sum(UNITS), plain.sum(UNITS))


def test_another_contribution_of_the_model_starts_from_nothing():
    made = model()
    contribution(made)
    assert made.frozen.is_kept
    contribution(made, room=0)
    assert not made.frozen.is_kept


def test_a_folder_that_takes_no_file_ends_keeping_and_not_the_start(tmp_path):
    plain, kept = contribution(model(), room=0), contribution(model(), folder=tmp_path / "gone")
    assert not kept.model.frozen.is_kept
    assert np.array_equal(kept.sum(UNITS), plain.sum(UNITS))


def test_a_full_disk_gets_back_what_was_kept(tmp_path):
    kept = contribution(model(), folder=tmp_path)
    kept.sum(UNITS[:2])
    number = kept.model.frozen._file
    assert os.fstat(number).st_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", _full)
        kept.sum(UNITS)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)


def _full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_that_cannot_be_read_is_computed_again():
    plain, kept = contribution(model(), room=0), contribution(model())
    kept.sum(UNITS)
    unreadable = os.open("/dev/null", os.O_WRONLY)
    os.dup2(unreadable, kept.model.frozen._file)
    os.close(unreadable)
    assert np.array_equal(kept.sum(UNITS), plain.sum(UNITS))


class Named(nn.Module):
    def forward(self, hidden_states):
        return hidden_states + 1


def test_layers_that_are_called_by_name_go_on():
    stack = nn.ModuleList([Named(), Named()])
    prefix = Prefix(stack, 1)
    assert torch.equal(stack[0](hidden_states=torch.zeros(2)), torch.ones(2))
    assert not prefix.is_kept


def test_nothing_is_written_while_passes_are_plain():
    made = model()
    contribution(made)
    batch, size = as_batch(UNITS[:1], 32, 5), made.frozen.size
    with made.frozen.aside():
        made.keep_frozen(batch)
    assert made.frozen.size == size
    assert kept_prefix.GIB == 2**30
