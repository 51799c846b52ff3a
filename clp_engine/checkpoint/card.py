"""The model card of a checkpoint: what it is and how to use it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from clp_engine.checkpoint.manifest import Manifest

CARD_FILE = "README.md"
_MARK = re.compile(r"\n<!-- clp_engine: card ([0-9a-f]{64}) -->\n\Z")

_TEXT = """---
{header}
---

# A steerable language model

One model for every weighting of its rewards, made with clp_engine by Conditional Language Policy
([arXiv 2407.15762](https://arxiv.org/abs/2407.15762)). This repository holds what was trained on top of the base
model; the base itself is loaded beside it.

| | |
| --- | --- |
{facts}

Reward weights are {domain}, one for each reward. `kl_weight` from {min_kl_weight:g} (the trained policy) to 1
(the base model itself) says how close to the base a text stays. Every sequence of a batch may have its own.

```python
import clp_engine as clp
from transformers import AutoTokenizer

model = clp.CLPModel.from_pretrained("FOLDER OR HUB ID")
tokenizer = AutoTokenizer.from_pretrained({base_literal})
inputs = tokenizer(["a prompt"], return_tensors="pt")
tokens = model.generate(**inputs, reward_weights={example}, max_new_tokens=64)
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))
```

Where the base model is elsewhere by now, `from_pretrained` takes its place as `base_model=`.
"""


def text(manifest: Manifest) -> str:
    """The card of `manifest`'s checkpoint; its last line tells an untouched card from an edited one."""
    config = manifest.config
    base = manifest.base_model_name_or_path
    facts = {
        "rewards": ", ".join(f"`{name}`" for name in config.rewards),
        "conditioned": f"`{config.variant or config.target_modules}`, as `{config.parameterization}`",
        "base model": f"`{base or 'without a name'}`, revision {manifest.base_revision or 'unknown'}",
        "base fingerprint": f"`{manifest.base_fingerprint}`",
    }
    body = _TEXT.format(
        header=_header(manifest),
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        domain=">= 0 and sum to 1" if config.weight_domain == "simplex" else "any finite numbers",
        min_kl_weight=config.min_kl_weight,
        base_literal=json.dumps(base),
        example=json.dumps(dict.fromkeys(config.rewards, round(1 / len(config.rewards), 6))),
    )
    return f"{body}\n<!-- clp_engine: card {_hash(body)} -->\n"


def is_untouched(card: str) -> bool:
    """Whether `card` is one of `text`'s, as it was written."""
    mark = _MARK.search(card)
    return mark is not None and _hash(card[: mark.start()]) == mark[1]


def may_write(directory: Path) -> bool:
    """Whether `directory` has no card, or one that nobody has edited."""
    path = directory / CARD_FILE
    return not path.exists() or (path.is_file() and is_untouched(path.read_text(encoding="utf-8", errors="replace")))


def _hash(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _header(manifest: Manifest) -> str:
    from huggingface_hub import ModelCardData

    fields: dict[str, Any] = {"library_name": "clp_engine", "tags": ["clp", "conditional-language-policy", "steerable"]}
    if manifest.base_revision is not None:  # the hub refuses a folder's path
        fields["base_model"] = manifest.base_model_name_or_path
    return ModelCardData(**fields).to_yaml().strip()
