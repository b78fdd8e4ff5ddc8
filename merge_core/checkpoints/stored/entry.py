"""Which file of a folder opens a model, and where the files beside it lie if it is a link.

Source: the order of transformers' ``_get_resolved_checkpoint_files``: one whole file before an
index of shards, safetensors before pickles.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from merge_core.checkpoints.header_checks import read_index
from merge_core.checkpoints.shards import PICKLE_SUFFIXES, TORCH_SUFFIXES
from merge_core.errors import CheckpointError

FOLDER_CANDIDATES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# A trainer leaves these beside the weights, under endings that weights have too.
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "random_states", "scaler")
OPTIM_STATES = "_optim_states."  # of DeepSpeed
# Weights of other libraries, and their indexes.
OTHER_LIBRARIES = (".h5", ".msgpack", ".gguf", ".onnx", ".tflite", ".mlmodel", ".npz")
OTHER_INDEX = re.compile(r"\.(h5|msgpack)\.index\.json$")
INDEX = re.compile(r"\.index(\.[A-Za-z0-9_-]+)?\.json$")
SHARD = re.compile(r"(?<=[-_.])(\d{5})-of-(\d{5})(?=[-_.])")
# Where one matrix is cut over several files: Llama's own format, Megatron's and DeepSpeed's.
PIECE = re.compile(r"^(consolidated\.|mp_rank_)(\d\d)(?=[._])")
# The same weights once more, in another precision or without averaging.
VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)\.(?=safetensors|bin|index)")
DESCRIPTIONS = ("config.json", "open_clip_config.json", "adapter_config.json")
MOST_HOPS = 40
PART_MARK = "#"  # between a file's name and the key of one set of weights in it


def is_index(name: str) -> bool:
    """Whether a file's name is that of an index of shards, of a library that is read here."""
    return INDEX.search(name) is not None and OTHER_INDEX.search(name) is None


def shard_number(name: str) -> tuple[int, int] | None:
    """Number and count of a file that holds one of several shards; None for a whole one.

    Example:
        >>> shard_number("model-00002-of-00003.safetensors"), shard_number("a-00001-of-00001.bin")
        ((2, 3), None)
    """
    found = SHARD.search(name)
    if found is None or int(found[2]) < 2:
        return None
    return int(found[1]), int(found[2])


def weight_files(names: Collection[str]) -> list[str]:
    """The weight files and indexes among a folder's files, without a variant of another, sorted."""
    ours = [
        name
        for name in sorted(names)
        if (name.endswith((".safetensors", *TORCH_SUFFIXES)) or is_index(name))
        and not (name.startswith(NOT_WEIGHTS) or OPTIM_STATES in name)
    ]
    return [
        name
        for name in ours
        if VARIANT.sub(".", name) == name or VARIANT.sub(".", name) not in ours
    ]


def usual_file(names: Collection[str]) -> str | None:
    """The file of a folder by which its weights open; None where no single one is usual.

    Args:
        names: of the files in it.

    Example:
        >>> usual_file(["model.safetensors", "model.safetensors.index.json", "old.bin"])
        'model.safetensors'
    """
    for candidate in FOLDER_CANDIDATES:
        if candidate in names:
            return candidate
    ours = weight_files(names)
    safe = [name for name in ours if ".safetensors" in name]
    return _single(safe) if safe else _single(ours)


def _single(names: Sequence[str]) -> str | None:
    """The one whole file, the one index of shards, or the one shard of one."""
    indexes = [name for name in names if is_index(name)]
    shards = [name for name in names if name not in indexes and SHARD.search(name)]
    whole = [name for name in names if name not in indexes and name not in shards]
    if len(whole) == 1 and f"{whole[0]}.index.json" in indexes:  # left from an earlier save
        return whole[0]
    if len(indexes) == 1:
        return indexes[0]
    if len(whole) == 1 and not shards:
        return whole[0]
    alone = not whole and len(shards) == 1 and shard_number(shards[0]) is None
    return shards[0] if alone else None


