"""Sentences of pages, made from the frames that are drawn."""
