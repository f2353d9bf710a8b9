# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, each with one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

SiloHome = Annotated[Path, typer.Option("--home", help="the silo's directory", envvar="SILO_HOME", show_default=True)]
AggregatorHome = Annotated[
    Path, typer.Option("--home", help="the aggregator's directory", envvar="AGGREGATOR_HOME", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="print exactly one JSON document on stdout")]
HERE = Path()
