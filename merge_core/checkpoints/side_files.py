"""Files that stand beside weights: which come along with a model, and the one way to copy them.

They are taken by pattern, since libraries add new ones: configurations, tokenizers, templates and
licences. Code, pickles, weights and indexes of weights never match, nor does what a trainer leaves.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from merge_core.input_files import read_json

# One of these, and in it one of those fields, makes a folder a library's own.
CONFIGS = ("config.json", "open_clip_config.json")
CONFIG_FIELDS = ("model_type", "architectures", "architecture", "model_cfg")
CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "LICENCE*", "NOTICE*")
# What is not of the model, or no longer true of another one made from it.
LEFT = (
    ".*", "README*", "*.index.json", "adapter_config.json", "quantize_config.json",
    "quant_config.json", "trainer_state.json", "*_results.json", "training_args*", "optimizer*",
    "scheduler*", "rng_state*", "random_states*", "scaler*", "events*", "*.py", "*.safetensors",
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
TOKENIZER = (
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "*.model", "tekken.json", "chat_template*", "*.jinja",
)  # fmt: skip
# One of these lets a library make a tokenizer.
VOCABULARIES = ("tokenizer.json", "tekken.json", "vocab.*", "*.model")
SIDE_FILE_BYTES = 100_000_000
CONFIG_BYTES = 10_000_000
CONFIG_VALUES = 1_000_000
MOST_FILES = 200


def is_side_file(path: str) -> bool:
    """Whether a file comes along, told from its path in the model's folder.

    Args:
        path: with ``/`` between folders.

    Example:
        >>> names = ["tekken.json", "1_Pooling/config.json", "run.py", "model.safetensors"]
        >>> [name for name in names if is_side_file(name)]
        ['tekken.json', '1_Pooling/config.json']
    """
    folder, _, name = path.rpartition("/")
    if "/" in folder or folder.startswith((".", "checkpoint-")) or _matches(name, LEFT):
        return False
    if folder == TEMPLATES:
        return name.endswith(".jinja")
    return name == "config.json" if folder else _matches(name, CARRIED)


def is_tokenizer_file(path: str) -> bool:
    """Whether a side file belongs to the tokenizer, chat templates included."""
    return path.startswith(f"{TEMPLATES}/") or ("/" not in path and _matches(path, TOKENIZER))


def has_tokenizer(paths: Iterable[str]) -> bool:
    """Whether a tokenizer can be made from side files."""
    return any("/" not in path and _matches(path, VOCABULARIES) for path in paths)


def read_description(path: Path) -> Any:
    """The value of a JSON file of bounded size; None if it is missing or not readable as one."""
    try:
        return read_json(path, CONFIG_BYTES, CONFIG_VALUES)
    except (OSError, ValueError, RecursionError):
        return None


def describes_model(folder: Path) -> bool:
    """Whether a folder holds a library's description of a model."""
    return any(_is_description(read_description(folder / name)) for name in CONFIGS)


def find_side_files(folder: Path) -> dict[str, Path]:
    """The side files of a model's folder, by their paths in it.

    Links are among them: whoever copies one asks :func:`merge_core.input_files.belongs_beside`.

    Args:
        folder: of the model.
    """
    found = [path for path in sorted(folder.iterdir()) if path.is_file()]
    for below in sorted(path for path in folder.iterdir() if path.is_dir()):
        # A folder that describes a model of its own is another model, not a part of this one.
        if below.name == TEMPLATES:
            found += sorted(below.glob("*.jinja"))
        elif not _is_description(read_description(below / "config.json")):
            found.append(below / "config.json")
    named = {path.relative_to(folder).as_posix(): path for path in found}
    kept = [name for name, path in named.items() if is_side_file(name) and _is_bounded(path)]
    return {name: named[name] for name in kept[:MOST_FILES]}


def copy_side_file(source: Path, target: Path) -> None:
    """Copy the content of a side file, not its link or its rights.

    Raises:
        OSError: it cannot be read or written.
    """
    target.parent.mkdir(exist_ok=True)
    with source.open("rb") as stream, target.open("wb") as copy:
        shutil.copyfileobj(stream, copy)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_description(document: Any) -> bool:
    return isinstance(document, dict) and any(field in document for field in CONFIG_FIELDS)


def _is_bounded(path: Path) -> bool:
    """Whether a path, links followed, is a file of bounded size."""
    try:
        return path.is_file() and path.stat().st_size <= SIDE_FILE_BYTES
    except OSError:  # a circle of links
        return False
