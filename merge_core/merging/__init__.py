"""Recipes, and the engine that merges as they say."""
