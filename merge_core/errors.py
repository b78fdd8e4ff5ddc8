"""Errors that a user can act on: every message names the file or field and says what to do."""

from __future__ import annotations

from pydantic import ValidationError

SHOWN_FAULTS = 8


class MergeScopeError(Exception):
    """A user's mistake or an unusable input; the message is one clear sentence or two."""


class CheckpointError(MergeScopeError):
    """A weight file is missing, damaged, of another format, or holds non-finite values."""


class HubError(CheckpointError):
    """A name on the hub is wrong, or what it names is not there, not allowed or not downloaded."""


class SuiteError(MergeScopeError):
    """suite.yaml is wrong, or its members do not fit together."""


class PoolError(MergeScopeError):
    """pool.yaml is wrong, or its members do not fit together."""


class RecipeError(MergeScopeError):
    """A recipe names something unknown or gives a parameter outside its range."""


class OutputError(MergeScopeError):
    """The result could not be written; nothing half-written is left behind."""


class ExecutorError(MergeScopeError):
    """Work cannot be spread as asked: an unknown executor, no cluster, or workers that die."""


class DeviceError(MergeScopeError):
    """A device is asked for that has another name, or is not there."""


class Cancelled(MergeScopeError):  # noqa: N818 - a state rather than a fault
    """The work was cancelled by the user; nothing was written."""


def explain_validation(error: ValidationError) -> str:
    """One readable sentence for each of the first faulty fields of a pydantic validation error.

    Args:
        error: what pydantic raised.

    Returns:
        Text such as ``experts.digits.weight: this field is not known``.
    """
    sentences = []
    for item in error.errors(include_url=False)[:SHOWN_FAULTS]:
        where = ".".join(_name(part) for part in item["loc"]) or "the whole document"
        if item["type"] == "extra_forbidden":
            reason = "this field is not known; check its spelling"
        elif item["type"] == "missing":
            reason = "this field is required"
        else:
            reason = item["msg"].removeprefix("Value error, ")
            if item["type"] != "value_error":
                reason += f" (got {item['input']!r:.60})"
        sentences.append(f"{where}: {reason}")
    if more := error.error_count() - len(sentences):
        sentences.append(f"and {more} more")
    return "; ".join(sentences)


def _name(part: object) -> str:
    """A field's name as it can be shown."""
    text = f"{part!s:.80}"
    return text if text.isprintable() else ascii(text)
