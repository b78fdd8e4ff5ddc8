"""Speed and memory, measured; ratios are taken within one run."""
