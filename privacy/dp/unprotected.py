# SPDX-License-Identifier: Apache-2.0
"""What mechanisms come to when one of them may have no noise: infinite then, and else what the accountants say.

Everything that asks about a *ledger* asks here, for a ledger may hold a run without differential privacy beside others.

**Formal guarantees**

- *Infinite composes*: with one ``Unprotected`` among them the epsilon of any mechanisms is infinite, in whatever order they were
  run and however little the others cost. Nothing that is charged later makes it finite again.
- *Never asked*: no accountant is called with a mechanism that has no noise; there is no NaN and no overflow to fear.
- *Otherwise untouched*: without such a one the result is that of ``privacy.dp.accounting``, the same object.

Epsilon belongs to units: an infinite charge says nothing about units that no such run ever drew from. No credit is taken for
that: a silo's figure is that of its most spent unit (``privacy.dp.overlap``), so it is infinite with one such run on the ledger,
whoever the others drew. Records that no such run used belong into a silo of their own, with its own ledger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from privacy.dp import accounting
from privacy.dp.accounting import Certificate
from privacy.dp.mechanism import Mechanism, Noised, Unprotected

IN_WORDS: Final = "none: no differential privacy"
"""What stands where an epsilon would stand."""


def noised(events: Sequence[Mechanism]) -> list[Noised] | None:
    """The events as the accountants take them; None when one of them has no noise: then there is no figure to ask for."""
    found = [event for event in events if not isinstance(event, Unprotected)]
    return found if len(found) == len(events) else None


def certify(events: Sequence[Mechanism], delta: float, *, order: int | None = None) -> Certificate:
    """The cost of all ``events`` together; see the module docstring.

    Args:
        order: None for parameters fixed in advance (``accounting.certify``), else the filter's (``certify_adaptive``).

    Raises:
        NotCertified, PrivacyRefusal: as ``privacy.dp.accounting``.
    """
    found = noised(events)
    if found is None:
        return Certificate(
            epsilon=math.inf, epsilon_pld=math.inf, epsilon_rdp=math.inf, delta=delta, discretization=0.0, orders_checked=0
        )
    return accounting.certify(found, delta) if order is None else accounting.certify_adaptive(found, delta, order=order)


def figure(epsilon: float) -> float | None:
    """An epsilon for a JSON document, which has no infinity: None where there is no differential privacy."""
    return epsilon if math.isfinite(epsilon) else None


def in_words(epsilon: float | None, form: str = ".4g") -> str:
    """An epsilon for people: the number in ``form``, or ``IN_WORDS``."""
    return IN_WORDS if epsilon is None or not math.isfinite(epsilon) else format(epsilon, form)
