# SPDX-License-Identifier: Apache-2.0
"""The contract of a federation: ``federation.toml``, the same bytes for every party.

Its digest, the SHA-256 of the exact bytes, is bound into every key, mask and signature of the protocol: a silo that
trained on other terms cannot be summed. Signatures are detached: the coordinator signs the bytes, every member
countersigns them. Everything on which epsilon or the next model depends stands here; what a silo may choose for itself
(device, precision, microbatch) stands in ``silo.toml`` and cannot touch either.

Numbers are decimal text read by ``float()`` (tomllib), so the same bytes give the same floats everywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import msgspec

from privacy import basis_round
from privacy.contract import (
    GUARDIANS_FROM,
    Adapter,
    Aggregator,
    Basis,
    Contract,
    Guardian,
    Hex32,
    Member,
    Model,
    Name,
    Positive,
    Privacy,
    PublicBasis,
    Signer,
    Sum,
    Table,
    Task,
    Text,
    Training,
)
from privacy.contract import contradiction as _contradiction
from privacy.dp import grid, groups, ring
from privacy.dp.mechanism import MOST_CONTRIBUTIONS, MOST_STEPS, LatticeGaussian, Mechanism, Noised, Unprotected
from privacy.dp.mechanism import adversaries as of_a_sum
from privacy.errors import ConfigError, PrivacyRefusal
from privacy.secure_sum.shamir import MOST_SHARES
from privacy.task import check_task

__all__ = [
    "GUARDIANS_FROM", "Accepted", "Adapter", "Aggregator", "Basis", "Contract", "Guardian", "Hex32", "Member", "Model", "Name",
    "Positive", "Privacy", "PublicBasis", "Signer", "Sum", "Table", "Task", "Text", "Training", "adversaries", "before_training",
    "event", "exposure", "exposures", "mechanism", "parse", "ring_plan", "ring_plan_at", "update_grid", "whole_plan",
]  # fmt: skip


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """A contract together with the exact bytes it was read from and their digest."""

    terms: Contract
    raw: bytes
    digest: bytes

    def at(self, basis: bytes) -> Accepted:
        """This contract as it governs the round after a state that names the factors ``basis``: b"" while none are fixed."""
        return self if self.terms.basis is None or basis else self._basis_round

    def in_round(self, dimension: int) -> Accepted:
        """This contract as it governs a round whose manifest states vectors of this length (``_check_basis``: it says which)."""
        return self if self.terms.basis is None or dimension == self.terms.trainables else self._basis_round

    @property
    def _basis_round(self) -> Accepted:
        return msgspec.structs.replace(self, terms=basis_round.terms_of(self.terms))


def parse(raw: bytes) -> Accepted:
    """The contract in ``raw``, checked against every rule that needs no other file.

    Raises:
        ConfigError: not TOML, an unknown or missing key, a value out of range, or terms that contradict each other.
    """
    try:
        terms = msgspec.toml.decode(raw, type=Contract)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(
            f"federation.toml: {error}", hint="compare with the commented draft that `aggregator init` writes", code="contract"
        ) from error
    _check_words(terms)
    _check_suite(terms)
    _check_members(terms)
    _check_off(terms)
    _check_sum(terms)
    check_task(terms)
    _check_terms(terms)
    _check_basis(terms)
    return Accepted(terms=terms, raw=raw, digest=hashlib.sha256(raw).digest())


def ring_plan(terms: Contract) -> ring.Plan:
    """The integer plan of one private step: p, s², clamp Q and noise head-room, refused when anything could overflow.

    Raises:
        ConfigError: the terms do not fit the ring.
    """
    return ring_plan_at(terms, noise_multiplier=terms.privacy.noise_multiplier, lattice_bits=terms.privacy.lattice_bits)


def ring_plan_at(terms: Contract, *, noise_multiplier: float, lattice_bits: int | None) -> ring.Plan:
    """``ring_plan`` with another σ and p than the contract's; p is the finest that fits where it is None."""
    return ring.plan(
        silos=terms.summed,
        shares=terms.shares,
        dimension=terms.dimension,
        sampling_rate=terms.privacy.sampling_rate,
        units=terms.privacy.units,
        noise_multiplier=noise_multiplier,
        lattice_bits=lattice_bits,
    )


def update_grid(terms: Contract) -> grid.Grid:
    """How a silo's change of the model is written into the ring in local mode."""
    return grid.finest(silos=terms.silos, bound=terms.training.update_bound)


