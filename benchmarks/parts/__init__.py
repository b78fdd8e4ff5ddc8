"""What is measured: one file a part, or several that share their models."""
