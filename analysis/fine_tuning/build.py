"""A suite made from a plan, in steps that a killed build need not do again."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3

from analysis.data_sources import download
from analysis.fine_tuning.base import (
    architecture_of,
    base_identity,
    copy_base,
    open_base,
)
from analysis.fine_tuning.examples import read_part
from analysis.fine_tuning.expert import ExpertBuilder
from analysis.fine_tuning.plan import BASE, SuitePlan
from analysis.fine_tuning.steps import RECORD, Steps
from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.dtypes import DTYPES
from merge_core.devices import AUTO, choose_device, current_device, use_device
from merge_core.errors import OutputError, SuiteError
from merge_core.files import check_output, digest_of, explain_os_error, lock_output
from merge_core.opening.draft import write_suite
from merge_core.progress import Progress
from merge_core.suites.data_files import data_identity, head_identity
from merge_core.suites.data_spec import HeadSpec
from merge_core.suites.suite import Suite, load_suite
from merge_core.suites.suite_spec import ArchitectureSpec, ExpertSpec, SuiteSpec

FILE = "suite.yaml"
UNITS = 100  # of progress, for each task


def build_suite(
    plan: SuitePlan,
    output: Path,
    *,
    overwrite: bool = False,
    fetch: bool = False,
    progress: Progress | None = None,
    report: Callable[[str], None] | None = None,
) -> Suite:
    """Make a suite's folder: base, heads, experts and ``suite.yaml``, which comes last.

    A build that was killed or refused goes on from its finished steps, also under a changed plan:
    steps are known by the content that they were made from. The files are the same then.

    Args:
        plan: with absolute paths.
        output: the folder; absent, empty, or of a build.
        overwrite: whether what another plan built there may be replaced.
        fetch: whether base and datasets may be downloaded.
        progress: told of examples and steps; cancels between two.
        report: told a sentence after each task.

    Raises:
        SuiteError: data, base or plan that cannot be used.
        CheckpointError: a base without readable weights.
        OutputError: the folder has other content, is being written, or cannot be.
        Cancelled: through `progress`.

    Source: heads that are frozen while the backbone is fine-tuned, Ilharco et al.,
    arXiv:2212.04089.

    Example:
        >>> from analysis.fine_tuning.plan import SuitePlan
        >>> data = {"kind": "text", "path": "/absent", "text_columns": ["text"]}
        >>> plan = SuitePlan(name="mine", base="/absent", tasks={"mood": {"data": data}})
        >>> build_suite(plan, Path("mine"))
        Traceback (most recent call last):
        merge_core.errors.CheckpointError: ...
    """
    device = current_device() if plan.device == AUTO else choose_device(plan.device)
    base = open_base(plan, fetch)
    spec = _suite_spec(plan, architecture_of(plan, base))
    target = output.resolve()
    if any(file.resolve().is_relative_to(target) for file in base.files):
        raise OutputError(f"The base lies in {output}, which is written. Choose another folder.")
    if not (target / RECORD).is_file():
        check_output(output)
    with ExitStack() as held:
        held.enter_context(use_device(device))
        try:
            target.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock_output(target, output))
        except OSError as error:
            raise explain_os_error(error, output) from error
        path, steps = target / FILE, Steps(target)
        # Before anything else: the tokenizer, by which data are read, lies in it.
        dtype = None if plan.dtype is None else DTYPES[plan.dtype].torch
        made_of = digest_of("base", base_identity(base), str(plan.dtype))
        _make_way(path, steps.is_done(BASE, made_of), overwrite)
        steps.do(BASE, made_of, [BASE], lambda: _copy_base(base, target / BASE, dtype))
        draft = Suite(_with_base_alone(spec), path)
        for task in draft.tasks:
            note = _check_data(draft, task, fetch, progress)
            if note is not None and report is not None:
                report(note)
        whole = _identity(plan, spec, draft, base)
        _make_way(path, steps.is_done("suite", whole), overwrite)
        builder = ExpertBuilder(plan, Suite(spec, path), draft, steps, device.torch)
        total = UNITS * len(draft.tasks)
        for number, task in enumerate(draft.tasks):
            sentence = builder.build(task, _part(progress, UNITS * number, total))
            if report is not None:
                report(sentence)
        steps.do("suite", whole, [FILE], lambda: _write_description(spec, path))
        steps.finish()
        _tidy(target)
        if progress is not None:
            progress.step(total, total, "done")
    return load_suite(path)


def _make_way(path: Path, same: bool, overwrite: bool) -> None:
    """Take away a finished suite's file before anything that it names is made anew.

    Raises:
        OutputError: it is of another plan, and must not be replaced.
    """
    if same or not path.exists():
        return
    if not overwrite:
        raise OutputError(
            f"{path.parent} holds a suite that this plan did not build, or that was changed since. "
            "Choose another folder, or --overwrite to replace it."
        )
    path.unlink()


def _suite_spec(plan: SuitePlan, architecture: ArchitectureSpec) -> SuiteSpec:
    """The suite that a plan makes; heads and experts in its folder, data where they are."""
    own = "" if plan.fine_tuning.method == "lora" else ".safetensors"
    experts = {}
    for name, task in plan.tasks.items():
        fitted = f"heads/{name}.safetensors"
        normalize = plan.probe.normalize
        head = task.head or (HeadSpec(file=fitted, normalize=True) if normalize else fitted)
        title = {} if task.title is None else {"title": task.title}
        experts[name] = ExpertSpec(
            weights=f"experts/{name}{own}", head=head, data=task.data, **title
        )
    return SuiteSpec(
        name=plan.name,
        description=plan.description or _describe(plan),
        architecture=architecture,
        base=BASE,
        experts=experts,
    )


def _describe(plan: SuitePlan) -> str:
    """What a plan does, in a sentence without places of this machine."""
    how = plan.fine_tuning
    kind = "LoRA" if how.method == "lora" else "full fine-tuning"
    return (
        f"{len(plan.tasks)} experts of one base under frozen heads: {kind}, {how.steps} steps of "
        f"{how.batch} examples at a learning rate of {how.rate:g}."
    )


def _with_base_alone(spec: SuiteSpec) -> SuiteSpec:
    """The same suite with its base for every expert: what is there before anything is trained."""
    experts = {
        task: each.model_copy(update={"weights": BASE}) for task, each in spec.experts.items()
    }
    return spec.model_copy(update={"experts": experts})


def _identity(plan: SuitePlan, spec: SuiteSpec, draft: Suite, base: Checkpoint) -> str:
    """Digest (hex) of all that a build's result is made from."""
    parts = [
        plan.model_dump_json(exclude={"base", "device", "tasks"}),
        spec.model_dump_json(),
        base_identity(base),
    ]
    for task, each in draft.spec.experts.items():
        assert each.data is not None
        parts.append(data_identity(each.data, draft.file, f"data of task {task!r}"))
        if (given := plan.tasks[task].head) is not None:
            parts.append(head_identity(given, draft.file, f"head of task {task!r}"))
    return digest_of(*parts)


