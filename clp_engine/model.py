"""The conditioned model: any Hugging Face language model whose forward and generate take a weighting per sequence.

Legend: B sequences, K copies, V vocabulary.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clp_engine import packing, weighting
from clp_engine.conditioning import ActiveConditioning, ConditionedCheckpoint, Conditioning
from clp_engine.config import CLPConfig
from clp_engine.generation import WeightedGeneration, cache_of, check_cache, tag_cache
from clp_engine.layers import CLPLinear, conditioned_layers, find_targets
from clp_engine.weighting import KLWeight, RewardWeights
from clp_kernels import available_backends, backend_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

WEIGHTING_ARGUMENTS = ("reward_weights", "kl_weight", "coefficients")


def get_clp_model(model: PreTrainedModel, config: CLPConfig) -> Any:
    """Condition `model` in place: its parameters freeze, the chosen layers get K trainable copies that start at zero.

    The object's class becomes a subclass of (CLPModel, its own class), so it stays what it was to every library.
    Right after the call the model's outputs equal the plain model's under every weighting.

    Args:
        model: a transformers language model, decoder-only or an encoder-decoder.
        config: what to condition, on which rewards.

    Returns:
        `model` itself.

    Raises:
        TypeError: not a transformers model, or conditioned already.
        NotImplementedError: a quantised model, or a layer that accelerate keeps off its device.
        ValueError: the config matches no linear layer.
    """
    from transformers import PreTrainedModel

    if isinstance(model, CLPModel):
        raise TypeError(f"{type(model).__name__} is conditioned already, on {model.clp_config.rewards}")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"get_clp_model needs a transformers PreTrainedModel, got {type(model).__name__}")
    if getattr(model, "is_quantized", False):
        raise NotImplementedError(f"{type(model).__name__} is quantised: full deltas need floating-point weights")
    targets = find_targets(model, config)
    for name in targets:
        _check_not_offloaded(model.get_submodule(name), name)
    model.requires_grad_(False)
    active = ActiveConditioning()
    for name in targets:
        linear = model.get_submodule(name)
        model.set_submodule(name, CLPLinear.from_linear(linear, config.num_copies, active, name))  # type: ignore[arg-type]
    conditioned: Any = model
    plain_class: Any = type(model)
    conditioned.__class__ = _conditioned_class(plain_class)
    conditioned.clp_config, conditioned._active = config, active
    conditioned._kernel_backend, conditioned._said_default, conditioned._isolates = "auto", False, {}
    if "_old_forward" in vars(model):  # accelerate's hook runs it in the forward's place, under its signature
        conditioned._old_forward = type(conditioned).forward.__get__(conditioned)
        functools.update_wrapper(conditioned.forward, conditioned._old_forward)
    return conditioned


def _check_not_offloaded(module: torch.nn.Module, name: str) -> None:
    hook: Any = getattr(module, "_hf_hook", None)
    if any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,))):
        raise NotImplementedError(
            f"{name} is offloaded: its weights come to the device for each forward only; choose a device_map that "
            "leaves conditioned layers on a device"
        )


class _ConditionedType(type):
    """The type of the classes made here, which pickle as what they are made of: no module holds them."""


@functools.cache
def _conditioned_class(base: Any) -> type:
    """The subclass of (CLPModel, base) whose forward's signature names the weighting's arguments for generate."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return CLPModel.forward(self, *args, **kwargs)

    signature = inspect.signature(base.forward)
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in WEIGHTING_ARGUMENTS]
    parameters = list(signature.parameters.values())
    catch_all = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    named = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    forward.__signature__ = signature.replace(parameters=[*named, *own, *catch_all])  # type: ignore[attr-defined]
    namespace = {"forward": forward, "__module__": __name__, "base_class": base}
    return _ConditionedType(f"CLP{base.__name__}", (CLPModel, base), namespace)


def _reduce_class(cls: type) -> Any:
    base = vars(cls).get("base_class")
    return (_conditioned_class, (base,)) if base is not None else cls.__qualname__


copyreg.pickle(_ConditionedType, _reduce_class)


