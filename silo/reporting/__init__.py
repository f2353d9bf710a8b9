# SPDX-License-Identifier: Apache-2.0
"""The silo's own report: what it may know and nobody else, as a record, a page and a PDF that do not leave the site."""
