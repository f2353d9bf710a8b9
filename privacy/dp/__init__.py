# SPDX-License-Identifier: Apache-2.0
"""What epsilon rests on: clipping, noise, the accountants, the ledger and the gate."""
