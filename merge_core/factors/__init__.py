"""Singular values and vectors of task vectors, decomposed once and kept."""
