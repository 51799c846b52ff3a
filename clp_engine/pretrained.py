"""Plain models: given as objects, or loaded by name with the transformers class that their config asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_plain_model(model: Any, **kwargs: Any) -> Any:
    """`model` itself, or the causal or encoder-decoder language model that it names.

    Args:
        model: a transformers model, a path or a hub id.
        **kwargs: handed to from_pretrained.

    Raises:
        FileNotFoundError: no such model.
        TypeError: something else, or a model that is conditioned already.
        ValueError: kwargs beside a model that is loaded already.
    """
    from transformers import PreTrainedModel

    if isinstance(model, (str, Path)):
        try:
            return load_by_name(model, **kwargs)
        except OSError as error:
            raise FileNotFoundError(f"the model {str(model)!r} cannot be loaded: {error}") from error
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model, a path or a hub id, got {type(model).__name__}")
    if hasattr(model, "clp_config"):
        raise TypeError(f"{type(model).__name__} is conditioned already: take a plain model, as its collapse() gives")
    if kwargs:
        raise ValueError(f"{sorted(kwargs)} are for loading a model by name, {type(model).__name__} is loaded already")
    return model


def load_by_name(name: str | Path, **kwargs: Any) -> Any:
    """The causal or encoder-decoder language model at a path or hub id, whichever its config says.

    Raises:
        OSError, ValueError: transformers' own.
    """
    _, auto = _config_and_class(name, **kwargs)
    return auto.from_pretrained(name, **kwargs)


def outline_by_name(name: str | Path, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """The same model without values, on the meta device: its config alone is read.

    Args:
        name: a path or a hub id.
        dtype: of its parameters; None takes the config's.
        **kwargs: handed to AutoConfig.from_pretrained.

    Raises:
        OSError, ValueError: transformers' own.
    """
    config, auto = _config_and_class(name, **kwargs)
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype or config.dtype or torch.float32)


def _config_and_class(name: str | Path, **kwargs: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.from_pretrained(name, **kwargs)
    return config, AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
