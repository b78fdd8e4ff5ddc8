"""Datasets of the Hugging Face hub's form, from a folder of Parquet, Arrow or image files."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from analysis.data_sources.source import UNLABELLED, WHOLE, Request, Source
from merge_core.errors import SuiteError
from merge_core.input_files import check_all_regular, check_regular
from merge_core.suites.data_spec import DataSpec

# Readers of the library that only parse data.
READERS = ("parquet", "arrow", "imagefolder")


@dataclass(frozen=True)
class Rows:
    """Records of a table."""

    table: Any
    image: str
    label: str | None
    numbers: dict[str, int] | None  # of labels that are texts
    name: str

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int, /) -> tuple[Image.Image, int]:
        row = self.table[int(number)]
        picture = row[self.image]
        if isinstance(picture, dict):  # bytes that nothing declares to be an image
            picture = Image.open(io.BytesIO(picture["bytes"]))
        if not isinstance(picture, Image.Image):
            raise ValueError(f"the column {self.image!r} holds no images")
        if self.label is None:
            return picture, UNLABELLED
        label = row[self.label]
        return picture, self.numbers[label] if self.numbers is not None else int(label)

    def where(self, number: int) -> str:
        """Its row."""
        return f"row {number} of {self.name}"


def open_hugging_face(request: Request) -> Source:
    """The splits of a dataset, read by the library ``datasets`` from files on disk.

    Raises:
        SuiteError: the library is not installed, the folder holds no such dataset, or there is
            no column of images or labels.
    """
    found = read_tables(request)
    first = next(iter(found.values()))
    image, label = _columns(request.data, first.features, request.what)
    classes: tuple[str, ...] | None = None
    numbers = None
    if label is not None:
        feature = first.features[label]
        if hasattr(feature, "names"):
            classes = tuple(feature.names)
        elif getattr(feature, "dtype", "") in ("string", "large_string"):
            classes = tuple(sorted({name for t in found.values() for name in t.unique(label)}))
            numbers = {name: number for number, name in enumerate(classes)}
    return Source(
        classes,
        {
            name: partial(Rows, table, image, label, numbers, f"{request.path.name}, {name}")
            for name, table in found.items()
        },
    )


def read_tables(request: Request) -> dict[str, Any]:
    """The splits of a dataset, as the library's tables.

    Raises:
        SuiteError: the library is not installed, or the folder holds no such dataset.
    """
    datasets = _import_datasets()
    path, config = str(request.path), request.data.config
    # What save_to_disk wrote.
    if (request.path / "dataset_dict.json").is_file() or (request.path / "state.json").is_file():
        read = partial(datasets.load_from_disk, path)
    else:
        read = partial(_load, datasets, path, config)
    try:
        check_all_regular(request.path)
        found = read()
    except SuiteError:
        raise
    except Exception as fault:  # the library raises almost anything about files of another form
        reason = str(fault).strip().split("\n")[0]
        raise SuiteError(
            f"{path} ({request.what}) cannot be read as a dataset: {reason:.200} Give a folder of "
            "Parquet files, and its 'config' where it has several."
        ) from fault
    return dict(found) if isinstance(found, dict) else {WHOLE: found}


def read_file(request: Request) -> dict[str, Any]:
    """The one split of a dataset that is a Parquet file.

    Raises:
        SuiteError: the library is not installed, or the file is no such.
    """
    datasets = _import_datasets()
    try:
        check_regular(request.path)
        return {WHOLE: datasets.Dataset.from_parquet(str(request.path))}
    except Exception as fault:  # the library raises almost anything about files of another form
        reason = str(fault).strip().split("\n")[0]
        raise SuiteError(
            f"{request.path} ({request.what}) cannot be read as Parquet: {reason:.200}"
        ) from fault


def _import_datasets() -> Any:
    """The library, which keeps its progress to itself.

    Raises:
        SuiteError: it is not installed.
    """
    try:
        import datasets
    except ImportError as fault:
        raise SuiteError(
            "Hugging Face datasets need the package datasets: pip install 'mergescope[data]'."
        ) from fault
    datasets.disable_progress_bars()  # progress is ours to show
    return datasets


def _load(datasets: Any, path: str, config: str | None) -> Any:
    builder = datasets.load_dataset_builder(path, config)
    reader = type(builder).__module__.rpartition(".")[2]
    if reader not in READERS:
        raise SuiteError(
            f"{path} holds files for the reader {reader!r}; only those for {', '.join(READERS)} "
            "are read."
        )
    return datasets.load_dataset(path, config)


def _columns(data: DataSpec, features: Any, what: str) -> tuple[str, str | None]:
    """Names of the columns of images and labels: as stated, else by type, else by usual names."""
    for name in (data.image_column, data.label_column):
        if name is not None and name not in features:
            raise SuiteError(
                f"{what[0].upper()}{what[1:]}: there is no column {name!r}; there is "
                f"{', '.join(features)}."
            )
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    images = [n for n, k in kinds.items() if k == "Image"] or [
        n for n in ("image", "img") if n in features
    ]
    labels = [n for n, k in kinds.items() if k == "ClassLabel"]
    if len(labels) != 1:
        labels = [n for n in ("label", "labels", "fine_label") if n in features][:1]
    image = data.image_column or (images[0] if len(images) == 1 else None)
    label = data.label_column or (labels[0] if labels else None)
    if image is None or (label is None and data.labelled):
        lacking = "image_column" if image is None else "label_column"
        raise SuiteError(
            f"{what[0].upper()}{what[1:]}: which column is meant? There is {', '.join(features)}; "
            f"name it as '{lacking}'" + ("." if image is None else ", or say 'labelled: false'.")
        )
    return image, label if data.labelled else None
