"""How texts become tokens, and whether they do so alike for all members of a suite."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from analysis.data_sources.text import check_tokenizer_files, open_tokenizer
from merge_core.compatibility.compare import collect_companions
from merge_core.compatibility.vocabularies import FIELD, compare_vocabularies
from merge_core.errors import SuiteError
from merge_core.suites.suite import Suite

FILE = "tokenizer.json"


@lru_cache(maxsize=4)
def open_encoder(folder: Path) -> Callable[[str], list[int]]:
    """From a text to its tokens, with what the tokenizer puts before and after it.

    It is what ``tokenizer.json`` says, whatever tokenizer the library has for this type of model;
    other files are read by transformers. No code of the folder is run.

    Raises:
        SuiteError: there is no tokenizer, its files are too large, or transformers is not
            installed.
    """
    if not (folder / FILE).is_file():
        tokenizer = open_tokenizer(folder)
        return lambda text: list(tokenizer(text, verbose=False)["input_ids"])
    try:
        from tokenizers import Tokenizer

        check_tokenizer_files(folder)
        found = Tokenizer.from_file(str(folder / FILE))
        found.no_truncation()
        found.no_padding()
    except ImportError as fault:
        raise SuiteError(
            "Texts need the package transformers: pip install 'mergescope[text]'."
        ) from fault
    except Exception as fault:  # files of another form make the library raise almost anything
        reason = " ".join(str(fault).split())
        raise SuiteError(f"{folder} holds no tokenizer of transformers: {reason:.200}") from fault
    return lambda text: list(found.encode(text).ids)


def refuse_other_tokenizers(suite: Suite) -> None:
    """Refuse an expert whose files beside it have another tokenizer than the base's.

    Tokens that an expert has besides, and spare ones, do not count; members without such files are
    taken to have the base's.

    Raises:
        SuiteError: there is one.
    """
    members = collect_companions(suite, suite.tasks)
    found = compare_vocabularies(members, kept=False)
    other = [each for each in found if each.level == "refused" or _cuts_otherwise(each.field)]
    if other:
        raise SuiteError(
            f"The members of {suite.name!r} have different tokenizers, so they cannot be evaluated "
            f"on the same tokens: {other[0].sentence}. Take experts with the base's tokenizer."
        )


def _cuts_otherwise(field: str) -> bool:
    return field != FIELD
