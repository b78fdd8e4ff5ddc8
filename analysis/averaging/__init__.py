"""Weights or features averaged: soups, ensembles, and the curvature between them."""
