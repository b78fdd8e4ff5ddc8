"""The field's words, each explained once: on hover in texts, and on the page Glossary."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

PATH = "glossary"  # of the page


@dataclass(frozen=True)
class Term:
    """A word of the field.

    Attributes:
        name: the word.
        meaning: one sentence or two, without Markdown.
        forms: other forms of it that stand in texts.
        source: what explains it further: title and address.
    """

    name: str
    meaning: str
    forms: tuple[str, ...] = ()
    source: tuple[str, str] | None = None

    @property
    def anchor(self) -> str:
        """Its place on the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


_TASK_ARITHMETIC = ("Task Arithmetic, 2022", "https://arxiv.org/abs/2212.04089")
_CART = ("CART, 2024", "https://arxiv.org/abs/2412.12153")
_RETHINKING = ("Rethinking weight averaging, 2024", "https://arxiv.org/abs/2411.09263")
_SOUPS = ("Model soups, 2022", "https://arxiv.org/abs/2203.05482")
_TSV = ("Task Singular Vectors, 2024", "https://arxiv.org/abs/2412.00081")
_CALIBRATION = ("Calibration of networks, 2017", "https://arxiv.org/abs/1706.04599")

TERMS = (
    Term("base", "The pre-trained model that all experts were fine-tuned from.", ("base model",)),
    Term(
        "expert",
        "A model fine-tuned from the base on one task.",
        ("experts",),
        _TASK_ARITHMETIC,
    ),
    Term("suite", "A base, its experts, and what it takes to run and measure them.", ("suites",)),
    Term("pool", "Several models of one architecture trained on one and the same task."),
    Term(
        "task vector",
        "What fine-tuning changed: an expert's weights less those of the base. A centred task "
        "vector is taken about the average of the experts instead.",
        ("task vectors", "centred task vector", "centred task vectors"),
        _TASK_ARITHMETIC,
    ),
    Term(
        "centring",
        "Taking task vectors about the average of the experts instead of the base. It removes what "
        "all tasks have in common, and spreads a part of each task over the others.",
        ("centred",),
        _CART,
    ),
    Term(
        "weight average",
        "The mean of the experts' weights, parameter by parameter.",
        (),
        _SOUPS,
    ),
    Term(
        "merge",
        "One model for all tasks, made from the experts' weights.",
        ("merges", "merging"),
        _TASK_ARITHMETIC,
    ),
    Term(
        "direction",
        "A pair of singular vectors of a matrix, with its singular value as strength. A matrix is "
        "the sum of its directions.",
        ("directions", "singular vectors"),
        _TSV,
    ),
    Term(
        "singular value",
        "How strong a direction of a matrix is; squared, its energy.",
        ("singular values",),
    ),
    Term(
        "spectrum",
        "The singular values of a matrix from the largest to the smallest.",
        ("spectra",),
    ),
    Term(
        "rank",
        "How many directions of each task vector are kept; given as a number, or as a share of all "
        "that the matrix has.",
        ("ranks",),
        _CART,
    ),
    Term(
        "scaling coefficient",
        "The factor λ by which the kept parts of task vectors are multiplied before they are "
        "added.",
        ("scale", "scales"),
        _TASK_ARITHMETIC,
    ),
    Term("energy", "The sum of squares of a matrix's entries, and of its singular values."),
    Term(
        "interference",
        "How much the leading directions of different tasks fall into the same space, so that each "
        "task's change disturbs the others. Read in rows (inputs of a layer) or columns "
        "(outputs).",
        ("row-space interference",),
        _CART,
    ),
    Term(
        "overlap",
        "The share of one task's leading directions that lies in the space of another's: 1 for "
        "the same space, 0 for spaces at right angles.",
    ),
    Term(
        "cosine",
        "The angle between two task vectors as one number: 1 for the same direction, 0 for right "
        "angles, −1 for opposite ones.",
        ("cosines",),
    ),
    Term(
        "soup",
        "A model whose weights are the average of several models trained on one task.",
        ("soups",),
        _SOUPS,
    ),
    Term(
        "ensemble",
        "Several models whose outputs are averaged; it runs them all.",
        ("ensembles",),
    ),
    Term(
        "feature",
        "What a layer gives for an input; the last ones are what the classifier reads.",
        ("features",),
        _RETHINKING,
    ),
    Term("logit", "The number that a classifier gives a class before softmax.", ("logits",)),
    Term(
        "calibration error",
        "How far a model's confidence is from how often it is right, in the mean over inputs.",
        (),
        _CALIBRATION,
    ),
    Term(
        "validation split",
        "The inputs on which settings are chosen. Accuracies that are reported come from the test "
        "split, which no choice looks at.",
        ("test split",),
    ),
    Term(
        "agreement",
        "The share of inputs on which a merge says what each task's own expert says; it needs no "
        "labels.",
    ),
    Term(
        "regret",
        "What a choice loses: the accuracy at the best setting less that at the chosen one.",
    ),
    Term("template", "A classifier's weights for one class, seen as a picture.", ("templates",)),
)

_LINKED = re.compile(r"(\[[^\]]*\]\([^)]*\)|`[^`]*`|\$[^$]*\$)")


@cache
def _known() -> tuple[re.Pattern[str], dict[str, Term]]:
    forms = {form.lower(): term for term in TERMS for form in (term.name, *term.forms)}
    longest = sorted(forms, key=len, reverse=True)
    words = "|".join(re.escape(form).replace(r"\ ", r"\s+") for form in longest)
    return re.compile(rf"(?<![\w-])({words})(?![\w-])", re.IGNORECASE), forms


def link_terms(text: str) -> str:
    """A text in which the first of each known word says its meaning on hover, and leads to it.

    Args:
        text: Markdown. Code, formulas and links in it stay as they are.

    Example:
        >>> link_terms("Experts, `rank`")
        '[Experts](glossary#expert "A model fine-tuned from the base on one task."), `rank`'
    """
    pattern, forms = _known()
    seen: set[str] = set()

    def link(match: re.Match[str]) -> str:
        term = forms[" ".join(match[0].lower().split())]
        if term.name in seen:
            return match[0]
        seen.add(term.name)
        return f'[{match[0]}]({PATH}#{term.anchor} "{term.meaning}")'

    parts = _LINKED.split(text)
    return "".join(part if i % 2 else pattern.sub(link, part) for i, part in enumerate(parts))
