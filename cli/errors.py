# SPDX-License-Identifier: Apache-2.0
"""The one place where an exception becomes a message and an exit code.

==== ==========================================================================
code meaning
==== ==========================================================================
0    done
1    a bug: the traceback is in a file, one line and its path go to the user
2    usage: the words on the command line
3    configuration: unknown key, wrong value, missing file, unusable records
4    trust: signature, sender, fingerprint, contract, replay, malformed bytes
5    refused for privacy: budget, ledger, no certified bound; a self-test or audit that failed
6    the round did not complete; `verify`: nothing failed, and questions are open
7    the machine: device, memory, disk, clock, network
130  interrupted; the state is saved, the same command goes on
==== ==========================================================================

As text an error is ``error: what``, a blank line, ``hint: one thing to do``, on stderr. With ``--json`` it is one document
``{"error": {"code", "exit_code", "message", "hint", …facts}}`` on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

import typer

from privacy.errors import SiloquyError
from privacy.visible import visible

USAGE, INTERRUPTED, BUG = 2, 130, 1
# typer carries its own copy of click: its usage errors are found through a public subclass.
UsageProblem: type[Exception] = typer.BadParameter.__mro__[2]


def run(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give the exit code; never raises, except ``SystemExit`` from a signal handler."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    try:
        result = app(words, standalone_mode=False)
    except SiloquyError as error:
        return _report(as_json, **error.as_json()["error"])  # type: ignore[arg-type]
    except UsageProblem as error:
        return _usage(error, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _report(
            as_json,
            code="interrupted",
            exit_code=INTERRUPTED,
            message="interrupted; the state is saved",
            hint="run the same command again: it goes on where it stopped",
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _bug(error, as_json)
    return result if isinstance(result, int) else 0


def _usage(error: BaseException, as_json: bool) -> int:
    message = getattr(error, "format_message", lambda: str(error))()
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "silo"
    return _report(
        as_json,
        code="usage",
        exit_code=USAGE,
        message=message or "no command given",
        hint=f"`{path} -h` shows examples and options",
    )


def _bug(error: Exception, as_json: bool) -> int:
    """Keep the traceback, which may quote values, out of the terminal and in a private file."""
    descriptor, path = tempfile.mkstemp(prefix="siloquy-", suffix=".traceback")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    return _report(
        as_json,
        code="bug",
        exit_code=BUG,
        message=f"unexpected {type(error).__name__}; this is a bug",
        hint=f"read {path} for secrets or records, then send it with what you did",
        traceback=path,
    )


def _report(as_json: bool, *, code: str, exit_code: int, message: str, hint: str, **facts: object) -> int:
    if as_json:
        body = {**facts, "code": code, "exit_code": exit_code, "message": message, "hint": hint}
        sys.stdout.write(json.dumps({"error": body}, ensure_ascii=False, default=str) + "\n")
    else:
        sys.stderr.write(visible(f"error: {message}\n" + (f"\nhint: {hint}\n" if hint else "")))
    return exit_code
