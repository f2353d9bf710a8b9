# SPDX-License-Identifier: Apache-2.0
"""Local mode: a silo's own private training within one round, and what of it is sent.

Each step is a whole private release of its own: a fresh Poisson sample, a clipped integer sum, the full discrete Gaussian and
this silo's own update rule. So the model after the steps, and all that is computed from it, holds the plan's epsilon against
everyone; the secure sum then hides which change was whose. Every step is charged before the first one is computed.

Promised: between a sum and its noise nothing is kept, what is sent is computed from noised sums alone, and the silo's own model
ends with the round: its optimiser is all that is handed on. Not promised: credit for the mean over the silos, or for a step that
was computed and never sent; there is none.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from privacy import update_rule
from privacy.dp import grid, ring
from privacy.federation import Contract, update_grid
from privacy.prg import Randomness
from privacy.update_rule import State
from silo.upload import noisy


def trained(
    shared: State,
    own: State | None,
    terms: Contract,
    *,
    contribute: Callable[[State], NDArray[np.int64]],
    randomness: Callable[[], Randomness],
) -> tuple[NDArray[np.uint32], State]:
    """(x_i ``(d,)``: this silo's change of the shared model as ring words, its own optimiser after the steps).

    Args:
        shared: the state that everybody starts the round from.
        own: this silo's optimiser after the last round it was part of, as it was given here; None before the first.
        contribute: the noiseless integer sum ``(d,)`` of one private step at a state; draws its own fresh sample.
        randomness: gives a fresh source at every call, one for each step's noise.

    Formal guarantees:
        - *One noise per step*: each sum gets a full draw of its own before anything else is done with it; none where the contract
          has no differential privacy (silo.upload.noisy).
        - *Public count*: ``steps_per_round`` steps are run, whatever they find.
        - *Post-processing*: a change beyond ``update_bound`` is cut, and all are rounded, after the last noise was added.
        - *No own model*: the state given back has moments and zeros for θ. θ less the shared one would be x_i without its mask.

    Raises:
        MachineError: a step gave another shape than the contract's.
        RoundError: the silo's own model is not finite; nothing is sent, and the attempt stays charged.
    """
    state = msgspec.structs.replace(own or update_rule.initial(terms), theta=shared.theta, basis=shared.basis)
    for _ in range(terms.training.steps_per_round):
        total = ring.lift(noisy(contribute(state), terms, randomness()))
        state = update_rule.step(state, total, terms, applied=shared.applied)
    x = grid.encode(state.theta - shared.theta, update_grid(terms))
    return x, msgspec.structs.replace(state, theta=np.zeros_like(shared.theta))
