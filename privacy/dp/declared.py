# SPDX-License-Identifier: Apache-2.0
"""A plan that was declared in advance: training rounds, and the basis rounds before them where there are some.

**Formal guarantees**

- *Two mechanisms, one bound*: ``accounting.certify`` of ``rest`` of an empty ledger bounds every run under the plan. The plan is
  the basis rounds and then the training rounds, each fixed before the first; a run leaves some out: a slot without a release.
- *Never more than declared*: no more basis rounds and no more training steps than the plan has are ``left``, whatever was run.
- *One kind of unit*: ``require_same_unit`` lets no two kinds compose. A patient may have many records, and a record more or
  less may move a patient's clipped sum by twice the clip: an epsilon of the one is none of the other, and nothing converts them.
- *Over is over*: once a basis round ended with a result, or a training step is charged, no basis round is left.

Not here: whether the silo's limits allow it (``privacy.dp.budget``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from privacy.dp.entries import Body, Commit, Plan, Reserve
from privacy.dp.mechanism import Mechanism
from privacy.errors import PrivacyRefusal


def require_same_unit(entries: Sequence[Body], contract: str, unit: str | None) -> None:
    """Return if no other run that is charged protects another kind of unit, as far as plans say it; None: nothing is said.

    Raises:
        PrivacyRefusal: one does; whoever they drew, for ids of two kinds cannot be compared.
    """
    charged = {body.contract for body in entries if isinstance(body, Reserve)} - {contract}
    kinds = {body.unit for body in entries if isinstance(body, Plan) and body.contract in charged and body.unit is not None}
    if unit is not None and (others := kinds - {unit}):
        raise PrivacyRefusal(
            f"this ledger has charges for the unit {min(others)!r}, the plan is for {unit!r}: their epsilons do not compose",
            hint="agree on one unit; or use records that no such run used, as a silo of their own, with its own ledger",
            code="other-unit",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The plan of one contract for one silo.

    Args:
        contract: hex digest of the contract.
        training: the mechanism of all training steps.
        each: how many of them one attempt at a training round is charged for.
        before: the mechanism of all basis rounds that the plan pays for, one step each; None where there are none.
    """

    contract: str
    training: Mechanism
    each: int
    before: Mechanism | None = None

    def one(self, *, basis: bool) -> Mechanism:
        """What one attempt at a round is charged. Raises PrivacyRefusal for a basis round that the plan does not have."""
        if not basis:
            return self.training.with_steps(self.each)
        if self.before is None:
            raise PrivacyRefusal("the plan has no basis round", hint="declare the plan first", code="plan-missing")
        return self.before.with_steps(1)

    def used(self, entries: Sequence[Body], *, basis: bool) -> int:
        """How many steps of this kind are charged under the contract; what is no basis round counts as training."""
        first = None if self.before is None else self.before.with_steps(1)
        charged = [body.mechanism for body in entries if isinstance(body, Reserve) and body.contract == self.contract]
        return sum(event.steps for event in charged if (event.with_steps(1) == first) == basis)

    def left(self, entries: Sequence[Body], *, basis: bool) -> int:
        """How many steps of this kind may still be charged."""
        if not basis:
            return max(0, self.training.steps - self.used(entries, basis=False))
        released = any(isinstance(body, Commit) and body.contract == self.contract for body in entries)
        if self.before is None or released or self.used(entries, basis=False):
            return 0
        return max(0, self.before.steps - self.used(entries, basis=True))

    def attempts_left(self, entries: Sequence[Body]) -> int:
        """How many rounds may still come if no further one is void: a basis round while it is missing, and the training rounds."""
        return min(1, self.left(entries, basis=True)) + self.left(entries, basis=False) // self.each

    def rest(self, entries: Sequence[Body]) -> list[Mechanism]:
        """Everything that may still be charged."""
        before, more = self.left(entries, basis=True), self.left(entries, basis=False)
        return [*self._before(before), *([self.training.with_steps(more)] if more else [])]

    def ahead(self, entries: Sequence[Body], attempts: int) -> list[Mechanism]:
        """The next so many rounds, none of them void: the basis round while it is missing, then training rounds."""
        first = min(1, attempts, self.left(entries, basis=True))
        more = (attempts - first) * self.each
        return [*self._before(first), *([self.training.with_steps(more)] if more else [])]

    def is_on(self, plan: Plan | None) -> bool:
        """Whether this very plan stands on a ledger."""
        return plan is not None and (plan.mechanism, plan.before) == (self.training, self.before)

    def _before(self, steps: int) -> list[Mechanism]:
        return [self.before.with_steps(steps)] if self.before is not None and steps else []
