# SPDX-License-Identifier: Apache-2.0
"""The thin roof: words in, words out. Heavy imports live inside the command functions."""
