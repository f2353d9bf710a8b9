# SPDX-License-Identifier: Apache-2.0
"""Compute the figures of a privacy report again, with nothing of this project: Google's dp_accounting alone.

Run: ``pip install dp-accounting``, then ``python recompute_epsilon.py report.json``. The file may be handed on by itself: it
imports no part of siloquy. From the record it reads how many rounds of which version of the contract each silo is charged for and
the plan has, basis rounds by themselves, and what each adversary sees of one of them. It asks dp_accounting's
privacy-loss-distribution and Renyi accountants for epsilon, and compares with what the report states: for each of the three
adversaries, now and for the plan, for the accountants' own table, and for each silo. And it counts: each silo is charged for no
fewer rounds than the record lists with its upload.

What the accountants are asked about is the continuous Gaussian at sigma' = sqrt(shares * s^2 - 16) / 2^p; epsilon grows by
2 zeta, delta shrinks by exp(zeta): docs/concepts/proofs.md says why. Rounds under one version, and its basis rounds with them, were
fixed in advance: both accountants compose them, and the smaller epsilon counts. Under several versions the later terms may follow
from earlier results: the Renyi accountant alone composes them, at one order (an RDP filter) that follows from the limits of the
first version with rounds. What no record can show: that silos did what it says.

Exit code: 0 every figure agrees (PLD to 1e-3 relative, since another grid rounds otherwise; nothing is stated lower), 1 one does
not or is left out, 2 this report is of a kind that this file does not cover (units in several silos, no differential privacy, a
record of a release that did not state what each adversary sees).
"""

from __future__ import annotations

import collections
import functools
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
GRID = 1e-4
ADVERSARIES = ("outside", "insiders", "sum_broken")
TOO_WIDE = 100.0
"""Above this epsilon a distribution of privacy losses needs too much memory, and protects nobody."""
ORDERS = [*(tenths / 10 for tenths in range(21, 110)), *(float(order) for order in range(11, 257)), 2.0]

Event = dict[str, Any]
Charged = tuple[tuple[tuple[tuple[str, Any], ...], int], ...]
"""The items of what one adversary sees of a round, and how many such rounds there are."""


@functools.cache
def figures(charged: Charged, *, delta: float, grid: float | None, order: int | None) -> tuple[float | None, float]:
    """(epsilon by PLD, epsilon by RDP) of these rounds together.

    Args:
        grid: the report's step for privacy losses; None where it has no PLD: then one is computed unless it would be too wide.
        order: the one order of the filter, to which no PLD applies; None where everything was fixed in advance.
    """
    if not charged:
        return 0.0, 0.0
    zeta, events = 0.0, []
    for items, rounds in charged:
        event: Event = dict(items)
        steps, shares = rounds * event["steps"], event["shares"]
        sigma = math.sqrt(shares * event["share_variance"] - SMOOTHING) / 2.0 ** event["lattice_bits"]
        apart = (shares - 1) * 10 * math.exp(-(math.pi**2) * event["share_variance"])
        zeta += steps * event["dimension"] * (5 * math.exp(-2 * math.pi**2 * SMOOTHING) + apart)
        events.append((dp_accounting.PoissonSampledDpEvent(event["sampling_rate"], dp_accounting.GaussianDpEvent(sigma)), steps))
    at = delta * math.exp(-zeta)
    renyi = RdpAccountant(orders=ORDERS if order is None else [float(order)])
    for one, steps in events:
        renyi.compose(one, steps)
    by_renyi = renyi.get_epsilon(at) + 2 * zeta
    if order is not None or (grid is None and by_renyi > TOO_WIDE):
        return None, by_renyi
    losses = PLDAccountant(value_discretization_interval=grid or GRID)
    for one, steps in events:
        losses.compose(one, steps)
    return losses.get_epsilon(at) + 2 * zeta, by_renyi


def filter_order(record: dict[str, Any]) -> int:
    """The integer order at which the limits of the first version with rounds hold the most steps."""
    first = min((version for version in record["versions"] if version["rounds"]), key=lambda version: version["version"])

    def room(order: int) -> float:
        conversion = math.log1p(-1 / order) - math.log(first["delta"] * order) / (order - 1)
        return (first["epsilon"] - conversion) / order

    return max(range(2, 257), key=room)


def covered(record: dict[str, Any]) -> str:
    """Why this report is not covered here; "" when it is."""
    event = (record.get("accounting") or {}).get("event") or {}
    if event.get("type") != "lattice-gaussian":
        return "its mechanism is none with one share of noise for each unit"
    if not all(version.get("seen") for version in record["versions"]):
        return "it does not state what each adversary sees of a round: ask for one that a newer release makes"
    seen = [event for version in record["versions"] for each in version["seen"] for event in (each["event"], each["basis"])]
    if any(event is not None and event["type"] != "lattice-gaussian" for event in seen):
        return "under one of its versions a unit may be in several silos"
    return ""


