# SPDX-License-Identifier: Apache-2.0
"""Where the time of a round goes, and how many bytes it carries: a real federation in the shape of the demonstration.

Run: ``OMP_NUM_THREADS=1 python -m benchmarks.round``. Contract, model, records and limits are those of ``aggregator simulate``;
service (a process of its own, HTTP on loopback), coordinator, keys, ledgers and disks are real. The silos are threads that work
in turn, so that none slows another; waiting for others is shown and belongs to no share. A round is then one silo's work and
the coordinator's. The first round is discarded, figures are medians over the others. Phases that only compute are given in
processor time; those that wait for disk or network (transport, ledger, documents) by the clock on the wall, so that a
busy machine makes the share of what is not the model larger and never smaller. Bytes are those of the documents; HTTP adds
its headers.

The model's own work is measured in the same run: on every few batches the ordinary step of the same parameters (one loss, one
backward pass, nothing per unit) is taken beside the per-unit one, and its processor time is their ratio's denominator. Both
see the same rows, fillers included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import silo.round
import silo.witness
from aggregator import commands as hub
from aggregator import rounds
from aggregator.desk import Desk
from aggregator.simulation import dealing, simulate
from aggregator.simulation.processes import Children, children
from aggregator.store import Store
from benchmarks.clocks import REST, TRANSPORT, WAITING, Cost, Watch, wrapped
from benchmarks.machine import described, verdict
from privacy.dp.budget import Account, Gate
from privacy.federation import Contract
from privacy.secure_sum import guardian_sum
from silo import commands, config
from silo.learning import training
from silo.transport import HttpTransport

GRADIENT, SAMPLE, CLIP = "gradient", "sample, pack, load", "clip, lattice"
NOISE, MASK, SUM, UPDATE = "noise", "mask, seal, sign", "sum", "update"
LEDGER, ACCOUNTING = "ledger", "accounting"
PHASES = (GRADIENT, SAMPLE, CLIP, NOISE, MASK, TRANSPORT, SUM, UPDATE, LEDGER, ACCOUNTING, REST)
BY_THE_WALL = frozenset({TRANSPORT, LEDGER, REST, WAITING})
LARGEST_SHARE = 0.15
PACKAGES = ("torch", "transformers", "numpy", "cryptography")
WHEN = {
    "joining": ("contract", "countersignature"),
    "an epoch": ("epoch", "epoch-note", "roster", "pair-seeds", "confirmation"),
    "a round": (
        "checkpoint", "cosignature", "head", "manifest", "upload", "freeze", "consent", "certificate", "release", "outcome",
        "acknowledgement",
    ),
}  # fmt: skip

Costs = Mapping[str, Cost]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run. ``costs`` are by party (0 is the coordinator), one per round that counts; ``lora_bytes`` are plain LoRA's."""

    watch: Watch
    costs: Mapping[int, Sequence[Costs]]
    terms: Contract
    records: Sequence[int]
    precision: str
    lora_bytes: int

    @property
    def silos(self) -> list[int]:
        return sorted(set(self.costs) - {0})

    @property
    def per_unit_ratio(self) -> float:
        """Processor time of per-unit gradients over that of the ordinary step on the same batches."""
        pairs = self.watch.step_pairs
        return sum(private for private, _ in pairs) / sum(ordinary for _, ordinary in pairs)

    def seconds(self, party: int, phase: str) -> float:
        """Median over the rounds; for accounting the slowest silo's, since silos of one process share its cache."""
        if phase == ACCOUNTING and party:
            return statistics.median(
                max(_seconds(each, phase) for each in of_round) for of_round in zip(*self._silos(), strict=True)
            )
        return statistics.median(_seconds(costs, phase) for costs in self.costs[party])

    def work(self, party: int) -> float:
        """Seconds of all phases."""
        return sum(self.seconds(party, phase) for phase in PHASES)

    def of_a_round(self, phase: str) -> float:
        """Seconds of a phase in a round: the silos' mean and the coordinator's."""
        return statistics.mean(self.seconds(silo, phase) for silo in self.silos) + self.seconds(0, phase)

    @property
    def total(self) -> float:
        """Seconds of a round without waiting for others."""
        return sum(self.of_a_round(phase) for phase in PHASES)

    @property
    def own_seconds(self) -> float:
        """Seconds of the model's own forward and backward in a round."""
        return self.of_a_round(GRADIENT) / self.per_unit_ratio

    @property
    def not_the_model(self) -> float:
        """The share of a round that is not the model's own forward and backward."""
        return 1 - self.own_seconds / self.total

    def bytes(self, kind: str) -> tuple[float, float]:
        """(sent, received) per silo and round or, for the kinds before a round, once: the mean over silos and rounds."""
        last = 1 + len(self.costs[0])
        numbers = range(2, last + 1) if kind in WHEN["a round"] else (1,)
        slots = [(kind, number, silo) for number in numbers for silo in self.silos]
        sent, received = self.watch.sent, self.watch.received
        return statistics.mean(sent.get(slot, 0) for slot in slots), statistics.mean(received.get(slot, 0) for slot in slots)

    @property
    def bytes_of_a_round(self) -> tuple[float, float]:
        """(sent, received) per silo in a round."""
        sent, received = zip(*map(self.bytes, WHEN["a round"]), strict=True)
        return sum(sent), sum(received)

    def _silos(self) -> list[Sequence[Costs]]:
        return [self.costs[silo] for silo in self.silos]


