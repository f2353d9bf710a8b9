# SPDX-License-Identifier: Apache-2.0
"""Valid contract bytes for tests, with any value replaceable."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

TEMPLATE: dict[str, dict[str, Any]] = {
    "task": {"kind": "text-classification", "labels": ["no", "yes"], "text_pair": False, "max_length": 32},
    "model": {"name": "tiny", "digest": "00" * 32, "hidden_size": 8, "pooling": "mean"},
    "adapter": {"rank": 2, "modules": ["layer.0.query", "layer.0.value"], "basis": "weights", "scale": 1.0, "head_scale": 1.0},
    "training": {"mode": "joint", "rounds": 10, "optimizer": "adam", "learning_rate": 0.02},
    "privacy": {
        "unit": "record", "units": 200, "sampling_rate": 0.25, "max_grad_norm": 0.5, "noise_multiplier": 2.0, "epsilon": 8.0,
        "delta": 1e-5, "colluders": 1, "lattice_bits": 20,
    },
    "sum": {"protocol": "consent", "ring_bits": 32, "max_void_rounds": 3, "deadline_s": 60},
}  # fmt: skip


def seed(index: int) -> bytes:
    """A fixed Ed25519 seed for test silo ``index``."""
    return bytes([index]) * 32


def public(index: int) -> str:
    return Ed25519PrivateKey.from_private_bytes(seed(index)).public_key().public_bytes_raw().hex()


def contract_bytes(
    silos: int = 3,
    *,
    sign_keys: list[str] | None = None,
    aggregator_key: str | None = None,
    seal_key: str = "00" * 1216,
    ml_dsa_keys: list[str] | None = None,
    aggregator_ml_dsa_key: str = "",
    **changes: Any,
) -> bytes:
    """TOML of a valid contract. ``privacy={"sampling_rate": 0.5}`` changes single values; ``None`` drops a key."""
    keys = sign_keys or [public(i) for i in range(1, silos + 1)]
    tables = {name: {**values, **changes.pop(name, {})} for name, values in TEMPLATE.items()}
    tables |= {name: changes.pop(name) for name in ("basis", "public_basis") if name in changes}
    top = {"format": "siloquy/1", "version": 1, "name": "test-federation", "previous": "", "expires": "2099-12-31", **changes}
    lines = [f"{key} = {_toml(value)}" for key, value in top.items() if value is not None]
    for name, values in tables.items():
        lines += ["", f"[{name}]"] + [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    lines += ["", "[aggregator]", 'name = "hub"', f'sign_key = "{aggregator_key or public(100)}"', f'seal_key = "{seal_key}"']
    lines += [f'ml_dsa_key = "{aggregator_ml_dsa_key}"'] if aggregator_ml_dsa_key else []
    for index, key in enumerate(keys, start=1):
        lines += [
            "",
            "[[member]]",
            f"id = {index}",
            f'name = "silo-{index}"',
            f'organisation = "Hospital {index}"',
            f"sign_key = {_toml(key)}",
            *([f'ml_dsa_key = "{ml_dsa_keys[index - 1]}"'] if ml_dsa_keys else []),
        ]
    return ("\n".join(lines) + "\n").encode()


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)
