# SPDX-License-Identifier: Apache-2.0
"""Real text for the demonstration, found on every machine that installed this project.

A pair is a function's signature and the first sentence of a docstring, both taken from the source of an installed library;
the question is whether the sentence describes the function. The source is parsed with ``ast`` and never imported or run.

A library's files are parted into two sorts by the SHA-256 of their names. *Unit* files give the records: each function
gives exactly one, with its own docstring (label ``yes``) or a lent one (label ``no``). *Lending* files give nothing else
than the lent docstrings, each to one record at most. So no docstring stands in two records. A signature may: equal functions
are written in several files (in one trial 121 of 1,950 signatures stood on both sides of the hold-out), their docstrings are
not equal. As dealt, a file's records hold nothing of another unit file; that no sentence comes twice is settled across files
before, which is fine for a demonstration on public text and which a real silo must never do.

The result is a function of the installed files: no clock, no random generator. What it does not promise: the same pairs on
a machine with other versions, or that every lent sentence is wrong (two functions may do the same under two names).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LABELS = ("no", "yes")
LIBRARIES = (
    "stdlib",
    "accelerate",
    "anyio",
    "attr",
    "click",
    "cryptography",
    "dp_accounting",
    "fsspec",
    "httpcore2",
    "httpx2",
    "huggingface_hub",
    "hypothesis",
    "jinja2",
    "joblib",
    "markdown_it",
    "mpmath",
    "networkx",
    "numpy",
    "opacus",
    "packaging",
    "pandas",
    "peft",
    "pip",
    "psutil",
    "pyarrow",
    "pydantic",
    "pytest",
    "rich",
    "safetensors",
    "scipy",
    "sentence_transformers",
    "setuptools",
    "sklearn",
    "sqlalchemy",
    "starlette",
    "sympy",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "typer",
    "uvicorn",
    "wrapt",
    "yaml",
)
_NOT_OWN = re.compile(
    r"_?tests?|testing|test_.*|.*_test|conftest|_?vendor(ed)?|(site|dist)-packages|idlelib|lib2to3|config-.*|__.*__"
)
_MAX_FILE_BYTES = 60_000
_MAX_LIBRARY_BYTES = 10_000_000
_LENDERS = 4
MAX_PER_FILE = 6
_SENTENCE_CHARS = (30, 240)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One record. ``file`` (``library/path.py``) is the privacy unit; ``label`` is one of ``LABELS``."""

    library: str
    file: str
    text: str
    text_pair: str
    label: str


@dataclass(frozen=True, kw_only=True)
class _Function:
    file: str
    name: str
    signature: str
    sentence: str

    @property
    def rank(self) -> bytes:
        """A fixed pseudo-random place, from what the function is and not from where the walk met it."""
        return hashlib.sha256("\0".join((self.file, self.signature, self.sentence)).encode()).digest()


def collect(limit_per_library: int = 1500, *, libraries: Sequence[str] = LIBRARIES) -> list[Pair]:
    """The pairs of every library in ``libraries`` that is installed, at most ``limit_per_library`` of each.

    About half of them are labelled ``no``. Ordered by library, then file.
    """
    seen: set[str] = set()
    return [pair for library in libraries for pair in _pairs(library, limit_per_library, seen)]


def _pairs(library: str, limit: int, seen: set[str]) -> list[Pair]:
    root = _root(library)
    if root is None:
        return []
    units, lenders = _functions(library, root, limit, seen)
    lent = deque(sorted(lenders, key=lambda function: function.rank))
    pairs = []
    for function in sorted(units, key=lambda function: function.rank)[:limit]:
        other = _borrow(lent, function) if function.rank[-1] & 1 else None
        sentence, label = (function.sentence, "yes") if other is None else (other.sentence, "no")
        pairs.append(Pair(library=library, file=function.file, text=function.signature, text_pair=sentence, label=label))
    return sorted(pairs, key=lambda pair: (pair.file, pair.text, pair.text_pair))


def _borrow(lent: deque[_Function], borrower: _Function) -> _Function | None:
    """The next lent function of another name, taken out of ``lent``; None when there is none left."""
    for place, other in enumerate(lent):
        if other.name.strip("_") != borrower.name.strip("_"):
            del lent[place]
            return other
    return None


def _root(library: str) -> Path | None:
    """The folder of an installed package, without importing it."""
    if library == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    if library in sys.stdlib_module_names:
        return None
    spec = importlib.util.find_spec(library)
    return Path(spec.origin).parent if spec and spec.origin and spec.submodule_search_locations else None


def _functions(library: str, root: Path, limit: int, seen: set[str]) -> tuple[list[_Function], list[_Function]]:
    """Functions of unit files and of lending files, in the order of the files' hashes, until enough was found or read.

    A sentence that was ``seen`` before is passed over and the new ones are added there.
    """
    units: list[_Function] = []
    lenders: list[_Function] = []
    left = _MAX_LIBRARY_BYTES
    for file, source in _sources(library, root):
        lends = _hash(f"lends {file}") % _LENDERS == 0
        kept, enough = (lenders, limit // 2) if lends else (units, limit)
        if len(kept) >= enough:
            continue
        left -= len(source)
        found = _read(file, source)[: None if lends else MAX_PER_FILE]
        new = {function.sentence: function for function in found if function.sentence not in seen}
        kept.extend(new.values())
        seen.update(new)
        if left <= 0:
            break
    return units, lenders


def _sources(library: str, root: Path) -> Iterator[tuple[str, bytes]]:
    """(unit name, source) of a library's own files, in the order of the SHA-256 of their names."""
    files = {f"{library}/{path.relative_to(root).as_posix()}": path for path in _walk(root) if path.suffix == ".py"}
    for name in sorted(files, key=_hash):
        try:
            source = files[name].read_bytes() if files[name].stat().st_size <= _MAX_FILE_BYTES else b""
        except OSError:
            continue
        if b'"""' in source:
            yield name, source


def _walk(root: Path) -> Iterator[Path]:
    """The files below ``root``, without the folders and files that are tests or belong to others."""
    for path in root.iterdir():
        if _NOT_OWN.fullmatch(path.stem):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        elif path.is_file():
            yield path


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def _read(file: str, source: bytes) -> list[_Function]:
    """The described functions of one file, in a fixed pseudo-random order; none when it is not Python of this version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    return sorted(_described(file, tree), key=lambda function: function.rank)


def _described(file: str, tree: ast.Module) -> Iterator[_Function]:
    scopes: list[ast.Module | ast.ClassDef] = [tree]
    scopes.extend(node for node in tree.body if isinstance(node, ast.ClassDef))
    for node in (node for scope in scopes for node in scope.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("__"):
            sentence = _first_sentence(ast.get_docstring(node) or "")
            if len(sentence) >= _SENTENCE_CHARS[0]:
                yield _Function(file=file, name=node.name, signature=_signature(node), sentence=sentence)


def _first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9)`'\"]\.) (?=[A-Z])", paragraph)[0][: _SENTENCE_CHARS[1]]


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """``def name(a, b, *c)``: names only, so that what is asked is what the function does."""
    arguments = node.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    stars = [f"*{argument.arg}" for argument in (arguments.vararg, arguments.kwarg) if argument]
    return f"def {node.name}({', '.join([*names, *stars])})"[: _SENTENCE_CHARS[1]]
