# SPDX-License-Identifier: Apache-2.0
"""What a report says of the basis: where the frozen factors come from, what that released, and what it cost.

Promised: a basis from records is never called free; its cost is a figure of ``privacy.spending`` like every other. Not promised:
that it was worth it.
"""

from __future__ import annotations

from privacy import basis_round, federation
from privacy.dp import unprotected
from privacy.federation import Contract

Row = tuple[str, str, int | float | str, str]

_MEANINGS = {
    "weights": "computed from the public base model alone; it costs no privacy",
    "random": "drawn from a public seed; it costs no privacy",
    "public": "computed by the coordinator from gradients of a public data set; it costs no privacy",
    "private": "computed from one noisy sum of gradient sketches over all units, released before training; part of ε",
    "raw": "computed from the EXACT sum of gradient sketches over all units: NO NOISE, and no figure holds",
}


def rows(terms: Contract) -> list[Row]:
    """The basis among the parameters, and those of its round where it has one."""
    own: list[Row] = [("basis", "", terms.adapter.basis, _MEANINGS[terms.adapter.basis])]
    if (public := terms.public_basis) is not None:
        return [
            *own,
            ("basis: data set", "", public.data, "what the data set is called; no record of a silo has a part in it"),
            ("basis: file of the data set", "", public.data_digest, "SHA-256 of the file whose records were used"),
            ("basis: factors", "", public.digest, "digest of B and A, to which every silo holds its own copy"),
            ("basis: sketch width", "l", public.width, "columns of each sketch of a layer’s gradient"),
            ("basis: max grad norm", "C₀", public.max_grad_norm, "a record’s sketches of all layers together are clipped to it"),
        ]
    if terms.basis is None:
        return own
    at = basis_round.terms_of(terms)
    plan = federation.ring_plan(at)
    own += [
        ("basis: sketch width", "l", terms.basis.width, "columns of each sketch of a layer’s gradient"),
        ("basis: numbers released", "", at.dimension, "the length of what a silo sends in the basis round"),
        ("basis: sampling rate", "q₀", 1.0, "every unit enters, once"),
        ("basis: max grad norm", "C₀", at.privacy.max_grad_norm, "a unit’s sketches of all layers together are clipped to it"),
        ("basis: lattice bits", "p₀", plan.lattice_bits, "C₀ is 2 to this power steps of the lattice of that round"),
        ("basis: rounds paid for", "", terms.basis.attempts, "a basis round without a sum is charged and run again"),
    ]
    if terms.is_private:
        own += [
            ("basis: noise multiplier", "σ₀", at.privacy.noise_multiplier, "the noise of that sum, in units of C₀"),
            ("basis: noise of one silo", "s₀²", plan.share_variance, "variance parameter of its share, in lattice steps squared"),
        ]
    return own


def left(terms: Contract) -> list[tuple[str, str, str]]:
    """(what, form, reader) of what a basis round sends out of a site."""
    if terms.basis is None:
        return []
    numbers, noise = basis_round.terms_of(terms).dimension, "plus noise" if terms.is_private else "exactly, WITHOUT NOISE"
    what = f"in the basis round one vector of {numbers:,} integers: clipped gradient sketches, summed over all units, {noise}"
    return [(what, "masked, sealed, signed", "nobody alone; everybody reads the sum over the silos")]


def in_composition(terms: Contract) -> str:
    """What the basis adds to the figures."""
    if (public := terms.public_basis) is not None:
        return (
            f"The basis “public” is computed from the data set {public.data} alone and spends nothing; that it is public is the "
            "coordinator’s word, and whoever has the file can make it again. "
        )
    if terms.basis is None:
        return f"The basis “{terms.adapter.basis}” is computed from public things alone and spends nothing. "
    if not terms.is_private:
        return "The basis “raw” is computed from an exact sum over the records that everybody saw. "
    alone = federation.event(basis_round.terms_of(terms)).with_steps(1)
    spent = unprotected.certify([alone], terms.privacy.delta).epsilon
    return (
        f"The basis “private” was, or will be, released by a basis round before the first training round: one more event, "
        f"with ε = {spent:.3f} at the same δ if it stood alone. Every figure here includes it; the events are composed, and their "
        "epsilons do not add. "
    )
