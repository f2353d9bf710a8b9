# SPDX-License-Identifier: Apache-2.0
"""The ground floor: every line on which a privacy or secrecy guarantee rests, and nothing else.

Reading order for an auditor: ``federation`` (what was agreed), ``lattice`` (sensitivity), ``noise``, ``mechanism``
and ``accounting`` (what it costs), ``ledger`` and ``budget`` (who may spend it), ``keys``, ``envelope`` and
``guardian_sum`` (who sees what), ``update_rule`` (why the next model cannot be forged).
"""
