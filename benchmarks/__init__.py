# SPDX-License-Identifier: Apache-2.0
"""Where the figures that we state come from; run with ``make bench``."""
