"""Public names of stored tensors: without what wrappers put before or into them.

Sources: ``torch.nn.parallel`` and ``torch.optim.swa_utils`` (``module.``, ``n_averaged``),
``torch.compile``, FSDP, activation checkpointing and DeepSpeed (names that begin with ``_``), PEFT
(``base_model.model.``), Opacus (``_module.``), PyTorch Lightning, and the renaming of old names
that transformers does in ``conversion_mapping.py`` ("legacy"); ``torch.nn.utils.weight_norm`` and
``torch.nn.utils.parametrizations.weight_norm``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from merge_core.errors import CheckpointError

Shape = tuple[int, ...]

# A wrapper of the whole model puts one of these before all names, in any nesting.
PEFT = "base_model.model."
PREFIXES = ("module.", "_module.", PEFT)
# These stand before or inside names, wherever a part was wrapped. No layer is called so.
INSERTED = frozenset(
    {
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
    }
)
# Numbers that wrappers which average weights keep beside the model.
COUNTERS = frozenset({"n_averaged", "num_updates", "decay", "initted", "step"})
OLD_NORM = re.compile(r"(.*LayerNorm\.)(gamma|beta)")
NEW_NORM = {"gamma": "weight", "beta": "bias"}
NEW_WEIGHT_NORM = re.compile(r"(.*\.)?parametrizations\.weight\.original([01])")
WEIGHT_NORM = ("weight_g", "weight_v")  # magnitude and direction


def public_names(
    shapes: Mapping[str, Shape], where: object, lightning: bool = False
) -> dict[str, str]:
    """The stored name of each tensor by its public one.

    Prefixes of wrappers are taken off where all names have them, and words that only wrappers use
    wherever they stand. Counters of wrappers are left out. Of two names that torch or
    transformers have for one tensor, one is taken: ``LayerNorm.weight`` for ``LayerNorm.gamma``,
    ``weight_g`` and ``weight_v`` for the parametrization of weight norm.

    Args:
        shapes: shape of each tensor by its stored name.
        where: the file, for messages.
        lightning: whether PyTorch Lightning wrote them, which puts the attribute that holds the
            model before all names.

    Raises:
        CheckpointError: two stored names become one.

    Example:
        >>> public_names({"module.fc.weight": (2, 2), "n_averaged": ()}, "swa.pt")
        {'fc.weight': 'module.fc.weight'}
    """
    public = _without_words({name: name for name in shapes}, INSERTED, where)
    public = _without_prefixes(public, shapes, where)
    if lightning and (first := _common_part(public)):
        public = _without_prefixes(_cut(public, first), shapes, where)
    return _with_one_spelling(public, shapes)


def _without_words(public: dict[str, str], words: Collection[str], where: object) -> dict[str, str]:
    text = "\n".join(public)
    if not any(word in text for word in words):
        return public
    result: dict[str, str] = {}
    for name, stored in public.items():
        plain = ".".join(part for part in name.split(".") if part not in words)
        if plain in result or not plain:
            raise CheckpointError(
                f"{where}: {stored!r} and {result.get(plain, plain)!r} are one tensor without the "
                "names of their wrappers. Save the state_dict() of the unwrapped model."
            )
        result[plain] = stored
    return result


def _without_prefixes(
    public: dict[str, str], shapes: Mapping[str, Shape], where: object
) -> dict[str, str]:
    """Without the prefixes that all names have, but counters of the wrapper beside them."""
    found = True
    while found:
        found = False
        counters = set(_counters(public, shapes))
        named = {name: stored for name, stored in public.items() if name not in counters}
        for prefix in PREFIXES:
            if named and all(len(n) > len(prefix) and n.startswith(prefix) for n in named):
                public, found = _cut(named, prefix), True
                # What PEFT adapts is called so; elsewhere it is a layer's own name.
                if prefix == PEFT and not any("lora_" in name for name in public):
                    public = _without_words(public, {"base_layer"}, where)
                break
    return public


def _counters(public: Mapping[str, str], shapes: Mapping[str, Shape]) -> Iterator[str]:
    for name, stored in public.items():
        if name in COUNTERS and shapes[stored] in ((), (1,)):
            yield name


def _cut(public: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name[len(prefix) :]: stored for name, stored in public.items()}


def _common_part(names: Collection[str]) -> str:
    """The first part that all names have, with its dot; empty if there is none."""
    parts = {name.partition(".")[0] if "." in name else "" for name in names}
    part = parts.pop() if len(parts) == 1 else ""
    return f"{part}." if part else ""


def _with_one_spelling(public: dict[str, str], shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Names with other spellings replaced, where the new name is not taken."""
    result: dict[str, str] = {}
    for name, stored in public.items():
        new = _spelling(name, public, shapes)
        result[name if new in public else new] = stored
    return result


def _spelling(name: str, public: Mapping[str, str], shapes: Mapping[str, Shape]) -> str:
    if old := OLD_NORM.fullmatch(name):
        return old[1] + NEW_NORM[old[2]]
    if new := NEW_WEIGHT_NORM.fullmatch(name):
        parts = [public.get(f"{name[:-1]}{number}") for number in "01"]
        if None not in parts and _are_weight_norm(*(shapes[part] for part in parts if part)):
            return (new[1] or "") + WEIGHT_NORM[int(new[2])]
    return name


def _are_weight_norm(magnitude: Shape, direction: Shape) -> bool:
    """Whether shapes are those of a magnitude for each slice along one dimension of a weight."""
    return len(magnitude) == len(direction) and all(
        short in (1, full) for short, full in zip(magnitude, direction, strict=True)
    )
