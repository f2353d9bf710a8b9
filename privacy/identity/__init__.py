# SPDX-License-Identifier: Apache-2.0
"""Who somebody is: keys to sign and to receive, and which of them may be trusted."""