def mechanism(terms: Contract, *, shares: int | None = None, rounds: int | None = None) -> LatticeGaussian:
    """What ``rounds`` rounds release, against an adversary that faces ``shares`` noise shares (default: the plan's T and h).

    In local mode a silo is charged its own steps alone: nothing is taken off for the mean, for other silos' noise or for masks.

    Raises:
        PrivacyRefusal: the contract has no differential privacy; ``event`` is what a ledger is told then.
    """
    if not terms.is_private:
        raise PrivacyRefusal(
            "this contract has no differential privacy: no accountant can be asked about it",
            hint="there is no epsilon to compute", code="no-differential-privacy",
        )  # fmt: skip
    plan = ring_plan(terms)
    return LatticeGaussian(
        sampling_rate=terms.privacy.sampling_rate,
        lattice_bits=plan.lattice_bits,
        share_variance=plan.share_variance,
        shares=terms.shares if shares is None else shares,
        dimension=terms.dimension,
        steps=terms.steps if rounds is None else rounds * terms.training.steps_per_round,
    )


def event(terms: Contract, *, rounds: int | None = None) -> Mechanism:
    """What a silo's ledger is charged for ``rounds`` rounds (default: the plan): ``exposure``, or that there is no noise."""
    if terms.is_private:
        return exposure(terms, mechanism(terms, rounds=rounds))
    return Unprotected(
        sampling_rate=terms.privacy.sampling_rate,
        lattice_bits=ring_plan(terms).lattice_bits,
        dimension=terms.dimension,
        steps=terms.steps if rounds is None else rounds * terms.training.steps_per_round,
    )


def exposure(terms: Contract, event: LatticeGaussian, *, apart: bool = False, silos: int = 1, records: int = 1) -> Noised:
    """``event`` as a unit is exposed to it that ``max_silos_per_unit`` silos know: the figure of the guarantee is of this.

    Args:
        apart: whoever it is reads the uploads one by one, as everybody may in local mode, where each holds its noise in full.
        silos: of a unit in so many silos, where that is more than the contract says.
        records: of a person with so many units in each of them.

    Formal guarantees: with one silo and one record it is ``event`` itself (``privacy.dp.groups``).
    """
    known = max(silos, terms.privacy.max_silos_per_unit)
    return groups.exposure(event, silos=known, records=records, together=not (apart or terms.is_local))


def whole_plan(terms: Contract) -> tuple[Mechanism, ...]:
    """Everything a contract declares, fixed in advance: the basis rounds where it has some, then the training rounds.

    **Formal guarantees**: a run under the contract is these mechanisms, some left out: ``accounting.certify`` of all bounds it.
    """
    return (*before_training(terms), event(terms))


def before_training(terms: Contract) -> tuple[Mechanism, ...]:
    """The basis rounds that a contract pays for, as one mechanism; nothing where there are none."""
    return () if terms.basis is None else (event(basis_round.terms_of(terms)),)


def exposures(terms: Contract, *, standing: int | None = None, rounds: int | None = None) -> dict[str, Noised]:
    """``adversaries``, each as a unit is exposed to it that ``max_silos_per_unit`` silos know."""
    seen = adversaries(terms, standing=standing, rounds=rounds)
    return {name: exposure(terms, each, apart=name == "sum_broken") for name, each in seen.items()}


def adversaries(terms: Contract, *, standing: int | None = None, rounds: int | None = None) -> dict[str, LatticeGaussian]:
    """The plan as three adversaries see it, by name; see ``privacy.dp.mechanism.adversaries``.

    In local mode all three face one silo's noise in full: what a silo releases is private before it is summed.

    Args:
        standing: how many silos stood in the sums, for rounds that are over; None for the fewest that ever do.
        rounds: how many rounds; None for the whole plan.
    """
    event = mechanism(terms, rounds=rounds)
    if terms.is_local:
        return dict.fromkeys(("outside", "insiders", "sum_broken"), event)
    return of_a_sum(event, silos=terms.fewest if standing is None else standing, colluders=terms.privacy.colluders)


def _check_words(terms: Contract) -> None:
    """Every text in the contract is printable: a line break or an escape code could forge what a person compares."""
    words = [terms.model.name, terms.privacy.unit, *terms.task.labels, *terms.adapter.modules]
    words += [terms.public_basis.data] if terms.public_basis is not None else []
    words += [member.organisation for member in terms.member] + [guardian.organisation for guardian in terms.guardian]
    for word in words:
        if not word.isprintable():
            raise _contradiction(f"{word!a:.80} has characters that are not printable", "names and labels are plain words")


def _check_members(terms: Contract) -> None:
    ids = [member.id for member in terms.member]
    if ids != sorted(set(ids)):
        raise _contradiction("member ids must be distinct and ascending", f"found {ids}")
    _check_apart("members", terms.member, "name", "sign_key", "ml_dsa_key")
    fewest = 2 if terms.sum.two_silos_see_each_other else 3
    if terms.silos < fewest:
        raise _contradiction(f"{terms.silos} members", f"a sum hides nobody below {fewest}")
    if terms.sum.two_silos_see_each_other and terms.silos != 2:
        raise _contradiction(f"two_silos_see_each_other with {terms.silos} members", "it is for exactly two")
    if terms.silos < terms.privacy.colluders + 2 and not terms.sum.two_silos_see_each_other:
        raise _contradiction(f"colluders = {terms.privacy.colluders}, {terms.silos} members", "at least colluders + 2 are needed")
    if terms.silos <= terms.privacy.colluders:
        raise _contradiction(f"colluders = {terms.privacy.colluders} with {terms.silos} members", "no honest noise share is left")


