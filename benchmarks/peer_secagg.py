# SPDX-License-Identifier: Apache-2.0
"""One round of Flower's SecAgg+ in one process: seconds of a client and of the server, bytes a client sends. Prints JSON.

Run by benchmarks.secure_sum, with the Python of an environment that has ``flwr`` (Apache-2.0); imports nothing of ours. Flower's
own functions do all the work: ``SecAggPlusWorkflow`` on the server, ``secaggplus_mod`` on each client, in turn, so that none slows
another. Between them stands a grid in memory that turns every message into its protobuf bytes and back, as a network would
have to; that time is given apart and belongs to neither side. The clients' own training gives an array at once, and the
server's strategy does nothing after the sum. A client that drops out does so where that costs the server most: its keys are
shared, its masked vector never comes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.compat.common import recorddict_compat as compat
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.server import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.supercore.task_identity import TaskIdentity

STAGES = ("setup", "share_keys", "collect_masked_vectors", "unmask")


class Client:
    """One client: its state between the stages, what it spends and sends."""

    def __init__(self, number: int, update: np.ndarray) -> None:
        self.number, self.update = number, update
        self.context = Context(run_id=1, node_id=number, node_config={}, state=RecordDict(), run_config={})
        self.seconds, self.sent = 0.0, 0

    def answer(self, message: Message) -> Message:
        """A stage, timed."""
        start = time.perf_counter()
        reply = secaggplus_mod(message, self.context, self.train)
        self.seconds += time.perf_counter() - start
        return reply

    def train(self, message: Message, context: Context) -> Message:
        """What would be training."""
        result = FitRes(
            status=Status(code=Code.OK, message=""), parameters=ndarrays_to_parameters([self.update]), num_examples=1, metrics={}
        )
        return Message(compat.fitres_to_recorddict(result, keep_input=False), reply_to=message)


class Grid:
    """Carries messages to the clients, as bytes."""

    def __init__(self, clients: Iterable[Client], dropped: frozenset[int]) -> None:
        self.clients, self.dropped = {client.number: client for client in clients}, dropped
        self.stage, self.encoding = -1, 0.0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        self.stage += 1
        gone = self.dropped if STAGES[self.stage] in STAGES[2:] else frozenset()
        replies = []
        for message in messages:
            number = message.metadata.dst_node_id
            if number in gone:
                continue
            client = self.clients[number]
            message.content, _ = self.carried(message.content)
            reply = client.answer(message)
            reply.content, size = self.carried(reply.content)
            client.sent += size
            replies.append(reply)
        return replies

    def carried(self, content: RecordDict) -> tuple[RecordDict, int]:
        """The same content after a journey as bytes, and how many these are."""
        start = time.perf_counter()
        raw = recorddict_to_proto(content).SerializeToString()
        arrived = recorddict_from_proto(ProtoRecordDict.FromString(raw))
        self.encoding += time.perf_counter() - start
        return arrived, len(raw)


class Strategy:
    """Every client is asked, and the sum is kept."""

    def __init__(self, clients: Iterable[Client]) -> None:
        self.clients, self.parameters = clients, None

    def configure_fit(self, number: int, parameters: Any, manager: Any) -> list[tuple[Any, FitIns]]:
        return [(SimpleNamespace(node_id=client.number), FitIns(parameters, {})) for client in self.clients]

    def aggregate_fit(self, number: int, results: list[tuple[Any, FitRes]], failures: list[Any]) -> tuple[None, dict[str, Any]]:
        self.parameters = results[0][1].parameters
        return None, {}


def measured(silos: int, dimension: int, dropped: int, threshold: int) -> dict[str, float]:
    """Seconds and bytes of one round; what came out is held to the mean of the arrays that went in."""
    generator = np.random.default_rng(1)
    clients = [Client(i, generator.uniform(-1, 1, dimension).astype(np.float32)) for i in range(1, silos + 1)]
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
    grid, strategy = Grid(clients, frozenset(range(1, dropped + 1))), Strategy(clients)
    state = RecordDict()
    state.config_records["config"] = ConfigRecord({"current_round": 1})
    state.array_records["parameters"] = ArrayRecord([np.zeros(1, dtype=np.float32)])
    context = Context(run_id=1, node_id=0, node_config={}, state=state, run_config={})
    legacy = LegacyContext(context, strategy=strategy, client_manager=SimpleNamespace(num_available=lambda: silos))
    workflow = SecAggPlusWorkflow(silos if silos > 2 else 1.0, threshold, max_weight=1.0, clipping_range=1.0)
    start = time.perf_counter()
    workflow(grid, legacy)
    seconds = time.perf_counter() - start
    stayed = clients[dropped:]
    found = parameters_to_ndarrays(strategy.parameters)[0]
    assert np.abs(found - np.mean([client.update for client in stayed], axis=0)).max() < 1e-4, "Flower's own sum"
    silo_seconds = [client.seconds for client in clients]
    return {
        "client_s": float(np.mean([client.seconds for client in stayed])),
        "server_s": seconds - sum(silo_seconds) - grid.encoding,
        "encoding_s": grid.encoding,
        "sent_bytes": float(np.mean([client.sent for client in stayed])),
    }


def main() -> None:
    """Print the best of several rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--silos", type=int, default=8)
    parser.add_argument("--dimension", type=int, default=917_504)
    parser.add_argument("--dropped", type=int, default=0)
    parser.add_argument("--threshold", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rounds = [measured(options.silos, options.dimension, options.dropped, options.threshold) for _ in range(1 + options.repeats)][
        1:
    ]
    best = {name: min(each[name] for each in rounds) for name in rounds[0]}
    print(json.dumps({"version": version("flwr"), **best}))


if __name__ == "__main__":
    main()
