# SPDX-License-Identifier: Apache-2.0
"""The compliance report: its facts, its words, its pictures, its files."""
