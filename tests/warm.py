# SPDX-License-Identifier: Apache-2.0
"""Children of a simulation that are forked from a process which has imported everything, instead of importing for seconds each.

A simulation starts ``silo`` and ``aggregator`` as it starts them for a user, by a path and arguments; with ``entry`` as that path
it starts this file as a script. That hands its arguments, environment, folder and open files to the ``server``, which forks a
child that runs the command by its own entry point. Signals, the exit code and a death by SIGKILL go through in both directions:
to the simulation the script is the command. What is not tested like this: that the installed command itself starts
(test_processes.py has one simulation of installed commands).
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

LIFELINE = "SILOQUY_LIFELINE"
_LENGTH = 8


# --- The script, which imports nothing else --------------------------------------------------------------------------------------


def script(server: str, words: list[str]) -> None:
    """Be the command ``words``: ask ``server`` for a child, pass signals on, and end as the child ended."""
    line = socket.socket(socket.AF_UNIX)
    line.connect(server)
    lifeline = os.environ.get(LIFELINE, "")
    files = [0, 1, 2, *([int(lifeline)] if lifeline else [])]
    request = json.dumps({"words": words, "environment": dict(os.environ), "folder": str(Path.cwd()), "files": files}).encode()
    line.sendmsg([len(request).to_bytes(_LENGTH, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])
    line.sendall(request)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, _: line.send(bytes([caught])))
    answer = line.recv(_LENGTH)
    code = int.from_bytes(answer, "big", signed=True) if answer else 1
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# --- The server ------------------------------------------------------------------------------------------------------------------


def server(path: str) -> None:
    """Fork a keeper for each script that asks; runs in a process that has imported everything, and never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are nobody's to wait for
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    while True:
        line, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _keep(line)
        line.close()


def _keep(line: socket.socket) -> None:
    """Fork the command and stay until it ended: its signals come by ``line``, its exit code goes there."""
    head, rights, *_ = line.recvmsg(_LENGTH, socket.CMSG_SPACE(4 * 4))
    handed = array.array("i", rights[0][2])
    length, raw = int.from_bytes(head, "big"), b""
    while len(raw) < length:
        raw += line.recv(length - len(raw))
    request = json.loads(raw)
    child = os.fork()
    if child == 0:
        line.close()
        _become(request, list(handed))
    for descriptor in handed:
        os.close(descriptor)
    while True:
        ready, _, _ = select.select([line], [], [], 0.02)
        if ready:
            sent = line.recv(1)
            os.kill(child, sent[0] if sent else signal.SIGKILL)
            if not sent:
                os._exit(0)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            line.sendall(os.waitstatus_to_exitcode(status).to_bytes(_LENGTH, "big", signed=True))
            os._exit(0)


def _become(request: dict, handed: list[int]) -> None:
    """The command, with the script's files, environment and folder."""
    from tests import sessions

    above = [os.dup2(descriptor, 100 + place) for place, descriptor in enumerate(handed)]
    for descriptor, wanted in zip(above, request["files"], strict=True):
        os.dup2(descriptor, wanted)
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sessions.be(request["words"])


def entry(path: str):
    """What replaces ``aggregator.simulation.processes._entry``."""
    return lambda command: [sys.executable, "-I", "-S", __file__, path, command]


if __name__ == "__main__":
    script(sys.argv[1], sys.argv[2:])
