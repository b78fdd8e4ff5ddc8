"""Upload of a merged model to the Hugging Face Hub."""

from __future__ import annotations

from glob import escape
from pathlib import Path, PurePosixPath

from merge_core.checkpoints.side_files import is_side_file
from merge_core.errors import HubError
from merge_core.hub.client import api, token
from merge_core.hub.errors import explain_hub_errors
from merge_core.hub.files import BESIDE, MAIN, SCHEME, HubId, is_hub_id

RECIPE = "recipe.yaml"


def push(folder: Path, name: str, public: bool = False) -> str:
    """Upload a merged model: weights, recipe, card, and the configuration beside them.

    Args:
        folder: as :func:`merge_core.output.model_folder.merge_to_folder` wrote it.
        name: ``org/name`` on the hub; made if it is not there.
        public: whether the repository is public.

    Returns:
        Its address.

    Raises:
        HubError: no token, a malformed name, no weights in the folder, a public repository
            although `public` is False, no permission, no network.
    """
    target = HubId.parse(name if is_hub_id(name) else f"{SCHEME}{name}")
    if target.file is not None or target.revision != MAIN:
        raise HubError(f"Push to a repository (org/name), not to {name!r}.")
    if not any(folder.rglob("*.safetensors")):
        raise HubError(f"{folder} holds no merged model. Name the folder that a merge wrote.")
    if token() is None:
        raise HubError(
            "A push needs a token that may write: make one in the settings of your account on the "
            "hub, and set HF_TOKEN to it."
        )
    with explain_hub_errors(target, folder):
        client = api()
        made = client.create_repo(target.repo, private=not public, exist_ok=True)
        private = client.model_info(made.repo_id).private
    if not private and not public:
        raise HubError(
            f"{made.repo_id} exists and is public. Push with --public if everybody may see this "
            "model, or choose another name."
        )
    with explain_hub_errors(target, folder):
        client.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=[escape(name) for name in pushed_files(folder)],
            commit_message="Model merged with MergeScope",
        )
    return str(made)


def pushed_files(folder: Path) -> list[str]:
    """What of a merge is uploaded: as it wrote them, at the root or in a folder a task.

    Never code, never pickles.
    """
    paths = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]

    def is_pushed(path: str) -> bool:
        name = PurePosixPath(path).name
        if name.endswith((".safetensors", ".index.json")) or name in (RECIPE, *BESIDE):
            return path.count("/") <= 1
        _, _, below = path.partition("/")  # a task's folder
        return is_side_file(path) or is_side_file(below)

    return [path for path in paths if (folder / path).is_file() and is_pushed(path)]
