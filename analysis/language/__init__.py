"""Causal language models evaluated on texts: cross-entropy, and the likeliest of choices."""
