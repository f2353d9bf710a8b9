# SPDX-License-Identifier: Apache-2.0
"""Children that end when their parent does, however it ends: a pipe whose one writing end the parent holds.

The kernel closes that end when the parent dies, also by SIGKILL; a child that reads the other end sees it and stops with SIGTERM.
Promised: a child that calls ``watch`` gets SIGTERM soon after its parent is gone, at once if it is gone already. Not promised:
that a child which does not call it ends.
"""

from __future__ import annotations

import os
import signal
import threading

_VARIABLE = "SILOQUY_LIFELINE"


class Lifeline:
    """The parent's end; children get ``environment`` and inherit ``descriptor``, and end when it is closed."""

    def __init__(self) -> None:
        self.descriptor, self._held = os.pipe()

    @property
    def environment(self) -> dict[str, str]:
        """What tells a child which descriptor to watch."""
        return {_VARIABLE: str(self.descriptor)}

    def close(self) -> None:
        """Let go: children that still run end."""
        os.close(self.descriptor)
        os.close(self._held)


def watch() -> None:
    """End this process with SIGTERM when its parent ends, if a parent asked for it."""
    descriptor = os.environ.pop(_VARIABLE, "")
    if descriptor.isascii() and descriptor.isdecimal():
        threading.Thread(target=_end_after, args=(int(descriptor),), daemon=True).start()


def _end_after(descriptor: int) -> None:
    try:
        os.read(descriptor, 1)
    except OSError:  # not a descriptor of this process: nobody asked
        return
    os.kill(os.getpid(), signal.SIGTERM)
