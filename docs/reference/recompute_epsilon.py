# SPDX-License-Identifier: Apache-2.0
"""Compute the figures of a privacy report again, with nothing of this project: Google's dp_accounting alone.

Run: ``pip install dp-accounting``, then ``python recompute_epsilon.py report.json``. The file may be handed on by itself: it
imports no part of siloquy. It reads sampling rate, noise, shares and steps from the record, asks dp_accounting's
privacy-loss-distribution and Renyi accountants for epsilon, and compares with what the report states for each of the three
adversaries, now and for the plan.

What the accountants are asked about is the continuous Gaussian at sigma' = sqrt(shares * s^2 - 16) / 2^p; epsilon grows by
2 zeta, delta shrinks by exp(zeta): docs/concepts/proofs.md says why. What no record can show: that silos did what it says.

Exit code: 0 every figure agrees (PLD to 1e-3 relative, since another grid rounds otherwise; RDP is never below), 1 one does not,
2 this report is of a kind that this file does not cover (several versions, a basis round, units in several silos, no
differential privacy).
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

SMOOTHING = 16.0
TOLERANCE = 1e-3


def figures(event: dict[str, Any], *, shares: int, steps: int, delta: float, grid: float) -> tuple[float, float]:
    """(epsilon by PLD, epsilon by RDP) of ``steps`` steps for an adversary who faces so many shares of the noise."""
    if not steps:
        return 0.0, 0.0
    sigma = math.sqrt(shares * event["share_variance"] - SMOOTHING) / 2.0 ** event["lattice_bits"]
    apart = (shares - 1) * 10 * math.exp(-(math.pi**2) * event["share_variance"])
    zeta = steps * event["dimension"] * (5 * math.exp(-2 * math.pi**2 * SMOOTHING) + apart)
    one = dp_accounting.PoissonSampledDpEvent(event["sampling_rate"], dp_accounting.GaussianDpEvent(sigma))
    at = delta * math.exp(-zeta)
    pld = PLDAccountant(value_discretization_interval=grid or 1e-4).compose(one, steps).get_epsilon(at)
    rdp = RdpAccountant(orders=[float(order) for order in range(2, 257)]).compose(one, steps).get_epsilon(at)
    return pld + 2 * zeta, rdp + 2 * zeta


def covered(record: dict[str, Any]) -> str:
    """Why this report is not covered here; "" when it is."""
    stated = record.get("accounting") or {}
    event = stated.get("event") or {}
    if event.get("type") != "lattice-gaussian":
        return "its mechanism is none with one share of noise for each unit"
    kinds = {(each["version"], each["basis"]) for each in [*stated["charged"], *stated["planned"]]}
    if len(kinds) > 1 or any(basis for _, basis in kinds) or stated.get("order") is not None:
        return "its rounds stand under several versions or mechanisms"
    return ""


def compared(record: dict[str, Any]) -> list[tuple[str, float, float, float, bool]]:
    """(which, epsilon stated, by PLD, by RDP, whether they agree) for each adversary, now and for the plan."""
    event, delta, rows = record["accounting"]["event"], record["guarantee"]["delta"], []
    for adversary in record["guarantee"]["adversaries"]:
        for when in ("spent", "plan"):
            said = adversary[when]
            pld, rdp = figures(event, shares=adversary["shares"], steps=said["steps"], delta=delta, grid=said["grid"])
            close = math.isclose(said["epsilon_pld"], pld, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
            agrees = close and said["epsilon_rdp"] <= rdp * (1 + TOLERANCE) and said["epsilon"] >= min(pld, rdp) * (1 - TOLERANCE)
            rows.append((f"{adversary['name']}, {when}", said["epsilon"], pld, rdp, agrees))
    return rows


def main(words: list[str]) -> int:
    """Print the comparison; the exit code as above."""
    record = json.loads(Path(words[0]).read_text(encoding="utf-8"))
    reason = covered(record)
    if reason:
        print(f"not covered: {reason}")
        return 2
    rows = compared(record)
    print(f"{'':<22}{'stated':>10}{'PLD':>10}{'RDP':>10}")
    for which, stated, pld, rdp, agrees in rows:
        print(f"{which:<22}{stated:>10.4f}{pld:>10.4f}{rdp:>10.4f}  {'agrees' if agrees else 'DIFFERS'}")
    return 0 if all(agrees for *_, agrees in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
