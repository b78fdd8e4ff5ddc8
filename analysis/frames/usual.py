"""The settings that pages offer at first, and that a record holds."""

from __future__ import annotations

# Shares of min(m, n) that a rank's slider offers: finer where the published ranks lie.
SHARES = (
    0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.24, 0.32, 0.4, 0.5, 0.6,
    0.7, 0.8, 0.9, 1.0,
)  # fmt: skip
# Storage, as shares of the recommended rank's, and scales, of the recommended one, at which ranks
# per layer are compared with the uniform rank.
BUDGETS = (0.5, 1.0, 2.0)
SCALES = (0.7, 1.0, 1.4)
# Ranks at which a record holds the angles between subspaces, which take longest.
ANGLE_SHARES = (0.02, 0.04, 0.08, 0.16, 0.32)
# Methods whose rank and scale a record holds.
SEARCHED = ("cart", "low_rank_task_arithmetic", "task_arithmetic")
# How many sets of tasks of each size the page "How does it scale?" offers to draw.
SUBSETS = (3, 5, 10)