def _check_apart(who: str, parties: Sequence[Signer], *fields: str) -> None:
    for field in fields:
        values = [value for party in parties if (value := getattr(party, field))]
        if len(set(values)) != len(values):
            raise _contradiction(f"two {who} share one {field}", ", ".join(sorted(set(values)))[:200])


def _check_off(terms: Contract) -> None:
    """With noise every figure of the guarantee is stated; without it none is, and the members stand in blocks.

    **Formal guarantees** of a contract without differential privacy that parses: it says so in words, it has neither noise nor
    epsilon nor delta, and it has a partition of the members into blocks of at least u_min (``_check_blocks``). So every sum of
    released ones, with whatever factors, has the same factor for all silos of a block: none holds fewer than u_min silos.
    """
    figures = ("noise_multiplier", "epsilon", "delta")
    if terms.is_private:
        for name in figures:
            if not getattr(terms.privacy, name):
                raise _contradiction(f"Object missing required field `{name}` - at `$.privacy`", "with noise it must be stated")
        return
    if given := [name for name in figures if getattr(terms.privacy, name)]:
        raise _contradiction(f"privacy.off with {', '.join(given)}", "there is no noise, and no figure holds")
    if not terms.sum.blocks:
        raise _contradiction(
            "no differential privacy, and no sum.blocks", "without noise sums of overlapping sets give one silo away"
        )
    if terms.sum.two_silos_see_each_other:
        raise _contradiction("no differential privacy among two silos", "each would read the other's sum of gradients")


def _check_sum(terms: Contract) -> None:
    """Consent mode has nothing of share mode; share mode has guardians, and thresholds at which it hides and ends."""
    if not terms.shared:
        theirs = ("dropouts", "corrupt_guardians", *(("blocks",) if terms.is_private else ()))
        given = [name for name in theirs if getattr(terms.sum, name)]
        given += ["guardian"] if terms.guardian else []
        if given:
            raise _contradiction(f"protocol = consent with {', '.join(given)}", 'these belong to protocol = "shares"')
        _check_blocks(terms)
        return
    t_d, t_c = terms.sum.dropouts, terms.privacy.colluders
    if terms.sum.two_silos_see_each_other:
        raise _contradiction("two_silos_see_each_other with protocol = shares", "it is for consent mode")
    if t_d >= terms.silos:
        raise _contradiction(f"dropouts = {t_d} with {terms.silos} members", "somebody must stay")
    if terms.fewest < t_c + 2:
        raise _contradiction(
            f"a sum of {terms.fewest} silos with colluders = {t_c}", "colluders + 2 must stand in every sum: fewer dropouts"
        )
    _check_guardians(terms)
    _check_blocks(terms)


def _check_guardians(terms: Contract) -> None:
    ids, count, corrupt = [guardian.id for guardian in terms.guardian], len(terms.guardian), terms.sum.corrupt_guardians
    if ids != sorted(set(ids)):
        raise _contradiction("guardian ids must be distinct and ascending", f"found {ids}")
    if not 3 <= count <= MOST_SHARES:
        raise _contradiction(f"{count} guardians", f"share mode has 3 to {MOST_SHARES}")
    if corrupt >= count:
        raise _contradiction(f"corrupt_guardians = {corrupt} of {count}", "one guardian must be honest")
    _check_apart("guardians", terms.guardian, "name", "sign_key", "ml_dsa_key", "organisation")
    keys = ("sign_key",) if terms.signatures == "ed25519" else ("sign_key", "ml_dsa_key")
    for guardian in terms.guardian:
        if any(getattr(guardian, key) == getattr(terms.aggregator, key) for key in keys):
            raise _contradiction(f"guardian {guardian.name} has the aggregator's key", "a guardian is another party")
        for member in terms.member:
            same = [getattr(guardian, field) == getattr(member, field) for field in ("name", *keys)]
            if any(same) and not (all(same) and guardian.organisation == member.organisation):
                raise _contradiction(
                    f"guardian {guardian.name} and silo {member.name} share a name or a key, and not all of them",
                    "a guardian that is part of a silo has its name, organisation and keys; another one has none of them",
                )
    # An organisation with a silo and a guardian of other keys is one adversary, and one that drops out, all the same.
    together = {guardian.organisation for guardian in terms.guardian} & {member.organisation for member in terms.member}
    if together and terms.sum.dropouts > count - terms.quorum:
        raise _contradiction(
            f"dropouts = {terms.sum.dropouts}, and {count} guardians of which {terms.quorum} are needed",
            "silos that are guardians drop out as both: at most as many as guardians can be spared",
        )
    if together and corrupt < terms.privacy.colluders:
        raise _contradiction(
            f"corrupt_guardians = {corrupt}, colluders = {terms.privacy.colluders}", "silos that are guardians collude as both"
        )


