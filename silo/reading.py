# SPDX-License-Identifier: Apache-2.0
"""What the ``silo`` commands do that only read: where a silo stands, what it spent, how good its model is, the model itself.

Promised: nothing in the home changes, no network is touched but to fetch a base model that is not on this machine, and a contract
that has expired hinders none of it. torch is loaded only by the functions that compute.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from privacy import files
from privacy.dp import overlap, unprotected
from privacy.dp.accounting import Certificate
from privacy.dp.budget import Account, Limits
from privacy.dp.declared import Declared
from privacy.dp.ledger import History
from privacy.dp.mechanism import Mechanism
from privacy.dp.together import Together, merged
from privacy.errors import ConfigError
from privacy.federation import Accepted, Contract, event
from privacy.identity import keys
from privacy.update_rule import State
from silo import agreed_basis, budgeting, config, keyring, other_homes, succession, unit_sets
from silo.home import Home
from silo.learning.card import Origin
from silo.settlement import load_progress

if TYPE_CHECKING:
    from silo.learning.evaluation import Bench


def status(root: Path) -> dict[str, Any]:
    """Who this silo is, what it joined, and the state it has reached."""
    home, settings = opened(root)
    identity = keys.load(home.identity_path)
    plain, both = fingerprints(identity)
    facts: dict[str, Any] = {"name": settings.name, "fingerprint": plain, "fingerprint_ml_dsa": both, "joined": False}
    facts["rotating"] = home.old_identity_path.exists()
    try:
        accepted, member, _ = succession.at_work(home)
    except ConfigError:
        return facts
    progress = load_progress(home, accepted)
    spent = _account(home, accepted, settings)[0].spent()
    return {
        **facts,
        "joined": True,
        "federation": accepted.terms.name,
        "member": member.id,
        "contract": accepted.digest.hex(),
        "version": accepted.terms.version,
        "expires": accepted.terms.expires,
        "round": progress.round,
        "mode": accepted.terms.training.mode,
        "rounds_planned": accepted.terms.planned_rounds,
        "steps_per_round": accepted.terms.training.steps_per_round,
        "epsilon": unprotected.figure(spent.epsilon),
        "epsilon_pld": unprotected.figure(spent.epsilon_pld),
        "delta": delta_of(spent),
        **why_none(spent),
        "limit": settings.limits.epsilon,
        "model_digest": progress.state.digest.hex(),
    }


def budget(root: Path, forecast: int) -> dict[str, Any]:
    """What the ledger has charged, against the silo's limits, and what ``forecast`` more rounds would bring it to."""
    home, settings = opened(root)
    accepted, _, _ = succession.at_work(home)
    account, planned = _account(home, accepted, settings)
    spent, own = account.spent(), History.read(home.ledger_path, verify=keyring.verifier(home))
    history = Together(own, other_homes.histories(home, settings))
    return {
        "epsilon": unprotected.figure(spent.epsilon),
        "epsilon_pld": unprotected.figure(spent.epsilon_pld),
        "epsilon_rdp": unprotected.figure(spent.epsilon_rdp),
        "delta": delta_of(spent),
        **why_none(spent),
        "limit": settings.limits.epsilon,
        "left": account.left,
        **({} if fewest(accepted.terms) is None else {"epsilon_stood": unprotected.figure(account.stood().epsilon)}),
        "steps": planned - account.steps_left,
        "steps_left": account.steps_left,
        "steps_per_round": accepted.terms.training.steps_per_round,
        "rounds_left": account.attempts_left,
        **_with_plans(home, accepted, settings),
        "several": budgeting.several(account, accepted.terms),
        **budgeting.runs(account, history),
        **budgeting.forecast(account, forecast, settings.limits.epsilon),
    }


def earlier_runs(home: Home, accepted: Accepted, settings: config.Config) -> list[str]:
    """What this silo's ledgers hold on the units of a contract, and whether other homes' plans leave room for it, in words."""
    earlier, limit = budgeting.in_words(_account(home, accepted, settings)[0]), settings.limits.epsilon
    return earlier + [budgeting.room_in_words(found, limit) for found in _with_plans(home, accepted, settings).values()]


def _with_plans(home: Home, accepted: Accepted, settings: config.Config) -> dict[str, float | None]:
    """Epsilon of all that is charged and all that plans may still charge, here and in other homes; nothing where there are none.

    Each home's gate asks for its own plan alone, and whoever charges first has the room: this says whether there is room for all.
    """
    beside = other_homes.histories(home, settings)
    if not beside:
        return {}
    own, within = History.read(home.ledger_path, verify=keyring.verifier(home)), limits(settings, accepted)
    events = [*Together(own, beside).charged(), *plan_left(home, own, accepted), *other_plans_left(settings, beside)]
    found = unprotected.certify(merged(events), within.delta, order=within.filter_order)
    return {"epsilon_with_plans": unprotected.figure(found.epsilon)}


