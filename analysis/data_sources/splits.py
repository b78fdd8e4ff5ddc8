"""Which images of a source are for choosing (validation) and which for reporting (test).

Of a source's training split, what validation does not take is for fine-tuning.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from merge_core.errors import SuiteError
from merge_core.suites.data_spec import DataSpec

TEST = ("test", "t10k", "testing")
VALIDATION = ("val", "validation", "valid")
TRAINING = ("train", "training", "trainval")
KNOWN = (*TRAINING, *VALIDATION, *TEST)
Part = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Choice:
    """The splits of a source that are used.

    Attributes:
        val: the one to choose on.
        test: the one to report on; perhaps the same.
    """

    val: str
    test: str

    @property
    def held_out(self) -> bool:
        """Whether validation images are a drawn part of their split rather than all of it."""
        return self.val == self.test or _is_training(self.val)


def choose(data: DataSpec, names: Collection[str], what: str) -> Choice:
    """The splits that suite.yaml names, else the usual ones.

    Test: the split called so, else one called validation, else the only one. Validation: the
    split called so, else a part of the training split, else a part of the test split.

    Args:
        data: what suite.yaml says.
        names: of the source's splits.
        what: whose data these are, for messages.

    Raises:
        SuiteError: a split that the source lacks, or none that is clearly for testing.

    Example:
        >>> data = DataSpec(kind="folder", path="images")
        >>> choose(data, ["train", "test"], "images")
        Choice(val='train', test='test')
    """
    for field, name in (("val", data.val), ("test", data.test)):
        if name is not None and name not in names:
            raise SuiteError(
                f"{what[0].upper()}{what[1:]}: there is no split {name!r}; there is "
                f"{', '.join(names) or 'none'}. Correct '{field}'."
            )
    others = [name for name in VALIDATION if name != data.val]
    usual = [name for name in (*TEST, *others) if name in names]
    test = data.test or next(iter([*usual, *(names if len(names) == 1 else [])]), None)
    if test is None:
        raise SuiteError(
            f"{what[0].upper()}{what[1:]}: which split is for testing? There is "
            f"{', '.join(names) or 'none'}; name one as 'test'."
        )
    own = [name for name in (*VALIDATION, *TRAINING) if name in names and name != test]
    return Choice(data.val or next(iter(own), test), test)


def draw_rows(data: DataSpec, choice: Choice, for_test: bool, count: int, what: str) -> np.ndarray:
    """Numbers of the images that are used, in an order drawn by the seed.

    The order is shuffled, so that the first ones are a fair sample, and a larger `limit` adds
    to a smaller one. Validation and test images never overlap.

    Args:
        data: what suite.yaml says.
        choice: of splits.
        for_test: for the test split rather than validation.
        count: images in the split that is drawn from.
        what: whose data these are, for messages.

    Raises:
        SuiteError: too few images.

    Example:
        >>> data = DataSpec(kind="folder", path="images", val_share=0.2)
        >>> choice = choose(data, ["all"], "images")
        >>> parts = [draw_rows(data, choice, test, 10, "images").tolist() for test in (False, True)]
        >>> [len(part) for part in parts], sorted(sum(parts, []))
        ([2, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    order = np.random.default_rng(data.seed).permutation(count)
    shared = choice.val == choice.test
    if count < 1 + shared:
        raise SuiteError(
            f"{what[0].upper()}{what[1:]}: the split "
            f"{(choice.test if for_test else choice.val)!r} has {count} {data.inputs}, too few."
        )
    held = max(1, round(data.val_share * count))
    if shared:
        held = min(held, count - 1)
        order = order[held:] if for_test else order[:held]
    elif not for_test and choice.held_out:
        order = order[:held]
    return order[: data.limit]


def name_of_part(data: DataSpec, part: Part, names: Collection[str], what: str) -> str:
    """The split of a source that a part is drawn from.

    Args:
        data: what suite.yaml says.
        part: for fine-tuning, for choosing or for reporting.
        names: of the source's splits.
        what: whose data these are, for messages.

    Raises:
        SuiteError: a split that the source lacks, none that is clearly for testing, or none for
            fine-tuning beside the one that is reported on.

    Example:
        >>> data = DataSpec(kind="folder", path="images")
        >>> [name_of_part(data, part, ["train", "test"], "images") for part in ("train", "val")]
        ['train', 'train']
    """
    choice = choose(data, names, what)
    if part != "train":
        return choice.val if part == "val" else choice.test
    found = [name for name in names if _is_training(name)]
    if len(found) != 1 or found[0] == choice.test:
        raise SuiteError(
            f"{what[0].upper()}{what[1:]}: which split is for fine-tuning? There is "
            f"{', '.join(names) or 'none'}; one must be called train, and not be the test."
        )
    return found[0]


def draw_part(
    data: DataSpec, part: Part, names: Collection[str], count: int, what: str
) -> np.ndarray:
    """Numbers of the images of a part (see :func:`draw_rows`); no two parts overlap.

    Args:
        data: what suite.yaml says.
        part: for fine-tuning, for choosing or for reporting.
        names: of the source's splits.
        count: images in the split that it is drawn from.
        what: whose data these are, for messages.

    Raises:
        SuiteError: too few images.

    Example:
        >>> data = DataSpec(kind="folder", path="images", val_share=0.2)
        >>> names = ["train", "test"]
        >>> [len(draw_part(data, part, names, 10, "images")) for part in ("train", "val")]
        [8, 2]
    """
    choice = choose(data, names, what)
    if part != "train":
        return draw_rows(data, choice, part == "test", count, what)
    order = np.random.default_rng(data.seed).permutation(count)
    if choice.val == name_of_part(data, part, names, what):
        whole = data.model_copy(update={"limit": None})
        order = order[len(draw_rows(whole, choice, False, count, what)) :]
    if not len(order):
        raise SuiteError(f"{what[0].upper()}{what[1:]}: no image is left for fine-tuning.")
    return order[: data.limit]


def _is_training(name: str) -> bool:
    # The parts of EMNIST are called emnist-digits-train and so on.
    return name.rpartition("-")[2] in TRAINING
