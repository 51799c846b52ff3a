"""How a conditioned model leaves memory and comes back: saved, pushed, loaded, collapsed into plain models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from clp_engine import collapsing
from clp_engine.config import CLPConfig
from clp_engine.weighting import RewardWeights


class StoredModel:
    """The part of `CLPModel` that writes and reads models."""

    clp_config: CLPConfig
    coefficients: Callable[..., torch.Tensor]

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

        self._check_unfolded()
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
        self._check_unfolded()
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

    def _check_unfolded(self) -> None:
        if self.clp_config.folded is not None:
            raise ValueError(
                f"copy {self.clp_config.folded!r} is folded into this model's base, which is no longer the one that it "
                "would refer to: save the model that it was folded from"
            )
