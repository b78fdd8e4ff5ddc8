"""Merged models written: folders, adapters, their layout, provenance and cards."""
