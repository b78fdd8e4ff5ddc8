"""Pages on presets' stand-ins: networks of another library, text models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from analysis.patterns import filters
from merge_core.opening.draft import write_suite
from merge_core.opening.presets import presets
from tests.pages.test_pages import assert_healthy, figures, open_page
from tests.stand_ins import go_offline, shrink, write_stand_ins

DRAWN = ("spectra", "merge_lab")


@pytest.fixture(scope="module", params=["clip-vit-b-32-8", "gpt-2-glue-7"])
def preset(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Offer a preset's stand-in to the dashboard as the suite ``mine``."""
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp(name) / "mine"
        folder.mkdir()
        write_stand_ins(presets()[name], go_offline(patch, folder), folder)
        write_suite(shrink(presets()[name].spec), folder / "suite.yaml")
        patch.setenv("MERGESCOPE_SUITES", str(folder / "suite.yaml"))
        yield name


@pytest.mark.parametrize("page", ["overview", *DRAWN])
def test_every_page_opens(preset: str, page: str) -> None:
    at = assert_healthy(open_page(page, suite="mine"))
    assert at.sidebar.selectbox(key="suite").value == "mine"
    notes = " ".join(info.value for info in at.info)
    assert "not evaluated" not in notes
    if page == "overview":
        assert ("texts, which are not shown" in notes) == preset.startswith("gpt")
    if page in DRAWN:
        assert figures(at)


def test_patterns_shows_filters_positions_and_heads(preset: str) -> None:
    at = assert_healthy(open_page("patterns"))
    assert_healthy(at.selectbox(key="source").set_value("Suite mine").run())
    place = next(s.key for s in at.selectbox if (s.key or "").startswith("shown_"))
    # The base of a CLIP holds a text half that the experts lack.
    assert_healthy(at.selectbox(key=place).set_value("base").run())
    control = next(g for g in at.get("button_group") if "Attention heads" in g.options)
    views = [v for v, title in filters.VIEWS.items() if title.capitalize() in control.options]
    drawn = []
    for view in views:
        picked = next(g for g in at.get("button_group") if g.key == control.key)
        assert_healthy(picked.set_value(view).run())
        drawn.append(len(figures(at)))
    if preset.startswith("gpt"):
        assert views == ["heads"]
        assert drawn[0]
    else:
        assert views == ["patch_embedding", "positions", "heads"]
        assert drawn[0] == drawn[2] > drawn[1]  # three models, with two figures or one each
