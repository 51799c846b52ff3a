"""The conditioned model: any causal Hugging Face model whose forward and generate take a weighting per sequence.

Legend: B sequences, K copies, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clp_engine import collapsing, weighting
from clp_engine.conditioning import ActiveConditioning, Conditioning
from clp_engine.config import CLPConfig
from clp_engine.layers import conditioned_layers
from clp_engine.targets import condition_modules
from clp_engine.weighting import KLWeight, RewardWeights
from clp_kernels import available_backends

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

WEIGHTING_ARGUMENTS = ("reward_weights", "kl_weight", "coefficients")


def get_clp_model(model: PreTrainedModel, config: CLPConfig) -> Any:
    """Condition `model` in place: its parameters freeze, the chosen layers get K trainable copies that start at zero.

    The object's class becomes a subclass of (CLPModel, its own class), so it stays what it was to every library.
    Right after the call the model's outputs equal the plain model's under every weighting.

    Args:
        model: a decoder-only transformers model.
        config: what to condition, on which rewards.

    Returns:
        `model` itself.

    Raises:
        TypeError: not a transformers model, or conditioned already.
        NotImplementedError: a layer that cannot carry such copies.
        ValueError: the config matches no layer.
    """
    from transformers import PreTrainedModel

    if isinstance(model, CLPModel):
        raise TypeError(f"{type(model).__name__} is conditioned already, on {model.clp_config.rewards}")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"get_clp_model needs a transformers PreTrainedModel, got {type(model).__name__}")
    active = ActiveConditioning()
    condition_modules(model, config, active)
    conditioned: Any = model
    plain_class: Any = type(model)
    conditioned.__class__ = _conditioned_class(plain_class)
    conditioned.clp_config, conditioned._active = config, active
    conditioned._kernel_backend, conditioned._said_default = "auto", False
    return conditioned


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
    return type(f"CLP{base.__name__}", (CLPModel, base), namespace)


class CLPModel:
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
            **kwargs: the plain model's own arguments.

        Returns:
            The plain model's output.

        Raises:
            ValueError: a weighting of a wrong name, length or value, or a KV cache that was filled under another one.
        """
        batch_size = _batch_size(args, kwargs)
        cache = kwargs.get("past_key_values")
        if coefficients is None:
            coefficients = self.coefficients(batch_size, reward_weights, kl_weight)
            check_cache(cache, coefficients)
        elif reward_weights is not None or kl_weight is not None:
            raise ValueError("coefficients already hold the weighting: give them, or reward_weights and kl_weight")
        accumulator = torch.promote_types(self.dtype, torch.float32)  # type: ignore[attr-defined]
        record = Conditioning.from_rows(coefficients.to(accumulator), self._kernel_backend, self.clp_config.num_copies)
        with self._active.use(record.to(self.device)):  # type: ignore[attr-defined]
            outputs = super().forward(*args, **kwargs)  # type: ignore[misc]
        tag_cache(getattr(outputs, "past_key_values", None), coefficients)
        return outputs

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate with each sequence under its own weighting, in one batch.

        Args:
            inputs: prompt ids, as in transformers.
            *args: the plain model's own arguments.
            **kwargs: those, and `reward_weights` and `kl_weight` as in `forward` (one row per prompt: beams and
                num_return_sequences repeat them).

        Returns:
            What the plain model's generate returns.

        Raises:
            ValueError: as `forward`, before the first token.
        """
        reward_weights, kl_weight = kwargs.pop("reward_weights", None), kwargs.pop("kl_weight", None)
        if kwargs.get("coefficients") is None:
            prompts = (inputs,) if inputs is not None else ()
            rows = self.coefficients(_batch_size(prompts, kwargs), reward_weights, kl_weight)
            check_cache(kwargs.get("past_key_values"), rows)
            kwargs["coefficients"] = rows
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

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
            if kl_weight is None and not self._said_default:
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

    def collapse(self, reward_weights: RewardWeights | None = None, kl_weight: float | None = None) -> Any:
        """A new, ordinary model that equals this one at one weighting; this one stays as it is.

        Equivalent to `weight + einsum("k,nkd->nd", c, deltas)` for every conditioned parameter, added in float32 and
        rounded to the parameter's dtype: in 16 bits a copy smaller than the weight's last bit is lost in that sum. It
        shares no memory with this model. Serving one weighting for many steps, this is the cheaper form.

        Args:
            reward_weights: a dict or [R]; None for the config's default.
            kl_weight: alpha; None for the trained policy.

        Raises:
            ValueError: a weighting of a wrong name, length or value.
            NotImplementedError: no plain model computes this one (soft tokens, low rank over quantised weights).
        """
        return collapsing.collapse(self, self.coefficients(1, reward_weights, kl_weight)[0])

    def fold(self) -> Any:
        """A new conditioned model with the last copy folded into the base: K - 1 copies to read instead of K.

        On the simplex `W_0 + sum_k w_k Delta_k` is `(W_0 + Delta_K) + sum_{k < K} w_k (Delta_k - Delta_K)`, exactly; a
        16-bit base rounds W_0 + Delta_K. The reference policy is no longer in it: `kl_weight` is refused, and so is
        saving. It serves.

        Raises:
            NotImplementedError: copies other than full deltas, or shared parts beside them.
            ValueError: weights that need not sum to one.
        """
        return collapsing.fold(self)

    @staticmethod
    def own_attributes() -> tuple[str, ...]:
        """Names of what conditioning sets on the model object."""
        return "clp_config", "_active", "_kernel_backend", "_said_default"

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
        if self._kernel_backend != "auto":
            return self._kernel_backend
        layers = conditioned_layers(self).values()  # type: ignore[arg-type]
        return next(layer.auto_backend() for layer in layers if layer.added)

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

        inner: Callable[..., Any] = kwargs.pop("gradient_checkpointing_func", checkpoint)

        def conditioned_checkpoint(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
            return inner(self._active.bind(function), *args, **options)

        super()._set_gradient_checkpointing(  # type: ignore[misc]
            enable=enable, gradient_checkpointing_func=conditioned_checkpoint, **kwargs
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

    @classmethod
    def from_peft(cls, base: Any, adapters: Mapping[str, str | Path], **kwargs: Any) -> Any:
        """A conditioned model whose copies are PEFT LoRA adapters of one base: Rewarded Soups without training.

        Equivalent to PEFT's `add_weighted_adapter(..., combination_type="cat")` with each sequence's own weights, the
        exact sum of the adapters' deltas. Ranks, scalings and target modules may differ between adapters and within
        one. peft itself is not needed.

        Args:
            base: the plain model, conditioned in place, or its path or hub id.
            adapters: reward -> folder or hub id of its adapter; their order is the order of the weights.
            **kwargs: handed to the base's from_pretrained.

        Raises:
            FileNotFoundError: no base or no adapter there.
            NotImplementedError: more than plain LoRA on linear layers; the message names the field or tensor.
            ValueError: an adapter of another model, or one whose tensors and config do not agree.
        """
        from clp_engine import adapters as peft_adapters

        return peft_adapters.from_peft(base, adapters, **kwargs)

    @classmethod
    def from_finetuned(cls, base: Any, finetuned: Mapping[str, Any], **kwargs: Any) -> Any:
        """A conditioned model whose copies are full fine-tunes of one base: Rewarded Soups without training.

        `Delta_k = finetuned_k - base` in float32 for the parameters that differ; where a linear layer's bias does, all
        parameters get copies (`variant="full"`). Differences of 16-bit values are exact in float32 (unless a factor of
        2**12 lies between the two); `collapse` rounds to the base's dtype, so a one-hot weighting gives a fine-tune of
        that dtype back, and a mix loses what is smaller than its last bit.

        Args:
            base: the plain model, conditioned in place, or its path or hub id.
            finetuned: reward -> a model, path or hub id; their order is the order of the weights.
            **kwargs: handed to the base's from_pretrained.

        Raises:
            FileNotFoundError: no base or no fine-tune there.
            NotImplementedError: a difference in what carries no copies (buffers, fused experts, quantised weights).
            ValueError: a parameter that is missing, extra or of another shape, or a fine-tune that equals the base.
        """
        from clp_engine import finetuned as soups

        return soups.from_finetuned(base, finetuned, **kwargs)


def check_cache(cache: Any, coefficients_BK: torch.Tensor) -> None:
    """Refuse a KV cache that was filled under other coefficients; one comparison at a call's entry.

    Raises:
        ValueError: the cache holds keys and values of another weighting.
    """
    filled = getattr(cache, "clp_coefficients", None)
    if filled is None or cache.get_seq_length() == 0:
        return
    if filled.shape != coefficients_BK.shape or not torch.equal(filled.cpu(), coefficients_BK.cpu()):
        raise ValueError(
            f"past_key_values was filled under coefficients {filled.tolist()}, this call's are "
            f"{coefficients_BK.tolist()}: a KV cache belongs to its weighting, start a new one"
        )


def tag_cache(cache: Any, coefficients_BK: torch.Tensor) -> None:
    """Mark `cache` with the coefficients that filled it."""
    if cache is not None:
        cache.clp_coefficients = coefficients_BK


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    candidates = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "inputs", "attention_mask"))]
    for candidate in candidates:
        if isinstance(candidate, torch.Tensor):
            return candidate.shape[0]
    return 1
