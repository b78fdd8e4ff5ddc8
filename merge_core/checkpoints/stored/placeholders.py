"""Short texts that lie where weights should: pointers of Git LFS and git-annex, pages of errors.

Sources: the pointer format of https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md; pointer
files of https://git-annex.branchable.com/internals/pointer_file/.
"""

from __future__ import annotations

import re
from pathlib import Path

from merge_core.errors import CheckpointError
from merge_core.input_files import open_regular

HEAD_BYTES = 512
LFS = re.compile(rb"version https?://(git-lfs|hawser|git-media)\b.*", re.DOTALL)
ANNEX = re.compile(rb"(\.\./)*(\.git)?/?annex/objects/\S.*", re.DOTALL)
PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml)\b.*", re.DOTALL | re.IGNORECASE)
ANSWER = re.compile(
    rb"\s*(\{\s*\"error\"|entry not found|repository not found|invalid (username|credentials)"
    rb"|access to (model|dataset) |not found\s*$|unauthorized|forbidden).*",
    re.DOTALL | re.IGNORECASE,
)


def check_content(path: Path) -> None:
    """Refuse a file that holds a pointer or a server's answer in place of its content.

    Args:
        path: a regular file.

    Raises:
        CheckpointError: it is such a text; the message says how to get the content.
        OSError: it cannot be read.
    """
    with open_regular(path) as stream:
        head = stream.read(HEAD_BYTES)
    what = ""
    if LFS.fullmatch(head):
        what = "a Git LFS pointer, not the file itself: fetch it with 'git lfs pull'"
    elif ANNEX.fullmatch(head):
        what = "a pointer of git-annex, not the file itself: fetch it with 'git annex get'"
    elif PAGE.fullmatch(head):
        what = "a web page, not weights: download the file itself (on the Hub, by 'resolve')"
    elif ANSWER.fullmatch(head):
        what = "a server's message in place of the file: log in where it is needed, and load again"
    if what:
        raise CheckpointError(f"{path} is {what}.")
