# SPDX-License-Identifier: Apache-2.0
"""Records of a causal language model become token numbers: a prompt, of which nothing is learned, and a response.

Promised: a record is encoded by itself, the same way whatever day it is and however often; records are never packed together.
What a model learns is what it is asked for later: the prompt is encoded as it is at generation, and the response apart from it, so
that no token lies across the boundary. Errors never quote a record. Not promised: that a chat template means what its author says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from privacy.errors import ConfigError, RecordsError
from privacy.federation import Task
from silo.learning.records import Record

_ONE_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"
"""What is put in front of a template that asks for the day, so that records do not depend on it: Llama 3's day without a clock."""

_AT_RANDOM = re.compile(r"""\|\s*random\b|['"]random['"]|\blipsum\s*\(""")
"""Of what Jinja brings along, what gives something else each time: a filter (also within ``map``) and a function."""


def encoded(records: Sequence[Record], tokenizer: Any, task: Task) -> list[tuple[tuple[int, ...], None, int]]:  # noqa: ANN401
    """Of each record (token ids, None, how many of them are the prompt's): ``tokens.Row``, cut on the right at ``max_length``.

    ===================  ==================================================================================
    ``task.format``      tokens
    ===================  ==================================================================================
    ``text``             BOS*, the text, EOS
    ``prompt-response``  BOS*, the prompt, then the response, EOS
    ``messages``         by the tokenizer's chat template, which writes its own: all messages but the last with the
                         generation prompt, then what the template makes of the last message, the assistant's
    ===================  ==================================================================================

    BOS*: where the tokenizer puts one before a text. A response that is cut has lost its EOS: a model does not learn to stop there.

    Raises:
        ConfigError: the tokenizer has no end-of-text token, or no chat template.
        ConfigError: the chat template draws at random, or changes what came before a message.
        RecordsError: records of which no token to learn is left, or that the template refuses: how many, and nothing of them.
    """
    if task.format == "messages":
        (prompts, responses), begin, end = _rendered(records, tokenizer), [], []
    else:
        prompts = [record.texts[0] for record in records] if task.format == "prompt-response" else [""] * len(records)
        responses = [record.texts[-1] for record in records]
        begin, end = _begin(tokenizer), [_end_of_text(tokenizer)]
    rows = [
        (tuple([*begin, *prompt, *response, *end][: task.max_length]), None, len(begin) + len(prompt))
        for prompt, response in zip(_ids(tokenizer, prompts), _ids(tokenizer, responses), strict=True)
    ]
    if empty := sum(len(ids) <= max(1, prompt) for ids, _, prompt in rows):
        raise RecordsError(
            f"{empty} of {len(rows)} records leave no token of a response within {task.max_length} tokens",
            hint="shorten or drop such records, or agree on a larger max_length", code="prompt-too-long", found=empty,
        )  # fmt: skip
    return rows


def ends(tokenizer: Any, task: Task) -> frozenset[int]:  # noqa: ANN401
    """The tokens that end a response: EOS, and of a conversation the first that the chat template writes after a message's text."""
    found = {tokenizer.eos_token_id} - {None}
    if task.format == "messages":
        _, (response,) = _rendered([Record(texts=("user", "a", "assistant", "1847"), label=0)], tokenizer)
        found |= set(_ids(tokenizer, [response.partition("1847")[2].strip()])[0][:1])
    return frozenset(found)


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:  # noqa: ANN401
    """The token numbers of each text, without special tokens of the tokenizer's own."""
    whole = tokenizer(list(texts), add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False)
    found: list[list[int]] = whole["input_ids"]
    return found


def _begin(tokenizer: Any) -> list[int]:  # noqa: ANN401
    """BOS, where this tokenizer puts it before a text."""
    first = tokenizer("a")["input_ids"][:1]
    return list(first) if first == [tokenizer.bos_token_id] else []


def _end_of_text(tokenizer: Any) -> int:  # noqa: ANN401
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the base model's tokenizer has no end-of-text token",
            hint="choose a base model whose tokenizer_config.json names an eos_token", code="tokenizer",
        )  # fmt: skip
    return int(tokenizer.eos_token_id)


def _rendered(records: Sequence[Record], tokenizer: Any) -> tuple[list[str], list[str]]:  # noqa: ANN401
    """(prompt, response) of each conversation, by the chat template; apart they are exactly the whole that it makes."""
    template, prompts, responses, refused = _template(tokenizer), [], [], 0
    for record in records:
        messages = [dict(zip(("role", "content"), pair, strict=True)) for pair in zip(*[iter(record.texts)] * 2, strict=True)]
        try:
            prompt, whole = (
                tokenizer.apply_chat_template(part, chat_template=template, tokenize=False, add_generation_prompt=prompted)
                for part, prompted in ((messages[:-1], True), (messages, False))
            )
        except Exception:  # a template is a program: what it raises is its own affair, and may quote the record
            refused += 1
            continue
        if not whole.startswith(prompt):
            raise ConfigError(
                "the base model's chat template does not begin a conversation with its own prompt for the last message",
                hint='write the prompts out and use format = "prompt-response"', code="chat-template",
            )  # fmt: skip
        prompts.append(prompt)
        responses.append(whole.removeprefix(prompt))
    if refused:
        raise RecordsError(
            f"the base model's chat template refuses {refused} of {len(records)} conversations",
            hint="many templates want user and assistant in turn, and some know no system message", code="chat-template",
            found=refused,
        )  # fmt: skip
    return prompts, responses


def _template(tokenizer: Any) -> str:  # noqa: ANN401
    """The tokenizer's chat template, for which every day is the same one."""
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            "the base model's tokenizer has no chat template, or several and none by default",
            hint='choose an instruction-tuned base model, or format = "prompt-response"', code="no-chat-template",
        ) from error  # fmt: skip
    if found := _AT_RANDOM.search(template):
        raise ConfigError(
            f"the base model's chat template draws at random: {found[0]}",
            hint='a record must be the same tokens each time: use format = "prompt-response"', code="chat-template",
        )  # fmt: skip
    return _ONE_DAY + template if "strftime_now" in template else template
