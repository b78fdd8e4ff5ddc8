"""The one place that calls huggingface_hub: its cache, its client, and the transfer of a file."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_core.hub.errors import explain_hub_errors
from merge_core.hub.files import HubId
from merge_core.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LIBRARY = "mergescope"
MEGABYTE = 10**6


def token() -> str | None:
    """The token of the environment; files in the home folder are not read."""
    return os.environ.get("HF_TOKEN") or None


def api() -> HfApi:
    """The hub's client, with the token of the environment."""
    from huggingface_hub import HfApi

    return HfApi(token=token() or False, library_name=LIBRARY)


def cache_folder() -> Path:
    """Where downloads are kept (``HF_HOME`` or ``HF_HUB_CACHE`` choose it)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repository_folder(asked: HubId) -> Path:
    """Where the cache keeps a repository."""
    from huggingface_hub.file_download import repo_folder_name

    return cache_folder() / repo_folder_name(repo_id=asked.repo, repo_type="model")


def snapshot(asked: HubId) -> Path | None:
    """The folder of a revision in the cache."""
    from huggingface_hub import errors, snapshot_download

    try:
        # No file is asked for, so that what happens to be there is enough.
        folder = snapshot_download(
            asked.repo, revision=asked.revision, local_files_only=True, allow_patterns=[]
        )
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        return None
    return Path(folder)


def is_cached(pinned: HubId, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(pinned.repo, name, revision=pinned.revision), str)


def fetch_file(model: HubId, name: str, bar: Any = None) -> Path:
    """One file of a repository, from the cache or downloaded into it."""
    from huggingface_hub import constants, hf_hub_download

    # On a broken connection it would print the file's address, which may be signed.
    logging.getLogger("huggingface_hub.file_download").setLevel(logging.ERROR)
    with explain_hub_errors(model, cache_folder()):
        path = hf_hub_download(
            model.repo,
            name,
            revision=model.revision,
            endpoint=constants.ENDPOINT,
            token=token() or False,
            library_name=LIBRARY,
            tqdm_class=bar or reporting_bar(None, 0, 0, name),
        )
    return Path(path)


def reporting_bar(progress: Progress | None, before: int, total: int, label: str) -> Any:
    """A class for huggingface_hub to report a file's bytes to, which prints nothing.

    Args:
        progress: who learns of it, and may cancel.
        before: bytes of earlier files.
        total: bytes of all files.
        label: what is being transferred.
    """
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self._arrived = 0

        def update(self, n: float | None = 1) -> None:
            self._arrived += int(n or 0)
            if progress is not None:
                arrived = min(before + self._arrived, total)
                progress.step(arrived // MEGABYTE, total // MEGABYTE, label)

        def update_transfer(self, n: float | None = 1) -> None:
            """What a chunked transfer receives; `update` counts it when it is on disk."""

        def set_transfer_postfix_str(self, s: str = "", refresh: bool = True) -> None:
            """The speed, which is shown nowhere."""

    return Bar
