"""Images of a task as the network takes them, kept in the cache folder by content.

Images are decoded one at a time and written as they come; what is read back is mapped into
memory, so that a split may be larger than that.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from analysis.data_sources import open_source
from analysis.data_sources.source import UNLABELLED, Records, Source
from analysis.data_sources.splits import Part, draw_part, name_of_part
from analysis.data_sources.transforms import geometric_transform, resolve_transform
from merge_core.errors import OutputError, SuiteError
from merge_core.files import cache_dir, digest_of, evict, explain_os_error, write_atomically
from merge_core.progress import Progress
from merge_core.suites.data_files import Resolve, data_identity, read_names
from merge_core.suites.data_spec import DataSpec, TransformSpec
from merge_core.suites.suite_spec import ArchitectureSpec

FORMAT = "images-1"
FOLDER = "images"
MOST_BYTES = 1 << 35  # in the cache folder, over all tasks


class PreparedSplit(NamedTuple):
    """One split of one task.

    Attributes:
        images: uint8, N x H x W x 3, mapped from a file.
        labels: int64, N.
        class_names: one per class.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


def prepare_split(
    data: DataSpec,
    architecture: ArchitectureSpec | None,
    split: Part,
    resolve: Resolve,
    what: str,
    progress: Progress | None = None,
) -> PreparedSplit:
    """One split of a task's data: from the cache where it is known, else decoded into it.

    Args:
        data: what suite.yaml says.
        architecture: the suite's.
        split: ``train``, ``val`` or ``test``.
        resolve: of paths of suite.yaml.
        what: whose data these are, for messages.
        progress: reports images decoded.

    Raises:
        SuiteError: data that are missing or damaged, labels that do not fit the classes, or
            images of several sizes without a transform.
        OutputError: the cache folder is full or cannot be written.
        Cancelled: between two images; nothing is kept.
    """
    transform = resolve_transform(data, architecture, what)
    key = digest_of(
        FORMAT,
        split,
        data_identity(data, resolve, what),
        "" if transform is None else transform.model_dump_json(),
    )
    folder = cache_dir() / FOLDER
    images, labels = folder / f"{key}.npy", folder / f"{key}.json"
    known = _read_cached(images, labels)
    if known is None:
        source = open_source(data, resolve, what)
        _prepare(source, data, transform, split, resolve, what, (images, labels), progress)
        with suppress(OSError):
            evict(folder, MOST_BYTES)
        known = _read_cached(images, labels)
    if known is None:
        raise OutputError(f"{images} was written and cannot be read again. Check the disk.")
    return known


def class_names(data: DataSpec, resolve: Resolve, what: str) -> tuple[str, ...] | None:
    """A task's class names in the order of its labels; None where it has only numbers.

    Raises:
        SuiteError: the data are missing or damaged.

    Example:
        >>> data = DataSpec(kind="folder", path="images", classes=["cat", "dog"])
        >>> class_names(data, Path, "images")
        ('cat', 'dog')
    """
    if data.classes is not None:
        return read_names(data.classes, resolve, f"classes of {what}")
    return open_source(data, resolve, what).classes


def _read_cached(images: Path, labels: Path) -> PreparedSplit | None:
    """The split that is stored in these files; None where one is missing or damaged."""
    with suppress(OSError, EOFError, ValueError, LookupError, TypeError):
        about = json.loads(labels.read_bytes())
        mapped = np.load(images, mmap_mode="r", allow_pickle=False)
        numbers = np.asarray(about["labels"], dtype=np.int64)
        if mapped.ndim == 4 and mapped.dtype == np.uint8 and len(mapped) == len(numbers) > 0:
            for path in (images, labels):  # used last, deleted last
                os.utime(path)
            return PreparedSplit(mapped, numbers, tuple(about["class_names"]))
    return None


