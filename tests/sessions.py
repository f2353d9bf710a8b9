# SPDX-License-Identifier: Apache-2.0
"""Command-line sessions: a command in, exit code and both outputs out; a tiny model on disk; real processes where they matter."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cli import aggregator as aggregator_cli
from cli import errors
from cli import silo as silo_cli
from tests import warm as warm_children

APPS = {"silo": silo_cli.app, "aggregator": aggregator_cli.app}
WORDS = ("fever", "cough", "rash", "pain", "sleep", "blood", "heart", "lung", "mild", "acute", "old", "young", "left", "right")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, kw_only=True)
class Session:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict:
        """The one JSON document on stdout; anything else there fails."""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)

    @property
    def error(self) -> dict:
        return self.document["error"]


class Terminal:
    """Runs commands in this process; every word that was ever printed is kept in ``said``."""

    def __init__(self, capsys):
        self.capsys, self.said = capsys, []

    def __call__(self, command: str, *words: object) -> Session:
        name, *rest = [*command.split(), *map(str, words)]
        self.capsys.readouterr()
        code = errors.run(APPS[name], rest)
        out, err = self.capsys.readouterr()
        self.said.append(out + err)
        return Session(code=code, out=out, err=err)


WARM = (
    "tests.crash", "silo.commands", "silo.learning.training", "silo.learning.evaluation",
    "aggregator.commands", "aggregator.service",
    "aggregator.reporting.compliance", "cli.output", "cli.progress", "dp_accounting.pld.privacy_loss_distribution",
    "dp_accounting.rdp.rdp_privacy_accountant", "tests.warm", "transformers.models.bert.modeling_bert", "pydantic.main",
    "encodings.idna", "tests.preloaded",
)  # fmt: skip
"""What the server has imported from which processes are forked."""


@functools.cache
def warm():
    """The context whose processes are forked from one server that has imported everything, once for all tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(WARM))
    return context


class Started:
    """A real process of ``silo`` or ``aggregator`` from the warm server: what subprocess.Popen has, as far as tests ask for it."""

    def __init__(
        self, words: Sequence[str], *, out: Path | str, err: Path | str, cwd: Path | str | None = None, children: str = ""
    ):
        given = (words, str(out), str(err), cwd and str(cwd), children)
        self.process = warm().Process(target=_command, args=given, daemon=True)
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a command", timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()


def _command(words: Sequence[str], out: str, err: str, cwd: str | None, children: str) -> None:
    """The child: the command by its own entry point, with output in files; its own children come from ``children``."""
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    os.environ.update(ENVIRONMENT)
    if cwd:
        os.chdir(cwd)
    if children:
        from aggregator.simulation import processes

        processes._entry = warm_children.entry(children)
    be(words)


def be(words: Sequence[str]) -> None:
    """Be the command ``words`` by its own entry point; ends the process."""
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w", closefd=False), encoding="utf-8") for n in (1, 2))
    sys.argv, code = list(words), 1
    try:
        {"silo": silo_cli, "aggregator": aggregator_cli}[words[0]].main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(*words: object, out: Path | str = os.devnull, cwd: Path | None = None) -> Started:
    """A real process of ``silo`` or ``aggregator``; both outputs go to ``out``."""
    return Started([*map(str, words)], out=out, err=out, cwd=cwd)


@functools.cache
def children_server() -> str:
    """The address of a server of warm children (tests/warm.py), one for all tests of this process."""
    path = str(Path(tempfile.mkdtemp(prefix="siloquy-warm-")) / "socket")
    process = warm().Process(target=warm_children.server, args=(path,), daemon=True)
    process.start()
    atexit.register(shutil.rmtree, Path(path).parent, ignore_errors=True)
    until(Path(path).exists)
    return path


def finish(*words: object, timeout_s: float = 300.0, cwd: Path | None = None, warm_children: bool = False) -> Session:
    """A real process, run to its end. With ``warm_children`` those that it starts are forked, see tests/warm.py."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        children = children_server() if warm_children else ""
        running = Started([*map(str, words)], out=out, err=err, cwd=cwd, children=children)
        try:
            code = running.wait(timeout_s)
        finally:
            running.kill()
        return Session(code=code, out=out.read_text() if out.exists() else "", err=err.read_text() if err.exists() else "")


@contextlib.contextmanager
def serving(home: Path, port: int = 0):
    """A real `aggregator serve` on loopback: (process, address)."""
    process = start("aggregator", "serve", "--home", home, "--port", port)
    try:
        yield process, until(lambda: address(home, process))
    finally:
        process.kill()
        process.wait()


def address(home: Path, process: Started) -> str | None:
    assert process.poll() is None, "the service ended"
    path = home / "service.json"
    with contextlib.suppress(FileNotFoundError):
        stated = json.loads(path.read_bytes())
        return stated["url"] if stated["pid"] == process.pid else None
    return None


def until(look, *, within_s: float = 60.0, every_s: float = 0.002):
    """What ``look`` gives once it is true."""
    end = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(every_s)
    return found


def tiny_model(folder: Path, kind: str = "bert") -> Path:
    """A random BERT (or another kind of ``tiny_models.encoder``) of two layers with a word-level tokenizer, as files."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from tests import tiny_models

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: place for place, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tiny_models.encoder(kind).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    return folder


def rows(count: int, *, start_at: int = 0) -> list[dict]:
    """Records whose label a word decides."""
    found = []
    for number in range(start_at, start_at + count):
        words = [WORDS[(number * k + k * k) % len(WORDS)] for k in range(1, 5 + number % 4)]
        found.append({"text": " ".join(words), "label": "yes" if "fever" in words else "no"})
    return found


def write_rows(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def private_seeds(*homes: Path) -> list[bytes]:
    """Every private seed and local secret under these folders, raw."""
    found = []
    for home in homes:
        for path in home.rglob("*.key"):
            raw = path.read_bytes()
            if raw.startswith(b"#"):
                names = (b"sign_seed", b"receive_seed", b"ml_dsa_seed")
                lines = [line.split(b'"')[1] for line in raw.splitlines() if line.startswith(names)]
                found += [bytes.fromhex(line.decode()) for line in lines]
            else:
                assert len(raw) == 32
                found.append(raw)
    assert found
    return found


def private_seeds_of(path: Path) -> list[bytes]:
    """The seeds in one identity's file."""
    lines = [line.split(b'"')[1] for line in path.read_bytes().splitlines() if b"_seed = " in line]
    return [bytes.fromhex(line.decode()) for line in lines]


def mentions(data: bytes, seeds: list[bytes]) -> bool:
    """Whether one of the seeds stands in ``data``, raw or as hex in either case."""
    return any(seed in data or seed.hex().encode() in data.lower() for seed in seeds)
