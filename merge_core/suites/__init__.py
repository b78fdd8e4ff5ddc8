"""Suites and pools: what they name, what fits, and what a merge takes."""
