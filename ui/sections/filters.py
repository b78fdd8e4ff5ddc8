"""The part of "Patterns in weights" about deeper networks: filters, norms, positions and heads."""

from __future__ import annotations

import math

import streamlit as st
from torch import Tensor

from analysis.figures.pictures import patterns as figures
from analysis.patterns import filters as patterns
from analysis.patterns.images import Normalisation
from ui import charts, shell
from ui.controls import choice, selectbox
from ui.sections.pictured import AVERAGE, Source, open_source, pictured_tensors, source_names

NORMALISATIONS: dict[Normalisation, str] = {
    "symmetric": "Symmetric (grey is zero)",
    "joint": "Min-max (as in the paper)",
}

PER_ROW, SHOWN, TILE = 6, 24, 54
FILTERS = ("kernels", "patch_embedding")  # views of pictures

EXPLAINED = {
    "kernels": charts.HowToRead(
        "Each tile is one filter of the first convolution, its channels drawn as colours. Filters "
        "of one start stay alike under fine-tuning: the difference shows what changed. "
        "Principal components say which patterns the filters are mixtures of.",
        r"W_{o} = \sum_j a_{oj}\, v_j + \bar W",
    ),
    "patch_embedding": charts.HowToRead(
        "Each tile is one filter by which a vision transformer reads a patch; the components "
        "below are ordered by the share of the filters' variance that they explain.",
        r"z_{p} = E\, x_p + b,\qquad E = \sum_j \sigma_j u_j v_j^\top",
    ),
    "norms": charts.HowToRead(
        "Each row is a layer, its filters sorted by their root mean square weight.",
        r"\|W_o\| / \sqrt{\text{number of weights}}",
    ),
    "positions": charts.HowToRead(
        "Each small map belongs to one position of the image and shows the cosine of its learned "
        "embedding with those of all positions.",
        r"\cos(p_i, p_j)",
    ),
}
HEADS_EXPLAINED = charts.HowToRead(
    "Head h lets token x attend to token y by x B_h yᵀ (before biases and softmax). A symmetric "
    "B_h matches tokens that are alike; the part that is antisymmetric matches in one direction "
    "only. For a difference of two models, the form shown is that of the differing query and key "
    "weights, not the difference of the forms.",
    r"B_h = W_{Q,h}^\top W_{K,h} / \sqrt d",
)


@shell.fragment
def filters_section() -> None:
    """First filters, norms, positions and heads of two models and of their difference."""
    st.subheader("What do deeper networks hold in their first layers?", anchor=False)
    sources = source_names()
    left, middle, right = st.columns(3)
    with left:
        label = selectbox("Models of", sources, "source")
    source = open_source(sources[label])
    place = list(sources).index(label)
    with middle:
        first = selectbox("Model", source.models, f"shown_{place}", rest=source.models[1])
    with right:
        second = selectbox(
            "Compared with",
            source.models,
            f"compared_{place}",
            rest=AVERAGE,
        )
    one = pictured_tensors(source.key, first, source)
    two = pictured_tensors(source.key, second, source)
    shown = {first: one, second: two, f"{first} − {second}": patterns.difference(one, two)}
    if first == second:
        shown = {first: one}
    views = patterns.available_views(one)
    if not views:
        st.info("These models have no kernels, patch embedding, positions or attention.")
        return
    titles = {view: patterns.VIEWS[view].capitalize() for view in views}
    view = choice("Look at", titles, "view")
    if view == "heads":
        draw_heads(source, shown)
        return
    if view in FILTERS:
        levels = choice("Grey levels of filters", NORMALISATIONS, "filter_levels")
        drawn = [chart_filters(view, name, each, levels) for name, each in shown.items()]
        drawn += [chart_components(name, each, levels) for name, each in shown.items()]
    else:
        chart = chart_norms if view == "norms" else chart_positions
        drawn = [chart(name, weights) for name, weights in shown.items()]
    charts.panel(*drawn, key="deeper", columns=st.columns(len(shown)), how_to_read=EXPLAINED[view])


