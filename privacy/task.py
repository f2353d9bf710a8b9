# SPDX-License-Identifier: Apache-2.0
"""What a contract must say about its task, by kind: labels for a classification, the form of a record for a language model.

Keys of the other kind are refused where they change anything: one that stands there and does nothing would be read as a promise.
"""

from __future__ import annotations

from privacy.contract import Contract, Task, contradiction


def check_task(terms: Contract) -> None:
    """Returns when the task has what its kind needs, and nothing of the other kind.

    Raises:
        ConfigError: it lacks something, or a key stands there that belongs to the other kind.
    """
    task = terms.task
    if not task.is_causal:
        if task.format:
            raise contradiction(f"task.format = {task.format}", 'it belongs to kind = "causal-lm"')
        if len(task.labels) < 2:
            raise contradiction(f"{len(task.labels)} labels - at `$.task.labels`", "a text classification has two or more")
        if len(set(task.labels)) != len(task.labels):
            raise contradiction("a label stands twice in task.labels", ", ".join(task.labels))
        return
    theirs = {
        "task.labels": task.labels, "task.text_pair": task.text_pair, "model.pooling": terms.model.pooling != "mean",
        "adapter.head_scale": terms.adapter.head_scale != 1.0,
    }  # fmt: skip
    if given := [name for name, value in theirs.items() if value]:
        raise contradiction(f"kind = causal-lm with {', '.join(given)}", 'these belong to kind = "text-classification"')
    if not task.format:
        raise contradiction("kind = causal-lm without task.format", 'it is "text", "prompt-response" or "messages"')
    if terms.adapter.basis not in ("weights", "random"):
        raise contradiction(f"kind = causal-lm with adapter.basis = {terms.adapter.basis}", 'it is "weights" or "random"')
    if not terms.adapter.modules:
        raise contradiction("kind = causal-lm without adapter.modules", "there is no head: nothing would be trained")


def in_words(task: Task) -> str:
    """What is learned, for a person who is to agree to it."""
    if not task.is_causal:
        shown = ", ".join(task.labels[:6]) + (", …" if len(task.labels) > 6 else "")
        return f"{task.kind} into {len(task.labels)} labels: {shown}"
    what = "every token" if task.format == "text" else "the response alone"
    return f"{task.kind} of records as {task.format}: {what} is learned, within {task.max_length} tokens"
