# SPDX-License-Identifier: Apache-2.0
"""``silo selftest`` and ``silo audit``: is the code on this machine the mechanism that epsilon was computed for?

Both exit with 0 when nothing contradicts that, and with 5 when something does. Neither opens a record or charges the ledger.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import HERE, Json, SiloHome

FAILED = 5


def add_to_silo(app: typer.Typer) -> None:
    """Register these commands."""
    app.command("selftest")(selftest)
    app.command("audit")(audit)


def selftest(home: SiloHome = HERE, json: Json = False) -> int:
    """Run a real step on made-up units and check it: clipping, neighbours, sampling, noise, divisor. Under a minute.

    It tests the silo's own contract and model, or built-in ones where it has joined no federation. No record is opened, nothing is
    sent or charged. Exit code 5 when a check fails.

    \b
    Examples:
      silo selftest
      silo selftest --json
    """
    from cli.output import Output, table
    from silo import selftest

    facts = selftest.run(home)
    failed = [check for check in facts["checks"] if not check["passed"]]
    rows = [(check["name"], "✓" if check["passed"] else "✗", _rare(check["false_alarm"])) for check in facts["checks"]]
    lines: list[Any] = [facts["subject"], "", table("", ("check", "", "false alarm"), rows), ""]
    lines += [f"✗ {check['name']} ({check['asks']}): {check['found']}" for check in failed]
    lines.append(f"✗ {len(failed)} of {len(rows)} checks failed: train no further on this machine" if failed else
                 f"✓ {len(rows)} checks passed; no record was opened, nothing was charged")  # fmt: skip
    Output(json=json).result(facts, lines)
    return FAILED if failed else 0


def audit(
    canaries: Annotated[int, typer.Option(min=1, help="made-up units, at least 1000; more see more")] = 10_000,
    steps: Annotated[
        int | None, typer.Option(min=1, help="private steps; the whole plan unless given, or what takes about a minute")
    ] = None,
    directions: Annotated[str, typer.Option(help="of the canaries' gradients: dirac (a coordinate each), or random")] = "dirac",
    plot: Annotated[Path | None, typer.Option(help="write the scores as a picture (SVG) here")] = None,
    membership: Annotated[
        bool, typer.Option("--membership", help="instead: what a membership attack (LiRA) finds, beside what epsilon allows")
    ] = False,
    runs: Annotated[int, typer.Option(min=1, help="with --membership: shadow runs, and as many attacked ones")] = 32,
    records: Annotated[
        Path | None, typer.Option(help="with --membership: held-out records instead of made-up ones; the figures stay here")
    ] = None,
    home: SiloHome = HERE,
    json: Json = False,
) -> int:
    """A lower bound on epsilon by experiment: canaries through the contract's mechanism on this machine.

    The sums are made, scored and thrown away here: no record is opened, nothing is sent or charged. Exit code 5 when the
    bound is above what the accountant claims. The bound is no guarantee: it is below epsilon also where all is well.

    \b
    Examples:
      silo audit
      silo audit --steps 5 --canaries 1000 --plot scores.svg
      silo audit --membership --plot membership.svg
    """
    from cli.output import Output
    from silo import empirical_audit

    if directions not in ("dirac", "random"):
        raise typer.BadParameter("--directions is dirac or random")
    if membership:
        facts = _membership(home, runs, steps, records, plot, json)
        return 0 if facts["holds"] else FAILED
    if records is not None:
        raise typer.BadParameter("--records is for --membership: canaries are made up")
    facts = empirical_audit.audit(home, canaries=canaries, steps=steps, directions=directions, plot=plot)
    Output(json=json).result(facts, _words(facts))
    return 0 if facts["holds"] else FAILED


def _membership(home: Path, runs: int, steps: int | None, records: Path | None, plot: Path | None, json: bool) -> dict[str, Any]:
    from cli.output import Output, bar
    from cli.progress import RoundDisplay
    from silo import empirical_audit

    output, done = Output(json=json), 0
    with RoundDisplay(output) as display:

        def progress() -> None:
            nonlocal done
            done += 1
            display.moving(f"{bar(done, 4 * runs)} {done} of {4 * runs} runs")

        facts = empirical_audit.membership(home, runs=runs, steps=steps, records=records, plot=plot, progress=progress)
    output.result(facts, _found(facts))
    return facts


def _found(facts: dict[str, Any]) -> list[Any]:
    from cli.output import table

    def percent(part: float) -> str:
        return f"{100 * part:.2f} %"

    shown = ("false_positive_rate", "true_positive_rate", "low", "high", "allowed", "without_protection")
    rows = [tuple(percent(each[name]) for name in shown) for each in facts["at"]]
    columns = ("false alarms", "members found", "95 % from", "to", "epsilon allows", "without clipping and noise")
    verdict = (
        "✓ the attack finds no more than epsilon allows; that is no proof that none could"
        if facts["holds"]
        else "✗ the attack finds more than epsilon allows: train no further, run `silo selftest`"
    )
    return [
        f"{facts['attacked_runs']} runs of {facts['steps']} of {facts['steps_planned']} planned steps on {facts['units']} "
        f"{facts['records']} units, epsilon {facts['epsilon_claimed']:.3g} at delta {facts['delta']:g}",
        "",
        table("", columns, rows),
        "",
        f"area under the curve {facts['roc_area']:.3f}; without clipping and noise {facts['roc_area_without_protection']:.3f} "
        "(0.5 is chance)",
        *([f"picture in {facts['plot']}"] if facts.get("plot") else []),
        verdict,
    ]


def _words(facts: dict[str, Any]) -> list[Any]:
    from cli.output import table

    over = f"{facts['steps']} of {facts['steps_planned']} planned steps"
    seen = "an audit like this one could see no smaller noise"
    if facts["detectable_factor"] is not None:
        seen = (
            f"an audit like this one sees a true epsilon from {facts['detectable_epsilon']:.3g} on, "
            f"{facts['detectable_factor']:.2g} times the claim ({facts['detectable_noise']:.2f} of the noise)"
        )
    rows = [
        ("the accountant: at most", f"{facts['epsilon_claimed']:.3f}"),
        ("the audit: at least, whatever the mechanism", f"{facts['epsilon_bound']:.3f}"),
        ("the audit: at least, for subsampled Gaussian noise", f"{facts['epsilon_bound_family']:.3f}"),
    ]
    verdict = (
        "✓ nothing contradicts the accountant; that is no proof that it is right"
        if facts["holds"]
        else "✗ the mechanism on this machine is not the one that epsilon was computed for: train no further"
    )
    return [
        f"{facts['canaries']} canaries over {over}, against {facts['noise_shares']} honest noise shares, delta {facts['delta']:g}",
        "",
        table("", (f"epsilon at {100 * facts['confidence']:.0f} % confidence", ""), rows),
        "",
        seen,
        f"telling members apart: area {facts['roc_area']:.3f} under the curve (0.5 is chance), "
        f"{100 * facts['true_positive_rate_at_1_percent']:.1f} % found at 1 % false alarms",
        *([f"picture in {facts['plot']}"] if facts.get("plot") else []),
        verdict,
    ]


def _rare(chance: float) -> str:
    return f"{chance:.0e}" if chance else "none"
