"""Accuracy of members and merges of a suite."""
