# SPDX-License-Identifier: Apache-2.0
"""The transparency log: leaves, tiles, proofs and signed heads, in C2SP formats."""