def charges(record: dict[str, Any], adversary: str, listed: list[dict[str, Any]]) -> Charged:
    """What these rounds show an adversary: ``listed`` as in ``accounting.charged``."""
    seen = {(version["version"], each["name"]): each for version in record["versions"] for each in version["seen"]}
    found = []
    for charge in listed:
        of_version = seen[charge["version"], adversary]
        event: Event = of_version["basis"] if charge["basis"] else of_version["event"]
        found.append((tuple(event.items()), charge["rounds"]))
    return tuple(found)


def largest(record: dict[str, Any], adversary: str, loads: list[list[dict[str, Any]]], grid: float | None) -> tuple[Any, ...]:
    """(PLD, RDP, steps) of the load that costs most against this adversary."""
    found = []
    for load in {json.dumps(load): load for load in loads}.values():
        mixed = len({charge["version"] for charge in load}) > 1
        charged, order = charges(record, adversary, load), filter_order(record) if mixed else None
        pld, rdp = figures(charged, delta=record["guarantee"]["delta"], grid=grid, order=order)
        steps = sum(rounds * dict(items)["steps"] for items, rounds in charged)
        found.append((rdp if pld is None else min(pld, rdp), steps, pld, rdp))
    _, steps, pld, rdp = max(found, key=lambda each: each[:2])
    return pld, rdp, steps


def agrees(said: dict[str, Any], pld: float | None, rdp: float, steps: int) -> bool:
    """Whether a stated figure is what was computed: of as many steps, certified no lower, and by each accountant no other."""
    near = {"rel_tol": TOLERANCE, "abs_tol": TOLERANCE}
    by_pld = said["epsilon_pld"]
    if said["steps"] != steps or not math.isclose(said["epsilon_rdp"], rdp, **near):
        return False
    if by_pld is not None and (pld is None or not math.isclose(by_pld, pld, **near)):
        return False
    return bool(said["epsilon"] >= (rdp if pld is None else min(pld, rdp)) * (1 - TOLERANCE))


def left_out(record: dict[str, Any]) -> list[str]:
    """In words: adversaries without a figure, and rounds with a silo's upload that it is not charged for."""
    named = [each["name"] for each in record["guarantee"]["adversaries"]]
    found = [f"no figure against {name}" for name in ADVERSARIES if named.count(name) != 1]
    charged = {
        (silo["silo"], each["version"], each["basis"]): each["rounds"] for silo in record["silos"] for each in silo["charged"]
    }
    sent = collections.Counter((silo, each["version"], each["basis"]) for each in record["rounds"] for silo in each["participants"])
    return found + [
        f"silo {silo} has {count} {'basis ' * basis}rounds of version {version}, and is charged for {charged.get(key, 0)}"
        for key, count in sorted(sent.items())
        for silo, version, basis in [key]
        if charged.get(key, 0) < count
    ]


def compared(record: dict[str, Any]) -> list[tuple[str, float, float | None, float, bool]]:
    """(which, epsilon stated, by PLD, by RDP, whether they agree): adversaries and table, now and for the plan, and each silo."""
    loads, plan = [silo["charged"] for silo in record["silos"]], [record["accounting"]["planned"]]
    asked = [
        (f"{each['name']}, {when}", each["name"], load, each[when])
        for each in record["guarantee"]["adversaries"]
        for when, load in (("spent", loads), ("plan", plan))
    ]
    asked += [
        (f"accounting, {when}", "insiders", load, record["accounting"][when]) for when, load in (("spent", loads), ("plan", plan))
    ]
    asked += [(f"silo {silo['silo']}", "insiders", [silo["charged"]], silo["spent"]) for silo in record["silos"]]
    rows = []
    for which, adversary, listed, said in asked:
        pld, rdp, steps = largest(record, adversary, listed, said["grid"])
        rows.append((which, said["epsilon"], pld, rdp, agrees(said, pld, rdp, steps)))
    return rows


def main(words: list[str]) -> int:
    """Print the comparison; the exit code as above."""
    record = json.loads(Path(words[0]).read_text(encoding="utf-8"))
    reason = covered(record)
    if reason:
        print(f"not covered: {reason}")
        return 2
    missing, rows = left_out(record), compared(record)
    for line in missing:
        print(line)
    print(f"{'':<22}{'stated':>10}{'PLD':>10}{'RDP':>10}")
    for which, stated, pld, rdp, same in rows:
        by_pld = "" if pld is None else f"{pld:.4f}"
        print(f"{which:<22}{stated:>10.4f}{by_pld:>10}{rdp:>10.4f}  {'agrees' if same else 'DIFFERS'}")
    return 0 if not missing and all(same for *_, same in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
