"""``mergescope methods`` prints what the methods declare."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from merge_core.methods import methods, postprocessors
from mergescope import cli


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Output of the command, spaces and rules of tables removed."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["mergescope", "methods", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        return [" | ".join(part.strip() for part in line.split("│")) for line in lines]

    return run


def test_all(shown: Any) -> None:
    lines = shown()
    for entry in [*methods().values(), *postprocessors().values()]:
        assert f" | {entry.name} | {entry.title} | {entry.source} | " in lines
    # By hand: one of each kind of need.
    everything = (
        "everything but the weights of inner linear layers (attention, MLP, …) and convolution "
        "kernels; the patch embedding is averaged too"
    )
    for line in (
        " | average | nothing else |  |  | everything | ",
        f" | cart | nothing else |  | average | {everything} | ",
        " | ties | the base |  | base, average | nothing | ",
        " | dare_ties | the base | which entries are dropped | base, average | nothing | ",
        " | tsv_c | the base, the task at inference |  | base | nothing | ",
        " | adamerging | the base, unlabelled data, gradients | the inputs of each step | base | "
        "nothing | ",
    ):
        assert line in lines


def test_one(shown: Any) -> None:
    text = "\n".join(shown("ties"))
    method = methods()["ties"]
    for part in (method.summary, method.formula, method.source, method.deviations):
        assert part in text
    assert "TIES (ties)" in text
    for line in (
        "needs         the base",
        "experts       any number",
        "origins       base, average",
        "task weights  yes",
        "random        no",
        "averaged      nothing",
    ):
        assert f"\n{line}" in text
    rows = {row.split(" | ")[1]: row.split(" | ")[2:5] for row in text.splitlines() if "| " in row}
    for spec in method.specs:
        assert rows[spec.name][0] == str(spec.default)
        assert spec.help in text
    assert rows["density"][1:] == ["0 to 1", "0.2"]
    assert rows["trim"][1] == "global or tensor"


def test_other_properties(shown: Any) -> None:
    assert any(line.startswith("experts       2") for line in shown("slerp"))
    text = "\n".join(shown("dare_ties"))
    assert "random        yes: which entries are dropped, by the recipe's seed" in text
    text = "\n".join(shown("cart"))
    assert "origins       average\n" in text.replace("  \n", "\n").replace(" \n", "\n")
    assert " | rank | 0.08 | a share in (0, 1], or directions: 1, 2, ... | " in text
    assert "Parameters" not in "\n".join(shown("average"))
    text = "\n".join(shown("svc"))
    post = postprocessors()["svc"]
    assert "SVC (svc)" in text
    for part in (post.formula, post.deviations, "a step of a recipe's 'then'", "floor"):
        assert part in text


@pytest.mark.parametrize("name", [*methods(), *postprocessors()])
def test_every_one_can_be_shown(shown: Any, name: str) -> None:
    assert f"({name})" in shown(name)[0]


def test_an_unknown_one(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["mergescope", "methods", "bogus"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "no method 'bogus'. Known: average, " in capsys.readouterr().err
