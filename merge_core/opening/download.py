"""What a suite names on the hub: what is missing here, its headers, and its download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.hub.files import HubId, is_hub_id
from merge_core.hub.headers import read_headers
from merge_core.hub.models import HubModel, describe, fetch, find_cached
from merge_core.progress import Progress
from merge_core.suites.suite import Suite
from merge_core.suites.suite_spec import SuiteSpec


class SuiteByHeaders(Suite):
    """A suite of which some members are known by their headers alone.

    Args:
        spec: the suite.
        path: where its file lies, or will lie.
        known: those members by the reference that the suite gives them; others are opened.
    """

    def __init__(self, spec: SuiteSpec, path: Path, known: Mapping[str, Checkpoint]) -> None:
        super().__init__(spec, path)
        self._known = known

    def _is_adapter(self, relative: str) -> bool:
        return relative not in self._known and super()._is_adapter(relative)

    def _open(self, relative: str, what: str) -> Checkpoint:
        known = self._known.get(relative)
        return super()._open(relative, what) if known is None else known


def hub_members(suite: Suite) -> list[str]:
    """What a suite names on the hub, the base first: weights, heads, towers and tokenizers."""
    named = [suite.spec.base, *(f for expert in suite.spec.experts.values() for f in expert.files)]
    return list(dict.fromkeys(name for name in named if name is not None and is_hub_id(name)))


def missing_members(suite: Suite) -> list[str]:
    """What a suite names on the hub and the cache has not, the base first.

    Raises:
        HubError: a name on the hub is malformed.
    """
    return [name for name in hub_members(suite) if find_cached(name) is None]


def download(suite: Suite, progress: Progress | None = None) -> None:
    """Download what a suite names on the hub and the cache has not.

    Args:
        suite: the suite.
        progress: reports megabytes; cancels within a file.

    Raises:
        HubError, OutputError, Cancelled: as :func:`merge_core.hub.models.find_or_fetch`.
    """
    fetch([describe(name) for name in missing_members(suite)], progress)


def with_headers_only(
    suite: Suite, models: Sequence[HubModel], progress: Progress | None = None
) -> Suite:
    """The suite, with the headers alone of members that are on the hub and not downloaded.

    Args:
        suite: the suite.
        models: what is not downloaded, as :func:`merge_core.hub.models.describe` found it.
        progress: reports each file; cancels between two.

    Raises:
        HubError: a member opens only whole (an adapter, a pickle); no access, no network.
        Cancelled: `progress` was cancelled.
    """
    weights = [suite.spec.base, *(expert.weights for expert in suite.spec.experts.values())]
    named = {name: HubId.parse(name) for name in weights if name is not None and is_hub_id(name)}
    known: dict[str, Checkpoint] = {}
    for model in models:
        names = [name for name, asked in named.items() if asked == model.asked]
        if names:  # else a tower or a tokenizer
            known |= dict.fromkeys(names, read_headers(model, progress))
    return SuiteByHeaders(suite.spec, suite.path, known) if known else suite
