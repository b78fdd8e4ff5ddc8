"""Weights as pictures."""
