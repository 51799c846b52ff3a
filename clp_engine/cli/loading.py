"""From what a user types to objects: base models, conditioned models with their tokenizers, reward functions."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EMBEDDED_MODEL = "smollm2"
EMBEDDED_DATASET = "docstrings"


def find_base_model(name_or_path: str, flag: str) -> str:
    """The hub id or folder of a base model, where "smollm2" is the embedded one.

    Raises:
        FileNotFoundError: a path that does not exist.
    """
    if name_or_path == EMBEDDED_MODEL and not Path(name_or_path).exists():
        from clp_engine.data.smollm2 import ensure_smollm2

        name_or_path = str(ensure_smollm2())
    check_path(name_or_path, flag)
    return name_or_path


def load_base_model(name_or_path: str, dtype: str | None = None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: a hub id, a folder, or "smollm2" for the embedded SmolLM2-135M-Instruct.
        dtype: a torch dtype's name; None takes the checkpoint's own.

    Raises:
        FileNotFoundError: a path that does not exist.
    """
    name_or_path = find_base_model(name_or_path, "--model_name_or_path")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype or "auto"), tokenizer


def load_model(path: str) -> Any:
    """Load a conditioned model by itself.

    Raises:
        FileNotFoundError: `path` is missing or holds no conditioned model.
    """
    check_path(path, "the model")
    from clp_engine.model import CLPModel

    return CLPModel.from_pretrained(path)


def load_conditioned_model(path: str, backend: str) -> tuple[Any, Any]:
    """Load a conditioned model, ready to generate with kernel back-end `backend`, and its tokenizer.

    Raises:
        FileNotFoundError: `path` is missing or holds no conditioned model.
        ValueError: the back-end is missing here.
    """
    from transformers import AutoTokenizer

    model = load_model(path)
    try:
        model.set_kernel_backend(backend)
    except RuntimeError as error:
        raise ValueError(f"--backend: {error}") from error
    has_tokenizer = (Path(path) / "tokenizer_config.json").is_file()
    return model, AutoTokenizer.from_pretrained(path if has_tokenizer else model.config._name_or_path)


def load_reward_funcs(specs: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Load reward functions by name, in the order given.

    Args:
        specs: names of built-in rewards, or `package.module:function`, found as from `python -m` in this folder.

    Raises:
        ValueError: no such built-in reward or function, or two of one name.
        ImportError: the module does not import.
    """
    functions: dict[str, Callable[..., Any]] = {}
    for spec in specs:
        function = _load_function(spec) if ":" in spec else _load_built_in(spec)
        name = getattr(function, "__name__", type(function).__name__)
        if name in functions:
            raise ValueError(f"--reward_funcs: two rewards have the name {name!r}; names tell the weights apart")
        functions[name] = function
    return functions


def save_tokenizer(output_dir: str, *places: str) -> None:
    """Write the tokenizer of the first of `places`, folders or hub ids, that has one; say so where none has."""
    from transformers import AutoTokenizer

    for place in filter(None, places):
        folder = Path(place)
        if folder.is_dir() and not [*folder.glob("tokenizer*"), *folder.glob("vocab*")]:
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError):
            continue  # no such hub repository, or one without a tokenizer
        tokenizer.save_pretrained(output_dir)
        return
    print(f"no tokenizer found in {' or '.join(filter(None, places))}: none written")


def check_new_folder(output_dir: str) -> None:
    """Refuse an output folder that holds anything.

    Raises:
        FileExistsError: with the remedy.
    """
    folder = Path(output_dir)
    if folder.is_dir() and (held := sorted(folder.iterdir())):
        raise FileExistsError(f"--output_dir {folder} holds {held[0].name}: choose another folder, or remove it")


def check_path(name_or_path: str, what: str) -> None:
    """Say that a folder is missing before a hub is asked for it.

    Raises:
        FileNotFoundError: `name_or_path` can only be a path, and nothing is there.
    """
    is_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if is_path and not Path(name_or_path).exists():
        raise FileNotFoundError(f"{what} {name_or_path}: no such folder")


def _load_function(spec: str) -> Callable[..., Any]:
    module_name, _, function_name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script's path lacks the current folder
    module = importlib.import_module(module_name)
    if not callable(function := getattr(module, function_name, None)):
        raise ValueError(f"--reward_funcs {spec}: module {module_name} has no function {function_name!r}")
    return function


def _load_built_in(name: str) -> Callable[..., Any]:
    from clp_engine.rewards import BUILTIN_REWARDS

    if name not in BUILTIN_REWARDS:
        raise ValueError(
            f"--reward_funcs {name}: no such built-in reward; they are {', '.join(sorted(BUILTIN_REWARDS))}, "
            "your own is package.module:function"
        )
    return BUILTIN_REWARDS[name]()