class CLPModel(WeightedGeneration):
    """Mixin of a conditioned model; `get_clp_model` and `CLPModel.from_pretrained` make instances.

    Attributes:
        clp_config: what the model is conditioned on.
        base_class: the plain model's class.
    """

    clp_config: CLPConfig
    base_class: type
    _active: ActiveConditioning
    _kernel_backend: str
    _said_default: bool
    _isolates: dict[str, bool]

    def forward(
        self,
        *args: Any,
        reward_weights: RewardWeights | None = None,
        kl_weight: KLWeight | None = None,
        coefficients: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The plain model's forward under W(c) = W_0 + sum_k c_k Delta_k with each sequence's own coefficients c.

        Args:
            *args: the plain model's own arguments.
            reward_weights: dict | list of B dicts | [K] | [B, K]; None for the config's default.
            kl_weight: alpha in [min_kl_weight, 1], a float or [B]; 1.0 is the reference model, None the trained policy.
            coefficients: [B, K] float32 instead of the two above, lambda(alpha) * w, taken as they are (generate
                passes them; values off the simplex are task arithmetic).
            **kwargs: the plain model's own arguments. A packed row [1, T] whose position_ids restart at each of S
                sequences takes one weighting for all or S of them.

        Returns:
            The plain model's output.

        Raises:
            ValueError: a weighting of a wrong name, length or value, or a KV cache that was filled under another one.
            NotImplementedError: packed sequences of several weightings that would see each other in this model.
        """
        weighting.check_given_once(coefficients, reward_weights, kl_weight)
        sequence_1T: torch.Tensor | None
        if packing.is_paged(kwargs):
            coefficients, sequence_1T = packing.paged_rows(kwargs, self.num_coefficients)
        else:
            given = weighting.num_rows(reward_weights, kl_weight) if coefficients is None else len(coefficients)
            sequence_1T = self._packed_sequences(args, kwargs, given)
        if coefficients is None:
            num_rows = packing.batch_size(args, kwargs) if sequence_1T is None else given
            coefficients = self.coefficients(num_rows, reward_weights, kl_weight)  # type: ignore[arg-type]
            check_cache(kwargs.get("past_key_values"), coefficients)
        record = self._record(coefficients)
        if sequence_1T is not None:
            record = record.packed(sequence_1T, kwargs.get("logits_to_keep", 0))
        tag_cache(kwargs.get("past_key_values"), coefficients)
        with self._active.use(record):
            outputs = super().forward(*args, **kwargs)  # type: ignore[misc]
        tag_cache(cache_of(outputs), coefficients)
        return outputs

    def _packed_sequences(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], num_weightings: int | None
    ) -> torch.Tensor | None:
        """The sequence of each token where a packed row gets several weightings; the KV cache is switched off then."""
        if num_weightings is None or packing.batch_size(args, kwargs) != 1:
            return None
        sequence_1T = packing.packed_sequences(kwargs, num_weightings)
        if sequence_1T is not None:
            with self._active.use(self._record(torch.zeros(1, self.num_coefficients))):
                packing.check_packed(self, super().forward, kwargs)  # type: ignore[misc]
        return sequence_1T

    def _record(self, coefficients_BK: torch.Tensor) -> Conditioning:
        accumulator = torch.promote_types(self.dtype, torch.float32)  # type: ignore[attr-defined]
        record = Conditioning.from_rows(coefficients_BK.to(accumulator), self._kernel_backend)
        return record.to(self.device)  # type: ignore[attr-defined]

    @property
    def num_coefficients(self) -> int:
        """Columns of `coefficients`."""
        return self.clp_config.num_copies

    def coefficients(
        self, batch_size: int, reward_weights: RewardWeights | None = None, kl_weight: KLWeight | None = None
    ) -> torch.Tensor:
        """Coefficients lambda(alpha) * w of a batch, [B, K] float32, from any accepted form of a weighting.

        Raises:
            ValueError: a weighting of a wrong name, length or value.
        """
        config = self.clp_config
        if reward_weights is None:
            w_BK = config.default_weights(batch_size)
            if kl_weight is None and not torch.compiler.is_compiling() and not self._said_default:
                self._said_default = True
                named = dict(zip(config.rewards, w_BK[0].tolist(), strict=True)) if batch_size else {}
                logger.warning("no reward_weights given: using the default %s", named)
        else:
            w_BK = weighting.reward_weights_tensor(reward_weights, config.rewards, batch_size, config.weight_domain)
        return weighting.coefficients(w_BK, kl_weight, config.min_kl_weight)

    def set_kernel_backend(self, name: str) -> None:
        """Choose the operators' back-end for this model: "auto", "reference", "cpp", "triton" or "cuda".

        Raises:
            ValueError: an unknown name.
            RuntimeError: that back-end is missing here; the message says why.
        """
        backends = available_backends()
        if name != "auto" and name not in backends:
            raise ValueError(f"kernel back-end is {name!r}, expected 'auto' or one of {sorted(backends)}")
        if name != "auto" and backends[name] is not None:
            raise RuntimeError(f"kernel back-end {name!r} is missing here: {backends[name]}")
        self._kernel_backend = name

    def kernel_backend(self) -> str:
        """The back-end that the first conditioned layer takes now; what "auto" resolves to."""
        layer = next(iter(conditioned_layers(self).values()))  # type: ignore[arg-type]
        if self._kernel_backend != "auto":
            return self._kernel_backend
        x_1D = torch.empty(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
        c_K = torch.zeros(layer.deltas.shape[1], device=layer.weight.device)
        return backend_for(x_1D, layer.weight, layer.deltas, c_K, layer.bias)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Counts of trainable parameters and of all parameters."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]  # type: ignore[attr-defined]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print the number and share of trainable parameters, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        """Tie each checkpointed block to the record of its own forward: the recompute runs after that forward ended."""
        from torch.utils.checkpoint import checkpoint

        inner = kwargs.pop("gradient_checkpointing_func", checkpoint)
        super()._set_gradient_checkpointing(  # type: ignore[misc]
            enable=enable, gradient_checkpointing_func=ConditionedCheckpoint(self._active, inner), **kwargs
        )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the copies and the config to `save_directory`; the base model is referenced, not copied.

        Args:
            save_directory: a folder, made where missing.
            **kwargs: `is_main_process` and `state_dict` as transformers' Trainer passes them; the rest is ignored.
        """
        from clp_engine import checkpoint

        if kwargs.get("is_main_process", True):
            checkpoint.save(self, Path(save_directory), kwargs.get("state_dict"))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, base_model: Any = None, is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        """Load a conditioned model that `save_pretrained` wrote.

        Args:
            path: its folder, or a hub id.
            base_model: the plain model (an object, a path or an id) instead of the recorded one.
            is_trainable: True keeps the copies trainable.
            **kwargs: handed to the base's from_pretrained.

        Raises:
            FileNotFoundError: no such model, or its base is not where it was.
            ValueError: a tensor is missing, extra or of another shape, or the base is another model.
        """
        from clp_engine import checkpoint

        return checkpoint.load(path, base_model, is_trainable, **kwargs)
