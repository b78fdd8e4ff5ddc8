"""What ``suite.yaml`` says about a task's evaluation data and its head.

:mod:`merge_core.suites.data_files` finds them, :mod:`analysis.data_sources` reads each kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from merge_core.strict_model import StrictModel

Kind = Literal["numpy", "folder", "idx", "cifar", "torchvision", "huggingface", "text", "language"]
WINDOW = 512  # tokens, where a language model's data name no length
MetricName = Literal["accuracy", "cross_entropy"]
Positive = Annotated[float, Field(gt=0)]
Three = tuple[float, float, float]
ThreePositive = tuple[Positive, Positive, Positive]
HALF = (0.5, 0.5, 0.5)
# Written out, or a text file with one on each line.
Names = Annotated[list[str], Field(min_length=1)] | str

COMMON = frozenset(
    (
        *("kind", "labelled", "classes", "val", "test", "val_share", "limit", "seed"),
        *("transform", "mean", "std"),
    )
)
# Fields of each kind beside the common ones; those that it cannot do without.
FIELDS: dict[Kind, tuple[frozenset[str], frozenset[str]]] = {
    "numpy": (frozenset({"file"}), frozenset({"file"})),
    "folder": (frozenset({"path"}), frozenset({"path"})),
    "idx": (frozenset({"path"}), frozenset({"path"})),
    "cifar": (frozenset({"path"}), frozenset({"path"})),
    "torchvision": (frozenset({"path", "dataset"}), frozenset({"path", "dataset"})),
    "huggingface": (
        frozenset({"path", "dataset", "config", "revision", "image_column", "label_column"}),
        frozenset(),
    ),
    "text": (
        frozenset({"path", "dataset", "config", "revision", "text_columns", "label_column"})
        | {"tokenizer", "length"},
        frozenset({"text_columns"}),
    ),
    "language": (
        frozenset({"path", "dataset", "config", "revision", "text_columns", "tokenizer", "length"})
        | {"blocks", "choices_column", "answer_column", "length_normalised"},
        frozenset(),
    ),
}
# Kinds that hold texts, which a tokenizer cuts.
OF_TEXTS: frozenset[Kind] = frozenset({"text", "language"})
# What a numpy archive is read by as it is; anything more makes a prepared copy.
PLAIN = {"kind", "file", "mean", "std"}

# Where each of torchvision's datasets lies below its root, and what its splits are called there
# (none where it has one part only). Source: ``torchvision.datasets``.
TORCHVISION: dict[str, tuple[str, tuple[str, ...]]] = {
    "CIFAR10": ("cifar-10-batches-py", ("train", "test")),
    "CIFAR100": ("cifar-100-python", ("train", "test")),
    "Country211": ("country211", ("train", "valid", "test")),
    "DTD": ("dtd", ("train", "val", "test")),
    "EMNIST": ("EMNIST/raw", ("train", "test")),
    "EuroSAT": ("eurosat", ()),
    "FER2013": ("fer2013", ("train", "test")),
    "FGVCAircraft": ("fgvc-aircraft-2013b", ("train", "val", "test")),
    "FashionMNIST": ("FashionMNIST/raw", ("train", "test")),
    "Flowers102": ("flowers-102", ("train", "val", "test")),
    "Food101": ("food-101", ("train", "test")),
    "GTSRB": ("gtsrb", ("train", "test")),
    "KMNIST": ("KMNIST/raw", ("train", "test")),
    "MNIST": ("MNIST/raw", ("train", "test")),
    "OxfordIIITPet": ("oxford-iiit-pet", ("trainval", "test")),
    "PCAM": ("pcam", ("train", "val", "test")),
    "RenderedSST2": ("rendered-sst2", ("train", "val", "test")),
    "STL10": ("stl10_binary", ("train", "test")),
    "SUN397": ("SUN397", ()),
    "SVHN": (".", ("train", "test")),
    "StanfordCars": ("stanford_cars", ("train", "test")),
}


def _word_or_table(value: Any) -> str:
    return "name" if isinstance(value, str) else "table"


class TransformSpec(StrictModel):
    """Resize, crop and normalisation, as in timm's data configuration.

    Attributes:
        size: height and width that the network sees, in pixels.
        mean: subtracted from each channel, of pixels in [0, 1].
        std: by which each channel is divided then.
        interpolation: of the resize.
        crop_pct: the share of the resized image's shorter side that the crop keeps.
        crop_mode: ``center`` keeps the aspect ratio and crops, ``squash`` does not keep it,
            ``border`` keeps it and fills up.
    """

    size: int = Field(ge=1, le=4096)
    mean: Three = HALF
    std: ThreePositive = HALF
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    crop_pct: float = Field(default=1.0, gt=0.1, le=1)
    crop_mode: Literal["center", "squash", "border"] = "center"


Transform = Annotated[
    Annotated[Literal["timm", "open_clip"], Tag("name")] | Annotated[TransformSpec, Tag("table")],
    Discriminator(_word_or_table),
]


class DataSpec(StrictModel):
    """Evaluation images of one task; which fields a kind takes is in :data:`FIELDS`.

    Attributes:
        kind: how the images are stored.
        file: a numpy archive.
        path: the folder that holds them; of texts, perhaps a file.
        dataset: its name in torchvision, or on the hub.
        config: a Hugging Face dataset's configuration.
        revision: of the hub's repository.
        image_column: of a Hugging Face dataset; found by its type where not named.
        label_column: likewise.
        text_columns: of texts: one, or two that are read as a pair. Of a language model's: one,
            ``text`` where a table has it and none is named; with choices, the question's.
        tokenizer: of texts: a folder or hub id that holds a fast tokenizer of transformers; the
            suite's base where it is not named.
        length: of texts: tokens that are kept at most; of a language model's texts tokens of a
            window, into as many of which a text is cut as it takes (512).
        blocks: of a language model's texts: all texts of a split are one, cut into blocks of
            `length` tokens, which are the units that are drawn and counted.
        choices_column: of a language model's: the texts of which one follows the question, as a
            list; the likeliest is the model's answer.
        answer_column: with choices: the number of the right one, from 0, its letter (A, B, ...) or
            its text.
        length_normalised: with choices: whether the likelihood of a choice is that of one token,
            the mean over its own, rather than of all together.
        labelled: whether there are labels.
        classes: class names in the order of the head's outputs.
        val: the source's own split to choose on.
        test: the source's own split to report on.
        val_share: the part of a split that is held out for validation where that has no split of
            its own.
        limit: the largest number of images of each split, drawn by the seed.
        seed: of what is drawn.
        transform: from a stored image to the network's input.
        mean: where there is no transform: subtracted from pixels in [0, 1] (0.5).
        std: where there is no transform: by which they are divided then (0.5).
    """

    kind: Kind = "numpy"
    file: str | None = None
    path: str | None = None
    dataset: str | None = None
    config: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    text_columns: Annotated[list[str], Field(min_length=1, max_length=2)] | None = None
    tokenizer: str | None = None
    length: int = Field(default=128, ge=2, le=8192)
    blocks: bool = False
    choices_column: str | None = None
    answer_column: str | None = None
    length_normalised: bool = False
    labelled: bool = True
    classes: Names | None = None
    val: str | None = None
    test: str | None = None
    val_share: float = Field(default=0.1, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    transform: Transform | None = None
    mean: Three | None = None
    std: ThreePositive | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> DataSpec:
        own, needed = FIELDS[self.kind]
        given = self.model_dump(exclude_defaults=True).keys()
        if odd := sorted(given - own - COMMON):
            raise ValueError(
                f"the kind {self.kind!r} takes no {odd[0]!r}, only {', '.join(sorted(own))} and "
                "what all kinds take"
            )
        if missing := sorted(needed - given):
            raise ValueError(f"the kind {self.kind!r} needs {missing[0]!r}")
        on_hub = self.kind == "huggingface" or self.kind in OF_TEXTS
        if on_hub and (self.path is None) == (self.dataset is None):
            raise ValueError(
                f"the kind {self.kind!r} needs either 'path', a folder"
                + (" or file" if self.kind in OF_TEXTS else "")
                + ", or 'dataset', a name on the hub"
            )
        if self.kind == "torchvision" and self.dataset not in TORCHVISION:
            raise ValueError(
                f"no dataset {self.dataset!r}; those of torchvision that can be read are "
                f"{', '.join(TORCHVISION)}"
            )
        if self.kind in OF_TEXTS and given & {"transform", "mean", "std"}:
            raise ValueError(f"the kind {self.kind!r} takes no transform, mean or std")
        if self.kind == "language":
            self._check_language(given)
        if self.transform is not None and given & {"mean", "std"}:
            raise ValueError("a transform brings its own mean and std; leave out these two")
        if self.val_share == 1 and self.val is not None and self.val == self.test:
            raise ValueError("val_share must be less than 1 where val and test are one split")
        return self

    def _check_language(self, given: Set[str]) -> None:
        """Refuse fields that do not go together.

        Raises:
            ValueError: there are such.
        """
        if odd := given & {"labelled", "classes"}:
            raise ValueError(
                f"the kind 'language' takes no {min(odd)!r}: each next token is its own label, and "
                "choices have an answer_column"
            )
        if len(self.text_columns or ()) > 1:
            raise ValueError("the kind 'language' takes one text column")
        if (self.choices_column is None) != (self.answer_column is None):
            raise ValueError("choices_column and answer_column go together")
        if self.length_normalised and self.choices_column is None:
            raise ValueError("length_normalised is of choices; name the choices_column")
        if self.choices_column is not None and self.blocks:
            raise ValueError("questions with choices are not cut into blocks")
        if self.choices_column is not None and self.text_columns is None:
            raise ValueError("name the question's column in text_columns, as [question]")

    @property
    def inputs(self) -> Literal["images", "texts", "blocks", "questions"]:
        """What these are, for messages."""
        if self.choices_column is not None:
            return "questions"
        if self.blocks:
            return "blocks"
        return "texts" if self.kind in OF_TEXTS else "images"

    @property
    def window(self) -> int:
        """Tokens of a language model's texts that are run at once."""
        return self.length if "length" in self.model_fields_set else WINDOW

    @property
    def measured_by(self) -> str:
        """In what way: inputs of different ways have no common mean."""
        if self.kind != "language":
            return "classifier"
        return "cross-entropy" if self.choices_column is None else "choices"

    @property
    def plain(self) -> bool:
        """Whether this is a numpy archive whose images are taken as they are."""
        as_written = self.model_dump(exclude=PLAIN, exclude_defaults=True)
        return self.kind == "numpy" and not as_written

    @property
    def normalised_only(self) -> bool:
        """Whether images keep their size: no transform, and a mean or std, or an archive."""
        stated = self.mean is not None or self.std is not None
        return self.transform is None and (stated or self.kind == "numpy")

    @property
    def constants(self) -> tuple[Three, ThreePositive]:
        """Mean and std of each channel where there is no transform."""
        return self.mean or HALF, self.std or HALF


