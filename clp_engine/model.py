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

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the copies, the config and a model card to `save_directory`; the base model is referenced, not copied.

        A save over an older one is atomic: a process killed at any moment leaves the old or the new. Other files in
        the folder are not touched, nor is a README.md that somebody wrote or edited.

        Args:
            save_directory: a folder, made where missing.
            is_main_process: False writes nothing.
            state_dict: tensors to write instead of the model's own, as transformers' Trainer gathers them.
            max_shard_size: bytes of a tensor file at most, or as "200MB".
            push_to_hub: not offered here: call `push_to_hub`.
            **kwargs: transformers' other arguments, which have no meaning here.

        Raises:
            ValueError: a copy holds NaN or infinity (nothing is written then), or an argument is out of range.
        """
        from clp_engine import checkpoint

        if push_to_hub:
            raise ValueError("save_pretrained(push_to_hub=True) is not offered: call model.push_to_hub(repo_id)")
        if is_main_process:
            checkpoint.save(self, Path(save_directory), state_dict, max_shard_size)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a conditioned model",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
    ) -> Any:
        """Upload what `save_pretrained` writes to the Hugging Face hub, in one commit.

        Tensor files of an earlier push go with it; other files of the repository stay, as does a README.md that
        somebody wrote or edited.

        Args:
            repo_id: the repository, as in "name/model"; made where missing.
            commit_message: of the commit.
            private: whether a new repository is private; None for the account's default.
            token: an access token; None for the one of `hf auth login`.
            revision: the branch to commit to.
            create_pr: True opens a pull request instead.
            max_shard_size: bytes of a tensor file at most, or as "200MB".

        Returns:
            huggingface_hub's CommitInfo.
        """
        from clp_engine import checkpoint

        return checkpoint.push(
            self,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            max_shard_size=max_shard_size,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        base_model: Any = None,
        is_trainable: bool = False,
        *,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a conditioned model that `save_pretrained` wrote.

        Everything is checked before a model changes: the manifest, every file's hash and tensors, the base model's
        fingerprint (its limits are `checkpoint.base_fingerprint`'s). No code is run that the folder names.

        Args:
            path: its folder, or a hub id.
            base_model: the plain model (an object, which is conditioned in place, a path or an id) instead of the
                recorded one.
            is_trainable: True keeps the copies trainable.
            revision: the branch, tag or commit of a hub id; the base's own is recorded.
            **kwargs: handed to the base's from_pretrained; cache_dir, force_download, local_files_only and token also
                to the download of a hub id.

        Raises:
            FileNotFoundError: no such model, a file of it is missing, or its base is not where it was.
            ValueError: a file is damaged or altered, a tensor is missing, extra, not finite or of another shape, a
                field is unknown or out of range, or the base is another model.
            TypeError: base_model is no transformers model, or conditioned already.
        """
        from clp_engine import checkpoint

        return checkpoint.load(path, base_model, is_trainable, revision, **kwargs)


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
