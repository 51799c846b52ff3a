"""Continuous batching under weightings: each request's coefficients travel with the arguments of logits processors.

transformers packs the requests of a step into one row and hands per-request arguments to the forward in one tensor,
which graphs and streams keep in place. The coefficients are further rows of that tensor; `clp_engine.packing` reads
them in the forward.

Legend: S requests of a step, C coefficients of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from clp_engine.weighting import check_given_once


class WeightedPrompt(list[int]):
    """A request's token ids and its coefficients."""

    def __init__(self, ids: Sequence[int], coefficients: list[float]) -> None:
        super().__init__(ids)
        self.coefficients = coefficients


class WeightedManager(ContinuousBatchingManager):
    """A manager whose requests have weightings: `add_request(ids, reward_weights=..., kl_weight=...)`."""

    @classmethod
    def of(cls, manager: ContinuousBatchingManager) -> WeightedManager:
        """Turn a manager of a conditioned model into this class; one that is, as a cached one may be, stays as it is.

        Raises:
            RuntimeError: the manager was started before its model was conditioned.
        """
        if isinstance(manager, cls):
            return manager
        if manager.batch_processor is not None:
            raise RuntimeError(
                "the cached manager was started before the model was conditioned: call "
                "destroy_cached_continuous_batching_manager first"
            )
        manager.__class__ = cls
        manager.logit_processor = CoefficientArguments(manager.logit_processor, manager.model)
        # Blocks are found by their tokens alone, and keys and values depend on the weighting too.
        manager.continuous_batching_config.allow_block_sharing = manager._use_prefix_sharing = False
        return manager  # type: ignore[return-value]

    def add_request(self, input_ids: list[int], *args: Any, **kwargs: Any) -> str | None:
        """Add a request under a weighting.

        Args:
            input_ids: the prompt.
            *args: as in transformers.
            **kwargs: those, and `reward_weights` and `kl_weight` of this one request, or its `coefficients`.
        """
        if isinstance(input_ids, WeightedPrompt):
            kwargs["coefficients"] = input_ids.coefficients
        return super().add_request(input_ids, *args, **kwargs)


class CoefficientArguments(ContinuousBatchingLogitsProcessorList):
    """A manager's logits processors, and behind their arguments those of the model: coefficients of each request.

    A request keeps its coefficients where transformers forks it or moves it off the device and back.
    """

    def __init__(self, processors: ContinuousBatchingLogitsProcessorList, model: Any) -> None:
        vars(self).update(vars(processors))
        self.model = model
        self.width = model.clp_config.num_coefficients
        self.tensors_required += self.width

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Replace a request's weighting by its coefficients, a list of C numbers; runs once for each request."""
        coefficients, *weighting = (kwargs.pop(name, None) for name in ("coefficients", "reward_weights", "kl_weight"))
        super().check_kwargs(kwargs)
        check_given_once(coefficients, *weighting)
        if coefficients is None:
            coefficients = self.model.coefficients(1, *weighting)[0].tolist()
        if len(coefficients) != self.width:
            raise ValueError(
                f"coefficients has {len(coefficients)} entries, the model takes {self.width} for a request"
            )
        kwargs["coefficients"] = coefficients

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Fill the arguments of places without a request: the reference policy's zeros."""
        super().fill_defaults(int32_tensor)
        int32_tensor[-self.width :] = 0

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        """Write the step's arguments: the processors' own, then coefficients [C, S] as int32 bits."""
        super().prepare_tensor_args(requests_in_batch, arg_storage)
        nothing = [0.0] * self.width  # requests that transformers makes up to warm up
        rows = [request.state.logit_processor_kwargs.get("coefficients", nothing) for request in requests_in_batch]
        c_CS = torch.tensor(rows, dtype=torch.float32).T.contiguous()
        arg_storage[-self.width :, : len(rows)] = c_CS.view(torch.int32).to(arg_storage.device)
        return arg_storage