def find_entry(path: Path) -> Path:
    """The file that says what a checkpoint holds: the path itself, or one in its folder.

    A link is the file that it is named as; only where its own name has no known ending, or no
    description of the model lies beside it, the links that it leads over are looked at.

    Args:
        path: a file or a folder.

    Raises:
        CheckpointError: missing, an adapter, one shard of several, or a folder in which no file,
            or no single one, is a model's.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"{path} {_why_missing(path)}")
        return _entry_in(path) if path.is_dir() else _named_entry(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check it.") from error


def split_part(path: Path) -> tuple[Path, str]:
    """A file, and the key of the set of weights in it that stands after ``#``; often none.

    Example:
        >>> split_part(Path("net.pth#params_ema"))  # where there is a net.pth
        (PosixPath('net.pth#params_ema'), '')
    """
    name, mark, part = path.name.partition(PART_MARK)
    if not mark or not name or not part:
        return path, ""
    file = path.with_name(name)
    try:
        return (file, part) if not path.exists() and file.is_file() else (path, "")
    except (OSError, ValueError):  # a name that no file can have
        return path, ""


def link_hops(path: Path) -> list[Path]:
    """A path, and what it leads to link by link; the links of folders are not counted."""
    hops = [path]
    while hops[-1].is_symlink() and len(hops) < MOST_HOPS:
        hops.append(hops[-1].parent.resolve() / hops[-1].readlink())
    return hops


def _why_missing(path: Path) -> str:
    if path.is_symlink():
        return (
            "is a link to a file that is not there. Fetch its content (git annex get, dvc pull, or "
            "download it again), or correct the link."
        )
    return "does not exist. Check the path."


def _named_entry(path: Path) -> Path:
    """A named file at the link whose name and neighbours are a model's, after a look at its name.

    Raises:
        CheckpointError: one shard of several, or one piece.
    """
    hops = [hop for hop in link_hops(path) if _is_known(hop.name)]
    described = (hop for hop in hops if len(hops) == 1 or _is_described(hop))
    entry = next(described, hops[0] if hops else path)
    number = shard_number(entry.name)
    if number is not None:
        raise CheckpointError(
            f"{path} is shard {number[0]} of {number[1]}, a part of a model. Name the index of its "
            "shards (such as model.safetensors.index.json) or their folder."
        )
    piece = PIECE.match(entry.name)
    if piece and any(
        (other := PIECE.match(each.name)) and other[1] == piece[1] and other[2] != piece[2]
        for each in entry.parent.iterdir()
    ):
        raise CheckpointError(
            f"{path} holds a piece of each matrix; the others lie beside it. Convert them to one "
            "model (for Llama, by transformers' convert_llama_weights_to_hf.py)."
        )
    return entry


def _is_known(name: str) -> bool:
    return name.endswith((".safetensors", *PICKLE_SUFFIXES)) or INDEX.search(name) is not None


def _is_described(entry: Path) -> bool:
    """Whether what belongs to a file lies beside it: an index's shards, else a description."""
    if INDEX.search(entry.name):
        return all((entry.parent / shard).exists() for shard in set(read_index(entry).values()))
    return any((entry.parent / name).is_file() for name in DESCRIPTIONS)


def _entry_in(folder: Path) -> Path:
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is an adapter, which is no model without its base. Make it an expert of a "
            "suite whose 'base:' is what it was trained on."
        )
    names = [path.name for path in folder.iterdir()]
    found = usual_file([name for name in names if not (folder / name).is_dir()])
    if found is not None:
        return folder / found
    raise CheckpointError(f"The folder {folder} holds {explain_no_single(names)}")


def explain_no_single(names: Collection[str]) -> str:
    """Why none of a folder's files is its model, and what to do: the end of a sentence."""
    files = weight_files(names)
    shards = [name for name in files if shard_number(name)]
    if shards:
        stem = SHARD.split(shards[0])[0].rstrip("-_.")
        index = f"{stem}{Path(shards[0]).suffix}.index.json"
        return (
            f"shards of a model ({shards[0]} and others) without their index: copy or download "
            f"{index} as well, which says what each holds."
        )
    if files:
        return f"{len(files)} weight files and no index. Name the file itself."
    if any(name.endswith(".distcp") for name in names):
        return (
            "pieces of a model that torch.distributed.checkpoint wrote. Join them with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save."
        )
    foreign = sorted(name for name in names if name.endswith(OTHER_LIBRARIES))
    if foreign:
        return (
            f"{foreign[0]}, which no reader here knows, and no weight file. Save the model from "
            "PyTorch (save_pretrained, or torch.save of its state_dict)."
        )
    pointers = sorted(name for name in names if name.endswith(".dvc"))
    if pointers:
        return f"no weight file, but {pointers[0]}: fetch what it stands for with 'dvc pull'."
    return "no weight file. Name the file itself."
