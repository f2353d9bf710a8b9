# SPDX-License-Identifier: Apache-2.0
"""Text from elsewhere, before a person reads it: what cannot be seen, or moves other characters, is shown as □.

**Formal guarantees** of ``visible``

- *Nothing moves*: no control character, escape code, direction mark or line separator is left, but the line feed.
- *Nothing hides*: no zero-width character is left, so that two names that look the same are compared as they are.
- *The rest stays*: every other character is itself, in its place; a second time changes nothing.

Not promised: that two letters of different alphabets look different.
"""

from __future__ import annotations

import unicodedata

MISSING = "□"
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    """``text`` with □ for every character that cannot be seen; see the module docstring."""
    if text.isprintable():
        return text
    return "".join(char if char == "\n" or unicodedata.category(char) not in _UNSEEN else MISSING for char in text)
