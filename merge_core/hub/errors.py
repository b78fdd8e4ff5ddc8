"""Errors of the hub and the network, in words that say what to do.

The hub's own texts are left out: they hold addresses, some of them signed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from merge_core.errors import HubError, MergeScopeError
from merge_core.files import explain_os_error
from merge_core.hub.files import HubId

BY_STATUS = {
    401: "the hub refuses the token in HF_TOKEN. Set a valid one, or unset it.",
    403: "the hub forbids this to the token in HF_TOKEN, or wants one. Give it the right to.",
    404: "it is not there. Check the name.",
    409: "somebody else is changing it at this moment. Try again.",
    413: "the hub finds it too large.",
    429: "the hub receives too many requests from here. Wait some minutes; a token in HF_TOKEN "
    "allows more.",
}


@contextmanager
def explain_hub_errors(what: HubId, folder: Path) -> Iterator[None]:
    """Turn whatever huggingface_hub raises inside the block into a :class:`HubError`.

    Args:
        what: the model that is asked for or pushed, for the message.
        folder: where files are written to or read from.

    Raises:
        HubError: the repository, revision or file is missing, access is refused, or the network
            or the hub fails.
        OutputError: the folder cannot be written, or the disk is full.
    """
    try:
        yield
    except MergeScopeError:
        raise
    except Exception as error:  # the hub's client raises of many kinds, its transports of more
        raise _to_error(what, error, folder) from error


def _to_error(what: HubId, error: BaseException, folder: Path) -> MergeScopeError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{what} is gated. Accept its terms on its page on the hub, and set HF_TOKEN to a "
            "token that may read it."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{what}: the hub has no repository {what.repo!r}, or it is private. Check the name; "
            "for a private one set HF_TOKEN to a token that may read it."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{what.repo} has no revision {what.revision!r}. Check the name after the @."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(
            f"{what} is not in the cache ({folder}), and offline mode is on. Unset "
            "HF_HUB_OFFLINE to download it, or copy the cache of a machine that has it."
        )
    wrappers = (errors.LocalEntryNotFoundError, RuntimeError)  # around what really happened
    if isinstance(error, wrappers) and error.__cause__ is not None:
        return _to_error(what, error.__cause__, folder)
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"{what}: a file of it is gone from the hub. Check the name, or try again.")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        failed = f"the hub fails (HTTP {status}). Try again later."
        return HubError(f"{what}: {BY_STATUS.get(status, failed)}")
    # The root of all errors of the HTTP library, which differs by version of huggingface_hub.
    if isinstance(error, errors.HfHubHTTPError.__bases__[0]):
        host = urlsplit(constants.ENDPOINT).hostname
        return HubError(
            f"{what}: no connection to {host}, or it broke. Check the network and try again; what "
            "is complete is kept."
        )
    if isinstance(error, OSError) and error.errno is not None:
        return explain_os_error(error, folder)
    if isinstance(error, OSError):
        return HubError(f"{what}: a file arrived incomplete. Try again.")
    return HubError(f"{what}: the transfer failed ({type(error).__name__}). Try again.")
