# SPDX-License-Identifier: Apache-2.0
"""``federation.draft.toml`` as ``aggregator init`` writes it: every key of a contract, each with one line that says what it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from privacy.errors import ConfigError
from privacy.federation import Model
from privacy.keys import PublicIdentity

CALIBRATE: Final = "calibrate"
AUTO: Final = "auto"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a draft starts from; a ``noise_multiplier`` or ``lattice_bits`` of None is computed when it is signed."""

    name: str
    expires: str
    labels: Sequence[str]
    model: Model
    modules: Sequence[str]
    units: int
    rounds: int
    text_pair: bool = False
    max_length: int = 128
    rank: int = 8
    scale: float = 1.0
    head_scale: float = 1.0
    optimizer: str = "adam"
    learning_rate: float = 0.02
    warmup_rounds: int = 0
    decay_rounds: int = 0
    unit: str = "record"
    max_records_per_unit: int = 1
    sampling_rate: float = 0.1
    max_grad_norm: float = 1.0
    noise_multiplier: float | None = None
    epsilon: float = 8.0
    delta: float = 1e-6
    colluders: int = 1
    lattice_bits: int | None = None
    max_void_rounds: int = 3
    deadline_s: int = 600
    two_silos_see_each_other: bool = False


def draft(terms: Terms, aggregator: PublicIdentity) -> str:
    """The commented draft, without members, of which ``aggregator`` is the coordinator.

    Raises:
        ConfigError: a text has characters that are not printable.
    """
    return "\n".join((_head(terms), _what(terms), _training(terms), _privacy(terms), _sum(terms), _who(aggregator)))


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
"""


def _what(terms: Terms) -> str:
    return f"""\
[task]
# What is learned.
kind = "text-classification"
# The public label space; never derived from records. A label's position is its class.
labels = {_list(terms.labels)}
# Whether a record has a second text.
text_pair = {_bool(terms.text_pair)}
# Tokens per record; longer ones are cut.
max_length = {terms.max_length}

[model]
# A hub name or a path; every silo may use its own copy.
name = {quote(terms.model.name)}
# The digest of the base model's files: this, not the name, decides.
digest = {quote(terms.model.digest)}
# The width of the encoder's output.
hidden_size = {terms.model.hidden_size}
# How token vectors become one: "mean", "cls" or "last".
pooling = {quote(terms.model.pooling)}

[adapter]
# r: each adapted layer trains one r x r matrix.
rank = {terms.rank}
# The linear layers that are adapted, in this order.
modules = {_list(terms.modules)}
# Where A and B come from: the layer's own weights.
basis = "weights"
# The adapter's scale: W + scale * B R A. Gradients are clipped together, so a larger scale gives R a larger share of the clip.
scale = {terms.scale!r}
# What the head's input is multiplied by; a smaller one leaves more of the clip to R.
head_scale = {terms.head_scale!r}
"""


def _training(terms: Terms) -> str:
    return f"""\
[training]
# "joint": each round is one private step on the union of all silos' records.
mode = "joint"
# T: the plan that is accounted for.
rounds = {terms.rounds}
# "adam" or "sgd".
optimizer = {quote(terms.optimizer)}
learning_rate = {terms.learning_rate!r}
# Adam's two decay rates and its epsilon; sgd's momentum.
beta1 = 0.9
beta2 = 0.99
epsilon = 1e-8
momentum = 0.0
# The rate rises over the first rounds and falls to final_fraction of itself over the last.
warmup_rounds = {terms.warmup_rounds}
decay_rounds = {terms.decay_rounds}
final_fraction = 0.0
"""


def _privacy(terms: Terms) -> str:
    sigma = quote(CALIBRATE) if terms.noise_multiplier is None else repr(terms.noise_multiplier)
    bits = quote(AUTO) if terms.lattice_bits is None else str(terms.lattice_bits)
    return f"""\
[privacy]
# Whose presence is hidden: one record, or all records with one value of this field.
unit = {quote(terms.unit)}
# A rounded public number of units per silo (the largest silo), agreed without counting records exactly.
units = {terms.units}
# Further records of one unit are not used.
max_records_per_unit = {terms.max_records_per_unit}
# q: the chance with which each unit enters a round.
sampling_rate = {terms.sampling_rate!r}
# C: each unit's gradient is clipped to this L2 norm.
max_grad_norm = {terms.max_grad_norm!r}
# sigma; "calibrate": computed from epsilon, delta, rounds and sampling_rate when this is signed.
noise_multiplier = {sigma}
# The guarantee for the whole plan, against the aggregator together with the colluders.
epsilon = {terms.epsilon!r}
# At most 1e-5 and 1/(10 x units of the whole federation).
delta = {terms.delta!r}
# t_c: how many silos may work together with the aggregator.
colluders = {terms.colluders}
# p: the clipping norm is 2^p lattice steps; "auto": the finest that fits the ring.
lattice_bits = {bits}
"""


def _sum(terms: Terms) -> str:
    return f"""\
[sum]
# Every silo signs for every sum that holds its vector.
protocol = "consent"
ring_bits = 32
# As many void rounds in a row (at least one) stop the federation.
max_void_rounds = {terms.max_void_rounds}
# How long the silos have for each step of a round.
deadline_s = {terms.deadline_s}
# Only with two members: each then learns the other's update from the sum.
two_silos_see_each_other = {_bool(terms.two_silos_see_each_other)}
"""


def _who(aggregator: PublicIdentity) -> str:
    return f"""\
[aggregator]
# The coordinator's public keys, from aggregator.pub.
name = {quote(aggregator.name)}
sign_key = {quote(aggregator.sign_key.hex())}
seal_key = {quote((aggregator.seal_key or b"").hex())}

# The members; `aggregator member <identity.pub>` appends one.
"""


def _list(texts: Iterable[str]) -> str:
    return "[" + ", ".join(quote(text) for text in texts) + "]"


def _bool(value: bool) -> str:
    return "true" if value else "false"
