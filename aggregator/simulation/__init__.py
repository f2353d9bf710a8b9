# SPDX-License-Identifier: Apache-2.0
"""A whole federation on one machine: records dealt, processes started, a run from end to end."""