def evaluate(
    root: Path, records: Path, private_head: Sequence[Path], *, threads: int | None = None, choices: Path | None = None,
    exact_match: int = 0,
) -> dict[str, Any]:
    """How good the base model and the reached state are on ``records``; with ``private_head`` the comparison of that name.

    ``silo.learning.evaluation.measure`` says which figures there are, by the kind of task. ``choices``: questions to be answered by
    likelihood; ``exact_match``: so many tokens are written after each prompt of ``records`` and compared (silo.learning.answers).
    """
    from silo.learning import evaluation

    home, settings = opened(root)
    accepted, _, _ = succession.at_work(home)
    progress = load_progress(home, accepted)
    compute = settings.compute if threads is None else msgspec.structs.replace(settings.compute, threads=threads)
    bases = agreed_basis.of(home, accepted.terms, progress.state)
    bench = evaluation.open_bench(accepted.terms, model=settings.model.path, compute=compute, bases=bases)
    facts: dict[str, Any] = {
        **evaluation.measure(bench, None, records, "before"),
        **evaluation.measure(bench, progress.state, records, "after"),
        "rounds": progress.round,
        "model_digest": progress.state.digest.hex(),
    }
    if choices is not None or exact_match:
        facts |= _answers(bench, progress.state, records, choices, exact_match)
    if private_head:
        facts["accuracy_head"] = evaluation.private_head(bench, private_head, records)
        facts["head_models"] = len(evaluation.HEAD_RATES)
    return facts


def _answers(bench: Bench, state: State, records: Path, choices: Path | None, exact_match: int) -> dict[str, float]:
    """How often the base model and the one at ``state`` answer rightly, by the ways that were asked for."""
    from silo.learning import answers

    facts: dict[str, float] = {}
    questions = [] if choices is None else answers.read_questions(choices)
    for name, at in (("before", None), ("after", state)):
        if questions:
            facts[f"choices_{name}"], facts[f"choices_per_token_{name}"] = answers.choose(bench, at, questions)
        if exact_match:
            facts[f"exact_match_{name}"] = answers.exact_matches(bench, at, records, exact_match)
    return facts


def export(root: Path, folder: Path, base: str, *, merged: bool = False) -> dict[str, Any]:
    """The reached model as a PEFT adapter in ``folder``, which appears whole or not at all; see ``silo.learning.export``.

    Costs nothing: the state is released, and what is made of it alone is as private as it is.

    Args:
        base: how the adapter names the base model: a hub name, or a folder where the adapter is used; the contract's when empty.
        merged: a whole model instead, with the adapter merged into its weights; of a causal language model.

    Raises:
        ConfigError: there is something in ``folder``, or a model of this kind cannot be exported.
    """
    from silo.learning import evaluation
    from silo.learning import export as exporting

    home, settings = opened(root)
    accepted, member, _ = succession.at_work(home)
    _check_target(folder, base)
    progress = load_progress(home, accepted)
    spent = _account(home, accepted, settings, apart=False)[0].spent()
    origin = Origin(
        accepted=accepted, silo=member.name, round=progress.round, state=progress.state, spent=spent,
        base=base or accepted.terms.model.name,
    )  # fmt: skip
    exact = msgspec.structs.replace(settings.compute, device="cpu", precision="float32")
    bases = agreed_basis.of(home, accepted.terms, progress.state)
    bench = evaluation.open_bench(accepted.terms, model=settings.model.path, compute=exact, bases=bases)
    contents = (exporting.merged if merged else exporting.adapter)(bench, origin)
    files.sweep(folder.resolve())
    files.write_folder(folder.resolve(), contents)
    return {
        "path": str(folder),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(contents.items())},
        "round": progress.round,
        "model_digest": progress.state.digest.hex(),
        "epsilon": unprotected.figure(spent.epsilon),
        "delta": delta_of(spent),
        **why_none(spent),
    }


def _check_target(folder: Path, base: str) -> None:
    """Raises ConfigError unless ``folder`` is not there or empty, and ``base`` is printable: it goes into the adapter's code."""
    if not base.isprintable():
        raise ConfigError(f"the base model's name is {base!a}", hint="give a hub name or a folder that can be printed", code="base")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"{folder} is not an empty folder", hint="name a new one: an export never overwrites", code="folder-exists"
        )


