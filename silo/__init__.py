# SPDX-License-Identifier: Apache-2.0
"""One wing: what runs beside the records. It reads them, trains on them and sends only masked, noised sums."""
