# SPDX-License-Identifier: Apache-2.0
"""What one round says about R in each basis, and what noise alone does to the model: which scale suits a basis, without training.

Run: ``python -m benchmarks.basis_signal --data FOLDER --task ade``. Per-unit gradients of whole weights are taken once, at a head
that was trained without privacy on the same records, so this is for public data sets alone; every basis and scale is then judged
on the same gradients. ``--rounds``, ``--batch`` and ``--noise-multiplier`` are those of the training that is judged.

energy    the share of the mean gradient of all adapted weights that the basis holds
R, head   the norm of the mean clipped gradient over that of a round's noise on the same coordinates
noise     how much the held-out loss rises when R is what noise alone makes of it in all rounds: Gaussian, step size times the
          square root of the rounds, of which the linear fall over the second half leaves two thirds

Products of means are taken between two halves of the units, so that what is chance in one has no square in them.

``late`` is ``raw`` at the trained head: the best that ``private@K`` could come near. It and ``raw`` are of half of the units, and
judged on the others. No slope of the loss is given: a few records with large losses rule the unclipped mean, and the clipped one
can point against it (docs/adr/0010).
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from aggregator import defaults
from benchmarks import basis_runs, refresh
from benchmarks.basis_runs import Dealt, Run
from privacy import base_model, sketch
from privacy.contract import Contract
from privacy.orthonormal import Factors
from silo.config import Compute
from silo.learning import basis, classifier
from silo.learning import sketch as sketches
from silo.learning.gradients import DUMMY, PhysicalBatch, Tape, pack, unit_gradients
from silo.learning.lora_sb import matrix
from silo.learning.sketch import SketchModel
from silo.learning.tokens import EncodedUnit
from silo.learning.training import resolve

ROWS = 64
HEAD_STEPS, HEAD_RATE = 60, 0.02


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Of units of one record each: ``whole`` ``(units, modules, m, n)`` of the weights, ``head`` ``(units, numbers)``."""

    whole: Tensor
    head: Tensor

    @functools.cached_property
    def energy(self) -> float:
        """The squared norm of the mean gradient of the weights."""
        return product(self.whole.flatten(1), self.whole.flatten(1))


@dataclass(frozen=True, kw_only=True)
class Line:
    """One basis at one scale; see the module's docstring."""

    basis: str
    energy: float
    scale: float
    r_to_noise: float
    head_to_noise: float
    rise: float


def batches(units: Sequence[EncodedUnit], terms: Contract) -> list[PhysicalBatch]:
    """The units in physical batches."""
    return list(pack(units, lambda _: ROWS, max_length=terms.task.max_length))


def trained_head(model: SketchModel, units: Sequence[EncodedUnit], terms: Contract) -> NDArray[np.float64]:
    """Weight and bias, flat, of a linear head on the frozen encoder, trained by Adam without privacy."""
    rows, labels = features(model, units, terms)
    head = nn.Linear(rows.shape[1], len(terms.task.labels))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    rule = torch.optim.Adam(head.parameters(), lr=HEAD_RATE)
    for _ in range(HEAD_STEPS):
        rule.zero_grad()
        functional.cross_entropy(head(rows), labels).backward()  # type: ignore[no-untyped-call]
        rule.step()
    return torch.cat([each.detach().flatten() for each in head.parameters()]).double().numpy()


def features(model: classifier.Classifier, units: Sequence[EncodedUnit], terms: Contract) -> tuple[Tensor, Tensor]:
    """(What the head sees ``(units, hidden)``, labels ``(units,)``)."""
    found = []
    with torch.no_grad():
        for batch in batches(units, terms):
            real = batch.unit != DUMMY
            found.append((model.features(batch)[real].clone(), batch.labels[real]))
    return torch.cat([rows for rows, _ in found]), torch.cat([labels for _, labels in found])


def gradients(model: SketchModel, units: Sequence[EncodedUnit], terms: Contract) -> Gradients:
    """Every unit's gradients under the head that ``model`` has."""
    tape, sides = Tape(model.dimension), model.layout.shapes[0]
    whole = [unit_gradients(model, batch, tape).view(-1, len(model.layers), *sides).clone() for batch in batches(units, terms)]
    rows, labels = features(model, units, terms)
    with torch.no_grad():
        errors = torch.softmax(model.head(rows), dim=1) - functional.one_hot(labels, len(terms.task.labels))
    head = torch.cat([(errors[:, :, None] * rows[:, None, :]).flatten(1), errors], dim=1)
    return Gradients(whole=torch.cat(whole), head=head)


def product(left: Tensor, right: Tensor) -> float:
    """The mean row of ``left`` times that of ``right``, each of another half of the rows, both ways."""
    means = [(left[start::2].mean(dim=0), right[1 - start :: 2].mean(dim=0)) for start in (0, 1)]
    return sum(float(a @ b) for a, b in means) / 2


def projected(found: Gradients, factors: Mapping[str, Factors]) -> Tensor:
    """BᵀGAᵀ of every unit and module, ``(units, modules, r, r)``: the gradients of R at scale 1."""
    cores = [torch.from_numpy(b).T @ found.whole[:, place] @ torch.from_numpy(a).T for place, (b, a) in enumerate(factors.values())]
    return torch.stack(cores, dim=1)


