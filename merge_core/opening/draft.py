"""A suite drafted from models at hand: task names, base, architecture, and its file.

Everything here is a suggestion from names and headers; people overrule it before it is written.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import OutputError, SuiteError, explain_validation
from merge_core.files import write_atomically
from merge_core.suites.architectures import read_architecture
from merge_core.suites.suite_spec import ArchitectureSpec, SuiteSpec
from merge_core.yaml_text import dump_yaml

Layout = Mapping[str, tuple[int, ...]]

LONGEST = 80  # characters of a task name
# What a base is called, lower case and without separators.
BASE_WORDS = frozenset(
    {"base", "basemodel", "pretrained", "pretrain", "zeroshot", "init", "initial", "foundation"}
)
SEPARATORS = re.compile(r"([-_.+\s]+)")
HEADER = """\
# Written by `mergescope {command}`. Paths are relative to this file; change what you like.
# See what fits:   mergescope inspect {name}
# See inside:      mergescope app {name}
"""

# timm's plain ViTs by width: name, depth, heads. Shapes do not tell the number of heads, so only
# the published combinations are recognised.
VITS = {
    192: ("tiny", 12, (16,)),
    384: ("small", 12, (8, 16, 32)),
    768: ("base", 12, (8, 16, 32)),
    1024: ("large", 24, (14, 16, 32)),
    1280: ("huge", 32, (14,)),
}
VIT_IMAGE = 224
POOLED = ("pooling", "normalize")


def task_name(text: str, taken: Collection[str] = ()) -> str:
    """A text as a task's name: letters, digits and ``. _ + -``, at most 80, unlike those taken.

    Args:
        text: anything, such as a file's stem.
        taken: names already given.

    Example:
        >>> task_name("Straßen (2024)"), task_name("cars", taken=["cars"])
        ('Straen-2024', 'cars-2')
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", plain)[:LONGEST].strip("-.") or "task"
    unique, number = name, 2
    while unique in taken:
        tail = f"-{number}"
        unique, number = name[: LONGEST - len(tail)] + tail, number + 1
    return unique


def task_names(labels: Sequence[str]) -> list[str]:
    """A task name for each label, without what all labels begin and end with.

    ``clip-vit-base-patch32_sun397`` and ``clip-vit-base-patch32_cars`` become ``sun397`` and
    ``cars``. Numbers keep what stands before them.

    Example:
        >>> task_names(["vit_sun397_v2", "vit_cars_v2"])
        ['sun397', 'cars']
    """
    names: list[str] = []
    for label in strip_common_words(labels):
        names.append(task_name(label, names))
    return names


def strip_common_words(labels: Sequence[str]) -> list[str]:
    """Labels without the whole words that all of them begin and end with.

    Example:
        >>> strip_common_words(["vit-b-sun397", "vit-b-cars"])
        ['sun397', 'cars']
    """
    words = [SEPARATORS.split(label) for label in labels]
    if len(words) < 2:
        return list(labels)
    # Words stand at even places with separators between them; of each label one word stays.
    most = min(len(parts) for parts in words) // 2
    front = _count_shared(words, most)
    back = _count_shared([parts[::-1] for parts in words], most - front)
    kept = [parts[2 * front : len(parts) - 2 * back] for parts in words]
    if any(not "".join(parts).strip("0123456789") for parts in kept):
        return list(labels)
    return ["".join(parts) for parts in kept]


def _count_shared(words: Sequence[Sequence[str]], most: int) -> int:
    """How many leading words (each with the separator after it) all lists share."""
    count = 0
    while count < most and len({tuple(w[2 * count : 2 * count + 2]) for w in words}) == 1:
        count += 1
    return count


