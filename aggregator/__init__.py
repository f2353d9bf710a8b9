# SPDX-License-Identifier: Apache-2.0
"""The other wing: a mailbox, a referee and a reporter. It holds no record, no torch and no single update."""
