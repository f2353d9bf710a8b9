# SPDX-License-Identifier: Apache-2.0
"""What trains: records, the frozen model, its adapters, one gradient per unit, and what becomes of them."""
