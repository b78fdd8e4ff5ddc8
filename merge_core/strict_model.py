"""The base of what descriptions hold: the tables of a suite, a pool, a recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A table of known fields: an unknown one is refused, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
