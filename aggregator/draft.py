# SPDX-License-Identifier: Apache-2.0
"""``federation.draft.toml`` as ``aggregator init`` writes it: every key of a contract, each with one line that says what it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from aggregator import basis_draft, defaults
from privacy.errors import ConfigError
from privacy.federation import Member, Model
from privacy.identity import keys
from privacy.identity.keys import ED25519, PublicIdentity

CALIBRATE: Final = "calibrate"
AUTO: Final = "auto"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a draft starts from; a ``noise_multiplier`` or ``lattice_bits`` of None is computed when it is signed.

    ``warmup_rounds`` and ``decay_rounds`` of None are the usual ones for so many rounds. ``without_privacy``: no noise and no
    figure of a guarantee; ``noise_multiplier``, ``epsilon`` and ``delta`` are then not looked at. ``shapes``: (out, in) of the
    modules, for a basis that comes from records; ``public_data``: what the data set of a public basis is called
    (aggregator.basis_draft).
    """

    name: str
    expires: str
    model: Model
    modules: Sequence[str]
    units: int
    rounds: int
    kind: str = "text-classification"
    labels: Sequence[str] = ()
    text_pair: bool = False
    format: str = ""
    max_length: int = defaults.MAX_LENGTH
    rank: int = defaults.RANK
    basis: str = defaults.BASIS
    heads: int = 1
    shapes: Sequence[tuple[int, int]] = ()
    public_data: str = ""
    scale: float | None = None
    head_scale: float = 1.0
    mode: str = "joint"
    steps_per_round: int = 1
    update_bound: float = 1.0
    optimizer: str = "adam"
    learning_rate: float = defaults.LEARNING_RATE
    warmup_rounds: int | None = None
    decay_rounds: int | None = None
    unit: str = "record"
    max_records_per_unit: int = 1
    max_silos_per_unit: int = 1
    sampling_rate: float = defaults.SAMPLING_RATE
    max_grad_norm: float = defaults.MAX_GRAD_NORM
    noise_multiplier: float | None = None
    epsilon: float = defaults.EPSILON
    delta: float = 1e-6
    colluders: int = 1
    lattice_bits: int | None = None
    max_void_rounds: int = 3
    deadline_s: int = 600
    two_silos_see_each_other: bool = False
    protocol: str = "consent"
    audit: str = AUTO
    dropouts: int = 0
    corrupt_guardians: int | None = None
    signatures: str = ED25519
    without_privacy: bool = False


def draft(terms: Terms, aggregator: PublicIdentity) -> str:
    """The commented draft, without members, of which ``aggregator`` is the coordinator.

    Raises:
        ConfigError: a text has characters that are not printable.
    """
    who = aggregator.under(terms.signatures)
    return "\n".join((_head(terms), _what(terms), _training(terms), _privacy(terms), *_basis(terms), _sum(terms), _who(who)))


def entry(member: Member) -> str:
    """A member as it stands in a draft."""
    lines = ["", "[[member]]", f"# fingerprint {keys.fingerprint(keys.stated(member))}", f"id = {member.id}"]
    lines += [f"{key} = {quote(getattr(member, key))}" for key in ("name", "organisation", "sign_key")]
    return "\n".join(lines + ([f"ml_dsa_key = {quote(member.ml_dsa_key)}"] if member.ml_dsa_key else [])) + "\n"


def entries(text: str) -> list[tuple[int, int, str, str]]:
    """(start, end, kind, name) of every ``[[member]]`` and ``[[guardian]]`` in a draft's text, in order."""
    found = []
    for block in re.finditer(r"(?m)^\[\[(member|guardian)\]\]\n(?:(?!\[).*\n?)*", text):
        name = re.search(r'(?m)^name[ \t]*=[ \t]*("[^"]*")', block[0])
        found.append((block.start(), block.end(), block[1], "" if name is None else json.loads(name[1])))
    return found


def quote(text: str) -> str:
    """A TOML string. Raises ConfigError for characters that are not printable."""
    if not text.isprintable():
        raise ConfigError(f"{text[:40]!r} has characters that are not printable", hint="leave them out", code="config")
    return json.dumps(text, ensure_ascii=False)


def _head(terms: Terms) -> str:
    return f"""\
# The terms of a federation, to be signed by the coordinator and countersigned by every silo.
# Edit freely until `aggregator sign`; after that the exact bytes are the contract.

# The version of this file's format.
format = "siloquy/1"
# The contract's version; each one is signed by all members.
version = 1
# Lower-case letters, digits, dots and hyphens.
name = {quote(terms.name)}
# The digest of the version before; empty in the first.
previous = ""
# The last day (UTC) on which rounds are opened.
expires = {quote(terms.expires)}
# How every party signs: "ed25519", or "ed25519+ml-dsa-65": both signatures on everything, against quantum computers too.
signatures = {quote(terms.signatures)}
"""


