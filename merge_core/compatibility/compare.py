"""Whether the members of a suite are one network, by the files beside their weights.

Weights of equal shapes need not belong to one network: another angle of rotary positions, another
activation, another number of heads or another order of the vocabulary makes other functions of
the same tensors. No weight is read for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge_core.checkpoints.lora import AdaptedCheckpoint
from merge_core.compatibility.companions import Companions, companions_of
from merge_core.compatibility.configs import compare_configs, compare_generation
from merge_core.compatibility.findings import BASE, Finding, sort_findings, tell_values
from merge_core.compatibility.tokens import compare_settings, compare_templates
from merge_core.compatibility.vocabularies import compare_vocabularies
from merge_core.errors import CheckpointError, SuiteError
from merge_core.suites.suite import Suite


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
        >>> compare_companions(load_suite("demo"))
        ()
    """
    chosen = suite.select(tasks)
    members, adapters = _collect(suite, chosen)
    whole = {member: files for member, files in members.items() if member not in adapters}
    kept = bool(suite.manifest(chosen).kept) if suite.spec.vocabulary == "base" else False
    return sort_findings(
        [
            *compare_configs(whole),
            *compare_generation(whole),
            *compare_vocabularies(members, kept),
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
        >>> refuse_incompatible(load_suite("demo"), ["digits", "dots"])
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


def _collect(
    suite: Suite, tasks: Sequence[str]
) -> tuple[dict[str, Companions], dict[str, AdaptedCheckpoint]]:
    """The files of all members that can be read, and which of them are adapters."""
    members: dict[str, Companions] = {}
    adapters: dict[str, AdaptedCheckpoint] = {}
    for task in (BASE, *tasks):
        try:
            member = suite.base if task == BASE else suite.expert(task)
        except CheckpointError:  # said by the pre-flight
            continue
        files = None if member is None else companions_of(member)
        if files is not None:
            members[task] = files
        if isinstance(member, AdaptedCheckpoint):
            adapters[task] = member
    return members, adapters


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
