"""The tasks of the published merging benchmarks: data sets, splits, classes, prompts.

Numbers of images are those of the data sets' own cards and papers. The two vision protocols
share tasks but neither all data nor all class orders, so that their figures never share a column.

Sources: FusionBench (arXiv:2406.03280; github.com/tanganke/fusion_bench, ``config/dataset`` and
``tasks/clip_classification``); Wang et al., TALL-masks (arXiv:2405.07813;
github.com/nik-dim/tall_masks, ``src/datasets``); prompts: Radford et al., CLIP
(arXiv:2103.00020; github.com/openai/CLIP, ``data/prompts.md``); Wang et al., GLUE
(arXiv:1804.07461).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_A_THE = ("a photo of a {}.", "a photo of the {}.")
_SEEN_FROM_ABOVE = tuple(
    f"{view} of {article}{{}}."
    for article in ("", "a ", "the ")
    for view in (
        "satellite imagery",
        "aerial imagery",
        "satellite photo",
        "aerial photo",
        "satellite view",
        "aerial view",
    )
)
_CIFAR = tuple(
    f"a {kind}photo of {article} {size}{{}}."
    for article in ("a", "the")
    for kind, size in (
        ("", ""),
        ("blurry ", ""),
        ("black and white ", ""),
        ("low contrast ", ""),
        ("high contrast ", ""),
        ("bad ", ""),
        ("good ", ""),
        ("", "small "),
        ("", "big "),
    )
)
_DIGITS = {"val": "emnist-digits-train", "test": "emnist-digits-test"}
_NUMBER = ('a photo of the number: "{}".',)


@dataclass(frozen=True)
class HubDataset:
    """Where FusionBench reads a task's images: a data set of the Hugging Face Hub.

    Attributes:
        name: its name there.
        config: its configuration, where it has several.
        train: the split to take validation images from.
        test: the split that is reported.
        image_column: name of the column.
        label_column: name of the column.
    """

    name: str
    config: str | None = None
    train: str = "train"
    test: str = "test"
    image_column: str = "image"
    label_column: str = "label"


@dataclass(frozen=True)
class LocalData:
    """Where the TALL-masks protocol reads a task's images, below a folder ``data``.

    Attributes:
        fields: as in ``data:`` of suite.yaml.
        classes: number of classes.
        train: images of the training split.
        test: images of the test split.
    """

    fields: dict[str, Any]
    classes: int
    train: int
    test: int


@dataclass(frozen=True)
class VisionTask:
    """One image classification task.

    Attributes:
        name: FusionBench's.
        title: as in the papers' tables.
        classes: number of classes.
        train: images of the training split on the hub.
        test: images of the test split.
        hub: the data set on the hub.
        templates: prompts of the zero-shot head, ``{}`` for the class.
        class_names: in the order of the labels, where prompts use other names than the data.
        local: the data of the TALL-masks protocol.
    """

    name: str
    title: str
    classes: int
    train: int
    test: int
    hub: HubDataset
    templates: tuple[str, ...]
    local: LocalData
    class_names: tuple[str, ...] = field(default=())


def _torchvision(dataset: str, classes: int, images: tuple[int, int], **splits: Any) -> LocalData:
    fields = {"kind": "torchvision", "path": "data", "dataset": dataset, "val": "train"}
    return LocalData({**fields, **splits}, classes, *images)


def _folder(path: str, classes: int, images: tuple[int, int], **splits: Any) -> LocalData:
    return LocalData({"kind": "folder", "path": path, **splits}, classes, *images)


# The order of Task Arithmetic's tables, then that of TALL-masks' 14 and 20 tasks.
VISION_TASKS: tuple[VisionTask, ...] = (
    VisionTask(
        "sun397",
        "SUN397",
        397,
        19850,
        19850,
        HubDataset("tanganke/sun397"),
        _A_THE,
        _folder("data/sun397", 397, (19850, 19850), val="train", test="val"),
    ),
    VisionTask(
        "stanford-cars",
        "Cars",
        196,
        8144,
        8041,
        HubDataset("tanganke/stanford_cars"),
        (
            *_A_THE,
            "a photo of my {}.",
            "i love my {}!",
            "a photo of my dirty {}.",
            "a photo of my clean {}.",
            "a photo of my new {}.",
            "a photo of my old {}.",
        ),
        _torchvision("StanfordCars", 196, (8144, 8041)),
    ),
    VisionTask(
        "resisc45",
        "RESISC45",
        45,
        18900,
        6300,
        HubDataset("tanganke/resisc45"),
        _SEEN_FROM_ABOVE,
        # The lists of arXiv:1911.06721 (train, test) are the hub's splits.
        LocalData(
            {
                "kind": "huggingface",
                "dataset": "tanganke/resisc45",
                "val": "train",
            },
            45,
            18900,
            6300,
        ),
    ),
    VisionTask(
        "eurosat",
        "EuroSAT",
        10,
        21600,
        2700,
        HubDataset("tanganke/eurosat"),
        tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
        _folder("data/EuroSAT_splits", 10, (21600, 2700), val="val", test="test"),
    ),
    VisionTask(
        "svhn",
        "SVHN",
        10,
        73257,
        26032,
        HubDataset("ufldl-stanford/svhn", config="cropped_digits"),
        _NUMBER,
        _torchvision("SVHN", 10, (73257, 26032)),
    ),
    VisionTask(
        "gtsrb",
        "GTSRB",
        43,
        26640,
        12630,
        HubDataset("tanganke/gtsrb"),
        tuple(
            f'a {kind} photo of a "{{}}" traffic sign.'
            for kind in ("zoomed in", "centered", "close up")
        ),
        _torchvision("GTSRB", 43, (26640, 12630)),
    ),
    VisionTask(
        "mnist",
        "MNIST",
        10,
        60000,
        10000,
        HubDataset("ylecun/mnist"),
        _NUMBER,
        _torchvision("MNIST", 10, (60000, 10000)),
    ),
    VisionTask(
        "dtd",
        "DTD",
        47,
        3760,
        1880,
        HubDataset("tanganke/dtd"),
        tuple(
            f"a photo of {article} {{}} {what}."
            for article in ("a", "the")
            for what in ("texture", "pattern", "thing", "object")
        ),
        _folder("data/dtd", 47, (3760, 1880), val="train", test="val"),
    ),
    VisionTask(
        "oxford_flowers102",
        "Flowers102",
        102,
        1020,
        6149,
        HubDataset("dpdl-benchmark/oxford_flowers102"),
        ("a photo of a {}, a type of flower.",),
        _torchvision("Flowers102", 102, (1020, 6149)),
    ),
    VisionTask(
        "pcam",
        "PCAM",
        2,
        262144,
        32768,
        HubDataset("1aurent/PatchCamelyon"),
        ("this is a photo of {}",),
        _torchvision("PCAM", 2, (262144, 32768)),
        ("lymph node", "lymph node containing metastatic tumor tissue"),
    ),
    VisionTask(
        "fer2013",
        "FER2013",
        7,
        28709,
        7178,
        HubDataset("clip-benchmark/wds_fer2013", image_column="jpg", label_column="cls"),
        (
            "a photo of a {} looking face.",
            "a photo of a face showing the emotion: {}.",
            "a photo of a face looking {}.",
            "a face that looks {}.",
            "they look {}.",
            "look at how {} they are.",
        ),
        _torchvision("FER2013", 7, (28709, 7178)),
        ("angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"),
    ),
    VisionTask(
        "oxford-iiit-pet",
        "OxfordIIITPet",
        37,
        3680,
        3669,
        HubDataset("timm/oxford-iiit-pet"),
        ("a photo of a {}, a type of pet.",),
        _torchvision("OxfordIIITPet", 37, (3680, 3669), val="trainval"),
    ),
    VisionTask(
        "stl10",
        "STL10",
        10,
        5000,
        8000,
        HubDataset("tanganke/stl10"),
        _A_THE,
        _torchvision("STL10", 10, (5000, 8000)),
    ),
    VisionTask(
        "cifar100",
        "CIFAR100",
        100,
        50000,
        10000,
        HubDataset("uoft-cs/cifar100", image_column="img", label_column="fine_label"),
        _CIFAR,
        _torchvision("CIFAR100", 100, (50000, 10000)),
    ),
    VisionTask(
        "cifar10",
        "CIFAR10",
        10,
        50000,
        10000,
        HubDataset("uoft-cs/cifar10", image_column="img"),
        _CIFAR,
        _torchvision("CIFAR10", 10, (50000, 10000)),
    ),
    VisionTask(
        "food101",
        "Food101",
        101,
        75750,
        25250,
        HubDataset("ethz/food101", test="validation"),
        ("a photo of {}, a type of food.",),
        _torchvision("Food101", 101, (75750, 25250)),
    ),
    VisionTask(
        "fashion_mnist",
        "FashionMNIST",
        10,
        60000,
        10000,
        HubDataset("zalando-datasets/fashion_mnist"),
        _A_THE,
        _torchvision("FashionMNIST", 10, (60000, 10000)),
    ),
    VisionTask(
        "emnist_letters",
        "EMNIST",
        26,
        124800,
        20800,
        HubDataset("tanganke/emnist_letters"),
        ('a photo of the digit character: "{}".',),
        # Digits here, letters on the hub.
        _torchvision("EMNIST", 10, (240000, 40000), **_DIGITS),
    ),
    VisionTask(
        "kmnist",
        "KMNIST",
        10,
        60000,
        10000,
        HubDataset("tanganke/kmnist"),
        ("a photo of the character {}.",),
        _torchvision("KMNIST", 10, (60000, 10000)),
        ("お", "き", "す", "つ", "な", "は", "ま", "や", "れ", "を"),
    ),
    VisionTask(
        "rendered-sst2",
        "RenderedSST2",
        2,
        6920,
        1821,
        HubDataset("nateraw/rendered-sst2"),
        ("a {} review of a movie.",),
        _torchvision("RenderedSST2", 2, (6920, 1821)),
        ("negative", "positive"),
    ),
)


@dataclass(frozen=True)
class TextTask:
    """One task of GLUE, whose validation split is reported, as its test labels are kept secret.

    Attributes:
        name: configuration of the data set :data:`GLUE`.
        title: as in the papers' tables.
        classes: number of classes; 1 is a regression.
        train: examples of the training split.
        test: examples of the validation split.
        columns: of the texts: one, or two that are read as a pair.
        split: the name of the validation split.
    """

    name: str
    title: str
    classes: int
    train: int
    test: int
    columns: tuple[str, ...] = ("sentence1", "sentence2")
    split: str = "validation"


GLUE = "nyu-mll/glue"
GLUE_TASKS: tuple[TextTask, ...] = (
    TextTask("cola", "CoLA", 2, 8551, 1043, ("sentence",)),
    TextTask("sst2", "SST-2", 2, 67349, 872, ("sentence",)),
    TextTask("mrpc", "MRPC", 2, 3668, 408),
    TextTask("qqp", "QQP", 2, 363846, 40430, ("question1", "question2")),
    TextTask("mnli", "MNLI", 3, 392702, 9815, ("premise", "hypothesis"), "validation_matched"),
    TextTask("qnli", "QNLI", 2, 104743, 5463, ("question", "sentence")),
    TextTask("rte", "RTE", 2, 2490, 277),
    TextTask("stsb", "STS-B", 1, 5749, 1500),
)
