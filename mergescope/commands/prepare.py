"""``mergescope prepare``: everything that evaluation reads, ready before it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, get_args

import typer

from merge_core.errors import SuiteError
from mergescope.terminal import (
    SuiteArgument,
    TasksOption,
    console,
    print_table,
    progress_bar,
    split_names,
)

SHOWN = 5  # classes of each task

if TYPE_CHECKING:
    from merge_core.suites.data_spec import DataSpec
    from merge_core.suites.suite import Suite


def prepare(
    suite: SuiteArgument,
    tasks: TasksOption = None,
    download: Annotated[
        bool,
        typer.Option("--download", help="Fetch datasets of torchvision and the hub if missing."),
    ] = False,
) -> None:
    """Read a suite's evaluation data and make its zero-shot heads, once; say what there is."""
    from merge_core.suites.suite import load_suite

    loaded = load_suite(suite)
    rows = []
    for task in loaded.select(split_names(tasks)):
        if download:
            _download(loaded, task)
        rows.append([task, *_images(loaded, task), _head(loaded, task)])
    print_table(
        console(),
        "Evaluation data",
        ["task", "kind", "input", "validation", "test", "classes", "head"],
        rows,
    )
    for task in loaded.select(split_names(tasks)):
        if (named := _classes(loaded, task)) is not None:
            console().print(named)


def _download(suite: Suite, task: str) -> None:
    from analysis.data_sources import download

    data = suite.data(task)
    if data is not None:
        download(data, suite.file, f"data of task {task!r}")


def _images(suite: Suite, task: str) -> list[str]:
    """Kind and size of the inputs, numbers of inputs and classes."""
    from analysis.outputs.inputs import Split, load_inputs

    data = suite.spec.experts[task].data
    if data is None:
        return ["none", "", "", "", ""]
    if data.kind == "language":
        return _texts(suite, task, data)
    bar = progress_bar(f"reading {task}")
    found = {split: load_inputs(suite, task, split, None, bar) for split in get_args(Split)}
    size = found["test"].images.shape[1:3]
    return [
        data.kind,
        f"{size[0]} tokens" if data.kind == "text" else f"{size[0]} x {size[1]}",
        *(f"{len(found[split].labels):,}" for split in ("val", "test")),
        str(len(found["test"].class_names)),
    ]


def _texts(suite: Suite, task: str, data: DataSpec) -> list[str]:
    """Kind of a language model's inputs, their longest window, and their numbers and tokens."""
    from analysis.language.inputs import read_language
    from analysis.outputs.inputs import Split

    completed = suite.data(task) or data
    parts = [
        read_language(completed, split, suite.file, f"data of task {task!r}")
        for split in get_args(Split)
    ]
    longest = max(len(each.tokens) for part in parts for each in part.sequences)
    return [
        data.inputs,
        f"{longest} tokens",
        *(f"{len(part.labels):,} ({part.tokens.sum():,} tokens)" for part in parts),
        "",
    ]


def _classes(suite: Suite, task: str) -> str | None:
    """The first classes of a task by number and name; None where they have none."""
    from analysis.outputs.inputs import load_inputs

    data = suite.data(task)
    known = data is not None and data.kind != "language"
    names = load_inputs(suite, task, "test").class_names if known else ()
    if not names or all(name.isdigit() for name in names):
        return None
    shown = ", ".join(f"{number} {name}" for number, name in enumerate(names[:SHOWN]))
    return f"classes of {task}: {shown}" + (", ..." if len(names) > SHOWN else "")


def _head(suite: Suite, task: str) -> str:
    """The form of the head.

    Raises:
        SuiteError: it has fewer classes than the labels.
    """
    from analysis.outputs.heads import load_head
    from analysis.outputs.inputs import has_labels, load_inputs

    if suite.speaks:
        return "the model's own"
    own = suite.has_own_head(task)
    if suite.spec.experts[task].head is None and not own:
        return "none"
    head = load_head(suite, task)
    classes, width = head.weight.shape
    if suite.spec.experts[task].data is not None and has_labels(suite, task, "test"):
        most = int(load_inputs(suite, task, "test").labels.max())
        if most >= classes:
            raise SuiteError(
                f"The head of task {task!r} has {classes} classes, but its test inputs have "
                f"labels up to {most}. Correct the head or 'classes'."
            )
    return (
        f"{classes} x {width}"
        + (", of unit features" if head.normalizes else "")
        + (", the checkpoint's own" if own else "")
    )
