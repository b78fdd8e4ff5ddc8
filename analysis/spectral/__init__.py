"""Spectra of task vectors, noise bounds, and interference between tasks."""
