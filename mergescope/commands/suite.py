"""``mergescope suite``: a suite.yaml from what there is (init), a suite from a plan (build)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merge_core.errors import SuiteError
from mergescope.computing import DeviceOption, computing
from mergescope.terminal import (
    console,
    print_above,
    print_table,
    progress_bar,
    progress_lines,
    size,
)

if TYPE_CHECKING:
    from rich.console import Console

    from merge_core.opening.roles import FoundModel
    from merge_core.suites.suite import Suite
    from merge_core.suites.suite_spec import SuiteSpec

suite_app = typer.Typer(
    name="suite",
    help="Suites: experts fine-tuned from one base.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
NO_BASE = "none"


@suite_app.callback()
def suite() -> None:
    """Suites: experts fine-tuned from one base."""


@suite_app.command()
def init(
    places: Annotated[
        list[str] | None,
        typer.Argument(help="Folders, weight files, adapter folders, hub ids (hf://org/name)."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="What the experts were fine-tuned from: a path, a hub id, or 'none'."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="An expert as name=path or name=hub id; may be repeated."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A published benchmark, such as clip-vit-b-32-8.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write; suite.yaml in the folder."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file if it exists.")
    ] = False,
) -> None:
    """Find models, say what fits, and write suite.yaml. Of weights only a sample is read."""
    from merge_core.input_files import resolve_path
    from merge_core.opening.draft import write_suite
    from merge_core.opening.roles import (
        apply_preset,
        draft_suite,
        open_by_headers,
        with_base,
        with_tasks,
    )
    from merge_core.opening.search import find_models

    named = _parse_pairs(task or [])
    wanted = list(places or [])
    out = console()
    path = _output(wanted, output)
    if path.exists() and not overwrite:
        raise SuiteError(
            f"{path} exists. Give another name with --output, or --overwrite to replace it."
        )
    if preset is not None:
        if wanted or named:
            raise SuiteError("--preset names its members itself: leave out paths, ids and --task.")
        spec = _spec_of_preset(preset, base)
        found = apply_preset(
            find_models(_members(spec), progress=progress_bar("asking the hub")), spec
        )
    else:
        further = [] if base in (None, NO_BASE) else [_reference(str(base))]
        found = find_models(
            [*wanted, *named.values(), *further] or ["."], progress=progress_bar("reading headers")
        )
        found = with_tasks(found, named)
        if base is not None:
            found = with_base(found, further[0] if further else None)
        _print_found(out, found)
        spec = draft_suite(found, resolve_path(path, SuiteError).parent.name or "suite")
    opened = open_by_headers(spec, path, found)
    if (network := opened.network_in_words) is not None:
        out.print(f"network: {network}")
    _print_fit(out, opened)
    write_suite(spec, path, overwrite)
    out.print(f"written: {path}")
    _print_next(out, path, found)


@suite_app.command()
@computing
def build(
    plan: Annotated[
        str, typer.Argument(help="A plan's file, or a plan that comes with MergeScope: sentences.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")],
    data: Annotated[
        Path | None, typer.Option(help="Where relative paths of data start; the plan's folder.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="In place of the plan's: a path, a hub id or package:NAME."),
    ] = None,
    device: DeviceOption = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a base or datasets of the hub if missing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what another plan built there.")
    ] = False,
) -> None:
    """Fit heads, fine-tune an expert for each task, and write a suite. A killed build goes on."""
    from analysis.fine_tuning.build import build_suite
    from analysis.fine_tuning.plan import load_plan

    build_suite(
        load_plan(plan, data, {"base": base, "device": device}),
        output,
        overwrite=overwrite,
        fetch=download,
        progress=progress_bar("building") or progress_lines(),
        report=print_above,
    )
    typer.echo(str(output / "suite.yaml"))


def _parse_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """``name=path`` pairs: reference by task."""
    from pydantic import TypeAdapter, ValidationError

    from merge_core.suites.suite_spec import TaskName

    named: dict[str, str] = {}
    for pair in pairs:
        name, equals, place = pair.partition("=")
        try:
            TypeAdapter(TaskName).validate_python(name)
        except ValidationError:
            equals = ""
        if not equals or not place or name in named:
            raise SuiteError(
                f"--task takes name=path, each name once and of letters, digits and . _ + -; "
                f"got {pair!r}."
            )
        named[name] = _reference(place)
    return named


def _reference(place: str) -> str:
    """A path made absolute; a hub id as it is."""
    from merge_core.files import path_below
    from merge_core.hub.files import is_hub_id

    return place if is_hub_id(place) else str(path_below(Path(), place, SuiteError))


def _output(places: Sequence[str], output: Path | None) -> Path:
    """Where the suite is written: in the one folder that is named, else here."""
    if output is not None:
        return output / "suite.yaml" if output.is_dir() else output
    from merge_core.hub.files import is_hub_id
    from merge_core.input_files import expand_path

    named = len(places) == 1 and not is_hub_id(places[0])
    only = expand_path(places[0], SuiteError) if named else Path()
    return (only if only.is_dir() else Path()) / "suite.yaml"


def _spec_of_preset(name: str, base: str | None) -> SuiteSpec:
    from merge_core.opening.presets import preset_spec

    spec = preset_spec(name)
    if base is None:
        return spec
    return spec.model_copy(update={"base": None if base == NO_BASE else _reference(base)})


def _members(spec: SuiteSpec) -> list[str]:
    """The references of a suite's base and experts."""
    return [*([spec.base] if spec.base else []), *(e.weights for e in spec.experts.values())]


def _print_found(out: Console, found: Sequence[FoundModel]) -> None:
    print_table(
        out,
        "Found",
        ["task", "role", "model", "size", "note"],
        [
            [
                each.task if each.role == "expert" else "",
                each.role,
                each.shown,
                size(each.nbytes) if each.nbytes else "",
                each.note,
            ]
            for each in found
        ],
    )


def _print_fit(out: Console, suite: Suite) -> None:
    from merge_core.compatibility.compare import compare_companions
    from merge_core.compatibility.kinship import measure_kinship
    from merge_core.suites.preflight import preflight
    from mergescope.compatibility_report import print_findings, print_kinships
    from mergescope.preflight_report import print_preflight

    report, findings = preflight(suite), compare_companions(suite)
    refused = bool(report.blocking) or any(finding.level == "refused" for finding in findings)
    if report.plan:
        members = [*suite.tasks, *([] if suite.spec.base is None else ["base"])]
        fits = [report.fit(member) for member in members]
        print_table(
            out,
            "What fits",
            ["member", "fits", "differences"],
            [[fit.member, "yes" if fit.fits else "no", fit.differences] for fit in fits],
        )
        print_preflight(out, report)
    else:
        reason = next((d.detail for d in report.blocking), "nothing is common to all")
        out.print(f"what fits is not known yet: {reason}")
    print_findings(out, findings)
    if not report.blocking:
        print_kinships(out, measure_kinship(suite))
    if refused and report.plan:
        typer.echo(
            "note: not all of these can be merged as they are. Correct their roles with --base and "
            "--task, or take members out of the file.",
            err=True,
        )


def _print_next(out: Console, path: Path, found: Sequence[FoundModel]) -> None:
    place = shlex.quote(str(path))
    if fetch := sum(each.download for each in found):
        out.print(f"next: mergescope download {place}  ({size(fetch)})")
    out.print(f"next: mergescope inspect {place}")
    out.print(f"next: mergescope app {place}")
