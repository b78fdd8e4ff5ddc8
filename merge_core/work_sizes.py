"""Sizes by which work is divided. The estimates of its cost read them too, without torch."""

from __future__ import annotations

# Results that an executor has under way for each worker, ahead of the consumer.
AHEAD = 2
# Files whose digests are taken side by side.
HASHED_AT_ONCE = 4
# Entries of each task vector that a threshold is first looked for in.
SAMPLE = 1 << 19
# Short sides below which a matrix costs little, whatever is made of all of it.
SMALL = 512
# Shares of a large matrix's directions that are found in float32, whichever suffices.
LEADING_SHARES = (8, 4)
# Multiplications of a product of matrices that pay for sending them to an accelerator.
WORTH_SENDING = 1 << 27
