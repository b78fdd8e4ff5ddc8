"""Averages that papers publish, by protocol: for orientation, never beside measured ones.

Figures are test accuracies in percent, averaged over tasks, of CLIP encoders with frozen heads.
Two protocols are in use for the same tasks and may not share a column: an early release of the
data had a leaking DTD test split, which lifts every average taken with it.
"""

from __future__ import annotations

import pandas as pd

CLEAN = "corrected DTD split"
README = "CART's README (arXiv:2412.12153)"
LIKE_WITH_LIKE = "authors' own comparisons, gathered"

SETTINGS = (
    ("ViT-B/32", 8),
    ("ViT-B/32", 14),
    ("ViT-B/32", 20),
    ("ViT-L/14", 8),
    ("ViT-L/14", 14),
    ("ViT-L/14", 20),
)
# In the order of SETTINGS.
CART_TABLE: dict[str, tuple[float, float, float, float, float, float]] = {
    "Pre-trained": (48.0, 57.1, 56.0, 65.0, 68.4, 65.4),
    "Individual experts": (90.5, 89.6, 90.5, 94.2, 93.3, 94.1),
    "Weight average": (65.9, 64.3, 61.0, 79.6, 76.8, 71.7),
    "Task Arithmetic": (69.1, 65.4, 60.5, 84.5, 79.6, 74.2),
    "TIES": (72.4, 65.2, 62.9, 86.1, 79.5, 75.8),
    "Consensus Task Arithmetic": (75.2, 70.0, 65.0, 86.6, 81.9, 78.8),
    "CART": (84.7, 79.5, 76.3, 92.6, 88.7, 87.9),
    "AdaMerging + Task Arithmetic": (80.1, 76.7, 69.2, 90.8, 88.0, 86.8),
    "AdaMerging + CART": (85.8, 82.3, 82.7, 93.1, 90.4, 91.3),
}
# ViT-B/32, 8 tasks; two numbers where authors report different ones. The last item: what the
# method needs at inference or for merging.
GATHERED: dict[str, tuple[float, float, str]] = {
    "SVC + Iso-CTS": (85.6, 85.6, "weights"),
    "WUDI": (85.2, 85.2, "weights"),
    "CART": (84.7, 84.7, "weights"),
    "TSV-M": (83.4, 84.0, "weights"),
    "Iso-C": (82.5, 83.1, "weights"),
    "Iso-CTS": (81.4, 84.9, "weights"),
    "PCB-Merging": (76.3, 76.3, "weights"),
    "EMR-Merging": (88.7, 88.7, "the task at inference"),
    "RegMean++": (84.4, 84.4, "unlabelled data"),
    "AdaMerging": (80.1, 80.1, "unlabelled data"),
}


def published_results() -> pd.DataFrame:
    """All published averages.

    Returns:
        One row per figure: source, protocol, model, tasks (number of them), method, needs, low,
        high (percent; equal unless authors report different figures).

    Example:
        >>> frame = published_results()
        >>> frame[(frame["method"] == "CART") & (frame["model"] == "ViT-L/14")]["tasks"].tolist()
        [8, 14, 20]
    """
    rows = [
        (README, CLEAN, model, tasks, method, _needs(method), value, value)
        for method, values in CART_TABLE.items()
        for (model, tasks), value in zip(SETTINGS, values, strict=True)
    ]
    rows += [
        (LIKE_WITH_LIKE, CLEAN, "ViT-B/32", 8, method, needs, low, high)
        for method, (low, high, needs) in GATHERED.items()
    ]
    columns = ["source", "protocol", "model", "tasks", "method", "needs", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _needs(method: str) -> str:
    if method == "Individual experts":
        return "the task at inference"
    return "unlabelled data" if method.startswith("AdaMerging") else "weights"
