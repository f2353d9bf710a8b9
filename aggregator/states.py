# SPDX-License-Identifier: Apache-2.0
"""The cache of model states: ``state/<round>.safetensors``, the arrays of privacy.update_rule.State.

A cache only: nothing here is believed without the digest that the round's outcome names, and every state can be computed
again from the outcomes. The current state and the one before it are kept.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import safetensors.numpy

from privacy import files
from privacy.errors import MachineError
from privacy.update_rule import State


def save(folder: Path, number: int, state: State) -> None:
    """Keep the state after a round, and let go of those before the previous round.

    Raises:
        MachineError: the folder cannot be written.
    """
    arrays = {"theta": state.theta, "first_moment": state.first_moment, "second_moment": state.second_moment}
    facts = {"applied": state.applied, "beta1_power": state.beta1_power.hex(), "beta2_power": state.beta2_power.hex()}
    facts |= {"basis": state.basis.hex()} if state.basis else {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"cannot make {folder}: {error.strerror}", hint="mend its permissions", code="cannot-write") from error
    files.write_atomic(_path(folder, number), safetensors.numpy.save(arrays, metadata={"siloquy": json.dumps(facts)}))
    for path in folder.glob("*.safetensors"):
        if path.stem.isdecimal() and int(path.stem) < number - 1:
            path.unlink(missing_ok=True)


def load(folder: Path, number: int, digest: bytes) -> State | None:
    """The state after a round, if the cache holds the one with this digest; damaged and missing files are the same: None."""
    try:
        data = _path(folder, number).read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts = json.loads(header["__metadata__"]["siloquy"])
        state = State(
            applied=facts["applied"], beta1_power=float.fromhex(facts["beta1_power"]),
            beta2_power=float.fromhex(facts["beta2_power"]), basis=bytes.fromhex(facts.get("basis", "")),
            **safetensors.numpy.load(data),
        )  # fmt: skip
        return state if state.digest == digest else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, struct.error, safetensors.SafetensorError):
        return None


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number}.safetensors"
