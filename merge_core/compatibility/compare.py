"""Whether the members of a suite are one network, by the files beside their weights.

Weights of equal shapes need not belong to one network: another angle of rotary positions, another
activation, another number of heads or another order of the vocabulary makes other functions of
the same tensors. No weight is read for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from merge_core.checkpoints.lora import AdaptedCheckpoint
from merge_core.compatibility.companions import VOCABULARY_FILES, Companions, companions_of
from merge_core.compatibility.configs import (
    CONFIG_FILES,
    GENERATION,
    compare_configs,
    compare_generation,
)
from merge_core.compatibility.findings import BASE, Finding, sort_findings, tell_values
from merge_core.compatibility.tokens import (
    SETTINGS,
    TEMPLATE_FILES,
    compare_settings,
    compare_templates,
)
from merge_core.compatibility.vocabularies import compare_vocabularies
from merge_core.errors import CheckpointError, MergeScopeError, SuiteError
from merge_core.suites.suite import Suite

COMPARED = (*CONFIG_FILES, GENERATION, *VOCABULARY_FILES, *SETTINGS, *TEMPLATE_FILES[:2])


def compare_companions(suite: Suite, tasks: Sequence[str] | None = None) -> tuple[Finding, ...]:
    """What differs between the files beside the members' weights, by level.

    Members whose weights cannot be read, or have no such files, say nothing. The order of the
    experts does not count.

    Args:
        suite: the suite.
        tasks: chosen experts (all when None).

    Raises:
        SuiteError: unknown tasks.

    Example:
        >>> compare_companions(load_suite("vision"))
        ()
    """
    chosen = suite.select(tasks)
    members, adapters = collect_companions(suite, chosen), _collect_adapters(suite, chosen)
    whole = {member: files for member, files in members.items() if member not in adapters}
    return sort_findings(
        [
            *compare_configs(whole),
            *compare_generation(whole),
            *compare_vocabularies(members, _keeps_embeddings(suite, chosen)),
            *compare_settings(members),
            *compare_templates(members),
            *_compare_bases(adapters),
        ]
    )


def refuse_incompatible(suite: Suite, tasks: Sequence[str] | None = None) -> tuple[Finding, ...]:
    """Refuse members that are not one network; else what differs.

    Args:
        suite: the suite.
        tasks: chosen experts (all when None).

    Raises:
        SuiteError: the same weights mean something else in some members.

    Example:
        >>> refuse_incompatible(load_suite("vision"), ["digits", "dots"])
        ()
    """
    found = compare_companions(suite, tasks)
    refused = [finding for finding in found if finding.level == "refused"]
    if refused:
        more = f" ({len(refused) - 1} more such differences)" if len(refused) > 1 else ""
        raise SuiteError(
            f"The members are not one network: {refused[0].sentence}{more}. Take members of one "
            "kind; where a file is wrong, correct it beside the weights. 'mergescope inspect' "
            "shows every difference."
        )
    return found


def collect_companions(suite: Suite, tasks: Sequence[str]) -> dict[str, Companions]:
    """The files beside the weights of all members that can be read, by task or ``base``.

    Example:
        >>> list(collect_companions(load_suite("vision"), ["dots"]))
        ['base', 'dots']
    """
    members: dict[str, Companions] = {}
    for task in (BASE, *tasks):
        with suppress(CheckpointError):  # said by the pre-flight
            member = suite.base if task == BASE else suite.expert(task)
            files = None if member is None else companions_of(member)
            if files is not None:
                members[task] = files
    return members


def _keeps_embeddings(suite: Suite, tasks: Sequence[str]) -> bool:
    """Whether the output has the base's embeddings as they are (``vocabulary: base``)."""
    if suite.spec.vocabulary != "base":
        return False
    try:
        return bool(suite.manifest(tasks).kept)
    except MergeScopeError:  # members that cannot be read, or do not fit: said by the pre-flight
        return False


def _collect_adapters(suite: Suite, tasks: Sequence[str]) -> dict[str, AdaptedCheckpoint]:
    """The experts that are adapters."""
    adapters = {}
    for task in tasks:
        with suppress(CheckpointError):
            expert = suite.expert(task)
            if isinstance(expert, AdaptedCheckpoint):
                adapters[task] = expert
    return adapters


def _compare_bases(adapters: Mapping[str, AdaptedCheckpoint]) -> list[Finding]:
    """Whether adapters name one base: its name without owner and folders."""
    named = {
        task: adapter.config.base_model_name_or_path.rstrip("/")
        for task, adapter in adapters.items()
    }
    named = {task: name for task, name in named.items() if name}
    if len({name.rpartition("/")[2].lower() for name in named.values()}) < 2:
        return []
    meaning = "adapters of other bases may not fit this one"
    return [
        Finding(
            "warned", "adapter_config.json", "base_model_name_or_path", tell_values(named), meaning
        )
    ]