def _seconds(costs: Costs, phase: str) -> float:
    cost = costs.get(phase, Cost())
    return cost.wall if phase in BY_THE_WALL else cost.cpu


def run(settings: simulate.Settings, *, counted: int, every: int) -> Measured:
    """A federation of these settings, for one round that is discarded and ``counted`` that are not."""
    watch, costs = Watch(every=every), dict[int, list[Costs]]()
    dealt = dealing.deal(
        settings.data,
        silos=settings.silos,
        silo_column=None,
        unit=settings.unit,
        max_records_per_unit=settings.max_records_per_unit,
    )
    aggregator = settings.home / "aggregator"
    with children(settings.home / "logs") as running, wrapped(_seams(watch)):
        homes = _enrol(settings, dealt, aggregator, running, watch)
        faults: list[BaseException] = []
        threads = [
            threading.Thread(target=_take_part, args=(watch, number, home, 1 + counted, costs, faults), daemon=True)
            for number, home in enumerate(homes, start=1)
        ]
        for thread in threads:
            thread.start()
        _coordinate(aggregator, 1 + counted, watch, costs, faults)
        for thread in threads:
            thread.join()
    if faults:
        raise faults[0]
    with hub.opened(aggregator) as at:
        terms = at.accepted.terms
    _, _, width = hub.describe_model(settings.model, settings.targets, last_layers=settings.last_layers)
    return Measured(
        watch=watch,
        costs={party: each[1:] for party, each in costs.items()},
        terms=terms,
        records=[len(share) for share in dealt.shares],
        precision=training.resolve(config.load(homes[0] / "silo.toml").compute)[1],
        lora_bytes=4 * (terms.adapter.vectors * width + len(terms.task.labels) * (terms.model.hidden_size + 1)),
    )


def _seams(watch: Watch) -> list[Any]:
    named = [
        (training.Contribution, "__call__", SAMPLE), (training, "to_lattice", CLIP), (training, "sum_lattice", CLIP),
        (silo.round, "noisy", NOISE), (silo.round, "masked", MASK), (silo.witness, "verified_total", SUM),
        (silo.witness, "next_state", UPDATE), (Gate, "admit", LEDGER), (Gate, "settle", LEDGER), (Account, "spent", ACCOUNTING),
        (guardian_sum, "unmask", SUM), (guardian_sum, "open_upload", SUM), (rounds, "result", UPDATE),
    ]  # fmt: skip
    special = [
        (training, "unit_gradients", watch.gradients), (HttpTransport, "get", watch.get), (HttpTransport, "put", watch.put),
        (Store, "put_once", watch.publish), (Desk, "collect", watch.collect),
    ]  # fmt: skip
    return [*((owner, name, watch.timed(phase)) for owner, name, phase in named), *special]


def _enrol(
    settings: simulate.Settings, dealt: dealing.Dealt, aggregator: Path, running: Children, watch: Watch
) -> list[Path]:  # fmt: skip
    """Contract, service and silos up to the countersignatures; the silos' homes."""
    model, modules, width = hub.describe_model(settings.model, settings.targets, last_layers=settings.last_layers)
    delta = dealing.default_delta(dealt.units, len(dealt.shares))
    terms = simulate.terms_of(settings, dealt, delta, model=model, modules=modules)
    made = hub.init(aggregator, organisation="Benchmark", terms=terms, lora_width=width, port=0, simulated=True)
    running.start("serve", "aggregator", ["serve", "--home", aggregator])
    url = _address(aggregator / "service.json", running)
    homes = [settings.home / f"silo-{number}" for number in range(1, len(dealt.shares) + 1)]
    for home, share in zip(homes, dealt.shares, strict=True):
        records = settings.home / f"{home.name}.jsonl"
        records.write_text("".join(json.dumps(record) + "\n" for record in share))
        created = commands.create(
            home, name=home.name, organisation="Benchmark", url=url, fingerprint=str(made["fingerprint"]), records=records,
            epsilon=2 * settings.epsilon, delta=delta, model=settings.model if Path(settings.model).is_dir() else "",
        )  # fmt: skip
        hub.add_member(aggregator, created.public_path)
    hub.sign(aggregator)
    for number, home in enumerate(homes, start=1):
        with watch.turn, watch.party(number), commands.joining(home, "") as visit:
            visit.countersign()
    return homes


def _address(path: Path, running: Children) -> str:
    """Where the service listens, once it does."""
    while not path.exists():
        running.check()
        time.sleep(0.02)
    return str(json.loads(path.read_bytes())["url"])


