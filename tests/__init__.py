"""Tests, laid out like the tree that they test; a package, so that helpers can be imported."""