def base_candidates(labels: Sequence[str]) -> list[int]:
    """Which labels look like the base that the others were fine-tuned from.

    By the first of these that some but not all labels fulfil: the whole label is a word such as
    ``base``, ``pretrained`` or ``zeroshot``; it is what all others begin with; one of its words
    that not all labels share is such a word.

    Example:
        >>> base_candidates(["cars", "pretrained", "dtd"])
        [1]
    """

    def fold(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    def begins_all_others(label: str) -> bool:
        others = [other for other in labels if other != label]
        return len(others) > 1 and all(
            other.startswith(label) and not other[len(label)].isalnum() for other in others
        )

    own = strip_common_words(labels)
    tests = (
        [fold(label) in BASE_WORDS for label in labels],
        [begins_all_others(label) for label in labels],
        [
            any(fold(word) in BASE_WORDS for word in (*SEPARATORS.split(label), label))
            for label in own
        ],
    )
    for fulfilled in tests:
        if any(fulfilled) and not all(fulfilled):
            return [i for i, yes in enumerate(fulfilled) if yes]
    return []


def name_architecture(
    layouts: Sequence[Layout], members: Sequence[Checkpoint | None]
) -> ArchitectureSpec | None:
    """The network of all members, told from their layouts, else from the files beside them.

    Args:
        layouts: shape of each parameter by name, of each member.
        members: the same members; None where headers are not known.

    Returns:
        None where nothing is told, or members tell different things. How vectors are pooled need
        only be told by one: trainers leave sentence-transformers' files out.

    Example:
        >>> name_architecture([{"conv1.weight": (64, 3, 7, 7)}], [None]) is None
        True
    """
    guessed = [guess_architecture(layout) for layout in layouts]
    if guessed and guessed[0] is not None and all(each == guessed[0] for each in guessed):
        return guessed[0]
    told = [read_architecture(member) for member in members if member is not None]
    known = [each for each in told if each is not None]
    alone = {each.model_copy(update=dict.fromkeys(POOLED)).model_dump_json() for each in known}
    if len(alone) != 1:
        return None
    return max(known, key=lambda each: sum(getattr(each, field) is not None for field in POOLED))


def guess_architecture(layout: Layout) -> ArchitectureSpec | None:
    """timm's name of a plain vision transformer, where names and shapes leave no doubt.

    Args:
        layout: shape of each parameter by name; a classifier ``head`` may be among them.

    Returns:
        The architecture; None for any other layout, width, depth or patch.

    Source: ``timm/models/vision_transformer.py``.

    Example:
        >>> guess_architecture({"conv1.weight": (64, 3, 7, 7)}) is None
        True
    """
    patch, position = layout.get("patch_embed.proj.weight"), layout.get("pos_embed")
    if patch is None or position is None or len(patch) != 4 or len(position) != 3:
        return None
    width, channels, size, _ = patch
    known = VITS.get(width)
    if known is None or channels != 3 or size not in known[2]:
        return None
    name, depth, _ = known
    pooled = "fc_norm.weight" in layout  # timm moves the last norm behind the average
    expected = _vit_layout(width, depth, size, position[1], "fc_norm" if pooled else "norm")
    if {n: s for n, s in layout.items() if not n.startswith("head.")} != expected:
        return None
    grid = math.isqrt(max(0, position[1] - 1))
    if grid * grid != position[1] - 1:
        return None
    args: dict[str, int | str] = {} if grid * size == VIT_IMAGE else {"img_size": grid * size}
    if pooled:
        args["global_pool"] = "avg"
    return ArchitectureSpec(name=f"vit_{name}_patch{size}_{VIT_IMAGE}", args=args)


def _vit_layout(width: int, depth: int, patch: int, tokens: int, norm: str) -> Layout:
    def block(i: int) -> dict[str, tuple[int, ...]]:
        wide = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (out, into) in wide.items():
            shapes[f"blocks.{i}.{name}.weight"] = (out * width, into * width)
            shapes[f"blocks.{i}.{name}.bias"] = (out * width,)
        for name in ("norm1", "norm2"):
            shapes[f"blocks.{i}.{name}.weight"] = shapes[f"blocks.{i}.{name}.bias"] = (width,)
        return shapes

    layout: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        f"{norm}.weight": (width,),
        f"{norm}.bias": (width,),
    }
    for i in range(depth):
        layout |= block(i)
    return layout


def draft(
    members: Mapping[str, str],
    base: str | None = None,
    name: str = "suite",
    architecture: ArchitectureSpec | None = None,
    heads: Mapping[str, str] | None = None,
) -> SuiteSpec:
    """A suite of these members.

    Args:
        members: task name to weights: an absolute path, or a hub id.
        base: what they were fine-tuned from, likewise; None for none.
        name: the suite's name.
        architecture: the network, where it is known.
        heads: classifiers by task, where they are known.

    Raises:
        SuiteError: no member, or a name that is not allowed.

    Example:
        >>> spec = draft({"cars": "/models/cars", "dtd": "/models/dtd"}, base="/models/base")
        >>> list(spec.experts), spec.base
        (['cars', 'dtd'], '/models/base')
    """
    if not members:
        raise SuiteError("A suite needs at least one expert. Choose a model for it.")
    document = {
        "name": name,
        "architecture": architecture,
        "base": base,
        "experts": {
            task: {"weights": weights, "head": (heads or {}).get(task)}
            for task, weights in members.items()
        },
    }
    try:
        return SuiteSpec.model_validate(document)
    except ValidationError as error:
        raise SuiteError(f"These members make no suite: {explain_validation(error)}") from error


def write_suite(
    spec: SuiteSpec, path: Path, overwrite: bool = False, command: str = "suite init"
) -> None:
    """Write a suite's file, whole or not at all, with paths below its folder made relative.

    Args:
        spec: the suite; its paths are absolute, or relative to that folder already.
        path: the file to write.
        overwrite: whether a file of that name may be replaced.
        command: that wrote it, for its first line.

    Raises:
        OutputError: it exists and may not be replaced, or cannot be written.

    Example:
        >>> write_suite(draft({"cars": "hf://org/cars"}), Path("suite.yaml"))
        >>> load_suite("suite.yaml").tasks
        ('cars',)
    """
    if not overwrite and os.path.lexists(path):
        raise OutputError(f"{path} exists. Choose another name, or ask for it to be replaced.")
    write_atomically(path, suite_text(spec, path, command).encode())


def suite_text(spec: SuiteSpec, path: Path, command: str = "suite init") -> str:
    """What :func:`write_suite` writes to a path.

    Example:
        >>> print(suite_text(draft({"cars": "/models/cars"}), Path("/models/suite.yaml")))
        # Written by ...
        experts:
          cars:
            weights: cars
    """
    document = _with_relative_paths(
        spec.model_dump(mode="json", exclude_unset=True, exclude_none=True),
        path.parent.resolve(),
    )
    text = dump_yaml(document, width=100)
    return HEADER.format(name=path.name, command=command) + text


def _with_relative_paths(value: object, folder: Path) -> object:
    """The same document with every absolute path below the folder made relative to it."""
    if isinstance(value, dict):
        return {key: _with_relative_paths(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_relative_paths(item, folder) for item in value]
    if isinstance(value, str) and value.startswith(os.sep) and Path(value).is_relative_to(folder):
        return Path(value).relative_to(folder).as_posix()
    return value
