"""The conditioned model: any Hugging Face language model whose forward and generate take a weighting per sequence.

Legend: B sequences, K copies, V vocabulary.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import logging
from typing import TYPE_CHECKING, Any

import torch

from clp_engine import packing, weighting
from clp_engine.conditioning import ActiveConditioning, ConditionedCheckpoint, Conditioning
from clp_engine.config import CLPConfig
from clp_engine.generation import WeightedGeneration, cache_of, check_cache, tag_cache
from clp_engine.layers import CLPLayer, conditioned_layers
from clp_engine.prompt_template import PromptTemplate
from clp_engine.storage import StoredModel
from clp_engine.targets import condition_modules
from clp_engine.weighting import KLWeight, RewardWeights
from clp_kernels import available_backends
from clp_kernels.select import FORMS

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
        NotImplementedError: a layer that cannot carry such copies, or one that accelerate keeps off its device.
        ValueError: the config matches no layer.
    """
    from transformers import PreTrainedModel

    if isinstance(model, CLPModel):
        raise TypeError(f"{type(model).__name__} is conditioned already, on {model.clp_config.rewards}")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"get_clp_model needs a transformers PreTrainedModel, got {type(model).__name__}")
    active = ActiveConditioning()
    condition_modules(model, config, active)
    for module in model.modules():
        if "_gradient_checkpointing_func" in vars(module):  # enabled before
            function: Any = module._gradient_checkpointing_func
            vars(module)["_gradient_checkpointing_func"] = ConditionedCheckpoint(active, function)
    conditioned: Any = model
    plain_class: Any = type(model)
    conditioned.__class__ = _conditioned_class(plain_class)
    conditioned.clp_config, conditioned._active = config, active
    conditioned._kernel_backend, conditioned._batch_invariant, conditioned._exact_delta = "auto", False, True
    conditioned._said_default, conditioned._isolates, conditioned.prompt_template = False, {}, None
    if "_old_forward" in vars(model):  # accelerate's hook runs it in the forward's place, under its signature
        conditioned._old_forward = type(conditioned).forward.__get__(conditioned)
        functools.update_wrapper(conditioned.forward, conditioned._old_forward)
    return conditioned


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


