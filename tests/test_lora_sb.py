# SPDX-License-Identifier: Apache-2.0
"""The LoRA-SB layer: the gradient identities of the paper, an unchanged base, exactly R trainable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from privacy.errors import ConfigError
from silo.learning.basis import weights_basis
from silo.learning.lora_sb import LoraSb, attach, find_linear, matrix

M, N, R = 48, 40, 6


def draws(seed: int, *shape: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)


def layer(scale: float, *, orthonormal: bool) -> LoraSb:
    base = nn.Linear(N, M, device="meta").to_empty(device="cpu")
    base.weight.data = torch.from_numpy(draws(1, M, N))
    base.bias.data = torch.from_numpy(draws(2, M))
    factors = (draws(3, M, R).astype(np.float32), draws(4, R, N).astype(np.float32))
    if orthonormal:
        factors = weights_basis(draws(1, M, N), R)
    adapted = LoraSb(base, factors, scale).double()
    adapted.R.data = torch.from_numpy(draws(5, R, R))
    return adapted


def gradients(adapted: LoraSb) -> tuple[torch.Tensor, torch.Tensor]:
    """(g of the full weight, g of R) of one non-linear loss, both by ordinary autograd in float64."""
    x, target = torch.from_numpy(draws(6, 5, 7, N)), torch.from_numpy(draws(7, 5, 7, M))
    (adapted(x).tanh() - target).square().sum().backward()
    full = adapted.merged_weight().requires_grad_()
    (nn.functional.linear(x, full, adapted.base.bias).tanh() - target).square().sum().backward()
    return full.grad, adapted.R.grad


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("orthonormal", [True, False])
def test_core_gradient_is_scale_times_projected_gradient(scale: float, orthonormal: bool) -> None:
    adapted = layer(scale, orthonormal=orthonormal)
    full, core = gradients(adapted)
    expected = scale * adapted.B.T @ full @ adapted.A.T
    assert (core - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


def test_best_core_step_is_the_corrected_gradient_and_none_is_needed_when_orthonormal() -> None:
    skewed = layer(0.37, orthonormal=False)
    full, core = gradients(skewed)
    best = np.linalg.pinv(skewed.B.numpy()) @ full.numpy() @ np.linalg.pinv(skewed.A.numpy()) / 0.37
    b, a = skewed.B, skewed.A
    corrected = torch.linalg.inv(b.T @ b) @ core @ torch.linalg.inv(a @ a.T) / 0.37**2
    assert np.abs(corrected.numpy() - best).max() <= 1e-8 * np.abs(best).max()
    straight = layer(1.0, orthonormal=True)
    full, core = gradients(straight)
    best = np.linalg.pinv(straight.B.numpy()) @ full.numpy() @ np.linalg.pinv(straight.A.numpy())
    assert np.abs(core.numpy() - best).max() <= 2e-5 * np.abs(best).max()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_merged_weight_computes_the_same(dtype: torch.dtype, limit: float) -> None:
    adapted = layer(0.7, orthonormal=True).to(dtype)
    x = torch.from_numpy(draws(8, 3, 4, N)).to(dtype)
    merged = nn.functional.linear(x, adapted.merged_weight().to(dtype), adapted.base.bias)
    assert (adapted(x) - merged).abs().max() <= limit * merged.abs().max()


def as_conv1d(linear: LoraSb) -> LoraSb:
    """The same layer, its base stored the other way round."""
    base = Conv1D(M, N).double()
    base.weight.data, base.bias.data = linear.base.weight.T.clone(), linear.base.bias.clone()
    turned = LoraSb(base, (linear.B.float().numpy(), linear.A.float().numpy()), linear.scale).double()
    turned.R.data = linear.R.clone()
    return turned


def test_a_conv1d_base_computes_the_same_has_the_same_gradient_and_merges_in_its_own_orientation() -> None:
    straight = layer(0.7, orthonormal=True)
    turned = as_conv1d(straight)
    assert torch.equal(matrix(turned.base), matrix(straight.base))
    x = torch.from_numpy(draws(6, 5, 7, N))
    for adapted in (straight, turned):
        adapted(x).tanh().square().sum().backward()
    assert (turned(x) - straight(x)).abs().max() <= 1e-12 * straight(x).abs().max()
    assert (turned.R.grad - straight.R.grad).abs().max() <= 1e-12 * straight.R.grad.abs().max()
    merged = turned.merged_weight()
    assert merged.shape == turned.base.weight.shape == (N, M)
    assert torch.equal(merged, straight.merged_weight().T)
    output = turned(x)
    turned.base.weight.data = merged
    assert (turned.base(x) - output).abs().max() <= 1e-12 * output.abs().max()


def test_a_model_may_look_at_the_type_of_an_adapted_layer() -> None:
    adapted = layer(1.0, orthonormal=True)
    assert adapted.weight is adapted.base.weight
    assert adapted.bias is adapted.base.bias


def test_factors_of_a_conv1d_stored_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs \(40, 2\) and \(2, 48\)"):
        LoraSb(Conv1D(N, M), weights_basis(draws(1, M, N), 2), 1.0)


def test_layers_that_are_linear_by_name_only_are_refused() -> None:
    """The projection inside nn.MultiheadAttention is a subclass that is never called."""
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ConfigError, match="NonDynamicallyQuantizableLinear, not a plain linear layer"):
        find_linear(attention, "out_proj")


def small_model() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 4)))


def bases(model: nn.Module, names: list[str]) -> dict:
    return {name: weights_basis(find_linear(model, name).weight.detach().double().numpy(), 2) for name in names}


def test_attach_leaves_the_function_the_base_bytes_and_the_generators_as_they_were() -> None:
    model = small_model()
    x = torch.ones(2, 3, 8)
    before, output = [p.detach().clone() for p in model.parameters()], model(x)
    generator = torch.get_rng_state()
    adapter = attach(model, ["2.0", "0"], bases(model, ["0", "2.0"]), 1.0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(model(x), output)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))
    for layer_ in adapter:
        layer_.R.data.fill_(0.5)
    assert not torch.equal(model(x), output)
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))


def test_exactly_the_cores_train_in_the_order_of_the_contract() -> None:
    model = small_model()
    adapter = attach(model, ["2.0", "0"], bases(model, ["0", "2.0"]), 1.0)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.R", "2.0.R"]
    assert adapter.names == ("2.0", "0")
    assert adapter.layers[0] is model.get_submodule("2.0")
    assert adapter.dimension == 8
    model(torch.ones(2, 3, 8)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["0.R", "2.0.R"]
    assert not any(name.endswith((".A", ".B")) for name in model.state_dict())


@pytest.mark.parametrize(("name", "reason"), [("2.1", "not in the model"), ("1", "a LayerNorm")])
def test_wrong_module_is_refused_with_near_names(name: str, reason: str) -> None:
    model = small_model()
    with pytest.raises(ConfigError, match=reason) as caught:
        attach(model, [name], {}, 1.0)
    assert "2.0" in caught.value.hint


def test_module_without_basis_or_named_twice_is_refused() -> None:
    model = small_model()
    with pytest.raises(ConfigError, match="1 have a basis"):
        attach(model, ["0", "2.0"], bases(model, ["0"]), 1.0)
    with pytest.raises(ConfigError, match="1 differ"):
        attach(model, ["0", "0"], bases(model, ["0"]), 1.0)


def test_attaching_twice_is_refused() -> None:
    model = small_model()
    factors = bases(model, ["0"])
    attach(model, ["0"], factors, 1.0)
    with pytest.raises(ConfigError, match="LoraSb"):
        attach(model, ["0"], factors, 1.0)


def test_factors_of_another_layer_are_refused_with_shapes() -> None:
    with pytest.raises(ConfigError, match=r"\(5, 2\)"):
        LoraSb(nn.Linear(8, 4), weights_basis(draws(0, 5, 8), 2), 1.0)


def test_mean_of_cores_is_the_mean_of_updates() -> None:
    """Fed-SB's exactness: B(Σ p R)A = Σ p B R A for 24 silos of unequal weight."""
    b, a = weights_basis(draws(1, M, N), R)
    cores, weights = draws(9, 24, R, R), np.arange(1.0, 25.0) / 300
    together = b.astype(np.float64) @ np.einsum("s,sij->ij", weights, cores) @ a
    apart = sum(p * (b.astype(np.float64) @ core @ a) for p, core in zip(weights, cores, strict=True))
    assert np.abs(together - apart).max() <= 1e-13 * np.abs(apart).max()
