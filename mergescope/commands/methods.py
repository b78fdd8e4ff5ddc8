"""``mergescope methods``: what every merge method declares of itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from mergescope.terminal import console, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from merge_core.methods.declaration import Method, ParameterSpec, Postprocessor


def list_methods(
    name: Annotated[
        str | None, typer.Argument(help="A method or post-processor to show in full.")
    ] = None,
) -> None:
    """All merge methods and what each needs, or one with formula, source and parameters."""
    from merge_core.methods import get_method, postprocessors

    out = console()
    if name is None:
        _overview(out)
    elif name in postprocessors():
        _show(out, postprocessors()[name], [("use", "a step of a recipe's 'then'")])
    else:
        method = get_method(name)
        _show(out, method, _properties(method))


def _overview(out: Console) -> None:
    from merge_core.methods import methods, postprocessors

    # Two tables, so that each fits a narrow terminal.
    print_table(
        out,
        "Methods",
        ["name", "title", "source"],
        [[each.name, each.title, each.source] for each in methods().values()],
    )
    print_table(
        out,
        "What they need besides the experts' weights, and do",
        ["name", "needs", "random", "origins", "leaves averaged"],
        [
            [
                each.name,
                _needs(each),
                each.draws,
                ", ".join(each.origins),
                each.averaged,
            ]
            for each in methods().values()
        ],
    )
    print_table(
        out,
        "Post-processors of a merged update",
        ["name", "title", "source"],
        [[each.name, each.title, each.source] for each in postprocessors().values()],
    )


def _needs(method: Method) -> str:
    return ", ".join(method.needs) or "nothing else"


def _properties(method: Method) -> list[tuple[str, str]]:
    """Properties that methods have and post-processors have not."""
    origins = ", ".join(method.origins) or "none (it takes no task vectors)"
    return [
        ("needs", _needs(method)),
        ("experts", "any number" if method.tasks is None else str(method.tasks)),
        ("origins", origins),
        ("task weights", "yes" if method.weighted else "no"),
        ("random", f"yes: {method.draws}, by the recipe's seed" if method.draws else "no"),
        ("averaged", method.averaged),
    ]


def _show(out: Console, entry: Method | Postprocessor, properties: list[tuple[str, str]]) -> None:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in [
        ("summary", entry.summary),
        ("formula", entry.formula),
        ("source", entry.source),
        *properties,
        ("deviations", entry.deviations),
    ]:
        grid.add_row(label, text)
    out.print(f"{entry.title} ({entry.name})")
    out.print(grid)
    limits = entry.parameters.model_json_schema().get("properties", {})
    print_table(
        out,
        "Parameters",
        ["name", "default", "range", "typical", "help"],
        [
            [spec.name, str(spec.default), _range(spec, limits[spec.name]), spec.typical, spec.help]
            for spec in entry.specs
        ],
    )


def _range(spec: ParameterSpec, limits: dict[str, float]) -> str:
    """The values that a parameter may take, in words."""
    if spec.kind == "choice":
        return " or ".join(spec.choices)
    if spec.kind == "rank":
        return "a share in (0, 1], or directions: 1, 2, ..."
    low, high = limits.get("minimum", -math.inf), limits.get("maximum", math.inf)
    return f"{low:g} to {high:g}"