def _check_data(draft: Suite, task: str, fetch: bool, progress: Progress | None) -> str | None:
    """Read all parts of a task's data before anything is trained.

    Returns:
        A note where some of what is measured on is trained on as well.

    Raises:
        SuiteError: one is missing or malformed, or has a class that the training part lacks.
    """
    data, what = draft.spec.experts[task].data, f"data of task {task!r}"
    assert data is not None
    if fetch:
        download(data, draft.file, what)
    quiet = None if progress is None else Progress(cancel=progress.cancel)
    train = read_part(draft, task, "train", None, quiet)
    seen, known = _digests(train.images), int(train.labels.max())
    shared = {}
    for part, name in (("val", "validation"), ("test", "test")):
        found = read_part(draft, task, part, None, quiet)  # type: ignore[arg-type]
        largest = int(found.labels.max())
        if largest > known:
            raise SuiteError(
                f"{what[0].upper()}{what[1:]}: class {largest} stands in the {name} part and not "
                "in the training part. Add examples of it, or leave the class out."
            )
        if twice := sum(digest in seen for digest in _digests(found.images, unique=False)):
            shared[name] = f"{twice} of {len(found.labels)} {name} examples"
    if not shared:
        return None
    return f"note: {task}: {' and '.join(shared.values())} stand in the training part, too"


def _digests(inputs: np.ndarray, unique: bool = True) -> Collection[bytes]:
    """What tells one input from another, for each of them."""
    found = [blake3(each.tobytes()).digest() for each in inputs]
    return set(found) if unique else found


def _copy_base(base: Checkpoint, folder: Path, dtype: torch.dtype | None) -> dict[str, object]:
    copy_base(base, folder, dtype)
    return {}


def _write_description(spec: SuiteSpec, path: Path) -> dict[str, object]:
    write_suite(spec, path, overwrite=True, command="suite build")
    return {}


def _part(progress: Progress | None, before: int, total: int) -> Progress:
    """Progress of one task, as a part of the whole."""
    if progress is None:
        return Progress()

    def show(done: int, _: int, label: str) -> None:
        progress.step(before + done, total, label)

    return Progress(show, progress.cancel)


def _tidy(folder: Path) -> None:
    """Delete temporary files that a killed build left, and give the others the usual rights.

    Nothing is touched but what builds write: weights are written privately.
    """
    mask = os.umask(0)
    os.umask(mask)
    for name in (BASE, "heads", "experts", FILE, RECORD):
        root = folder / name
        for path in (root, *root.rglob("*")):
            if path.name.startswith(".") and path.is_file():
                path.unlink()
            elif path.exists() and not path.is_symlink():
                path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
