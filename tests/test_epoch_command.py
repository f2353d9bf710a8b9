# SPDX-License-Identifier: Apache-2.0
"""`aggregator epoch`: a federation whose keys were lost goes on in a new epoch, with the state it had."""

from __future__ import annotations

from tests.federation import Federation


def test_a_new_epoch_takes_over_and_the_next_round_is_summed_with_fresh_keys(tmp_path) -> None:
    federation = Federation(tmp_path)
    coordinator = federation.ready()
    coordinator.run_round(1)
    first = federation.silos[0].chain.context
    called = coordinator.new_epoch()
    closed = coordinator.run_round(2)
    assert (called.number, closed.kind) == (2, "result")
    assert federation.silos[0].chain.context != first
    assert closed.state == federation.reached([1, 2]).digest
    federation.store.close()
