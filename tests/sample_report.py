# SPDX-License-Identifier: Apache-2.0
"""A real, parsed contract of three silos and the rounds of a small run, for the report's tests."""

from __future__ import annotations

import functools
import hashlib

from aggregator.reporting import compliance
from aggregator.reporting.record import Report, RoundFacts
from privacy import federation
from privacy.federation import Accepted
from privacy.identity import keys

NAMES = (("anna", "St. Anna Hospital"), ("brook", "Brook Clinic"), ("carl", "Carl University Hospital"))


def seed(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


COORDINATOR = keys.Identity(name="hub", sign_seed=seed("hub"), receive_seed=seed("hub receives"))


def contract(
    *, names=NAMES, unit="patient_id", units=2000, rounds=30, epsilon=3.0, noise_multiplier=1.85, sampling_rate=0.1,
    name="chest-reports", model="MiniLM", mode="joint", steps_per_round=1,
) -> Accepted:
    """A federation.toml of these terms, through the real parser."""
    hub = COORDINATOR.public
    modules = ", ".join(f'"encoder.layer.{n}.attention.self.{part}"' for n in range(6) for part in ("query", "value"))
    lines = [
        'format = "siloquy/1"', "version = 1", f'name = "{name}"', 'expires = "2027-06-30"',
        "[task]", 'labels = ["no finding", "finding"]', "max_length = 128",
        "[model]", f'name = "{model}"', f'digest = "{seed("model").hex()}"', "hidden_size = 384",
        "[adapter]", "rank = 16", f"modules = [{modules}]",
        "[training]", f'mode = "{mode}"', f"steps_per_round = {steps_per_round}", f"rounds = {rounds}", "learning_rate = 0.01",
        "[privacy]", f'unit = "{unit}"', f"units = {units}", f"sampling_rate = {sampling_rate}", "max_grad_norm = 1.0",
        f"noise_multiplier = {noise_multiplier}", f"epsilon = {epsilon}", "delta = 1e-6", "lattice_bits = 20",
        "[sum]",
        "[aggregator]", 'name = "hub"', f'sign_key = "{hub.sign_key.hex()}"', f'seal_key = "{hub.seal_key.hex()}"',
    ]
    for number, (short, organisation) in enumerate(names, start=1):
        key = keys.Identity(name=short, sign_seed=seed(short)).public.sign_key.hex()
        lines += ["[[member]]", f"id = {number}", f'name = "{short}"', f'organisation = "{organisation}"', f'sign_key = "{key}"']
    return federation.parse("\n".join(lines).encode() + b"\n")


def run(count: int, *, void=(), missing=()) -> tuple[RoundFacts, ...]:
    """``count`` rounds; those in ``void`` closed without a sum, with uploads of silos 1 and 2 only; ``missing`` with none."""
    return tuple(
        RoundFacts(
            number=number, kind="void" if number in {*void, *missing} else "result",
            reason="deadline: silo 3 absent" if number in void else "no upload" if number in missing else "",
            opened_at=1_800_000_000 + 60 * number, closed_at=1_800_000_041 + 60 * number,
            participants=() if number in missing else (1, 2) if number in void else (1, 2, 3),
            outcome_digest=seed(f"outcome {number}").hex(), state_digest=seed(f"state {number}").hex(),
            bytes_in=0 if number in missing else 16_912 * (2 if number in void else 3),
        )
        for number in range(1, count + 1)
    )


def make(accepted: Accepted, rounds, **changes) -> Report:
    given = {
        "rounds": rounds, "upload_bytes": 16_912, "lora_bytes": 595_976, "state_digest": seed("state").hex(),
        "generated_at": 1_800_003_600,
        "software": {"siloquy": "0.1.0", "python": "3.11.9", "dp-accounting": "0.6.0", "cryptography": "50.0.2"},
    }
    return compliance.facts(accepted, **{**given, **changes})


@functools.cache
def sample() -> Report:
    """24 rounds of 30, the seventh void."""
    return make(contract(), run(24, void=(7,)), extra={"accuracy before": 0.512, "accuracy after": 0.831})
