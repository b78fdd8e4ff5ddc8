"""Which members of a suite fit together, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from merge_core.preflight import Preflight


def fit_table(report: Preflight, members: Sequence[str]) -> pd.DataFrame:
    """One row per member: whether it can be merged with the first expert, and how it differs.

    Args:
        report: of the pre-flight.
        members: their names as in the report, the first expert first.

    Returns:
        Columns ``member``, ``fits`` (bool), ``differences`` (in words, such as ``2 missing,
        1 dtype``, or why it cannot be read; empty where there are none).
    """
    rows = []
    for member in members:
        own = [difference for difference in report.differences if difference.member == member]
        kinds = Counter(difference.kind for difference in own if difference.parameter)
        unread = [difference.detail for difference in own if not difference.parameter]
        rows.append(
            {
                "member": member,
                "fits": not any(difference.blocking for difference in own),
                "differences": ", ".join(
                    [*unread, *(f"{count} {kind}" for kind, count in kinds.items())]
                ),
            }
        )
    return pd.DataFrame(rows, columns=["member", "fits", "differences"])
