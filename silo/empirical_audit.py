# SPDX-License-Identifier: Apache-2.0
"""``silo audit``: the contract of a silo in, a finding and its picture out. ``silo.learning.canary`` and ``.shadows`` run it.

Promised: only the contract is read, and the base model with the held-out records where such are named: neither the silo's own
records nor its ledger; nothing is changed but the picture asked for.
Not to be mixed up with ``silo.auditing``, which checks the sums of others in a round.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from privacy import files
from privacy.errors import PrivacyRefusal
from silo import agreed_basis, reading, succession

if TYPE_CHECKING:
    from silo.config import Config
    from silo.home import Home
    from silo.learning.shadows import Subject
from silo.settlement import load_progress


def audit(root: Path, *, canaries: int, steps: int | None, directions: str, plot: Path | None) -> dict[str, Any]:
    """What a one-run audit of the silo's contract finds; with ``plot`` the scores as SVG in that file, which is replaced.

    Args:
        directions: "dirac" or "random".

    Raises:
        ConfigError: the silo has joined nothing, or the audit does not fit the contract.
        PrivacyRefusal: the contract adds no noise.
    """
    from silo.learning import canary, score_plot

    home, _ = reading.opened(root)
    terms = succession.at_work(home)[0].terms
    chosen = cast(Literal["dirac", "random"], directions)
    finding = canary.audit(terms, canaries=canaries, steps=steps, directions=chosen)
    facts = canary.as_facts(finding, terms)
    if plot is not None:
        lines = (
            f"Audit of {terms.name}: {len(finding.run.included)} canaries, {finding.run.steps} steps",
            f"epsilon: at least {max(finding.bound, finding.bound_family):.2f} (95 %), accountant: at most {finding.claimed:.2f}",
        )
        files.write_atomic(plot, score_plot.picture(finding.run.likelihood, finding.run.included, lines).encode())
        facts["plot"] = str(plot)
    return facts


def membership(
    root: Path, *, runs: int, steps: int | None, records: Path | None, plot: Path | None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """What a membership attack finds on the silo's mechanism; with ``plot`` its curve as SVG in that file, which is replaced.

    The picture of held-out records is for this user alone (mode 0600).

    Args:
        runs: shadow runs, and as many attacked ones; twice as many again are the control.
        records: held-out records to attack instead of made-up ones; their figures are exact and stay here.

    Raises:
        ConfigError: the silo has joined nothing, or the attack does not fit.
        PrivacyRefusal: the contract adds no noise, or ``records`` are the silo's own training records.
        NotCertified: as ``silo.learning.shadows.audit``.
    """
    from silo.learning import shadow_plot, shadows

    home, settings = reading.opened(root)
    terms = succession.at_work(home)[0].terms
    if not terms.is_private:
        raise PrivacyRefusal("this contract adds no noise", hint="there is no epsilon to audit", code="no-noise")
    taken = min(terms.steps, shadows.MOST_STEPS if steps is None else steps)
    subject = (
        shadows.made_up(terms, units=shadows.UNITS, steps=taken)
        if records is None
        else _held_out(home, settings, records, taken)
    )
    finding = shadows.audit(subject, runs=runs, progress=progress)
    facts = {**shadows.as_facts(finding), "steps_planned": terms.steps, "records": "made up" if records is None else "held out"}
    if plot is not None:
        lines = (
            f"Who was in the data? {terms.name}: {finding.units} {facts['records']} units, {finding.steps} steps",
            f"{finding.runs} attacked runs, noise as insiders face it; epsilon {finding.claimed:.2f} at delta {finding.delta:g}",
        )
        mode = files.PUBLIC if records is None else files.PRIVATE
        files.write_atomic(plot, shadow_plot.picture(finding, lines).encode(), mode=mode)
        facts["plot"] = str(plot)
    return facts


def _held_out(home: Home, settings: Config, path: Path, steps: int) -> Subject:
    """The held-out units in ``path`` by their features. Raises PrivacyRefusal when it is the file the silo trains on."""
    from silo.learning import evaluation, records, shadows, tokens

    own = Path(settings.records.path)
    if own.exists() and path.exists() and own.samefile(path):
        raise PrivacyRefusal(
            f"{path} is the file this silo trains on", hint="name held-out records: nothing here is charged", code="own-records"
        )
    accepted = succession.at_work(home)[0]
    terms, bases = accepted.terms, agreed_basis.of(home, accepted.terms, load_progress(home, accepted).state)
    bench = evaluation.open_bench(terms, model=settings.model.path, compute=settings.compute, bases=bases)
    units = records.load(path, terms.task, terms.privacy, selection_key=home.selection_key)
    return shadows.of_records(terms, evaluation.pool_features(bench, tokens.encode(units, bench.folder, terms.task)), steps=steps)
