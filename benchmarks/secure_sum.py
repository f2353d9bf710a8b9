# SPDX-License-Identifier: Apache-2.0
"""What a secure sum costs: seconds of a silo and of the aggregator, bytes sent, memory, by silos n and numbers d.

Run: ``OMP_NUM_THREADS=1 python -m benchmarks.secure_sum``. Real keys, signatures and documents, no network and no training
(benchmarks.round has both). Seconds are by the clock on the wall, the best of several repetitions, since slower ones measure the
neighbours; long mask streams use the machine's processors. A silo's *upload* is everything from its vector of ring words to
the signed document; *agree* is the rest of its round before the sum (consent mode: the set checked, consent, release). A *guardian*
opens all its bundles, lists, endorses and releases. The aggregator's *receive* is what it does with each upload while others
are still under way, *freeze* choosing or checking the set and its certificate, *sum* what remains when the last document is there:
opening seeds or shares, reconstruction, unmasking.
Memory is the most that Python and numpy hold at once during the sum, vectors read from files one at a time.

``--peer PYTHON`` also measures Flower's SecAgg+ with the Python of an environment that has ``flwr``, in the same run on the same
machine. What Flower's client does beside it (rounding its floats into the ring) is in Flower's figure, and not in ours.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from benchmarks.machine import described, verdict
from benchmarks.plots import Curve, Panel, picture
from benchmarks.summing import ConsentSum, Made, SharesSum, Words
from privacy.messages import Certificate, Freeze
from privacy.prg import add_stream

T = TypeVar("T")

SILOS = (3, 8, 50, 200)
DIMENSIONS = (10_000, 100_000, 917_504, 1_000_000)
PARTS = ("upload", "agree", "guardian", "receive", "freeze", "sum")
PEER_SILOS, PEER_DIMENSION = 8, 917_504
PEER = Path(__file__).with_name("peer_secagg.py")
# (modes, n, d, most megabytes up, most seconds of a silo, most seconds of the sum); consent mode is for few silos
TARGETS = (
    (("consent", "shares"), 8, 917_504, 3.70, 0.030, 0.060),
    (("shares",), 200, 1_000_000, None, 0.080, 1.5),
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One round. Seconds but for ``sent`` (bytes a silo sends) and ``peak`` (bytes during the sum)."""

    mode: str
    silos: int
    dimension: int
    dropped: int
    upload: float
    agree: float
    guardian: float
    receive: float
    freeze: float
    sum: float
    sent: int
    peak: int

    @property
    def silo(self) -> float:
        """All that a silo does in a round."""
        return self.upload + self.agree


