# SPDX-License-Identifier: Apache-2.0
"""A silo, or a process of its own, that keeps shares of what unmasks a sum."""
