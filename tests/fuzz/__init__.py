# SPDX-License-Identifier: Apache-2.0
"""Every parser of bytes that somebody else may have written, as a function of bytes: targets; ``python -m tests.fuzz --help``."""