def _what(terms: Terms) -> str:
    causal = terms.kind == "causal-lm"
    pooling = f"""\
# How token vectors become one: "mean", "cls" or "last".
pooling = {quote(terms.model.pooling)}
"""
    head_scale = f"""\
# What the head's input is multiplied by; a smaller one leaves more of the clip to R.
head_scale = {terms.head_scale!r}
"""
    return f"""\
{_completion(terms) if causal else _classification(terms)}
# Tokens per record; longer ones are cut.
max_length = {terms.max_length}

[model]
# A hub name or a path; every silo may use its own copy.
name = {quote(terms.model.name)}
# The digest of the base model's files: this, not the name, decides.
digest = {quote(terms.model.digest)}
# The width of the encoder's output.
hidden_size = {terms.model.hidden_size}
{"" if causal else pooling}
[adapter]
# r: each adapted layer trains one r x r matrix for each of its heads.
rank = {terms.rank}
# h: how many; their vectors are orthogonal to each other's, so that h heads of r/sqrt(h) reach a higher rank with as many numbers.
heads = {terms.heads}
# The linear layers that are adapted, in this order.
modules = {_list(terms.modules)}
# Where the frozen A and B come from. Public: "weights", the layer's own singular vectors, "random", a fixed seed, or "public", of
# a data set that [public_basis] names. From records, by a round of its own before all others: "private", with noise, or "raw",
# without any; see [basis].
basis = {quote(terms.basis)}
# The adapter's scale: W + scale * B R A. Gradients are clipped together, so a larger scale gives R a larger share of the clip.
scale = {defaults.SCALES.get(terms.basis, defaults.SCALE) if terms.scale is None else terms.scale!r}
{"" if causal else head_scale}"""


def _classification(terms: Terms) -> str:
    return f"""\
[task]
# What is learned.
kind = "text-classification"
# The public label space; never derived from records. A label's position is its class.
labels = {_list(terms.labels)}
# Whether a record has a second text.
text_pair = {_bool(terms.text_pair)}"""


def _completion(terms: Terms) -> str:
    return f"""\
[task]
# What is learned: the next token, with the base model's own output layer.
kind = "causal-lm"
# What a record is: "text", of which every token is learned; "prompt-response", of which the response is; or "messages", a
# conversation that the base model's chat template writes out, of which the last message is.
format = {quote(terms.format)}"""


def _basis(terms: Terms) -> tuple[str, ...]:
    vectors = terms.heads * terms.rank
    if terms.basis == "public":
        return (basis_draft.public_table(terms.public_data, vectors=vectors),)
    made = basis_draft.table(terms.basis, terms.shapes, vectors=vectors, without_privacy=terms.without_privacy)
    return (made,) if made else ()


def _training(terms: Terms) -> str:
    warmup = defaults.warmup(terms.rounds, terms.steps_per_round) if terms.warmup_rounds is None else terms.warmup_rounds
    decay = defaults.decay(terms.rounds) if terms.decay_rounds is None else terms.decay_rounds
    return f"""\
[training]
# "joint": each round is one private step on the union of all silos' records; each silo adds its share of the noise.
# "local": each round is steps_per_round private steps of each silo alone, with noise in full, and the mean of their changes.
mode = {quote(terms.mode)}
# T: the plan that is accounted for, steps_per_round steps in each round.
rounds = {terms.rounds}
# 1 in joint mode.
steps_per_round = {terms.steps_per_round}
# Local mode: in one round a silo changes no number by more than this; it costs no privacy and sets the grid of what is sent.
update_bound = {terms.update_bound!r}
# "adam" or "sgd".
optimizer = {quote(terms.optimizer)}
learning_rate = {terms.learning_rate!r}
# Adam's two decay rates and its epsilon; sgd's momentum.
beta1 = 0.9
beta2 = 0.99
epsilon = 1e-8
momentum = 0.0
# The rate rises over the first rounds and falls to final_fraction of itself over the last; all steps of a round have one rate.
warmup_rounds = {warmup}
decay_rounds = {decay}
final_fraction = 0.0
"""


def _privacy(terms: Terms) -> str:
    return _without_privacy(terms) if terms.without_privacy else _with_privacy(terms)


