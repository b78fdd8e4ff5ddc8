"""Which rank and which scaling coefficient: from labels, from inputs alone, from weights alone."""
