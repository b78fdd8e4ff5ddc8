"""Figures: pure functions from a tidy frame to a plotly Figure."""
