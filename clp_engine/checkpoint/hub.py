"""Where a conditioned model lies: a folder here, or a repository on the Hugging Face hub; and uploading one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clp_engine.checkpoint import card
from clp_engine.checkpoint.manifest import CONFIG_FILE, PROMPT_TEMPLATE_FILE
from clp_engine.checkpoint.saving import save

_OUR_TENSOR_FILES = "clp_model*.safetensors"
DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")


def is_conditioned(path: str | Path) -> bool:
    """Whether the local folder `path` holds a conditioned model."""
    return (Path(path) / CONFIG_FILE).is_file()


def find(path: str | Path, revision: str | None = None, options: Mapping[str, Any] | None = None) -> Path:
    """The folder of a conditioned model, downloaded first where `path` is a hub id.

    Args:
        path: a folder or a hub id.
        revision: a branch, tag or commit of the hub id.
        options: what a from_pretrained was given; those of a download are used.

    Raises:
        FileNotFoundError: no such model.
    """
    if is_conditioned(path):
        return Path(path)
    if Path(path).exists():
        raise FileNotFoundError(f"{path} holds no conditioned model: it has no {CONFIG_FILE}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    chosen = {name: value for name, value in (options or {}).items() if name in DOWNLOAD_OPTIONS}
    ours = [CONFIG_FILE, PROMPT_TEMPLATE_FILE, _OUR_TENSOR_FILES]
    try:
        folder = snapshot_download(str(path), revision=revision, allow_patterns=ours, **chosen)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"no conditioned model at {path}: not a folder here, and no hub repository") from error
    if not is_conditioned(folder):
        raise FileNotFoundError(f"the hub repository {path} holds no conditioned model: it has no {CONFIG_FILE}")
    return Path(folder)


def push(
    model: Any,
    repo_id: str,
    *,
    commit_message: str = "Upload a conditioned model",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str,
) -> Any:
    """Upload `model` in one commit; see `CLPModel.push_to_hub`."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder), max_shard_size=max_shard_size)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=[] if _may_write_card(api, repo_id, revision) else [card.CARD_FILE],
            delete_patterns=[_OUR_TENSOR_FILES, PROMPT_TEMPLATE_FILE],  # of the last push: names carry hashes
        )


def _may_write_card(api: Any, repo_id: str, revision: str | None) -> bool:
    if not api.file_exists(repo_id, card.CARD_FILE, revision=revision):
        return True
    present = Path(api.hf_hub_download(repo_id, card.CARD_FILE, revision=revision))
    return card.is_untouched(present.read_text(encoding="utf-8", errors="replace"))
