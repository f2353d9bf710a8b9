# SPDX-License-Identifier: Apache-2.0
"""Reports as pages: one document of headings, tables and pictures, shown as HTML and as PDF. It knows no figure of its own."""
