# SPDX-License-Identifier: Apache-2.0
"""The tables of a contract, and what follows from their numbers alone: counts, thresholds, who is who.

``privacy.federation.parse`` makes a ``Contract`` and holds it to every rule that needs no other file; one that was made in
another way promises nothing. Not here: any arithmetic of noise or rings (``privacy.federation``).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from privacy.errors import ConfigError

Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Positive = Annotated[float, msgspec.Meta(gt=0.0, le=1e9)]
Rate = Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]
Unit = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]
Bound = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}\Z")]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
"""Words that people compare: printable, see ``_check_words``."""
WHOLE_UP_TO = 10
"""With ``audit = "auto"``, up to so many members every silo sums everything again."""
GUARDIANS_FROM = 2**15
"""Silos have ids below, guardians above."""
Hex32 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Hex1952 = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{3904})?\Z")]
Hex1216 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{2432}\Z")]


def contradiction(what: str, against: str) -> ConfigError:
    """The error of terms that contradict each other, or a rule."""
    return ConfigError(f"federation.toml: {what}; {against}", hint="change the draft and sign it again", code="contract")


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the contract's tables: unknown keys are refused."""


class Task(Table, frozen=True, kw_only=True):
    """What is learned.

    ``text-classification``: ``labels`` is the public label space, a label's position is its class; ``text_pair``: a record has a
    second text. ``causal-lm``: the next token, with the base model's own output layer and no head (docs/adr/0022);
    ``format`` says what a record is: ``text``, of which every token is learned, ``prompt-response`` or ``messages``, of which the
    response is. What belongs to the other kind is left out: ``privacy.federation.parse`` holds a contract to that.
    """

    kind: Literal["text-classification", "causal-lm"] = "text-classification"
    labels: Annotated[tuple[Text, ...], msgspec.Meta(max_length=4096)] = ()
    text_pair: bool = False
    format: Literal["", "text", "prompt-response", "messages"] = ""
    max_length: Annotated[int, msgspec.Meta(ge=4, le=131072)]

    @property
    def is_causal(self) -> bool:
        """Whether the next token is learned; otherwise a text's label is."""
        return self.kind == "causal-lm"


class Model(Table, frozen=True, kw_only=True):
    """The frozen base model, pinned by the digest of privacy.base_model."""

    name: Text
    digest: Hex32
    hidden_size: Count
    pooling: Literal["mean", "cls", "last"] = "mean"


class Adapter(Table, frozen=True, kw_only=True):
    """LoRA-SB layers: W + s·B·R·A with r×r R on each of ``modules``, in this order, then the task head where there is one.

    ``heads``: h cores R_k on each module, W + s·Σ_k B_k R_k A_k; B_k and A_k are the k-th r of the h·r vectors of one basis, so
    that R is h blocks on a diagonal (RAVAN, arXiv 2506.05568; its factors s_k are part of R_k here).
    ``basis``: where the frozen B and A come from. Public: the base model's own ``weights``, a ``random`` public seed, or gradients
    of a ``public`` data set (``PublicBasis``). From the silos' records: ``private``, the result of a round of its own (``Basis``),
    and ``raw``, the same without noise, in contracts without differential privacy.
    """

    rank: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    modules: tuple[Text, ...]
    basis: Literal["weights", "random", "public", "private", "raw"] = "weights"
    heads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    scale: Positive = 1.0
    head_scale: Positive = 1.0

    @property
    def vectors(self) -> int:
        """h·r: how many orthonormal vectors A and B of a module have."""
        return self.heads * self.rank

    @property
    def core(self) -> int:
        """h·r²: trainable numbers of one module."""
        return self.heads * self.rank**2


class Training(Table, frozen=True, kw_only=True):
    """The update rule (``privacy.update_rule``) and its schedule; rounds is the declared plan T.

    ``joint``: a round is one private step on the union of all silos' records. ``local``: it is ``steps_per_round`` private steps
    of each silo on its own, and the mean of what they changed; a number that changed by more than ``update_bound`` is cut to it.
    """

    mode: Literal["joint", "local"] = "joint"
    rounds: Count
    steps_per_round: Count = 1
    update_bound: Bound = 1.0
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Positive
    beta1: Unit = 0.9
    beta2: Unit = 0.99
    epsilon: Positive = 1e-8
    momentum: Unit = 0.0
    warmup_rounds: Annotated[int, msgspec.Meta(ge=0)] = 0
    decay_rounds: Annotated[int, msgspec.Meta(ge=0)] = 0
    final_fraction: Unit = 0.0