def chart_filters(
    view: str, name: str, weights: dict[str, Tensor], levels: Normalisation
) -> charts.Chart:
    """The first filters of a model."""
    filters = patterns.first_kernels(weights).filters
    grid = charts.drawn(
        figures.kernel_grid, filters, title=name, kind=levels, columns=PER_ROW, most=SHOWN
    )
    rows = math.ceil(min(len(filters), SHOWN) / PER_ROW)
    return charts.Chart(
        grid, key=f"{view}_{name}", alt=f"First filters of {name}", height=fit_height(grid, rows)
    )


def chart_components(name: str, weights: dict[str, Tensor], levels: Normalisation) -> charts.Chart:
    """What the first filters of a model are mixtures of."""
    grid = charts.drawn(
        figures.components_grid,
        patterns.filter_components(patterns.first_kernels(weights).filters),
        title=f"{name}: components",
        kind=levels,
        columns=PER_ROW,
        most=2 * PER_ROW,
    )
    return charts.Chart(
        grid,
        key=f"components_{name}",
        alt=f"Principal components of the first filters of {name}",
        height=fit_height(grid, 2.6),
    )


def chart_norms(name: str, weights: dict[str, Tensor]) -> charts.Chart:
    """The norms of a model's filters, layer by layer."""
    frame = patterns.kernel_norms(weights)
    return charts.Chart(
        charts.drawn(figures.kernel_norm_map, frame, title=name),
        key=f"norms_{name}",
        alt=f"Norms of {name}",
        numbers=charts.Numbers(frame, f"kernel_norms_{name}"),
    )


def chart_positions(name: str, weights: dict[str, Tensor]) -> charts.Chart:
    """How alike a model's position embeddings are."""
    similar = patterns.position_similarity(patterns.position_embedding(weights))
    return charts.Chart(
        charts.drawn(figures.position_grid, similar, title=name),
        key=f"positions_{name}",
        alt=f"Similar positions of {name}",
    )


def fit_height(figure: charts.Drawn, rows: float) -> int:
    """The height at which rows of tiles fill a third of a wide page, or a phone's width."""
    return round(figure.spec["layout"]["margin"]["t"] + 24 + TILE * rows)


def draw_heads(source: Source, shown: dict[str, dict[str, Tensor]]) -> None:
    """The bilinear form of each head of a layer."""
    heads = source.heads()
    if heads is None:
        st.info(
            "The weights alone do not tell the number of attention heads. Add 'architecture:' to "
            "suite.yaml."
        )
        return
    every = [set(patterns.attention_layers(weights)) for weights in shown.values()]
    # A base may hold more than its experts: a whole CLIP has a text half too.
    common = set.intersection(*every)
    own = patterns.attention_layers(next(iter(shown.values())))
    layers = [name for name in own if name in common]
    if not layers:
        st.info("These two models share no attention layer. Compare other models.")
        return
    layer = selectbox("Attention layer", layers, "attention")
    charts.panel(
        *(
            charts.Chart(
                charts.drawn(
                    figures.head_maps, patterns.query_key(weights, layer, heads), title=name
                ),
                key=f"heads_{name}",
                alt=f"Heads of {name}",
            )
            for name, weights in shown.items()
        ),
        *(chart_spectrum(name, weights, layer, heads) for name, weights in shown.items()),
        key="heads",
        columns=st.columns(len(shown)),
        how_to_read=HEADS_EXPLAINED,
    )


def chart_spectrum(name: str, weights: dict[str, Tensor], layer: str, heads: int) -> charts.Chart:
    """The singular values of the heads of a layer."""
    frame = patterns.head_spectrum(weights, layer, heads)
    return charts.Chart(
        charts.drawn(figures.head_spectrum, frame, title=f"{name}: singular values"),
        key=f"spectrum_{name}",
        alt=f"Singular values of the heads of {name}",
        numbers=charts.Numbers(frame, f"heads_{name}"),
    )