class ZeroShotSpec(StrictModel):
    """A head made of class names by the text tower of a CLIP.

    Attributes:
        text_tower: a folder or hub id of a transformers CLIP; with `model`, a file of weights.
        model: open_clip's name of the model whose weights these are.
        classes: the names in the texts; those of the data where left out.
        templates: texts in which ``{}`` stands for the name.
    """

    text_tower: str
    model: str | None = None
    classes: Names | None = None
    templates: Names = Field(default=["a photo of a {}."])


class HeadSpec(StrictModel):
    """A task's linear classifier: read from a file, or made of class names.

    Attributes:
        file: weights with ``weight`` and, optionally, ``bias``.
        zero_shot: how it is made.
        normalize: whether features are divided by their norm first; zero-shot heads always do.
        layers: where the file holds more than the head: how the names of its tensors begin.
    """

    file: str | None = None
    zero_shot: ZeroShotSpec | None = None
    normalize: bool = False
    layers: str | None = None

    @model_validator(mode="after")
    def _check_origin(self) -> HeadSpec:
        if (self.file is None) == (self.zero_shot is None):
            raise ValueError("a head has either a 'file' or 'zero_shot'")
        if self.layers is not None and self.file is None:
            raise ValueError("'layers' are those of a 'file'")
        return self

    @property
    def normalizes(self) -> bool:
        """Whether features are divided by their norm before the head."""
        return self.normalize or self.zero_shot is not None


Head = Annotated[
    Annotated[str, Tag("name")] | Annotated[HeadSpec, Tag("table")],
    Discriminator(_word_or_table),
]


def head_spec(head: str | HeadSpec) -> HeadSpec:
    """A head as a table, also where suite.yaml names only its file."""
    return HeadSpec(file=head) if isinstance(head, str) else head


def paths_of(data: DataSpec | None, head: str | HeadSpec | None) -> Iterator[str]:
    """The paths that a task's data and head name, as they are written."""
    if data is not None:
        yield from filter(None, (data.file, data.path, data.tokenizer))
    if head is not None:
        table = head_spec(head)
        yield table.file or (table.zero_shot.text_tower if table.zero_shot else "")
