"""What is asked of a suite's weights alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import pandas as pd

from analysis.frames.asking import ask, ask_if_known
from analysis.frames.entries import Frames, Question, frame_question
from analysis.frames.usual import SHARES
from analysis.rank_selection.per_layer import ranks_per_layer
from analysis.rank_selection.space import SearchSpace
from analysis.rank_selection.weight_proxies import proxy_curves, recommend_from_weights
from analysis.spectral.build_up import build_up_shown
from analysis.spectral.centring import centring_frame
from analysis.spectral.interference import (
    Side,
    cosine_similarity,
    interference_over_rank,
    mean_angles,
    mean_over_layers,
    principal_angles,
    sign_conflict,
)
from analysis.spectral.overlap_maps import average_pairs, mean_overlap_pairs, overlap_pairs
from analysis.spectral.spectra import Part, cuts, spectral_summary, spectrum
from merge_core.factors.low_rank import count_directions
from merge_core.factors.store import FactorStore
from merge_core.files import digest_of
from merge_core.merging.recipe import Recipe
from merge_core.suites.suite import Suite
from merge_core.task_vectors import Origin, TensorGroup, TensorGroups

SPECTRUM = frame_question("spectral.spectrum", 1, "the spectrum")
CUTS = frame_question("spectral.cuts", 1, "the bounds of noise")
SUMMARY = frame_question("spectral.summary", 1, "the map of all layers")
COSINES = frame_question("spectral.cosines", 1, "the cosines of task vectors")
PAIRS = frame_question("spectral.pairs", 1, "the overlap of each pair")
OVER_RANK = frame_question("spectral.over_rank", 1, "interference over the rank")
CENTRING = frame_question("spectral.centring", 1, "what centring does to each layer")
ANGLES = frame_question("spectral.angles", 1, "the principal angles")
SIGNS = frame_question("spectral.signs", 1, "the clashes of signs")
BUILD_UP = frame_question("spectral.build_up", 1, "the picture of a matrix")
PROXIES = frame_question("rank.proxy_curves", 1, "the rules over the rank")
PICKS = frame_question("rank.weight_picks", 1, "what every rule picks")
PER_LAYER = frame_question("rank.per_layer", 2, "the ranks of each layer")
QUESTIONS: tuple[Question[pd.DataFrame], ...] = (
    *(
        SPECTRUM,
        CUTS,
        SUMMARY,
        COSINES,
        PAIRS,
        OVER_RANK,
        CENTRING,
        ANGLES,
        SIGNS,
        BUILD_UP,
        PROXIES,
        PICKS,
        PER_LAYER,
    ),
)


def members_inputs(suite: Suite, tasks: Sequence[str]) -> str:
    """Digest (hex) of all of a suite that frames about its weights depend on.

    That is the content of the chosen experts and of the base, their names (which stand in
    frames), the names, shapes and roles of the merged parameters, and the suite's rules for them.

    Args:
        suite: the suite.
        tasks: chosen tasks, in the suite's order.

    Example:
        >>> suite = load_suite("vision")
        >>> members_inputs(suite, ["digits", "dots"]) == members_inputs(suite, ["dots"])
        False
    """
    spec, manifest = suite.spec, suite.manifest(tuple(tasks))
    rules = [spec.decompose, spec.average, spec.vocabulary]
    parameters = {
        name: [list(info.shape), info.dtype.name, suite.treatment(name, tasks).decomposed]
        for name, info in manifest.infos.items()
    }
    return digest_of(
        "members-1",
        suite.members_digest(tasks, with_base=True),
        json.dumps([list(tasks), rules, parameters]),
    )


def method_arguments(recipe: Recipe) -> dict[str, Any]:
    """A method at its setting as arguments of a question, its revision included.

    Example:
        >>> method_arguments(make_recipe({"method": "task_arithmetic"}))["parameters"]
        {'scale': ...}
    """
    named = recipe.model_dump(mode="json", exclude={"suite", "tasks", "inputs"})
    found = {name: value for name, value in named.items() if value or name == "method"}
    origin = recipe.run(()).origin
    if (revision := recipe.declaration.revisions.get(origin)) is not None:
        found["revision"] = revision
    return found


def space_arguments(space: SearchSpace) -> dict[str, Any]:
    """The settings of a search as arguments of a question.

    Example:
        >>> from analysis.rank_selection.space import search_space
        >>> space_arguments(search_space("ties", "vision", scales=[0.5]))["scales"]
        [0.5]
    """
    ranks, scales = list(space.ranks), list(space.scales)
    return {**method_arguments(space.base), "ranks": ranks, "scales": scales}


class WeightFrames:
    """Frames about the weights of a suite's chosen tasks, read where they are kept.

    Args:
        suite: the suite, or what a record says of one.
        tasks: chosen tasks, in the suite's order.
        frames: where frames are kept.
        factors: where factors are kept, for what has to be computed.
        hold: keep what was read of a layer for the next question, where many about one follow.
    """

    def __init__(
        self,
        suite: Suite,
        tasks: Sequence[str],
        frames: Frames,
        factors: FactorStore,
        hold: bool = False,
    ) -> None:
        self.suite = suite
        self.tasks = tuple(tasks)
        self.frames = frames
        self._factors = factors
        self._hold = hold
        self._held: TensorGroup | None = None

    @cached_property
    def inputs(self) -> str:
        """Digest of what all of these frames depend on."""
        return members_inputs(self.suite, self.tasks)

    def spectrum(self, layer: str, origin: Origin, part: Part = "whole") -> pd.DataFrame:
        """See :func:`analysis.spectral.spectra.spectrum`."""
        named = {"layer": layer, "origin": origin, "part": part}
        return self._ask(SPECTRUM, named, lambda: spectrum(self._group(layer), origin, part))

    def cuts(self, layer: str, origin: Origin, part: Part = "whole") -> pd.DataFrame:
        """See :func:`analysis.spectral.spectra.cuts`."""
        named = {"layer": layer, "origin": origin, "part": part}
        return self._ask(CUTS, named, lambda: cuts(self._group(layer), origin, part))

    def summary(self, origin: Origin, apart: bool = False) -> pd.DataFrame:
        """See :func:`analysis.spectral.spectra.spectral_summary`."""
        named = {"origin": origin, "apart": apart}
        return self._ask(
            SUMMARY, named, lambda: spectral_summary(self._groups(), origin, apart=apart)
        )

    def cosines(self, layer: str | None, origin: Origin) -> pd.DataFrame:
        """See :func:`analysis.spectral.interference.cosine_similarity` (all layers for None)."""
        named = {"layer": layer, "origin": origin}
        return self._ask(COSINES, named, lambda: cosine_similarity(self._groups(), origin, layer))

    def pairs(
        self, layer: str | None, origin: Origin, share: float, side: Side = "row"
    ) -> pd.DataFrame:
        """Overlap of each pair at one rank, in one layer, or as a mean over all (None)."""

        def named(layer: str | None) -> dict[str, Any]:
            return {"layer": layer, "origin": origin, "share": share, "side": side}

        def compute() -> pd.DataFrame:
            if layer is not None:
                group = self._group(layer)
                if self._hold:
                    group.directions(origin)  # all of them: every rank takes the first of these
                return overlap_pairs(group, origin, self.directions(layer, share), side)
            if known := self._known_layers(PAIRS, named):
                return average_pairs(known)
            return mean_overlap_pairs(self._groups(), origin, share, side)

        return self._ask(PAIRS, named(layer), compute)

    def over_rank(self, layer: str | None, origin: Origin, side: Side = "row") -> pd.DataFrame:
        """I(k), R(k) and overlap over the offered ranks, of a layer or a mean over all (None)."""

        def named(layer: str | None) -> dict[str, Any]:
            return {"layer": layer, "origin": origin, "side": side, "shares": list(SHARES)}

        def compute() -> pd.DataFrame:
            if layer is not None:
                return interference_over_rank(self._group(layer), origin, SHARES, side)
            if known := self._known_layers(OVER_RANK, named):
                return mean_over_layers(pd.concat(known, ignore_index=True))
            return mean_over_layers(interference_over_rank(self._groups(), origin, SHARES, side))

        return self._ask(OVER_RANK, named(layer), compute)

    def centring(self, share: float, side: Side = "row", layer: str | None = None) -> pd.DataFrame:
        """See :func:`analysis.spectral.centring.centring_frame`: a row a layer, or one."""

        def named(layer: str | None) -> dict[str, Any]:
            return {"layer": layer, "share": share, "side": side}

        def compute() -> pd.DataFrame:
            if layer is not None:
                return centring_frame(self._group(layer), share, side)
            if known := self._known_layers(CENTRING, named):
                return pd.concat(known, ignore_index=True)
            return centring_frame(self._groups(), share, side)

        return self._ask(CENTRING, named(layer), compute)

    def angles(self, layer: str, origin: Origin, k: int, side: Side = "row") -> pd.DataFrame:
        """Mean principal angle of each pair in one layer, of k directions."""
        named = {"layer": layer, "origin": origin, "k": k, "side": side}
        return self._ask(
            ANGLES,
            named,
            lambda: mean_angles(principal_angles(self._group(layer), origin, k, side)),
        )

    def signs(self) -> pd.DataFrame:
        """Sign conflict of every weight matrix about the base."""

        def compute() -> pd.DataFrame:
            frame = sign_conflict(self._groups(), "base")
            return frame[frame["parameter"].isin(self.suite.matrices)].reset_index(drop=True)

        return self._ask(SIGNS, {}, compute)

    def build_up(self, task: str) -> pd.DataFrame:
        """See :func:`analysis.spectral.build_up.build_up_shown`."""
        return self._ask(BUILD_UP, {"task": task}, lambda: build_up_shown(self._groups(), task))

    def proxy_curves(self, space: SearchSpace) -> pd.DataFrame:
        """See :func:`analysis.rank_selection.weight_proxies.proxy_curves`."""
        return self._ask(
            PROXIES, space_arguments(space), lambda: proxy_curves(self._groups(), space)
        )

    def weight_picks(self, space: SearchSpace) -> pd.DataFrame:
        """See :func:`analysis.rank_selection.weight_proxies.recommend_from_weights`."""
        return self._ask(
            PICKS, space_arguments(space), lambda: recommend_from_weights(self._groups(), space)
        )

    def ranks_per_layer(self, space: SearchSpace, share: float) -> pd.DataFrame:
        """See :func:`analysis.rank_selection.per_layer.ranks_per_layer`."""
        named = {**space_arguments(space), "share": share}
        return self._ask(PER_LAYER, named, lambda: ranks_per_layer(self._groups(), space, share))

    def directions(self, layer: str, share: float) -> int:
        """How many directions of a matrix a share of them is."""
        shape = self.suite.manifest(self.tasks).infos[layer].matrix_shape
        return count_directions(share, min(shape))

    def _ask(
        self,
        question: Question[pd.DataFrame],
        arguments: Mapping[str, Any],
        compute: Callable[[], pd.DataFrame],
    ) -> pd.DataFrame:
        return ask(self.frames, question, self.inputs, arguments, compute)

    def _known_layers(
        self, question: Question[pd.DataFrame], named: Callable[[str], Mapping[str, Any]]
    ) -> list[pd.DataFrame]:
        """The answers for every layer, where all of them are kept; else none."""
        found = []
        for layer in self.suite.matrices:
            arguments = named(layer)
            known = ask_if_known(self.frames, question, self.inputs, arguments, lambda: None)
            if known is None:
                return []
            found.append(known)
        return found

    def _group(self, layer: str) -> TensorGroup:
        if self._held is not None and self._held.name == layer:
            return self._held
        group = TensorGroup(self.suite, self.tasks, layer, self._factors)
        if self._hold:
            self._held = group
        return group

    def _groups(self) -> TensorGroups:
        return TensorGroups(self.suite, self.tasks, self._factors)