def opened(root: Path) -> tuple[Home, config.Config]:
    """The silo's home in ``root``, and its configuration. Raises ConfigError when there is none."""
    home = Home(root)
    return home, config.load(home.config_path)


def limits(settings: config.Config, accepted: Accepted) -> Limits:
    """The silo's limits in the contract's delta, which is the smaller one: the ledger's figures are then those of the report."""
    own, stated = settings.limits, accepted.terms.privacy.delta
    return Limits(
        epsilon=own.epsilon, delta=min(own.delta, stated) if accepted.terms.is_private else own.delta, filter_delta=own.delta,
        without_privacy=own.without_privacy,
    )  # fmt: skip


def fingerprints(identity: keys.Identity) -> tuple[str, str]:
    """What contracts with plain signatures show of this identity, and what those with ML-DSA show; "" where it has no such key."""
    public = identity.public
    both = "" if public.ml_dsa_key is None else keys.fingerprint(public)
    return keys.fingerprint(public.under(keys.ED25519)), both


def plan(history: History, accepted: Accepted, opened: int) -> Mechanism:
    """What a contract may still cost this silo: the plan it declared under it, else every round that was not opened yet.

    Args:
        opened: how many rounds were opened under earlier versions; rounds are numbered on over all of them.
    """
    known, per_round = history.plan(accepted.digest.hex()), accepted.terms.training.steps_per_round
    before = 0 if accepted.terms.basis is None else accepted.terms.basis.attempts  # so many of them were basis rounds, at most
    left = max(1, accepted.terms.training.rounds - max(0, opened - before))
    return event(accepted.terms, rounds=left if known is None else known.mechanism.steps // per_round)


def plan_before(history: History, accepted: Accepted, home: Home) -> Mechanism | None:
    """The basis rounds of a contract's plan, as declared under it; none where earlier versions fixed a basis, or it needs none."""
    known, progress = history.plan(accepted.digest.hex()), home.progress()
    if known is not None:
        return known.before
    if accepted.terms.basis is None or (progress is not None and progress.state.basis):
        return None
    return event(accepted.at(b"").terms)


def plan_left(home: Home, history: History, accepted: Accepted) -> list[Mechanism]:
    """What a contract's own plan may still charge to the ledger of this home."""
    planned = Declared(
        contract=accepted.digest.hex(), training=plan(history, accepted, settled(home, accepted)),
        each=accepted.terms.training.steps_per_round, before=plan_before(history, accepted, home),
    )  # fmt: skip
    return planned.rest(history.entries)


def other_plans_left(settings: config.Config, beside: Sequence[History]) -> list[Mechanism]:
    """What the plans may still charge of the contracts that the silo's other homes joined; ``beside``: their ledgers, in order."""
    left: list[Mechanism] = []
    for root, history in zip(settings.records.other_homes, beside, strict=True):
        other = Home(Path(root))
        joined = succession.if_joined(other)
        left += [] if joined is None else plan_left(other, history, joined)
    return left


def settled(home: Home, accepted: Accepted) -> int:
    """How many rounds this silo settled under earlier versions than ``accepted``."""
    progress = home.progress()
    return 0 if progress is None or progress.contract == accepted.digest else progress.round


def _account(home: Home, accepted: Accepted, settings: config.Config, *, apart: bool = True) -> tuple[Account, int]:
    """What is spent, and how many steps the contract's plan has.

    ``apart``: runs shown to share no unit do not compose. Such a figure depends on the records: never for what leaves the silo.
    """
    history = History.read(home.ledger_path, verify=keyring.verifier(home))
    planned = plan(history, accepted, settled(home, accepted))
    account = Account(
        history, limits(settings, accepted), plan=planned, contract=accepted.digest.hex(),
        steps_per_attempt=accepted.terms.training.steps_per_round, fewest=fewest(accepted.terms),
        before=plan_before(history, accepted, home), units=unit_sets.reader(home) if apart else overlap.nothing_shown,
        beside=other_homes.histories(home, settings),
    )  # fmt: skip
    return account, planned.steps


def fewest(terms: Contract) -> int | None:
    """For how few silos in a sum the plan counts its noise, where more may stand; None elsewhere."""
    return terms.fewest if terms.shared and terms.is_private and not terms.is_local else None


def delta_of(spent: Certificate) -> float | None:
    """The delta of a figure; None where there is none."""
    return spent.delta if math.isfinite(spent.epsilon) else None


def why_none(spent: Certificate) -> dict[str, str]:
    """Why a document has no epsilon, to be put beside it; nothing where it has one."""
    return {} if math.isfinite(spent.epsilon) else {"epsilon_none": unprotected.IN_WORDS}
