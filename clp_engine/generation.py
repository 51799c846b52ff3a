"""Generation under weightings: what a conditioned model adds to transformers' generate, and the tags of KV caches.

Legend: B sequences, K copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from clp_engine.conditioning import ActiveConditioning, Conditioning
from clp_engine.config import CLPConfig
from clp_engine.packing import batch_size
from clp_engine.weighting import KLWeight, RewardWeights, check_given_once

if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching import ContinuousBatchingManager


class WeightedGeneration:
    """Mixin of a conditioned model: transformers' generation with a weighting for each prompt."""

    clp_config: CLPConfig
    _active: ActiveConditioning

    if TYPE_CHECKING:

        def coefficients(  # noqa: D102
            self, batch_size: int, reward_weights: RewardWeights | None = None, kl_weight: KLWeight | None = None
        ) -> torch.Tensor: ...

        def _record(self, coefficients_BK: torch.Tensor) -> Conditioning: ...

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
            NotImplementedError: classifier-free guidance, whose second forward transformers calls without a weighting.
        """
        self._check_guidance(args, kwargs)
        reward_weights, kl_weight = kwargs.pop("reward_weights", None), kwargs.pop("kl_weight", None)
        check_given_once(kwargs.get("coefficients"), reward_weights, kl_weight)
        if kwargs.get("coefficients") is None:
            prompts = (inputs,) if inputs is not None else ()
            rows = self.coefficients(batch_size(prompts, kwargs), reward_weights, kl_weight)
            check_cache(kwargs.get("past_key_values"), rows)
            kwargs["coefficients"] = rows
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _check_guidance(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config  # type: ignore[attr-defined]
        scale = kwargs.get("guidance_scale", getattr(config, "guidance_scale", None))
        if scale not in (None, 1):
            raise NotImplementedError(
                f"guidance_scale={scale}: transformers runs the unconditional prompt without its row's weighting; "
                "leave it out"
            )

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Run the encoder, which generate calls by itself before it repeats rows for beams, under the prompts' rows."""
        rows = model_kwargs.get("coefficients")
        if rows is None:  # a plain model's assistant
            rows = self.coefficients(len(inputs_tensor))
        arguments = {name: value for name, value in model_kwargs.items() if name != "coefficients"}
        with self._active.use(self._record(rows)):
            prepared = super()._maybe_prepare_encoder_kwargs_for_generation(  # type: ignore[misc]
                inputs_tensor, arguments, *args, **kwargs
            )
        return {**prepared, "coefficients": rows}

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Give an assistant model the weighting if it is conditioned on the same rewards; a plain one does without."""
        assistant = kwargs.get("assistant_model")
        if isinstance(assistant, WeightedGeneration):
            if assistant.clp_config.rewards != self.clp_config.rewards:
                raise ValueError(
                    f"assistant_model is conditioned on {assistant.clp_config.rewards}, the model on "
                    f"{self.clp_config.rewards}: they must be the same rewards in the same order"
                )
        elif assistant is not None:
            plain = {name: value for name, value in kwargs["model_kwargs"].items() if name != "coefficients"}
            kwargs = {**kwargs, "model_kwargs": plain}
        return super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        *args: Any,
        reward_weights: RewardWeights | None = None,
        kl_weight: KLWeight | None = None,
        coefficients: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate by continuous batching: requests of different weightings share packed rows without padding.

        Args:
            inputs: token ids of each request.
            *args: the plain model's own arguments.
            reward_weights: as in `forward`, one row per request; num_return_sequences repeat it.
            kl_weight: likewise.
            coefficients: [B, K] instead of the two.
            **kwargs: the plain model's own arguments.

        Returns:
            What the plain model's generate_batch returns: request ids and their outputs.

        Raises:
            ValueError: as `forward`, before the first token.
        """
        from clp_engine.continuous_batching import WeightedPrompt

        check_given_once(coefficients, reward_weights, kl_weight)
        if coefficients is None:
            coefficients = self.coefficients(len(inputs), reward_weights, kl_weight)
        prompts = [WeightedPrompt(ids, row) for ids, row in zip(inputs, coefficients.tolist(), strict=True)]
        return super().generate_batch(prompts, *args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        **kwargs: Any,
    ) -> ContinuousBatchingManager:
        """A manager of continuous batching whose `add_request` takes a weighting.

        Requests share no blocks of the cache (`allow_block_sharing`): keys and values belong to their weighting.

        Args:
            generation_config: as in transformers.
            continuous_batching_config: as in transformers.
            **kwargs: the plain model's own arguments.
        """
        from clp_engine.continuous_batching import WeightedManager

        return WeightedManager.of(
            super().init_continuous_batching(generation_config, continuous_batching_config, **kwargs)  # type: ignore[misc]
        )


def check_cache(cache: Any, coefficients_BK: torch.Tensor) -> None:
    """Refuse a KV cache that was filled under other coefficients; one comparison at a call's entry.

    Raises:
        ValueError: the cache holds keys and values of another weighting.
    """
    filled = getattr(cache, "clp_coefficients", None)
    if filled is None or _is_empty(cache):
        return
    if len(filled) != len(coefficients_BK) and len(filled.unique(dim=0)) == 1:
        filled = filled[:1].expand(len(coefficients_BK), -1)  # rows repeated or selected, all of one weighting
    if filled.shape != coefficients_BK.shape or not torch.equal(filled.cpu(), coefficients_BK.cpu()):
        raise ValueError(
            f"past_key_values was filled under coefficients {filled.tolist()}, this call's are "
            f"{coefficients_BK.tolist()}: a KV cache belongs to its weighting, start a new one"
        )


def _is_empty(cache: Any) -> bool:
    # An encoder-decoder's cache may have lost its own tokens (crop) and still hold those of the encoder.
    return bool(cache.get_seq_length() == 0) and not any(getattr(cache, "is_updated", {}).values())


def tag_cache(cache: Any, coefficients_BK: torch.Tensor) -> None:
    """Mark `cache` with the coefficients that filled it."""
    if cache is not None:
        cache.clp_coefficients = coefficients_BK


def cache_of(outputs: Any) -> Any:
    """The KV cache among a forward's outputs, which are a tuple under return_dict=False; None where there is none."""
    if isinstance(outputs, tuple):
        return next((item for item in outputs if hasattr(item, "get_seq_length")), None)
    return getattr(outputs, "past_key_values", None)