def _take_part(
    watch: Watch, number: int, home: Path, count: int, costs: dict[int, list[Costs]], faults: list[BaseException]
) -> None:
    """A silo's thread: ``silo train``, with an account after every round."""
    try:
        with watch.turn, watch.party(number) as line, commands.training(home) as session:
            line.cut()
            costs[number] = [line.cut() for _ in session.take_part(count)]
    except BaseException as error:  # told to the coordinator, who ends the run
        faults.append(error)


def _coordinate(aggregator: Path, count: int, watch: Watch, costs: dict[int, list[Costs]], faults: Sequence[BaseException]) -> None:
    """The coordinator's thread: `aggregator round`, with an account after every round."""

    def sleep(seconds: float) -> None:
        if faults:
            raise faults[0]
        time.sleep(seconds)

    with watch.party(0) as line, hub.running(aggregator, progress=lambda event: None, sleep=sleep) as coordinator:
        coordinator.ensure_countersigned()
        coordinator.ensure_epoch()
        line.cut()
        costs[0] = []
        for each in range(1, count + 1):
            coordinator.run_round(each)
            costs[0].append(line.cut())


# --- Printing ------------------------------------------------------------------------------------------------------------------


def shape(found: Measured) -> str:
    """What was trained."""
    terms, watch = found.terms, found.watch
    return (
        f"{len(found.silos)} silos of {', '.join(map(str, found.records))} records; rank {terms.adapter.rank} on "
        f"{len(terms.adapter.modules)} modules, d = {terms.dimension}, q = {terms.privacy.sampling_rate}, at most "
        f"{terms.task.max_length} tokens, {found.precision}; {watch.filler_rows / watch.rows:.1%} of the rows are fillers; "
        f"medians of {len(found.costs[0])} rounds"
    )


def time_table(found: Measured) -> Iterator[str]:
    """Seconds by phase and party, and each phase's share of a round."""
    parties = [*found.silos, 0]
    names = [*(f"silo {silo}" for silo in found.silos), "coordinator"]
    yield f"{'seconds of a round':<30}" + "".join(f"{name:>13}" for name in names) + f"{'share':>8}"
    for phase in PHASES:
        cells = "".join(f"{found.seconds(party, phase):>13.4f}" for party in parties)
        yield f"{phase:<30}{cells}{found.of_a_round(phase) / found.total:>8.1%}"
    yield f"{'all of its work':<30}" + "".join(f"{found.work(party):>13.4f}" for party in parties) + f"{1:>8.1%}"
    yield f"{WAITING:<30}" + "".join(f"{found.seconds(party, WAITING):>13.4f}" for party in parties)


def byte_table(found: Measured) -> Iterator[str]:
    """Bytes per silo by kind of document, and what plain LoRA would send."""
    yield f"{'bytes per silo':<30}{'sent':>13}{'received':>13}"
    for when, kinds in WHEN.items():
        for kind in kinds:
            sent, received = found.bytes(kind)
            yield f"{when + ': ' + kind:<30}{sent:>13,.0f}{received:>13,.0f}"
    sent, received = found.bytes_of_a_round
    yield f"{'all of a round':<30}{sent:>13,.0f}{received:>13,.0f}"
    yield f"{'plain LoRA, same rank':<30}{found.lora_bytes:>13,}{found.lora_bytes:>13,}"
    yield f"{'times as much':<30}{found.lora_bytes / sent:>13.1f}{found.lora_bytes / received:>13.1f}"


def document(found: Measured) -> dict[str, object]:
    """All of it for a program."""
    return {
        "machine": described(*PACKAGES),
        "shape": shape(found),
        "seconds": {
            str(party): {phase: round(found.seconds(party, phase), 6) for phase in (*PHASES, WAITING)} for party in found.costs
        },
        "own_seconds": round(found.own_seconds, 6),
        "per_unit_ratio": round(found.per_unit_ratio, 4),
        "not_the_model": round(found.not_the_model, 4),
        "bytes": {kind: found.bytes(kind) for kinds in WHEN.values() for kind in kinds},
        "lora_bytes": found.lora_bytes,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="that count, after one that does not")
    parser.add_argument("--every", type=int, default=4, help="batches for one on which the ordinary step is taken too")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--data", type=Path, help="records; the built-in pairs of the demonstration otherwise")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        settings = simulate.Settings(home=Path(folder), data=options.data, model=options.model)
        found = run(settings, counted=options.rounds, every=options.every)
    if options.json:
        print(json.dumps(document(found)))
        return
    lines = [
        described(*PACKAGES), shape(found), "", *time_table(found),
        f"per-unit gradients take {found.per_unit_ratio:.3f} times the processor time of the ordinary step on the same batches",
        f"the model's own forward and backward: {found.own_seconds:.3f} s of {found.total:.3f} s",
        verdict(
            f"all else is less than {LARGEST_SHARE:.0%} of a round", f"{found.not_the_model:.1%}",
            met=found.not_the_model < LARGEST_SHARE,
        ),
        "", *byte_table(found),
    ]  # fmt: skip
    print("\n".join(lines))


if __name__ == "__main__":
    main()
