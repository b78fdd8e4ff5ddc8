"""Suites made from a plan: heads fitted on a base's features, and experts fine-tuned from it."""
