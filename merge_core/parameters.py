"""Which parameters are decomposed as matrices and which are only averaged.

CART (arXiv:2412.12153) decomposes the matrices of attention and MLP; biases, norms, embeddings,
positional and patch embeddings, logit scales are averaged; heads are never merged. The table
below says so in patterns, which a suite may override.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from merge_core.checkpoint import TensorInfo

# First match wins; a parameter that none matches is decomposed when it is a weight matrix.
AVERAGED_BY_PATTERN: tuple[tuple[str, str], ...] = (
    ("*patch_embed*", "patch embedding"),
    ("*visual.conv1.weight", "patch embedding"),
    ("*embed*", "embedding"),
    ("*wte.weight", "embedding"),
    ("*wpe.weight", "embedding"),
    ("*token_type*", "embedding"),
    ("*cls_token*", "class token"),
    ("*class_token*", "class token"),
    ("*norm*", "norm"),
    ("*ln_*", "norm"),
    ("*logit_scale*", "logit scale"),
    ("*lm_head*", "head"),
    ("*classifier*", "head"),
    ("head.*", "head"),
    ("*.head.*", "head"),
    ("fc.weight", "head"),
    ("*.relative_position_bias_table", "positional embedding"),
)


@dataclass(frozen=True)
class Treatment:
    """What a spectral method does with a parameter, and why."""

    decomposed: bool
    reason: str


def treatment(
    name: str,
    info: TensorInfo,
    decompose: Sequence[str] = (),
    average: Sequence[str] = (),
) -> Treatment:
    """Whether a parameter is decomposed (spectral methods) or averaged.

    Args:
        name: parameter name.
        info: its shape and dtype.
        decompose: shell patterns of the suite that force decomposition (of tensors with two
            or more dimensions); they win over `average`.
        average: shell patterns of the suite that force averaging.

    Source: rule of CART, arXiv:2412.12153, section 5; for language models AdaRank's.
    """
    if not info.is_floating:
        return Treatment(False, "integer buffer, kept as it is")
    if len(info.shape) < 2 or min(info.shape[0], info.numel // max(1, info.shape[0])) < 2:
        return Treatment(False, "not a matrix")
    if any(fnmatchcase(name, pattern) for pattern in decompose):
        return Treatment(True, "named under 'decompose' in the suite")
    if any(fnmatchcase(name, pattern) for pattern in average):
        return Treatment(False, "named under 'average' in the suite")
    for pattern, what in AVERAGED_BY_PATTERN:
        if fnmatchcase(name, pattern):
            return Treatment(False, what)
    if not name.endswith("weight"):
        return Treatment(False, "not a layer's weight")
    if len(info.shape) == 2:
        return Treatment(True, "weight matrix")
    return Treatment(True, "convolution kernel, as o x (i·kh·kw)")
