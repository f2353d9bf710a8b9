# SPDX-License-Identifier: Apache-2.0
"""Verification from evidence alone: every check that another party can make again."""
