# SPDX-License-Identifier: Apache-2.0
"""The guardian sum: from an epoch's secrets to one sum of masked vectors, and nothing finer."""