def best(work: Callable[[], T], repeats: int) -> tuple[float, T]:
    """The fewest seconds of ``repeats`` runs, and what the last one gave."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        made = work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), made


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that Python and numpy held at once during ``work``, beyond those before it."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def uploads(at: ConsentSum, silos: Sequence[int], repeats: int) -> tuple[dict[int, Made], Words, float, float]:
    """Every silo's upload, received and put aside; the sum of their vectors; seconds of one upload and of receiving it."""
    made, expected = {}, np.zeros(at.dimension, dtype="<u4")
    measured = silos[len(silos) // 2]
    uploading = receiving = 0.0
    for silo in silos:
        x, chain, count = at.x(silo), at.chain(silo), repeats if silo == measured else 1
        up, made[silo] = best(lambda x=x, chain=chain, silo=silo: at.upload(silo, x, chain), count)
        down, (_, y) = best(lambda silo=silo: at.receive(silo, made[silo].document), count)
        expected += x
        at.vectors.put(silo, y)
        if silo == measured:
            uploading, receiving = up, down
        else:
            made[silo] = replace(made[silo], document=b"")
    return made, expected, uploading, receiving


def consent(silos: int, dimension: int, repeats: int) -> list[Cost]:
    """A round in consent mode; the sum is compared with that of the vectors."""
    with tempfile.TemporaryDirectory() as folder:
        at = ConsentSum(silos, dimension, Path(folder))
        made, expected, upload, receive = uploads(at, at.silos, repeats)
        one = at.silos[silos // 2]
        proposed = Freeze(round_ctx=at.ctx, headers=tuple(each.header for each in made.values()))
        freezing, frozen = best(lambda: at.frozen(proposed), repeats)
        agreeing, own = best(lambda: at.consent(one, proposed, made[one].header), repeats)
        consents = tuple(at.consent_to(silo, frozen) for silo in at.silos)
        certificate = Certificate(round_ctx=at.ctx, frozen=frozen.digest, consents=consents)
        certifying, certified = best(lambda: at.certified(certificate, frozen), repeats)
        releasing, own_release = best(lambda: at.release(one, certificate, frozen, made[one].seed), repeats)
        releases = {silo: at.release_to(silo, certified, made[silo].seed) for silo in at.silos}
        seconds, total = best(lambda: at.total(certified, at.seeds(certified, releases)), repeats)
        assert np.array_equal(total, expected), "the sum is not the sum"
        cost = Cost(
            mode="consent", silos=silos, dimension=dimension, dropped=0, upload=upload, agree=agreeing + releasing, guardian=0.0,
            receive=receive, freeze=freezing + certifying, sum=seconds,
            sent=len(made[one].document) + len(own) + len(own_release),
            peak=peak_bytes(lambda: at.total(certified, at.seeds(certified, releases))),
        )  # fmt: skip
        return [cost]


def shared(silos: int, dimension: int, repeats: int) -> list[Cost]:
    """Rounds in share mode: with nobody missing up to ten silos, and with a tenth of them missing from eight on."""
    drops = [dropped for dropped in sorted({0 if silos <= 10 else silos // 10, -(-silos // 10)}) if silos - dropped >= 3]
    return [shared_with(silos, dimension, dropped, repeats) for dropped in drops]


def shared_with(silos: int, dimension: int, dropped: int, repeats: int) -> Cost:
    """A round in share mode; the sum is compared with that of the vectors of those who stayed."""
    guardians, corrupt = (7, 2) if silos > 50 else (5, 2)
    with tempfile.TemporaryDirectory() as folder:
        at = SharesSum(silos, dimension, Path(folder), dropped=dropped, guardians=guardians, corrupt=corrupt)
        made, expected, upload, receive = uploads(at, at.here, repeats)
        first = next(iter(at.guardians))
        listing, _ = best(lambda: at.listed(first, made), repeats)
        has = {guardian: at.listed(guardian, made) for guardian in at.guardians}
        choosing, proposed = best(lambda: at.proposed(made, {guardian: raw for guardian, (_, raw) in has.items()}), repeats)
        endorsing, (frozen, _) = best(lambda: at.endorsed(first, proposed), repeats)
        endorsements = {guardian: at.endorsed(guardian, proposed)[1] for guardian in at.guardians}
        certifying, certificate = best(lambda: at.certificate(frozen, endorsements), repeats)
        releasing, _ = best(lambda: at.shared(first, certificate, frozen, has[first][0]), repeats)
        certified = at.certified(certificate, frozen)
        documents = {guardian: at.shared(guardian, certificate, frozen, has[guardian][0]) for guardian in at.guardians}
        seconds, total = best(lambda: at.total_of(certified, at.secrets(certified, documents)), repeats)
        assert np.array_equal(total, expected), "the sum is not the sum"
        return Cost(
            mode="shares", silos=silos, dimension=dimension, dropped=dropped, upload=upload, agree=0.0,
            guardian=listing + endorsing + releasing, receive=receive, freeze=choosing + certifying, sum=seconds,
            sent=len(made[at.here[len(at.here) // 2]].document),
            peak=peak_bytes(lambda: at.total_of(certified, at.secrets(certified, documents))),
        )  # fmt: skip


MODES: dict[str, Callable[[int, int, int], list[Cost]]] = {"consent": consent, "shares": shared}


def peer(python: Path, *, dropped: int, repeats: int) -> dict[str, float]:
    """Flower's SecAgg+ at the size of comparison; see benchmarks.peer_secagg."""
    words = ["--silos", PEER_SILOS, "--dimension", PEER_DIMENSION, "--dropped", dropped, "--repeats", repeats]
    ran = subprocess.run([python, PEER, *map(str, words)], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


# --- Printing ------------------------------------------------------------------------------------------------------------------


def table(costs: Sequence[Cost]) -> Iterator[str]:
    """A line for each round: milliseconds, and megabytes (10**6 bytes)."""
    names = "".join(f"{name:>10}" for name in PARTS)
    yield f"{'mode':<8}{'n':>5}{'d':>11}{'gone':>6}{names}{'MB up':>9}{'over 4d':>10}{'MB sum':>9}"
    for cost in costs:
        seconds = "".join(f"{1000 * getattr(cost, name):>10,.2f}" for name in PARTS)
        yield (
            f"{cost.mode:<8}{cost.silos:>5}{cost.dimension:>11,}{cost.dropped:>6}{seconds}{cost.sent / 1e6:>9.3f}"
            f"{cost.sent - 4 * cost.dimension:>10,}{cost.peak / 1e6:>9.1f}"
        )


def verdicts(costs: Sequence[Cost]) -> Iterator[str]:
    """The targets at the sizes that were measured."""
    for modes, silos, dimension, megabytes, silo_s, sum_s in TARGETS:
        for cost in costs:
            if cost.mode not in modes or (cost.silos, cost.dimension) != (silos, dimension):
                continue
            where = f"{cost.mode}, n = {silos}, d = {dimension:,}, {cost.dropped} gone"
            if megabytes is not None:
                up = cost.sent / 1e6
                yield verdict(f"{where}: at most {megabytes:.2f} MB up", f"{up:.3f} MB", met=up <= megabytes)
            for what, most, found in (("a silo", silo_s, cost.silo), ("the sum", sum_s, cost.sum)):
                yield verdict(f"{where}: {what} at most {1000 * most:.0f} ms", f"{1000 * found:.1f} ms", met=found <= most)


def memory(costs: Sequence[Cost]) -> str:
    """How the memory of the sum depends on n where the vectors are longest: the least and most bytes per number."""
    longest = max(cost.dimension for cost in costs)
    each = {cost.silos: cost.peak / cost.dimension for cost in costs if cost.dimension == longest}
    return (
        f"memory of the sum at d = {longest:,}: {min(each.values()):.1f} to {max(each.values()):.1f} bytes per number, "
        f"from {min(each)} to {max(each)} silos; a vector has 4"
    )


def against(costs: Sequence[Cost], found: dict[str, float], dropped: int) -> Iterator[str]:
    """Ours and the peer's, at one size."""
    yield f"{'n = 8, d = 917,504, ' + str(dropped) + ' gone':<34}{'silo, ms':>12}{'server, ms':>12}{'MB up':>10}"
    for cost in costs:
        if (cost.silos, cost.dimension, cost.dropped) == (PEER_SILOS, PEER_DIMENSION, dropped):
            server = cost.sum + cost.freeze + (cost.silos - cost.dropped) * cost.receive
            yield f"{'ours, ' + cost.mode:<34}{1000 * cost.silo:>12.1f}{1000 * server:>12.1f}{cost.sent / 1e6:>10.2f}"
    name = f"Flower {found['version']} SecAgg+"
    yield f"{name:<34}{1000 * found['client_s']:>12.1f}{1000 * found['server_s']:>12.1f}{found['sent_bytes'] / 1e6:>10.2f}"
    yield f"Flower's messages to bytes and back, counted on neither side: {1000 * found['encoding_s']:.0f} ms"


def drawn(costs: Sequence[Cost]) -> str:
    """A silo's and the aggregator's milliseconds against n and against d, as SVG."""
    mode = costs[-1].mode
    mine = [cost for cost in costs if cost.mode == mode]
    most_d, most_n = max(cost.dimension for cost in mine), max(cost.silos for cost in mine)
    parts: tuple[tuple[str, Callable[[Cost], float]], ...] = (
        ("silo", lambda cost: cost.silo), ("sum", lambda cost: cost.sum), ("receive one", lambda cost: cost.receive),
    )  # fmt: skip
    axes: tuple[tuple[str, str, str, int], ...] = (
        ("silos", "dimension", f"d = {most_d:,}", most_d), ("dimension", "silos", f"n = {most_n}", most_n),
    )  # fmt: skip
    panels = []
    for x, fixed, title, value in axes:
        these = sorted((cost for cost in mine if getattr(cost, fixed) == value), key=lambda cost: cost.dropped)
        along = [cost for _, cost in sorted({getattr(cost, x): cost for cost in these}.items())]
        curves = tuple(
            Curve(label=label, points=tuple((getattr(cost, x), 1000 * read(cost)) for cost in along)) for label, read in parts
        )
        panels.append(Panel(title=title, x=f"{'n, silos' if x == 'silos' else 'd, numbers'}", y="milliseconds", curves=curves))
    about = f"{mode} mode: seconds of one silo, of the sum, and of receiving one upload"
    return picture(panels, title="What a secure sum costs", desc=about)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", type=int, nargs="+", default=SILOS)
    parser.add_argument("--dimensions", type=int, nargs="+", default=DIMENSIONS)
    parser.add_argument("--modes", nargs="+", choices=sorted(MODES), default=list(MODES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", type=Path, metavar="PYTHON", help="of an environment that has flwr")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the last mode's figures into this file")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    machine = described("numpy", "cryptography")
    add_stream(np.zeros(1, dtype="<u4"), bytes(32))  # the self-check of the key stream is once per process
    costs = []
    for mode in options.modes:
        for silos in options.silos:
            for dimension in options.dimensions:
                costs += MODES[mode](silos, dimension, options.repeats)
    peers = {}
    if options.peer is not None:
        peers = {gone: peer(options.peer, dropped=gone, repeats=options.repeats) for gone in (0, 1)}
    if options.plot is not None:
        options.plot.write_text(drawn(costs), encoding="utf-8")
    if options.json:
        print(json.dumps({"machine": machine, "costs": [asdict(cost) for cost in costs], "peer": peers}))
        return
    print(machine)
    print(f"milliseconds, best of {options.repeats}; receive is per upload; MB are 10^6 bytes")
    lines = [*table(costs), memory(costs), *verdicts(costs)]
    for gone, found in peers.items():
        lines += ["", *against(costs, found, gone)]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
