"""Texts that name a place on somebody's machine: none of them belongs into what is published."""

from __future__ import annotations

import re

# From the root of a file system or a disk, from somebody's home, or out of the folder.
_PLACE = re.compile(r"^(/|~|\\|[A-Za-z]:[\\/]|file:)|(^|[\\/])\.\.([\\/]|$)")
_SEPARATORS = re.compile(r"[\\/]+")


def is_place(text: str) -> bool:
    """Whether a text is a path that says where on a machine something lies, or leaves its folder.

    Example:
        >>> [is_place(text) for text in ("/home/me/x", "~/x", "a/../../x", "org/name", "x")]
        [True, True, True, False, False]
    """
    return _PLACE.search(text) is not None


def name_without_place(text: str) -> str:
    """A text itself, or the last name of a path that says where something lies.

    Example:
        >>> name_without_place("/home/me/my-suite/"), name_without_place("org/name")
        ('my-suite', 'org/name')
    """
    if not is_place(text):
        return text
    parts = [part for part in _SEPARATORS.split(text) if part.strip(".~: ")]
    return parts[-1] if parts else "unnamed"