class Privacy(Table, frozen=True, kw_only=True):
    """The mechanism (docs/concepts/privacy.md). ``units`` is a rounded public figure per silo, never derived from records.

    ``max_silos_per_unit``: m, how many silos may know one unit; every figure is for such a unit (``federation.exposures``).

    ``off`` says in words that there is no noise and no epsilon. Then, and only then, are the figures of the guarantee left out
    (here 0): ``privacy.federation.parse`` holds a contract to that.
    """

    off: Literal["", "no differential privacy"] = ""
    unit: Text = "record"
    units: Count
    max_records_per_unit: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    max_silos_per_unit: Count = 1
    sampling_rate: Rate
    max_grad_norm: Positive
    noise_multiplier: Annotated[float, msgspec.Meta(gt=0.0, le=1e4)] = 0.0
    epsilon: Positive = 0.0
    delta: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 0.0
    colluders: Annotated[int, msgspec.Meta(ge=1)] = 1
    lattice_bits: Annotated[int, msgspec.Meta(ge=1, le=20)]


class Basis(Table, frozen=True, kw_only=True):
    """The basis round (docs/adr/0020): one release of clipped gradient sketches over all units, before the training rounds.

    It is there exactly with ``adapter.basis`` "private" or "raw". ``shapes``: (out, in) of each of ``adapter.modules``; ``width``:
    l, the columns of each sketch; the rest as in ``Privacy``, for this round. ``attempts``: how many such rounds the plan pays for,
    at most; the first that ends with a sum is the last.
    """

    shapes: tuple[tuple[Count, Count], ...]
    width: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    max_grad_norm: Positive
    noise_multiplier: Annotated[float, msgspec.Meta(gt=0.0, le=1e4)] = 0.0
    lattice_bits: Annotated[int, msgspec.Meta(ge=1, le=20)]
    attempts: Annotated[int, msgspec.Meta(ge=1, le=100)] = 2


class PublicBasis(Table, frozen=True, kw_only=True):
    """The factors that the coordinator made from a public data set (docs/adr/0019): its file, by ``digest``, and no other.

    It is there exactly with ``adapter.basis`` "public". ``data``: what the data set is called; ``data_digest``: the SHA-256 of the
    file whose records were used. ``width`` and ``max_grad_norm``, as in ``Basis``, say how to make the factors again.
    """

    data: Text
    data_digest: Hex32
    digest: Hex32
    width: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    max_grad_norm: Positive


class Sum(Table, frozen=True, kw_only=True):
    """The secure sum (docs/spec/guardian-sum.md).

    ``consent``: every silo signs for every sum that holds its vector, and a silent silo closes the round. ``shares``: guardians
    hold shares of what unmasks a sum, so that ``dropouts`` silos may be missing and the round still ends with a sum;
    ``corrupt_guardians`` of them may work against everybody. ``blocks``: a partition of the members; a set is then a union of
    whole blocks, so that no two sets differ by less than one. A contract without differential privacy must have them.
    """

    protocol: Literal["consent", "shares"] = "consent"
    dropouts: Annotated[int, msgspec.Meta(ge=0)] = 0
    corrupt_guardians: Annotated[int, msgspec.Meta(ge=0)] = 0
    blocks: tuple[tuple[Annotated[int, msgspec.Meta(ge=1, lt=2**15)], ...], ...] = ()
    audit: Literal["auto", "whole", "slices"] = "auto"
    """Who sums again before a sum is applied: every silo the whole, or each silo some slices; see ``Contract.sliced``."""
    ring_bits: Literal[32] = 32
    max_void_rounds: Annotated[int, msgspec.Meta(ge=0)] = 3
    deadline_s: Annotated[int, msgspec.Meta(ge=1, le=604800)] = 600
    two_silos_see_each_other: bool = False


class Signer(Table, frozen=True, kw_only=True):
    """Who signs: an Ed25519 key, and with ``signatures = "ed25519+ml-dsa-65"`` an ML-DSA-65 key beside it. Both must verify."""

    name: Name
    sign_key: Hex32
    ml_dsa_key: Hex1952 = ""

    @property
    def verify_key(self) -> bytes:
        """The keys as privacy.identity.keys.verify_signature takes them: 32 bytes, or 32 + 1952."""
        return bytes.fromhex(self.sign_key + self.ml_dsa_key)


class Aggregator(Signer, frozen=True, kw_only=True):
    """The coordinator's identity: its sign keys sign, its X-Wing key receives."""

    seal_key: Hex1216


class Member(Signer, frozen=True, kw_only=True):
    """A silo's public identity, as its own ``identity.pub`` states it."""

    id: Annotated[int, msgspec.Meta(ge=1, lt=GUARDIANS_FROM)]
    organisation: Text


class Guardian(Signer, frozen=True, kw_only=True):
    """A guardian: a process of one organisation, with ids apart from the silos'. One with a member's keys is part of that silo."""

    id: Annotated[int, msgspec.Meta(gt=GUARDIANS_FROM, lt=2**16)]
    organisation: Text


