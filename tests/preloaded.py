# SPDX-License-Identifier: Apache-2.0
"""What a command imports and computes again in every process, done once: in the server from which commands are forked.

No more than that is shared: constants of other libraries. Whatever depends on an argument, a file or the environment, each
forked command still reads and computes by itself.
"""

from __future__ import annotations

import importlib

from transformers import conversion_mapping

LATE = (
    "aggregator.mailbox", "cryptography.hazmat.backends.openssl.backend", "cryptography.hazmat.primitives.asymmetric.ec",
    "cryptography.hazmat.primitives.asymmetric.rsa", "encodings.utf_8_sig", "pydantic.fields", "pydantic.type_adapter",
    "pydantic.types", "silo.learning.sketch", "silo.learning.staged", "sqlalchemy.dialects.sqlite", "tokenizers.trainers",
    "tomllib", "transformers.convert_slow_tokenizer", "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers", "typer._adapters",
)  # fmt: skip
"""Modules that are only imported while a command runs; each costs every process of its own the same."""

for _name in LATE:
    importlib.import_module(_name)
conversion_mapping.get_checkpoint_conversion_mapping("bert")  # compiles hundreds of patterns at the first model, and keeps them
