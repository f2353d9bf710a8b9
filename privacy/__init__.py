# SPDX-License-Identifier: Apache-2.0
"""The ground floor: every line on which a privacy or secrecy guarantee rests, and nothing else.

Reading order for an auditor: ``federation`` and ``chain`` (what was agreed); ``dp`` (what it costs: ``lattice`` for the
sensitivity, ``noise``, ``mechanism`` and ``accounting``, ``ledger`` and ``budget`` for who may spend it); ``identity``,
``envelope`` and ``secure_sum`` (who sees what); ``update_rule`` (why the next model cannot be forged); ``transparency`` (why
nobody is shown another history); ``audit`` (the same checks, made by somebody else).
"""
