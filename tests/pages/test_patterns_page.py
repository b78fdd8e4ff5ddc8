"""The page about patterns in weights, on tiny pools and on the bundled suite."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_core.suites.pool import Pool
from tests.pages.test_pages import array, assert_healthy, figures, metrics, open_page, trace
from tests.pools import CLASSES, SIZE

SETTINGS = [
    {"weight_decay": 0.0, "seed": 0},
    {"weight_decay": 0.1, "seed": 0},
    {
        "weight_decay": 0.1,
        "seed": 1,
        "trajectory": [
            {"epoch": 0, "weights": "0.safetensors"},
            {"epoch": 5, "weights": "2.safetensors"},
        ],
    },
]
TITLE = "noise, linear, independent starts"
Offer = Callable[..., Pool]


def test_the_default_view_has_all_sections() -> None:
    at = assert_healthy(open_page("patterns"))
    titles = [figure["layout"]["title"]["text"] for figure in figures(at)]
    for part in ("linear classifier", "Which class", "blend"):
        assert any(part in title for title in titles), part
    assert len(titles) >= 8


def test_cosines_are_the_classifiers(offer_pool: Offer) -> None:
    pool = offer_pool("linear", fields=SETTINGS, channels=3)
    at = assert_healthy(open_page("patterns", classifiers=TITLE, decay="0"))
    with np.load(pool.root / "inputs.npz") as archive:
        raw, labels = archive["train_images"] / 255.0, archive["train_labels"]
    images = ((raw - 0.5) / 0.25).transpose(0, 3, 1, 2).reshape(len(raw), -1)
    means = np.stack([images[labels == c].mean(0) for c in range(CLASSES)]) - images.mean(0)
    weight = load_file(pool.root / "0.safetensors")["head.weight"].double().numpy()
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (weight, means)]
    cosine = unit[0] @ unit[1].T
    drawn = next(f for f in figures(at) if "Which class" in f["layout"]["title"]["text"])
    np.testing.assert_allclose(array(trace(drawn, type="heatmap")["z"]), cosine, atol=1e-6)
    assert metrics(at)["Cosine, own class"] == f"{np.diag(cosine).mean():.2f}"


def test_decay_model_and_epoch_are_choices(offer_pool: Offer) -> None:
    offer_pool("linear", fields=SETTINGS)
    at = assert_healthy(open_page("patterns", classifiers=TITLE))
    assert any("No snapshots" in caption.value for caption in at.caption)
    model = next(box for box in at.selectbox if box.label == "Model" and "seed" in box.options[0])
    assert model.options == ["seed 0", "seed 1"]
    at = assert_healthy(model.select("seed 1").run())
    epoch = next(slider for slider in at.select_slider if slider.label == "Epoch")
    last = metrics(at)
    first = metrics(assert_healthy(epoch.set_value(0.0).run()))
    assert last["Cosine, own class"] != first["Cosine, own class"]
    axis = next(group for group in at.segmented_control if group.label == "Drawn")
    assert_healthy(axis.set_value("epoch").run())


def test_a_pool_without_snapshots_says_so(offer_pool: Offer) -> None:
    offer_pool("linear", fields=[{"weight_decay": 0.0, "seed": i} for i in range(3)])
    at = assert_healthy(open_page("patterns", classifiers=TITLE, over="Over training"))
    assert any("no snapshots along training" in info.value for info in at.info)


@pytest.mark.parametrize("way", ["Two classes of this model", "One class of two models"])
def test_blends_run_from_one_end_to_the_other(offer_pool: Offer, way: str) -> None:
    pool = offer_pool("linear", fields=SETTINGS)
    at = assert_healthy(open_page("patterns", classifiers=TITLE, blend=way, decay="0"))
    wanted = "Who responds" if way.startswith("Two") else "What does the blend recognise"
    drawn = next(f for f in figures(at) if wanted in f["layout"]["title"]["text"])
    weight = load_file(pool.root / "0.safetensors")
    with np.load(pool.root / "inputs.npz") as archive:
        raw, labels = archive["test_images"] / 255.0, archive["test_labels"]
    images = torch.tensor((raw - 0.5) / 0.25).reshape(len(raw), SIZE**2)
    logits = images @ weight["head.weight"].double().T + weight["head.bias"].double()
    if way.startswith("Two"):
        line = trace(drawn, name="images of class0")
        ends = [logits[labels == 0, c].mean().item() for c in (3, 0)]
        np.testing.assert_allclose(array(line["y"])[[0, -1]], ends, rtol=1e-5)
    else:
        end = float((logits.argmax(1).numpy() == labels).mean())
        assert any(np.isclose(array(t["y"])[-1], [end, 100 * end]).any() for t in drawn["data"])


@pytest.mark.parametrize(
    ("architecture", "view", "drawn"),
    [
        ("vgg", "First convolution kernels", 6),
        ("resnet", "Norms of the later kernels", 3),
        ("vit", "Patch-embedding filters", 6),
        ("vit", "Similarity of positional embeddings", 3),
        ("vit", "Attention heads", 6),
    ],
)
def test_deeper_networks(offer_pool: Offer, architecture: str, view: str, drawn: int) -> None:
    offer_pool(architecture, channels=3)
    source = f"Pool noise, {architecture_name(architecture)}, independent starts"
    at = assert_healthy(open_page("patterns", source=source, view=view))
    names = [f["layout"]["title"]["text"].split(" ")[0] for f in figures(at)]
    assert len([name for name in names if name.startswith(("member", "average"))]) == drawn


def architecture_name(architecture: str) -> str:
    return {"resnet": "resnet18", "vit": "vit_tiny_patch16_224"}.get(architecture, architecture)


def test_a_model_with_itself_has_no_difference(offer_pool: Offer) -> None:
    offer_pool("vgg")
    at = assert_healthy(open_page("patterns", source="Pool noise, vgg, independent starts"))
    box = next(box for box in at.selectbox if box.label == "Compared with")
    at = assert_healthy(box.select("member 1").run())
    assert not any(" − " in f["layout"]["title"]["text"].split("<br>")[0] for f in figures(at)[-2:])


def test_a_damaged_classifier_is_said_in_words(offer_pool: Offer) -> None:
    pool = offer_pool("linear", fields=SETTINGS)
    for path in pool.root.glob("*.safetensors"):
        save_file({"head.weight": torch.zeros(CLASSES, 5)}, path)
    at = open_page("patterns", classifiers=TITLE)
    assert not at.exception
    assert any("no linear classifier" in error.value for error in at.error)
