# SPDX-License-Identifier: Apache-2.0
"""A unit in several places: known to up to m silos, or a person with k records where the unit is one record.

What is hidden is then more than one clipped vector. This module says which mechanism such a unit is exposed to; the figure is that
of the accountants, as for any other (docs/concepts/privacy.md, "A unit in several places").

**Formal guarantees**

- *One is unchanged*: one silo and one record give back the same mechanism, so the same figure to the last bit.
- *Together*: contributions to one sum are m coins and one noise: N(J, z^2), J from Binomial(m, q), at the same z.
- *Apart*: uploads that are read one by one are m releases, each with noise of its own.
- *Never less*: more silos or records never cost less, and together never less than apart; where it is not known, together counts.

=============================  ============================================
edge case                      result
=============================  ============================================
a mechanism without noise      itself: its epsilon is infinite anyway
k records, each in m silos     k·m contributions together; m releases of k
fewer than one                 ``PrivacyRefusal``
=============================  ============================================

Not promised: that the contract's m is right. Nothing here compares the silos' units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from privacy.dp import unprotected
from privacy.dp.accounting import Certificate
from privacy.dp.mechanism import LatticeGaussian, LatticeMixture, Mechanism, Noised, Unprotected
from privacy.errors import NotCertified, PrivacyRefusal

RECORDS = (2, 4, 8)
"""Of a person with so many records a figure is stated where the unit is one record."""
SILOS = 2
"""Of a unit in so many silos a figure is stated where the contract assumes that it is in one."""


def exposure(event: Noised, *, silos: int = 1, records: int = 1, together: bool = True) -> Noised:
    """``event`` as a unit is exposed to it that ``silos`` silos know, each with ``records`` records of it.

    Args:
        together: the silos' contributions meet in one sum before anybody reads it; else each silo's upload is read by itself.

    Formal guarantees: see the module docstring.

    Raises:
        PrivacyRefusal: fewer than one silo or record.
    """
    if silos < 1 or records < 1:
        raise PrivacyRefusal(f"{silos} silos and {records} records of a unit", hint="each is at least 1")
    summed, releases = (silos * records, 1) if together else (records, silos)
    if isinstance(event, LatticeMixture):
        summed, releases, event = summed * event.contributions, releases * event.releases, event.once
    if summed * releases == 1:
        return event
    fields = {name: getattr(event, name) for name in LatticeGaussian.__struct_fields__}
    return LatticeMixture(**fields, contributions=summed, releases=releases)


def exposed(events: Sequence[Mechanism], *, silos: int = 1, records: int = 1, together: bool = True) -> tuple[Mechanism, ...]:
    """``exposure`` of each; one without noise stays as it is."""
    return tuple(
        each if isinstance(each, Unprotected) else exposure(each, silos=silos, records=records, together=together)
        for each in events
    )


def certify_for(
    events: Sequence[Mechanism], delta: float, *, silos: int = 1, records: int = 1, together: bool = True, order: int | None = None
) -> Certificate:
    """The cost of ``events`` to a unit that ``silos`` silos know, each with ``records`` records of it.

    Args:
        order: None for parameters fixed in advance, else the filter's, as ``unprotected.certify`` has it.

    Raises:
        NotCertified, PrivacyRefusal: as ``privacy.dp.accounting``.
    """
    return unprotected.certify(exposed(events, silos=silos, records=records, together=together), delta, order=order)


def epsilon_for(
    events: Sequence[Mechanism], delta: float, *, silos: int = 1, records: int = 1, together: bool = True, order: int | None = None
) -> float | None:
    """Epsilon of ``certify_for``, to be shown beside the guarantee; None where no finite figure is certified."""
    try:
        found = certify_for(events, delta, silos=silos, records=records, together=together, order=order).epsilon
    except NotCertified:
        return None
    return found if math.isfinite(found) else None
