# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, each with one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aggregator import defaults

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

SiloHome = Annotated[Path, typer.Option("--home", help="the silo's directory", envvar="SILO_HOME", show_default=True)]
AggregatorHome = Annotated[
    Path, typer.Option("--home", help="the aggregator's directory", envvar="AGGREGATOR_HOME", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="print exactly one JSON document on stdout")]
Units = Annotated[int, typer.Option(min=1, help="a rounded public upper bound on any silo's privacy units, agreed, not counted")]
MaxSilos = Annotated[int, typer.Option(min=1, help="how many silos may know one unit: epsilon is for such a unit")]
Targets = Annotated[
    str, typer.Option(help="linear modules to adapt, comma separated: names, `value-output` (of attention) or `all-linear`")
]
LastLayers = Annotated[int, typer.Option(min=0, help="adapt only so many of the last layers; 0 adapts all")]
Rank = Annotated[int, typer.Option(min=1, help="r: each adapted module trains r×r numbers")]
Heads = Annotated[int, typer.Option(min=1, max=64, help="h: each adapted module trains h matrices of r×r on vectors of their own")]
Basis = Annotated[
    str, typer.Option(help="where A and B come from: weights, random, public (data), private (a noised round) or raw (no noise)")
]
Scale = Annotated[
    float | None, typer.Option(help="s in W + s·B·R·A: a larger one moves R faster; by default as the basis wants it")
]
PublicData = Annotated[str, typer.Option(help="with --basis public: what the public data set is called, in words")]
SamplingRate = Annotated[float, typer.Option(help="q: how likely a unit is in a step")]
Folder = Annotated[Path | None, typer.Option(help="exchange documents in this folder instead of where silo.toml says")]
Protocol = Annotated[
    str, typer.Option(help="consent: every silo signs for every sum; shares: guardians hold shares, so that silos may be away")
]
Dropouts = Annotated[int, typer.Option(min=0, help="with shares: how many silos may be away from a sum")]
WithoutPrivacy = Annotated[
    bool,
    typer.Option(
        "--without-privacy",
        help="NO differential privacy: no noise, no epsilon; exact sums over blocks of silos are seen by everybody",
    ),
]
TwoSilos = Annotated[
    bool, typer.Option("--two-silos-see-each-other", help="two members: each reads the other's noised vector off the sum")
]
Kind = Annotated[str, typer.Option(help="what is learned: text-classification, or causal-lm (to complete texts or prompts)")]
Form = Annotated[
    str, typer.Option("--format", help="with causal-lm: what a record is: text, prompt-response or messages (by the chat template)")
]
MODE_HELP = "joint: a round is one private step over all silos; local: steps of each silo alone, then the mean of their changes"
STEPS_HELP = f"local mode: private steps that each silo takes in a round; {defaults.STEPS_PER_ROUND['local']} unless given"
ROUNDS_HELP = f"private rounds; {defaults.ROUNDS['joint']}, or {defaults.ROUNDS['local']} in local mode, unless given"
HERE = Path()


def refuse_figures(context: typer.Context, without_privacy: bool) -> None:
    """Return unless a figure of a guarantee was asked for where there is none."""
    if not without_privacy:
        return
    for name in ("epsilon", "delta"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name} and --without-privacy contradict each other: without noise there is no {name}")


def check_kind(kind: str, *, labels: str, form: str, of_texts: bool, model: str = "") -> None:
    """Return if there is such a kind of task, with labels or a format, and a model, as it needs them.

    ``of_texts``: whether something was asked for that only a classification has, a second text or a pooling.
    """
    needed = {"text-classification": ("--labels", labels, "--format", form), "causal-lm": ("--format", form, "--labels", labels)}
    if kind not in needed:
        raise typer.BadParameter(f"--kind {kind} is not known: {' or '.join(needed)}")
    own, given, other, stray = needed[kind]
    if not given or stray:
        raise typer.BadParameter(f"--kind {kind} needs {own}, and has no {other}")
    if of_texts and kind == "causal-lm":
        raise typer.BadParameter("--text-pair and --pooling are for --kind text-classification")
    if model == "minilm" and kind == "causal-lm":
        raise typer.BadParameter("--kind causal-lm needs --model: minilm is an encoder, whose tokens see later ones")


def words(text: str) -> tuple[str, ...]:
    """The words of a comma separated list."""
    return tuple(word.strip() for word in text.split(",") if word.strip())