def _prepare(
    source: Source,
    data: DataSpec,
    transform: TransformSpec | None,
    split: Part,
    resolve: Resolve,
    what: str,
    targets: tuple[Path, Path],
    progress: Progress | None,
) -> None:
    name = name_of_part(data, split, source.splits, what)
    try:
        records = source.splits[name]()
    except OSError as fault:
        raise SuiteError(f"{what[0].upper()}{what[1:]} cannot be read: {fault}.") from fault
    numbers = draw_part(data, split, source.splits, len(records), what)
    class_of, names = _classes(source, data, resolve, what)
    labels = _write_images(
        records, numbers, transform, class_of, what, targets[0], progress or Progress()
    )
    if not names and data.labelled:
        names = tuple(map(str, range(max(labels) + 1)))
    about = {"labels": labels, "class_names": names}
    write_atomically(targets[1], json.dumps(about).encode())


def _classes(
    source: Source, data: DataSpec, resolve: Resolve, what: str
) -> tuple[Callable[[int], int], tuple[str, ...]]:
    """A function from a label to its class index, and the classes' names.

    The function raises ValueError for a label that is no class.
    """
    own = source.classes
    given = data.classes and read_names(data.classes, resolve, f"classes of {what}")
    wanted = given or own or ()
    if not data.labelled:
        return lambda _: UNLABELLED, wanted
    if own is None or given is None:
        count = len(wanted)

        def same(label: int) -> int:
            if label < 0 or (count and label >= count):
                raise ValueError(
                    f"its label is {label}"
                    + (f", and there are {count} classes" if count else ", which is no class")
                )
            return label

        return same, wanted
    if unknown := [name for name in wanted if name not in own]:
        raise SuiteError(
            f"Classes of {what}: there is no class {unknown[0]!r}. There is "
            f"{', '.join(own[:8])}{', …' if len(own) > 8 else ''}."
        )
    order = {own.index(name): number for number, name in enumerate(wanted)}

    def rank_of_label(label: int) -> int:
        if label not in order:
            name = own[label] if 0 <= label < len(own) else str(label)
            raise ValueError(f"its class is {name!r}, which is not among the 'classes'")
        return order[label]

    return rank_of_label, wanted


def _write_images(
    records: Records,
    numbers: np.ndarray,
    transform: TransformSpec | None,
    class_of: Callable[[int], int],
    what: str,
    target: Path,
    progress: Progress,
) -> list[int]:
    """Decode images into a file, whole or absent; their labels."""
    change = geometric_transform(transform)
    labels: list[int] = []
    total = len(numbers)
    shape: tuple[int, ...] | None = None
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            for done, number in enumerate(numbers.tolist()):
                progress.step(done, total, what)
                pixels, label = _decode(records, number, change, class_of, what)
                if shape is None:
                    shape = pixels.shape
                    npy.write_array_header_1_0(
                        stream, {"descr": "|u1", "fortran_order": False, "shape": (total, *shape)}
                    )
                elif pixels.shape != shape:
                    raise SuiteError(
                        f"{records.where(number)} ({what}) is {pixels.shape[1]} x "
                        f"{pixels.shape[0]} pixels, others are {shape[1]} x {shape[0]}. Name a "
                        "transform, such as transform: timm."
                    )
                stream.write(np.ascontiguousarray(pixels).data)
                labels.append(label)
        temporary.replace(target)
        temporary = None
    except OSError as fault:  # images' own faults are SuiteErrors already
        raise explain_os_error(fault, target) from fault
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    progress.step(total, total, what)
    return labels


def _decode(
    records: Records,
    number: int,
    change: Callable[[Image.Image], np.ndarray],
    class_of: Callable[[int], int],
    what: str,
) -> tuple[np.ndarray, int]:
    """An image (uint8, H x W x 3) and its class."""
    try:
        image, label = records[number]
        pixels = change(image)
        return pixels, class_of(label)
    # SyntaxError: a broken PNG; LookupError, TypeError: a damaged table.
    except (
        OSError,
        SyntaxError,
        ValueError,
        LookupError,
        TypeError,
        Image.DecompressionBombError,
    ) as fault:
        raise SuiteError(
            f"{records.where(number)} ({what}) cannot be used: {fault}. Replace it, or leave it "
            "out."
        ) from fault