class CLPModel(WeightedGeneration, StoredModel):
    """Mixin of a conditioned model; `get_clp_model` and `CLPModel.from_pretrained` make instances.

    Attributes:
        clp_config: what the model is conditioned on.
        base_class: the plain model's class.
        prompt_template: how prompts were worded in training, where that is known; saved and loaded with the model.
    """

    clp_config: CLPConfig
    base_class: type
    prompt_template: PromptTemplate | None
    _active: ActiveConditioning
    _kernel_backend: str
    _batch_invariant: bool
    _exact_delta: bool
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
            coefficients, sequence_1T = packing.paged_rows(kwargs, self.clp_config.num_coefficients)
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
            with self._active.use(self._record(torch.zeros(1, self.clp_config.num_coefficients))):
                packing.check_packed(self, super().forward, kwargs)  # type: ignore[misc]
        return sequence_1T

    def _record(self, coefficients_BC: torch.Tensor) -> Conditioning:
        config = self.clp_config
        shape = list(getattr(coefficients_BC, "shape", [type(coefficients_BC).__name__]))
        if len(shape) != 2 or shape[1] != config.num_coefficients:
            lambda_too = ", lambda behind the copies'" if config.has_shared else ""
            raise ValueError(
                f"coefficients has shape {shape}, the model takes a tensor [B, {config.num_coefficients}], "
                f"for each sequence those of {list(config.copy_names)}{lambda_too}"
            )
        accumulator = torch.promote_types(self.dtype, torch.float32)  # type: ignore[attr-defined]
        c_BC = coefficients_BC.to(accumulator)
        how = (self._kernel_backend, config.num_copies, self._batch_invariant, self._exact_delta)
        record = Conditioning.from_rows(c_BC, *how)
        return record.to(self.device)  # type: ignore[attr-defined]

    def coefficients(
        self, batch_size: int, reward_weights: RewardWeights | None = None, kl_weight: KLWeight | None = None
    ) -> torch.Tensor:
        """Coefficients lambda(alpha) * w of a batch, [B, K] float32, from any accepted form of a weighting.

        Where the config has copies of its own, `lambda(alpha) * (mixing_matrix @ w)`; where something is trained for
        all weightings (`config.has_shared`), [B, K + 1] with lambda(alpha) behind them.

        Raises:
            ValueError: a weighting of a wrong name, length or value.
        """
        config = self.clp_config
        if config.folded is not None and kl_weight is not None:
            raise ValueError(
                f"kl_weight={kl_weight} on a model whose copy {config.folded!r} is folded into its base: the reference "
                "is not in it, use the model that it was folded from"
            )
        if reward_weights is None:
            w_BR = config.default_weights(batch_size)
            if kl_weight is None and not torch.compiler.is_compiling() and not self._said_default:
                self._said_default = True
                named = dict(zip(config.rewards, w_BR[0].tolist(), strict=True)) if batch_size else {}
                logger.warning("no reward_weights given: using the default %s", named)
        else:
            w_BR = weighting.reward_weights_tensor(reward_weights, config.rewards, batch_size, config.weight_domain)
        mixing_KR = config.mixing_matrix()
        c_BK = w_BR if mixing_KR is None else w_BR @ mixing_KR.T.to(w_BR.device)
        lambdas = weighting.kl_coefficients(kl_weight, batch_size, config.min_kl_weight, config.kl_interpolation)
        lambda_B1 = lambdas.to(c_BK.device)[:, None]
        return torch.cat([lambda_B1 * c_BK, lambda_B1], dim=1) if config.has_shared else lambda_B1 * c_BK

    @staticmethod
    def own_attributes() -> tuple[str, ...]:
        """Names of what conditioning sets on the model object."""
        settings = ("_kernel_backend", "_batch_invariant", "_exact_delta", "_said_default", "_isolates")
        return "clp_config", "prompt_template", "_active", *settings

    def set_kernel_backend(self, name: str, batch_invariant: bool = False, exact_delta: bool = True) -> None:
        """Choose how this model's conditioned layers are computed.

        Args:
            name: the operators' back-end: "auto", "reference", "cpp", "triton" or "cuda".
            batch_invariant: True gives a row of a conditioned layer's output the same bits whatever else is in the
                batch, at some cost; then `kl_weight=1.0` is the reference model to rounding instead of bit for bit. For
                the layers between them (attention, all that is not conditioned) torch promises no such thing.
            exact_delta: False lets linear layers round base and copies as one 16-bit weight where many rows share a
                weighting, as `collapse` does: faster, and much of the effect of copies a thousandth of the base's size
                is lost.

        Raises:
            ValueError: an unknown name, or a back-end that cannot keep a row's bits.
            RuntimeError: that back-end is missing here; the message says why.
            NotImplementedError: `batch_invariant` with a layer whose output torch's GEMM has part in.
        """
        backends = available_backends()
        if name != "auto" and name not in backends:
            raise ValueError(f"kernel back-end is {name!r}, expected 'auto' or one of {sorted(backends)}")
        if name != "auto" and backends[name] is not None:
            raise RuntimeError(f"kernel back-end {name!r} is missing here: {backends[name]}")
        for layer in conditioned_layers(self).values():  # type: ignore[arg-type]
            if layer.added and name not in ("auto", "reference", *FORMS[layer.operator]):
                raise ValueError(f"{layer.operator}, which {layer.clp.path} calls, has no {name!r} form: use 'auto'")
            if layer.added and batch_invariant:
                layer.check_batch_invariant(layer.auto_backend() if name == "auto" else name)
        self._kernel_backend, self._batch_invariant, self._exact_delta = name, batch_invariant, exact_delta

    def kernel_backend(self) -> str:
        """The back-end that the first conditioned layer takes now; what "auto" resolves to."""
        if self._kernel_backend != "auto":
            return self._kernel_backend
        layers = conditioned_layers(self).values()  # type: ignore[arg-type]
        return next(layer.auto_backend() for layer in layers if layer.added)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the vocabulary, where neither embedding nor head is conditioned.

        Raises:
            NotImplementedError: one is: its copies would keep the old size.
        """
        for module in (self.get_input_embeddings(), self.get_output_embeddings()):  # type: ignore[attr-defined]
            if isinstance(module, CLPLayer):
                raise NotImplementedError(f"{module.clp.path} has copies of its size: resize before get_clp_model")
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]

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
