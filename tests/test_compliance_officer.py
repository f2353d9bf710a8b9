# SPDX-License-Identifier: Apache-2.0
"""The compliance officer's guide is run: its commands, as written, over a real federation's report, evidence and log."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from aggregator import commands
from privacy.identity import keys
from tests.sessions import Terminal
from tests.whole import Whole

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "compliance-officer.md"


def lines() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def handed_over(tmp_path_factory) -> tuple[Path, str]:
    """What a coordinator hands over after two rounds, and the fingerprint that is read aloud."""
    folder = tmp_path_factory.mktemp("officer")
    whole = Whole.create(folder / "whole")
    whole.run(2)
    whole.home.facts_path.write_text('{"lora_width": 1, "simulated": false}')
    keys.write_public(whole.home.public_path, whole.identity, "Hub")
    commands.write_report(whole.home.root, folder / "report", commands.build_report(whole.home.root))
    whole.close()
    for name in ("evidence", "log"):
        shutil.copytree(whole.home.root / name, folder / "copy" / name)
    return folder, keys.fingerprint(
        keys.stated(whole.accepted.terms.aggregator, bytes.fromhex(whole.accepted.terms.aggregator.seal_key))
    )


def run(line: str, folder: Path, fingerprint: str, capsys) -> tuple[int, str]:
    words = shlex.split(line.replace("$FINGERPRINT", fingerprint))
    if words[0] == "sha256sum":
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = Terminal(capsys)(" ".join(words[:2]), *words[2:])
    finally:
        os.chdir(before)
    return done.code, done.out + done.err


def test_the_three_commands_say_that_everything_holds(handed_over, capsys):
    folder, fingerprint = handed_over
    assert len(lines()) == 3
    said = []
    for line in lines():
        code, out = run(line, folder, fingerprint, capsys)
        assert code == 0, f"{line}\n{out}"
        said.append(out)
    digest = hashlib.sha256((folder / "report" / "report.json").read_bytes()).hexdigest()
    assert said[0].startswith(digest)
    assert digest in (folder / "report" / "report.html").read_text(encoding="utf-8").replace(" ", "")
    assert "✓" in said[1]
    assert '"holds":true' in said[2].replace(" ", "")


@pytest.mark.parametrize(
    ("name", "old", "new", "named"),
    [
        ("report.json", b'"rounds": 2', b'"rounds": 1', "in the log"),
        ("report.html", b"Hospital 1", b"Hospital 2", "report.html"),
        ("registry.yaml", b"Hospital 1", b"Hospital 2", "registry.yaml"),
        ("report.pdf", b"%%EOF", b"%%EOX", "report.pdf"),
    ],
)
def test_what_was_changed_is_named(handed_over, capsys, tmp_path, name, old, new, named):
    folder, fingerprint = handed_over
    shutil.copytree(folder / "report", tmp_path / "report")
    (tmp_path / "copy").symlink_to(folder / "copy")
    path = tmp_path / "report" / name
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    code, out = run(lines()[1], tmp_path, fingerprint, capsys)
    assert code == 4
    assert re.search(rf"✗ report .*{re.escape(named)}", out), out


def test_the_sections_it_names_are_those_of_the_page(handed_over):
    page = (handed_over[0] / "report" / "report.html").read_text(encoding="utf-8")
    text = GUIDE.read_text(encoding="utf-8")
    named = re.findall(r"^\| ([A-Z][A-Za-z0-9 -]+) \|", text, re.MULTILINE)
    assert len(named) >= 6
    for title in named:
        assert f"</span>{title}</h2>" in page, title
