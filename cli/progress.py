# SPDX-License-Identifier: Apache-2.0
"""Live progress on stderr: one moving line that says what is being waited for, and one kept line per round.

On a terminal the moving line is redrawn; into a file or a pipe only the kept lines go. Silent under ``--json``.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli.output import Output, bar, size, table
from privacy.dp.unprotected import in_words

if TYPE_CHECKING:
    from aggregator.desk import Event
    from aggregator.simulation.simulate import Result, Step

_WAITING = {
    "countersignature": "countersignatures",
    "epoch-note": "epoch keys",
    "pair-seeds": "pair seeds",
    "confirmation": "key confirmations",
    "upload": "masked updates",
    "consent": "consents",
    "release": "mask seeds",
    "acknowledgement": "model digests",
    "cosignature": "signatures on the log",
    "outcome": "the sum",
}


_HEAD = "a private linear head alone ({}best of {} step sizes, each at the same epsilon)"
_OPEN_HEAD = "a linear head alone, without noise ({}best of {} step sizes)"


class RoundDisplay:
    """The moving line of ``aggregator round``."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._live = Live(Text(""), console=output.err, transient=True, refresh_per_second=8)

    def __enter__(self) -> Self:
        if not self._output.json and self._output.err.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def event(self, event: Event) -> None:
        """Redraw the moving line."""
        self.moving(f"round {event.round}: {_waiting(event.step)} {event.arrived} of {event.expected}  {event.seconds:.0f} s")

    def moving(self, text: str) -> None:
        """Redraw the moving line with ``text``."""
        self._live.update(Text(text))

    def line(self, text: str) -> None:
        """Keep a line."""
        self._output.say(text)


class SimulationDisplay(RoundDisplay):
    """Progress of ``aggregator simulate``: phases, then a line per round with epsilon as a bar of its limit."""

    def step(self, step: Step) -> None:
        """Show one step."""
        if step.settled:
            cost = "NO DIFFERENTIAL PRIVACY"
            if step.epsilon is not None:
                cost = f"epsilon {step.epsilon:5.2f} of {step.limit:g} {bar(step.epsilon, step.limit)}"
            self.line(f"round {step.round:>3}/{step.rounds}  {step.text:<6}  {cost}  {step.seconds:4.1f} s")
        elif step.expected:
            self.moving(f"{_waiting(step.text)} {step.arrived} of {step.expected}  {step.seconds:.0f} s")
        else:
            self.line(step.text)


def _waiting(step: str) -> str:
    """What is being waited for, in words."""
    return _WAITING.get(step, step)


def _head(result: Result, models: int) -> str:
    return (_OPEN_HEAD if result.epsilon is None else _HEAD).format("in joint mode, " if result.mode == "local" else "", models)


def closing_words(result: Result) -> Iterator[str | Table]:
    """What a simulation ends with, for people."""
    from aggregator.reporting.no_guarantee import SENTENCE
    from aggregator.reporting.wording import HEAD_MODELS

    if result.epsilon is None:
        yield ""
        yield SENTENCE
    yield ""
    yield table(
        f"accuracy on {result.held_out} held-out records (the simulator's: no silo has them)",
        ("", "accuracy"),
        [
            ("before: an untrained head, which answers the first label to everything", f"{result.accuracy_before:.3f}"),
            (_head(result, HEAD_MODELS), f"{result.accuracy_head:.3f}"),
            ("after: R-only LoRA-SB adapters and head", f"{result.accuracy_after:.3f}"),
        ],
    )
    yield ""
    whom = "everyone, the aggregator and all other silos" if result.mode == "local" else "the aggregator with one colluding silo"
    yield table(
        "privacy: none" if result.delta is None else f"privacy against {whom}, delta {result.delta:g}",
        ("silo, by its own ledger", "epsilon"),
        [(name, in_words(epsilon, ".3f")) for name, epsilon in result.epsilon_per_silo.items()],
    )
    yield f"the head alone trained {HEAD_MODELS} more models on these records, which no ledger charges"
    yield ""
    ratio = result.lora_bytes / result.upload_bytes if result.upload_bytes else 0.0
    yield f"sent per silo and round: {size(result.upload_bytes)}"
    yield f"plain LoRA of the same rank would send {size(result.lora_bytes)}, {ratio:.0f} times as much"
    yield f"model {result.model_digest}"
    yield f"computed independently by {len(result.digests)} parties: {', '.join(result.digests)}"
    steps = f" of {result.steps_per_round} steps" if result.mode == "local" else ""
    yield f"{result.rounds} rounds{steps}, {result.seconds_per_round:.1f} s each, {result.seconds:.0f} s in all"
    yield f"report {result.report_html}"
    yield f"record {result.report}"
