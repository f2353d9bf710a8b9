# SPDX-License-Identifier: Apache-2.0
"""The documents are true: the generated page is fresh, every link inside the repository leads somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_command_reference_is_fresh() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/reference/generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.PAGE.read_text(encoding="utf-8") == generate.page(), "run: python docs/reference/generate.py"


def test_every_link_to_a_file_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_every_command_shows_an_example() -> None:
    text = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    for section in text.split("\n### ")[1:]:
        assert "Example" in section, section.splitlines()[0]


def test_the_readme_names_commands_that_exist() -> None:
    reference = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    for command, word in re.findall(r"`(silo|aggregator) ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert f"### {command} {word}\n" in reference, f"{command} {word}"
