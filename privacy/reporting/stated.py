# SPDX-License-Identifier: Apache-2.0
"""The views of a record that somebody else wrote: made, or refused by name; never an error of another kind.

Promised: a record whose values no view can show (a date beyond the calendar, an epsilon of 300 digits, a list without its first
entry) is refused as untrue. A machine that cannot write a PDF stays a machine's fault only where the record could be shown.
"""

from __future__ import annotations

from collections.abc import Callable

from privacy.errors import TrustError

Views = dict[str, bytes]


def views_of(make: Callable[[], Views]) -> Views:
    """What ``make`` gives, by file name. Raises TrustError when the record's values cannot be shown."""
    try:
        return make()
    except (ArithmeticError, LookupError, ValueError, OSError, RecursionError) as error:
        raise TrustError(
            f"it holds values that no view can show ({type(error).__name__})", hint="ask for the report again", code="malformed"
        ) from error