class Contract(Table, frozen=True, kw_only=True):
    """One version of a federation's terms; see the module docstring. ``digest`` and ``raw`` come from ``parse``."""

    format: Literal["siloquy/1"]
    version: Count
    name: Name
    previous: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    in_force: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    """Digest of the version in force, where the ones after it never took effect (privacy.chain); "" where it is the one before."""
    expires: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")]
    signatures: Literal["ed25519", "ed25519+ml-dsa-65"] = "ed25519"
    task: Task
    model: Model
    adapter: Adapter
    training: Training
    privacy: Privacy
    sum: Sum
    basis: Basis | None = None
    public_basis: PublicBasis | None = None
    aggregator: Aggregator
    member: tuple[Member, ...]
    guardian: tuple[Guardian, ...] = ()

    @property
    def silos(self) -> int:
        """n, the number of members."""
        return len(self.member)

    @property
    def is_local(self) -> bool:
        """Whether silos take their own private steps and send what these changed; otherwise a round is one step of all."""
        return self.training.mode == "local"

    @property
    def is_private(self) -> bool:
        """Whether noise is added and an epsilon stated; otherwise the contract says ``off`` in words."""
        return not self.privacy.off

    @property
    def shared(self) -> bool:
        """Whether guardians hold shares of what unmasks a sum (share mode); otherwise every silo signs for every sum."""
        return self.sum.protocol == "shares"

    @property
    def sliced(self) -> bool:
        """Whether silos audit slices of a sum (privacy.secure_sum.audits), so that none of them needs all masked vectors."""
        return self.silos > WHOLE_UP_TO if self.sum.audit == "auto" else self.sum.audit == "slices"

    @property
    def fewest(self) -> int:
        """u_min: the fewest silos that are ever summed: n in consent mode, max(3, n - t_d) in share mode."""
        return max(3, self.silos - self.sum.dropouts) if self.shared else self.silos

    @property
    def quorum(self) -> int:
        """q: how many signatures make a certificate, and how many shares a secret: ⌊(H+T)/2⌋+1; in consent mode all silos sign."""
        return (len(self.guardian) + self.sum.corrupt_guardians) // 2 + 1 if self.shared else self.silos

    @property
    def summed(self) -> int:
        """How many silos' vectors a noised lattice sum holds: all n in joint mode, one in local mode."""
        return 1 if self.is_local else self.silos

    @property
    def shares(self) -> int:
        """h: how many noise shares the plan counts on: n - t_d - t_c in joint mode, a silo's own in local mode."""
        return 1 if self.is_local else self.fewest - self.privacy.colluders

    @property
    def steps(self) -> int:
        """Private steps in the training rounds of the plan: rounds times steps per round."""
        return self.training.rounds * self.training.steps_per_round

    @property
    def planned_rounds(self) -> int:
        """How many rounds there will be if none is void: those of training, and where there is one the basis round before them."""
        return self.training.rounds + (self.basis is not None)

    @property
    def dimension(self) -> int:
        """Numbers in a silo's vector: d; of the sketches in a basis round (``privacy.basis_round.BasisTerms``)."""
        return self.trainables

    @property
    def trainables(self) -> int:
        """d: trainable numbers. h cores of r×r per module, then the head: weight (labels, hidden), bias (labels); or none."""
        labels = len(self.task.labels)
        return len(self.adapter.modules) * self.adapter.core + labels * self.model.hidden_size + labels

    @property
    def divisor(self) -> float:
        """D when all silos stand in the sum; see ``divisor_for``."""
        return self.divisor_for(self.silos)

    def divisor_for(self, standing: int) -> float:
        """D: the public expected number of sampled units in a sum of ``standing`` silos: q·units·|U|, in local mode q·units."""
        return self.privacy.sampling_rate * self.privacy.units * (1 if self.is_local else standing)

    @property
    def silo_guardians(self) -> dict[int, Guardian]:
        """By member id, the guardians that are part of that silo: those with its sign key."""
        by_key = {member.sign_key: member.id for member in self.member}
        return {by_key[guardian.sign_key]: guardian for guardian in self.guardian if guardian.sign_key in by_key}

    def by_id(self, silo: int) -> Member:
        """The member with this id. Raises ConfigError when there is none."""
        for member in self.member:
            if member.id == silo:
                return member
        raise ConfigError(f"no member has id {silo}", hint="`silo status` lists the members", code="no-such-member", silo=silo)

    def by_guardian(self, guardian: int) -> Guardian:
        """The guardian with this id. Raises ConfigError when there is none."""
        return self.guardian[self.position(guardian)]

    def position(self, guardian: int) -> int:
        """Where the guardian stands among all, from 0: its shares are taken at x = position + 1. Raises ConfigError."""
        for place, each in enumerate(self.guardian):
            if each.id == guardian:
                return place
        raise ConfigError(
            f"no guardian has id {guardian}", hint="the contract lists the guardians", code="no-such-guardian", guardian=guardian
        )


_RESOLVED = msgspec.json.Decoder(Contract)  # before any thread does: see privacy.messages
