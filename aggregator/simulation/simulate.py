# SPDX-License-Identifier: Apache-2.0
"""A whole federation on this machine: one real service, real silo processes, real keys, ledgers and records.

What the simulator does is what people do by hand (docs/guides/by-hand.md): deal records to silos, init, member, sign, serve,
join, train, round, eval, report. Silos and evaluation run through the ``silo`` command in processes of their own; the
coordinator runs in this one. Only one thing is the simulator's alone: it holds all the records, so it can hold some out and
say how accurate the model is. In a real federation nobody can.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from aggregator import basis_draft, commands
from aggregator.config import Home
from aggregator.coordinator import Closed
from aggregator.desk import Event
from aggregator.reporting.no_guarantee import AnyReport
from aggregator.simulation.dealing import Dealt, deal, default_delta
from aggregator.simulation.drops import Drops, first_epoch
from aggregator.simulation.processes import Children, children
from aggregator.simulation.settings import Settings, check, rounds_of, silo_names, terms_of
from privacy import files
from privacy.dp import accounting, unprotected
from privacy.errors import MachineError, TrustError
from privacy.federation import Contract, before_training, exposure, mechanism

_START_S = 60.0
_END_S = 120.0
_SILO_LIMIT = 1.25


@dataclass(frozen=True, kw_only=True)
class Step:
    """Progress: what is going on, or a settled round with its cost so far. ``epsilon`` is certified, against the insiders; None
    where there is no differential privacy.
    """

    text: str
    round: int = 0
    rounds: int = 0
    arrived: int = 0
    expected: int = 0
    seconds: float = 0.0
    epsilon: float | None = 0.0
    limit: float = 0.0
    settled: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a simulation found; ``as_json`` is the document of ``aggregator simulate --json``.

    Both epsilons are against the aggregator with the colluding silos, in local mode against everyone. ``epsilon_per_silo`` is
    what each silo's own ledger certifies, the smaller of two accountants; ``epsilon`` is the largest PLD figure among them, and so
    at least as large. Without differential privacy all of them and ``delta`` are None.
    """

    silos: int
    rounds: int
    epsilon: float | None
    delta: float | None
    epsilon_per_silo: dict[str, float | None]
    accuracy_before: float
    accuracy_head: float
    accuracy_after: float
    held_out: int
    upload_bytes: int
    lora_bytes: int
    model_digest: str
    digests: dict[str, str]
    report: str
    report_html: str
    seconds: float
    seconds_per_round: float
    home: str
    mode: str
    steps_per_round: int

    def as_json(self) -> dict[str, object]:
        """All fields as one document."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def simulate(settings: Settings, progress: Callable[[Step], None]) -> Result:
    """Run the federation; see the module docstring.

    Raises:
        ConfigError: the settings or the data cannot be used, or the folder is not empty.
        TrustError: the parties do not agree on the model.
        PrivacyRefusal: delta is too large for so many units.
        SiloquyError: what any of the processes reported.
    """
    started = time.monotonic()
    check(settings)
    built_in = "collecting docstrings of the installed libraries: does this sentence describe this function?"
    progress(Step(text=built_in if settings.data is None else f"reading {settings.data.name}"))
    dealt = deal(
        settings.data,
        silos=settings.silos,
        silo_column=settings.silo_column,
        unit=settings.unit,
        max_records_per_unit=settings.max_records_per_unit,
        held_out=settings.held_out,
    )
    delta = settings.delta or default_delta(dealt.units, len(dealt.shares))
    accounting.check_delta(delta, dealt.units * len(dealt.shares))
    if dealt.left_out:
        progress(Step(text=f"{dealt.left_out} records left out: at most {dealt.max_records_per_unit} of one {dealt.unit} are used"))
    home = settings.home.absolute()
    aggregator = home / "aggregator"
    progress(Step(text="signing the contract"))
    with children(home / "logs") as running:
        _enrol(settings, dealt, delta, aggregator, running)
        names = _silo_names(dealt)
        for name in names:
            running.start(f"train-{name}", "silo", ["train", "--home", home / name, "--rounds", str(rounds_of(settings))])
        closed = list(_train(settings, aggregator, running, progress))
        for name in names:
            running.wait(f"train-{name}", timeout_s=_END_S)
        progress(Step(text="evaluating on held-out records"))
        stated = {name: running.answer(f"status-{name}", "silo", ["status", "--home", home / name]) for name in names}
        measured = _evaluate(home, names, running)
    progress(Step(text="writing the report"))
    return _result(settings, dealt, closed, stated, measured, time.monotonic() - started)


def _enrol(settings: Settings, dealt: Dealt, delta: float, aggregator: Path, running: Children) -> None:
    """Everything before the first round: contract, service, silos, countersignatures."""
    home = aggregator.parent
    model, modules, lora_width = commands.describe_model(settings.model, settings.targets, last_layers=settings.last_layers)
    terms = terms_of(settings, dealt, delta, model=model, modules=modules)
    who = "Simulated coordinator"
    made = commands.init(aggregator, organisation=who, terms=terms, lora_width=lora_width, port=0, simulated=True)
    words = ["--without-differential-privacy"] if settings.without_privacy else []
    words += _public_basis(settings.public_data, aggregator, running)
    running.start("serve", "aggregator", ["serve", "--home", aggregator])
    url = _service_url(aggregator, running)
    _write_rows(home / "held-out.jsonl", dealt.held_out)
    for name, share in zip(_silo_names(dealt), dealt.shares, strict=True):
        (home / name).mkdir()
        _write_rows(home / name / "records.jsonl", share)
        _init_silo(settings, running, home / name, url, str(made["fingerprint"]), delta)
        commands.add_member(aggregator, home / name / "identity.pub")
    commands.sign(aggregator)
    _join(home, _silo_names(dealt), running, words)


def _public_basis(data: Path | None, aggregator: Path, running: Children) -> list[str]:
    """The factors of the public data set, made by the package that has torch; their digests go into the draft. Words for `join`."""
    if data is None:
        return []
    at = Home(aggregator)
    made = running.answer(
        "basis", "silo", ["basis", "--data", data.absolute(), "--contract", at.draft_path, "--out", at.basis_path]
    )
    draft = at.draft_path.read_text(encoding="utf-8")
    digests = {name: str(made[name]) for name in ("data_digest", "digest")}
    files.write_atomic(at.draft_path, basis_draft.stated(draft, **digests).encode())
    return ["--basis", str(at.basis_path)]


def _join(home: Path, names: Sequence[str], running: Children, words: Sequence[str]) -> None:
    """Every silo reads the contract and countersigns, side by side: each is a process of its own."""
    with ThreadPoolExecutor() as pool:
        said = ["--yes", *words]
        joins = [pool.submit(running.answer, f"join-{name}", "silo", ["join", "--home", home / name, *said]) for name in names]
        for join in joins:
            join.result()


def _init_silo(settings: Settings, running: Children, folder: Path, url: str, fingerprint: str, delta: float) -> None:
    arguments = {
        "home": folder,
        "name": folder.name,
        "organisation": f"Simulated {folder.name}",
        "aggregator": url,
        "fingerprint": fingerprint,
        "records": folder / "records.jsonl",
        "epsilon": repr(settings.epsilon * _SILO_LIMIT),
        "delta": repr(delta),
        "model": settings.model if Path(settings.model).is_dir() else "",
    }
    words = [word for key, value in arguments.items() for word in (f"--{key}", str(value)) if str(value)]
    running.answer(f"init-{folder.name}", "silo", ["init", *words])


def _train(settings: Settings, aggregator: Path, running: Children, progress: Callable[[Step], None]) -> Iterator[Closed]:
    """Run the rounds; the coordinator's waiting also looks after the children."""

    def sleep(seconds: float) -> None:
        running.check()
        time.sleep(seconds)

    last = rounds_of(settings)
    drops = Drops(settings.drops, last, aggregator.parent, running)

    def told(event: Event) -> None:
        drops.look(event)
        progress(
            Step(
                text=event.step,
                round=event.round,
                rounds=last,
                arrived=event.arrived,
                expected=event.expected,
                seconds=event.seconds,
            )
        )

    with commands.running(aggregator, progress=told, sleep=sleep) as coordinator, commands.opened(aggregator) as at:
        terms = at.accepted.terms
        curve = _curve(terms)
        curve(1)  # the first figure loads the accountants: now, while the silos start
        coordinator.ensure_countersigned()
        first_epoch(coordinator)
        for number in range(1, last + 1):
            start = time.monotonic()
            closed = coordinator.run_round(number)
            drops.after(number)
            progress(
                Step(
                    text=closed.kind,
                    round=number,
                    rounds=last,
                    seconds=time.monotonic() - start,
                    settled=True,
                    epsilon=curve(number),
                    limit=terms.privacy.epsilon,
                )
            )
            yield closed


