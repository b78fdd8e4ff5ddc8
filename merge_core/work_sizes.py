"""Sizes by which work is divided. The estimates of its cost read them too, without torch."""

from __future__ import annotations

# Results that an executor has under way for each worker, before whoever takes them.
AHEAD = 2
# Files whose digests are taken side by side.
HASHED_AT_ONCE = 4
# Entries of each task vector that a threshold is first looked for in.
SAMPLE = 1 << 19
# Short sides from which a float32 matrix is decomposed in float32; float64 takes no time below.
FAST_FROM = 512
# Vectors are made from a reduction this share of them at a time.
BLOCKS = 8
