# SPDX-License-Identifier: Apache-2.0
"""What ``aggregator plan`` is asked by a draft: the question whose answer ``aggregator sign`` would write into it.

Promised: every figure of the draft on which its noise depends is taken, open places are open here too, and the basis round is in
the plan where the draft has one. Not promised: that the draft can be signed; of the rest of it nothing is looked at. Of a
contract's later version the rounds are those that it states, whatever was opened before.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from aggregator import enrolment
from aggregator.draft import AUTO, CALIBRATE
from aggregator.planning import BasisRound, Question
from privacy import basis_round
from privacy.errors import ConfigError, PrivacyRefusal
from privacy.federation import Contract


def question(path: Path, *, rounds: int | None = None, silos: int | None = None) -> Question:
    """The question of the draft, or signed contract, in ``path``.

    Args:
        rounds: training rounds, instead of the draft's.
        silos: how many take part, instead of the members that it has so far.

    Raises:
        ConfigError: it cannot be read, says what no contract may, or has too few members and nothing was said of how many.
        PrivacyRefusal: it has no differential privacy.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="name a draft or a federation.toml", code="no-draft") from error
    terms = enrolment.raw_terms(text)
    if not terms.is_private:
        raise PrivacyRefusal(
            "this draft has no differential privacy: there is no noise to plan",
            hint="it has no epsilon", code="no-differential-privacy",
        )  # fmt: skip
    count = terms.silos if silos is None else silos
    if count <= terms.privacy.colluders:
        raise ConfigError(
            f"the draft has {terms.silos} members and expects {terms.privacy.colluders} colluders",
            hint="say how many silos there will be: --silos N", code="plan",
        )  # fmt: skip
    stated, private = tomllib.loads(text), terms.privacy
    calibrated = stated["privacy"]["noise_multiplier"] == CALIBRATE
    return Question(
        epsilon=private.epsilon if calibrated else None, noise_multiplier=None if calibrated else private.noise_multiplier,
        delta=private.delta, sampling_rate=private.sampling_rate, units=private.units, dimension=terms.dimension, silos=count,
        steps=(terms.training.rounds if rounds is None else rounds) * terms.training.steps_per_round,
        steps_per_round=terms.training.steps_per_round, local=terms.is_local, colluders=private.colluders,
        dropouts=terms.sum.dropouts if terms.shared else 0, max_silos_per_unit=private.max_silos_per_unit,
        lattice_bits=None if stated["privacy"]["lattice_bits"] == AUTO else private.lattice_bits,
        basis=_basis(terms, is_open=terms.basis is not None and stated["basis"]["lattice_bits"] == AUTO),
    )  # fmt: skip


def _basis(terms: Contract, *, is_open: bool) -> BasisRound | None:
    if terms.basis is None:
        return None
    return BasisRound(
        dimension=basis_round.layout_of(terms).dimension, noise_multiplier=terms.basis.noise_multiplier,
        attempts=terms.basis.attempts, lattice_bits=None if is_open else terms.basis.lattice_bits,
    )  # fmt: skip
