# SPDX-License-Identifier: Apache-2.0
"""``silo audit``: the contract of a silo in, a finding and its picture out. ``silo.learning.canary`` runs it.

Promised: only the contract is read: neither records nor base model nor ledger; nothing is changed but the picture asked for.
Not to be mixed up with ``silo.auditing``, which checks the sums of others in a round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from privacy import files
from silo import reading, succession


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