def candidates(run: Run, here: Dealt, model: SketchModel, half: Mapping[str, Gradients]) -> dict[str, dict[str, Factors]]:
    """The bases that are judged; ``half``: the gradients that ``raw`` and ``late`` are made of, by that name."""
    vectors, layout = here.terms.adapter.vectors, model.layout
    weights = {name: matrix(layer.base) for name, layer in zip(layout.modules, model.layers, strict=True)}
    found = {
        "weights": {name: basis.weights_basis(weight.double().numpy(), vectors) for name, weight in weights.items()},
        "random": basis_runs.random_of(run, here, 0),
    }
    for name, each in half.items():
        sums = zip(layout.modules, each.whole.sum(dim=0).double().numpy(), strict=True)
        found[name] = {module: basis.weights_basis(summed, vectors) for module, summed in sums}
    return found


def judged(name: str, found: Gradients, cores: Tensor, scale: float, noise: float, rise: Callable[[float], float]) -> Line:
    """The line of one basis at one scale. ``noise``: standard deviation of a round's noise on a coordinate of the mean gradient."""
    r = scale * cores.flatten(1)
    norms = torch.sqrt(r.square().sum(dim=1) + found.head.square().sum(dim=1))
    clip = (defaults.MAX_GRAD_NORM / norms).clamp(max=1.0)[:, None]
    parts = [r, found.head]
    squares = [max(0.0, product(clip * each, clip * each)) for each in parts]
    to_noise = [math.sqrt(square / each.shape[1]) / noise for square, each in zip(squares, parts, strict=True)]
    energy = product(cores.flatten(1), cores.flatten(1)) / found.energy
    return Line(
        basis=name, energy=energy, scale=scale, r_to_noise=to_noise[0], head_to_noise=to_noise[1], rise=rise(scale)
    )  # fmt: skip


def loss(model: classifier.Classifier, units: Sequence[EncodedUnit], terms: Contract) -> float:
    """The mean cross entropy."""
    rows, labels = features(model, units, terms)
    with torch.no_grad():
        return float(functional.cross_entropy(model.head(rows), labels))


def measured(run: Run, scales: Sequence[float], noise_multiplier: float, count: int) -> list[Line]:
    """Every basis at every scale, from ``count`` records."""
    here = basis_runs.dealt(basis_runs.data_of(run))
    names, known = here.terms.adapter.modules, base_model.describe(here.folder).linear
    shapes = [known[name] for name in names]
    layout = sketch.layout(names, shapes, max(map(max, shapes)))
    device, precision = resolve(Compute(precision="auto" if run.precision == "auto" else "float32", device="cpu"))
    model = sketches.build(here.folder, here.terms, layout, precision=precision, device=device)
    first, second, apart = here.train[: count // 2], here.train[count // 2 : count], here.held_out[:count]
    early = gradients(model, first, here.terms)
    head = trained_head(model, first, here.terms)
    refresh.put_head(model, head)
    late, found = (gradients(model, each, here.terms) for each in (first, second))
    spread = defaults.LEARNING_RATE * math.sqrt(run.rounds * 2 / 3)
    noise = noise_multiplier * math.sqrt(basis_runs.SILOS / here.terms.shares) * defaults.MAX_GRAD_NORM / run.batch
    plain, lines = loss(model, apart, here.terms), []
    for name, factors in candidates(run, here, model, {"raw": early, "late": late}).items():
        trained = classifier.build(here.folder, here.terms, precision=precision, device=device, bases=factors)
        drawn = np.random.Generator(np.random.PCG64(run.seed)).standard_normal(trained.adapter.dimension)

        def rise(scale: float, trained: classifier.Classifier = trained, drawn: NDArray[np.float64] = drawn) -> float:
            for layer in trained.adapter:
                layer.scale = scale
            trained.write(np.concatenate([spread * drawn, head]))
            return loss(trained, apart, here.terms) - plain

        cores = projected(found, factors)
        lines += [judged(name, found, cores, scale, noise, rise) for scale in scales]
    return lines


def table(lines: Sequence[Line]) -> list[str]:
    """The lines of a Markdown table."""
    head = ["| basis | energy | scale | R | head | noise |", "|---|---|---|---|---|---|"]
    return head + [
        f"| {line.basis} | {100 * line.energy:.2f} % | {line.scale:g} | {line.r_to_noise:.2f} | {line.head_to_noise:.2f} "
        f"| {line.rise:+.3f} |"
        for line in lines
    ]


def main(words: Sequence[str] | None = None, *, say: Callable[[str], None] = print) -> None:
    """Print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--task", default="ade")
    made.add_argument("--count", type=int, default=1000, help="records whose gradients are taken, half of them for raw and late")
    made.add_argument("--scales", nargs="+", type=float, default=[0.25, 1.0, 4.0, 16.0])
    made.add_argument("--rounds", type=int, default=40)
    made.add_argument("--batch", type=int, default=1000)
    made.add_argument("--noise-multiplier", type=float, default=0.642)
    made.add_argument("--rank", type=int, default=defaults.RANK)
    made.add_argument("--model", default=base_model.MINILM)
    made.add_argument("--precision", default="auto", choices=["auto", "float32"])
    options = made.parse_args(words)
    run = Run(
        data=str(options.data), task=options.task, basis="weights", epsilon=8.0, seed=0, rounds=options.rounds, batch=options.batch,
        records=options.count, rank=options.rank, model=options.model, precision=options.precision,
    )  # fmt: skip
    for line in table(measured(run, options.scales, options.noise_multiplier, options.count)):
        say(line)


if __name__ == "__main__":
    main()