def _without_privacy(terms: Terms) -> str:
    bits = quote(AUTO) if terms.lattice_bits is None else str(terms.lattice_bits)
    return f"""\
[privacy]
# NO DIFFERENTIAL PRIVACY. No noise is added: everybody who takes part sees the exact sum of each block of silos, and records can be
# reconstructed from such sums. Each silo must say with a word of its own that it takes part in this.
off = "no differential privacy"
# Whose gradients are clipped together: one record, or all records with one value of this field. It hides nobody.
unit = {quote(terms.unit)}
# A rounded public number of units per silo (the largest silo), agreed without counting records exactly.
units = {terms.units}
# Further records of one unit are not used.
max_records_per_unit = {terms.max_records_per_unit}
# q: the chance with which each unit enters a step.
sampling_rate = {terms.sampling_rate!r}
# C: each unit's gradient is clipped to this L2 norm, for the sums must fit the ring; a generous one clips next to nothing.
max_grad_norm = {terms.max_grad_norm!r}
# t_c: how many silos may work together with the aggregator.
colluders = {terms.colluders}
# p: the clipping norm is 2^p lattice steps; "auto": the finest that fits the ring.
lattice_bits = {bits}
"""


def _with_privacy(terms: Terms) -> str:
    sigma = quote(CALIBRATE) if terms.noise_multiplier is None else repr(terms.noise_multiplier)
    bits = quote(AUTO) if terms.lattice_bits is None else str(terms.lattice_bits)
    return f"""\
[privacy]
# Empty here. "no differential privacy" takes all noise and every guarantee away: docs/concepts/privacy.md; every silo must say yes.
off = ""
# Whose presence is hidden: one record, or all records with one value of this field.
unit = {quote(terms.unit)}
# A rounded public number of units per silo (the largest silo), agreed without counting records exactly.
units = {terms.units}
# Further records of one unit are not used.
max_records_per_unit = {terms.max_records_per_unit}
# m: how many silos may know one unit. Nothing checks it; epsilon is for such a unit, and stays the same in later versions.
max_silos_per_unit = {terms.max_silos_per_unit}
# q: the chance with which each unit enters a step.
sampling_rate = {terms.sampling_rate!r}
# C: each unit's gradient is clipped to this L2 norm.
max_grad_norm = {terms.max_grad_norm!r}
# sigma, of a whole sum in joint mode, of each silo in local mode; "calibrate": computed from epsilon when this is signed.
noise_multiplier = {sigma}
# The guarantee for the whole plan, against the aggregator together with the colluders (in local mode: against everyone).
epsilon = {terms.epsilon!r}
# At most 1e-5 and 1/(10 x units of the whole federation).
delta = {terms.delta!r}
# t_c: how many silos may work together with the aggregator.
colluders = {terms.colluders}
# p: the clipping norm is 2^p lattice steps; "auto": the finest that fits the ring.
lattice_bits = {bits}
"""


def _sum(terms: Terms) -> str:
    blocks = quote(AUTO) if terms.without_privacy else "[]"
    corrupt = quote(AUTO) if terms.corrupt_guardians is None and terms.protocol == "shares" else str(terms.corrupt_guardians or 0)
    return f"""\
[sum]
# "consent": every silo signs for every sum that holds its vector. "shares": guardians hold shares of what unmasks it.
protocol = {quote(terms.protocol)}
# t_d, with shares: how many silos may be missing in a sum.
dropouts = {terms.dropouts}
# T, with shares: how many guardians may work against everybody; "auto": by the table in docs/spec/guardian-sum.md.
corrupt_guardians = {corrupt}
{_BLOCKS[terms.without_privacy]}
blocks = {blocks}
# Who sums again before the model moves: "whole", every silo everything; "slices", some silos each MiB of the sum; "auto": whole
# up to ten members.
audit = {quote(terms.audit)}
ring_bits = 32
# As many rounds in a row (at least one) that end void, or with a sum beyond its bounds, stop the federation.
max_void_rounds = {terms.max_void_rounds}
# How long the silos have for each step of a round.
deadline_s = {terms.deadline_s}
# Only with two members: each then learns the other's update from the sum.
two_silos_see_each_other = {_bool(terms.two_silos_see_each_other)}
"""


_BLOCKS = {
    False: "# With shares, and without noise: groups of member ids; a sum is then over whole groups.",
    True: "# Groups of member ids, each at least as large as any sum: only whole groups are summed, as long as this chain lasts;\n"
    '# "auto": as many as there can be when this is signed, one of all members in consent mode.',
}


def _who(aggregator: PublicIdentity) -> str:
    return f"""\
[aggregator]
# The coordinator's public keys, from aggregator.pub.
name = {quote(aggregator.name)}
sign_key = {quote(aggregator.sign_key.hex())}
# Its ML-DSA-65 key; empty unless signatures asks for one.
ml_dsa_key = {quote((aggregator.ml_dsa_key or b"").hex())}
seal_key = {quote((aggregator.seal_key or b"").hex())}

# The members; `aggregator member <identity.pub>` appends one.
"""


def _list(texts: Iterable[str]) -> str:
    return "[" + ", ".join(quote(text) for text in texts) + "]"


def _bool(value: bool) -> str:
    return "true" if value else "false"