def _curve(terms: Contract) -> Callable[[int], float | None]:
    """Certified epsilon after so many rounds, the basis round first where there is one; None without differential privacy."""
    if not terms.is_private:
        return lambda rounds: None
    before = [event.with_steps(1) for event in unprotected.noised(before_training(terms)) or ()]
    training = exposure(terms, mechanism(terms))

    def after(rounds: int) -> float:
        steps = (rounds - len(before)) * terms.training.steps_per_round
        events = [*before, *([training.with_steps(steps)] if steps > 0 else [])]
        return accounting.certify(events, terms.privacy.delta).epsilon

    return after


def _evaluate(home: Path, names: Sequence[str], running: Children) -> dict[str, object]:
    """Before, head alone, after; by ``silo eval`` in a process of its own, which has both cores now."""
    pooled = [word for name in names for word in ("--private-head", str(home / name / "records.jsonl"))]
    return running.answer(
        "eval",
        "silo",
        ["eval", "--home", home / names[0], "--records", home / "held-out.jsonl", "--threads", "2", *pooled],
        threads=2,
    )


def _result(
    settings: Settings,
    dealt: Dealt,
    closed: Sequence[Closed],
    stated: Mapping[str, Mapping[str, object]],
    measured: Mapping[str, object],
    seconds: float,
) -> Result:
    aggregator = settings.home.absolute() / "aggregator"
    digests = {name: str(facts["model_digest"]) for name, facts in stated.items()} | {"aggregator": closed[-1].state.hex()}
    if len(set(digests.values())) != 1:
        raise TrustError(
            f"the parties reached different models: {digests}", hint="keep the folder and report this", code="digests-differ"
        )
    accuracies = {key: float(str(measured[key])) for key in ("accuracy_before", "accuracy_head", "accuracy_after")}
    facts = commands.build_report(aggregator, {"held_out_records": len(dealt.held_out), **accuracies})
    record, page = commands.write_report(aggregator, aggregator / "report", facts)
    return Result(
        silos=len(dealt.shares),
        rounds=len(closed),
        epsilon=None if settings.without_privacy else max(_by_pld(each) for each in stated.values()),
        delta=facts.guarantee.delta,
        epsilon_per_silo={
            name: None if each["epsilon"] is None else float(str(each["epsilon"])) for name, each in stated.items()
        },
        accuracy_before=accuracies["accuracy_before"],
        accuracy_head=accuracies["accuracy_head"],
        accuracy_after=accuracies["accuracy_after"],
        held_out=len(dealt.held_out),
        upload_bytes=facts.traffic.upload_bytes,
        lora_bytes=facts.traffic.lora_bytes,
        model_digest=closed[-1].state.hex(),
        digests=digests,
        report=str(record),
        report_html=str(page),
        seconds=round(seconds, 1),
        seconds_per_round=_seconds_per_round(facts),
        home=str(settings.home),
        mode=settings.mode,
        steps_per_round=settings.steps_per_round,
    )


def _by_pld(stated: Mapping[str, object]) -> float:
    """A silo's PLD figure, or the certified one where none was computed."""
    found = stated["epsilon_pld"]
    return float(str(stated["epsilon"] if found is None else found))


def _seconds_per_round(facts: AnyReport) -> float:
    spans = [each.closed_at - each.opened_at for each in facts.rounds]
    return round(sum(spans) / len(spans), 1)


def _silo_names(dealt: Dealt) -> list[str]:
    return silo_names(len(dealt.shares))


def _write_rows(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records), encoding="utf-8")


def _service_url(aggregator: Path, running: Children) -> str:
    """Where the service listens, once it does."""
    path, end = aggregator / "service.json", time.monotonic() + _START_S
    while time.monotonic() < end:
        if path.exists():
            return str(json.loads(path.read_bytes())["url"])
        running.check()
        time.sleep(0.02)
    raise MachineError(f"the service did not start within {_START_S:g} s", hint="read logs/serve.log", code="service")
