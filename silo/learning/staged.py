# SPDX-License-Identifier: Apache-2.0
"""A silo's contribution where a basis round comes first: gradient sketches until the factors are fixed, then private steps.

Which of the two a call computes, the state says that it is given. Promised: the part for the next round is built, and passes its
start-up tests, when the process begins; what a call gives has the length and the bound of its kind of round
(``silo.learning.sketch``, ``silo.learning.training``). Not promised: that both fit into memory; the sketch's model is let go first.
"""

from __future__ import annotations

import resource
import time

import numpy as np
from numpy.typing import NDArray

from privacy import basis_round
from privacy.federation import Contract, ring_plan
from privacy.update_rule import State
from silo import fixed_basis, membership, unit_sets
from silo.config import Config
from silo.home import Home
from silo.learning import sketch, training
from silo.learning.sketch import Sketch
from silo.learning.training import Contribution, Timing


class Staged:
    """The callable of ``silo.round`` under a contract with a basis round: a state in, the noiseless integer sum of its round out.

    Args:
        state: where the silo stands: the part for its next round is built at once.

    Raises:
        ConfigError, PrivacyRefusal, MachineError: as ``silo.learning.sketch.sketched`` and ``silo.learning.training.build``.
        TrustError: the factors of the state are not in the home (``silo.fixed_basis``).
    """

    def __init__(self, home: Home, config: Config, terms: Contract, state: State) -> None:
        self._home, self._config, self._terms = home, config, terms
        self._sketch: Sketch | None = None
        self._training: tuple[bytes, Contribution] | None = None
        self.unit_ids = membership.unit_ids(terms, config=config, home=home)
        if state.basis:
            self._steps(state.basis)
        else:
            self._sketches()

    @property
    def basis_digest(self) -> bytes:
        """What silos compare in an epoch's notes while no factors are fixed; afterwards they compare what their states name."""
        return basis_round.pending(self._terms)

    def __call__(self, state: State) -> NDArray[np.int64]:
        """The clamped noiseless sum of the round after ``state``: sketches while it names no factors."""
        if not state.basis:
            return self._sketches()()
        return self._steps(state.basis)(state)

    def dry_run(self, state: State) -> Timing:
        """One call on this silo's own units, whose result is thrown away."""
        if state.basis:
            return self._steps(state.basis).dry_run(state)
        begun = time.perf_counter()
        self(state)
        seconds = time.perf_counter() - begun
        device, precision = training.resolve(self._config.compute)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Timing(
            seconds=seconds, seconds_per_round=seconds, peak_memory_bytes=peak, device=str(device), precision=precision
        )  # fmt: skip

    def _sketches(self) -> Sketch:
        if self._sketch is None:
            at = basis_round.terms_of(self._terms)
            built = sketch.sketched(
                self._home, self._config, self._terms, basis_round.layout_of(at), plan=ring_plan(at),
                max_grad_norm=at.privacy.max_grad_norm,
            )  # fmt: skip
            unit_sets.require_named(built.unit_ids, self.unit_ids)
            self._sketch = built
        return self._sketch

    def _steps(self, digest: bytes) -> Contribution:
        if self._training is None or self._training[0] != digest:
            self._sketch = None
            bases = fixed_basis.load(self._home, digest)
            built = training.build(self._home, self._config, self._terms, bases=bases)
            unit_sets.require_named(built.unit_ids, self.unit_ids)  # the file is read again, later
            self._training = digest, built
        return self._training[1]