def _check_blocks(terms: Contract) -> None:
    if not terms.sum.blocks:
        return
    listed = sorted(silo for block in terms.sum.blocks for silo in block)
    if listed != [member.id for member in terms.member]:
        raise _contradiction("sum.blocks is no partition of the members", f"found {listed}")
    least = min(len(block) for block in terms.sum.blocks)
    if least < terms.fewest:
        raise _contradiction(f"a block of {least} silos", f"no sum is over fewer than {terms.fewest}")


def _check_suite(terms: Contract) -> None:
    """Every party has exactly the keys of the contract's signature suite: length alone never decides which one is used."""
    hybrid = terms.signatures != "ed25519"
    for party in (terms.aggregator, *terms.member, *terms.guardian):
        if bool(party.ml_dsa_key) != hybrid:
            has = "an" if party.ml_dsa_key else "no"
            raise _contradiction(f"{party.name} has {has} ml_dsa_key", f'signatures = "{terms.signatures}"')


def _check_terms(terms: Contract) -> None:
    if not terms.is_local and terms.training.steps_per_round != 1:
        raise _contradiction(
            f"mode = joint with steps_per_round = {terms.training.steps_per_round}", "a joint round is one step: it must be 1"
        )
    if terms.steps > MOST_STEPS:
        raise _contradiction(f"rounds x steps_per_round = {terms.steps}", f"at most {MOST_STEPS} private steps are accounted for")
    if terms.privacy.max_silos_per_unit > min(terms.silos, MOST_CONTRIBUTIONS):
        raise _contradiction(f"max_silos_per_unit = {terms.privacy.max_silos_per_unit}", f"there are {terms.silos} members")
    ceiling = min(1e-5, 1 / (10 * terms.privacy.units * terms.silos))
    if not terms.privacy.delta <= ceiling:  # 0 without privacy
        raise _contradiction(f"delta = {terms.privacy.delta:g}", f"at most 1e-5 and 1/(10 · all units), here {ceiling:g}")
    if len(set(terms.adapter.modules)) != len(terms.adapter.modules):
        raise _contradiction("a module stands twice in adapter.modules", ", ".join(terms.adapter.modules))
    if not all(math.isfinite(x) for x in (terms.training.learning_rate, terms.privacy.noise_multiplier, terms.privacy.epsilon)):
        raise _contradiction("a number is not finite", "learning_rate, noise_multiplier, epsilon")
    ring_plan(terms)


def _check_basis(terms: Contract) -> None:
    """``[basis]`` stands where the basis comes from records, and only there; with noise it is "private", without it "raw".

    ``[public_basis]`` stands where it comes from a public data set, and only there.
    """
    kind, basis, public = terms.adapter.basis, terms.basis, terms.public_basis
    if (kind == "public") != (public is not None):
        raise _contradiction(f"adapter.basis = {kind} {'without' if public is None else 'with'} [public_basis]", "see ADR 0019")
    if public is not None and not math.isfinite(public.max_grad_norm):
        raise _contradiction("a number is not finite", "public_basis.max_grad_norm")
    if (kind in ("private", "raw")) != (basis is not None):
        raise _contradiction(f"adapter.basis = {kind} {'without' if basis is None else 'with'} a table [basis]", "see ADR 0020")
    if basis is None:
        return
    if (kind == "private") != terms.is_private:
        raise _contradiction(
            f"adapter.basis = {kind}, {'with' if terms.is_private else 'without'} differential privacy",
            "raw gradients are for contracts whose [privacy] says that it is off, and only there",
        )
    if bool(basis.noise_multiplier) != terms.is_private:
        raise _contradiction(f"basis.noise_multiplier = {basis.noise_multiplier:g}", "it is stated with noise, and only then")
    if not all(math.isfinite(x) for x in (basis.noise_multiplier, basis.max_grad_norm)):
        raise _contradiction("a number is not finite", "basis.noise_multiplier, basis.max_grad_norm")
    layout = basis_round.layout_of(terms)
    layout.check_rank(terms.adapter.vectors)
    if layout.dimension == terms.trainables:
        raise _contradiction(
            f"vectors of {layout.dimension} numbers in both kinds of rounds", "their length tells them apart: another basis.width"
        )
    ring_plan(basis_round.terms_of(terms))
