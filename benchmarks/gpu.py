"""What an accelerator gives, in at most four minutes: ``python -m benchmarks.gpu``.

Inputs per second against timm and transformers themselves, CART against torch.linalg.svd, and a
search; both sides of a ratio in one run on one device. Without an accelerator it says so and ends;
``--device cpu --quick`` runs everything in small, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from analysis.evaluation.evaluator import Evaluator
from analysis.networks.towers import suite_network
from analysis.outputs.prediction_store import PredictionStore
from analysis.outputs.suite_outputs import DTYPES, Precision, SuiteOutputs
from analysis.rank_selection.adaptive import adaptive_search
from analysis.rank_selection.space import search_space
from benchmarks.synthetic import Model, vit, vit_b_32, write_suite
from merge_core.devices import Device, current_device, find_devices, use_process_device
from merge_core.errors import MergeScopeError
from merge_core.factors.low_rank import as_matrix, count_directions
from merge_core.factors.store import FactorStore
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.suite import Suite, load_suite
from merge_core.yaml_text import dump_yaml

RANK, CLASSES = 0.08, 100
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        images, side, vit: inputs of the vision model, and its arguments in timm.
        texts, tokens, bert: of the text model, and its configuration.
        tower, matrix: layouts that CART merges, of 8 and of 4 experts.
        repeats: of a pass over all inputs; the fastest counts.
    """

    images: int
    side: int
    vit: dict[str, Any]
    texts: int
    tokens: int
    bert: dict[str, Any]
    tower: Model
    matrix: Model
    repeats: int


def full_sizes() -> Sizes:
    """ViT-B/32, MiniLM's configuration, and a decoder's matrix."""
    bert = {
        "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
        "intermediate_size": 1536, "vocab_size": 30522, "max_position_embeddings": 512,
    }  # fmt: skip
    matrix = Model("matrix", {"layers.0.mlp.down_proj.weight": (4096, 11008)})
    return Sizes(6144, 224, {}, 8192, 64, bert, vit_b_32(), matrix, 4)


def quick_sizes() -> Sizes:
    """The same in seconds on a CPU."""
    small = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
    bert = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 32,
    }  # fmt: skip
    matrix = Model("matrix", {"layers.0.mlp.down_proj.weight": (96, 160)})
    return Sizes(24, 32, small, 40, 16, bert, vit(64, 2, 32, 16), matrix, 1)


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what: was measured.
        ours, theirs: of MergeScope, and of what it is compared with.
        unit: of both.
        ratio: how many times better; None where nothing is compared.
        asked: of the ratio, or of `ours` where nothing is compared.
    """

    what: str
    ours: float
    theirs: float | None
    unit: str
    ratio: float | None
    asked: str

    def words(self) -> str:
        """A line."""
        theirs = "" if self.theirs is None else f" against {self.theirs:,.4g}"
        ratio = "" if self.ratio is None else f": {self.ratio:.2f}x"
        return f"{self.what}: {self.ours:,.4g}{theirs} {self.unit}{ratio} (asked {self.asked})"


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """The fastest of some repeats, the device's work included."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        current_device().synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


def write_images(folder: Path, sizes: Sizes) -> Suite:
    """A suite of one ViT-B/32 with random weights and random images."""
    import timm

    args = sizes.vit
    model = timm.create_model("vit_base_patch32_224", num_classes=0, **args)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "expert.safetensors")
    head = {
        "weight": torch.randn(CLASSES, model.state_dict()["norm.weight"].numel()),
        "bias": torch.zeros(CLASSES),
    }
    save_file(head, folder / "head.safetensors")
    source = np.random.default_rng(0)
    shape = (sizes.images, sizes.side, sizes.side, 3)
    arrays: dict[str, Any] = {
        "val_images": source.integers(0, 256, shape, dtype=np.uint8),
        "class_names": [f"class {number}" for number in range(CLASSES)],
    }
    np.savez(folder / "inputs.npz", **arrays)
    half = [0.5, 0.5, 0.5]
    document = {
        "name": "images",
        "architecture": {"name": "vit_base_patch32_224", "args": args},
        "experts": {
            "one": {
                "weights": "expert.safetensors",
                "head": "head.safetensors",
                "data": {"file": "inputs.npz", "mean": half, "std": half},
            }
        },
    }
    (folder / "suite.yaml").write_text(dump_yaml(document))
    return load_suite(folder)


def vision_rows(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """Images per second of evaluating settings, against timm's model: both are given weights."""
    import timm

    suite, device = write_images(folder / "images", sizes), current_device()
    expert = suite.expert("one")
    weights = {name: expert.tensor(name) for name in expert}
    for precision in PRECISIONS:
        store = PredictionStore(folder / f"{precision}.sqlite")
        outputs = SuiteOutputs(suite, store, precision=precision)
        images = outputs.images(["one"], "val")
        names = iter(range(1000))
        model = timm.create_model("vit_base_patch32_224", num_classes=0, **sizes.vit).eval()
        model = model.to(device.torch, DTYPES[precision])
        pixels = outputs.inputs("one", "val", None)[0].to(DTYPES[precision])

        def evaluate(
            outputs: SuiteOutputs = outputs, images: Any = images, names: Iterator[int] = names
        ) -> None:
            outputs.measure(f"setting {next(names)}", lambda: weights, images)

        @torch.inference_mode()
        def forward(model: Any = model, pixels: Tensor = pixels) -> None:
            model.load_state_dict(weights)
            for part in pixels.split(1024):
                model(part)

        yield compare_speed(f"ViT-B/32, {precision}", evaluate, forward, sizes.images, sizes)


def text_rows(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """Texts per second through MiniLM's network, against transformers' own class."""
    import transformers

    device, place = current_device(), folder / "texts"
    config = transformers.BertConfig(**sizes.bert)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(place)
    document = {
        "name": "texts",
        "architecture": {
            "library": "transformers",
            "name": "bert",
            "args": sizes.bert,
            "pooling": "mean",
        },
        "base": "model.safetensors",
        "experts": {"one": {"weights": "model.safetensors"}},
    }
    (place / "suite.yaml").write_text(dump_yaml(document))
    suite = load_suite(place)
    network, expert = suite_network(suite), suite.expert("one")
    source = torch.Generator().manual_seed(0)
    shape = (sizes.texts, sizes.tokens)
    tokens = torch.randint(1, int(sizes.bert["vocab_size"]), shape, generator=source)
    lengths = torch.randint(4, sizes.tokens + 1, (sizes.texts, 1), generator=source)
    tokens = tokens.masked_fill(torch.arange(sizes.tokens) >= lengths, -1)
    # As a pipeline does: texts in the order of their lengths, each batch padded to its longest.
    ordered = tokens[(tokens >= 0).sum(dim=1).argsort()]
    for precision in PRECISIONS:
        loaded = network.load({name: expert.tensor(name) for name in expert}, DTYPES[precision])
        there = model.to(device.torch, DTYPES[precision])

        def evaluate(loaded: Any = loaded) -> None:
            network.features(loaded, tokens)

        @torch.inference_mode()
        def forward(model: Any = there) -> None:
            for part in ordered.split(256):
                mask = part >= 0
                longest = int(mask.sum(dim=1).max())
                ids = part.clamp_min(0)[:, :longest].to(device.torch)
                mask = mask[:, :longest].to(device.torch)
                hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
                (hidden * mask[..., None]).sum(dim=1).cpu()

        yield compare_speed(f"MiniLM, {precision}", evaluate, forward, sizes.texts, sizes)


def compare_speed(
    what: str, ours: Callable[[], None], theirs: Callable[[], None], count: int, sizes: Sizes
) -> Row:
    """Inputs per second of two ways, each once before the clock starts."""
    ours()
    theirs()
    own, other = (count / seconds(work, sizes.repeats) for work in (ours, theirs))
    return Row(what, own, other, "inputs/s", own / other, "at least 0.90x")


def merge_rows(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """Seconds of CART with nothing stored, against torch.linalg.svd on the same device."""
    cases = (("8 x ViT-B/32", sizes.tower, 8), ("4096 x 11008 by 4 experts", sizes.matrix, 4))
    for what, model, tasks in cases:
        suite = load_suite(write_suite(folder / model.name, model, "decaying", tasks))
        recipe = make_recipe({"method": "cart", "tasks": suite.tasks, "parameters": {"rank": RANK}})
        warm_up()

        def merge(suite: Suite = suite, recipe: Any = recipe, name: str = model.name) -> None:
            store = FactorStore(folder / f"factors of {name}")
            MergeSession(suite, None, store).merge(recipe)

        ours, theirs = seconds(merge), seconds_of_svd(suite)
        yield Row(f"CART of {what}, cold", ours, theirs, "s", theirs / ours, "at least 10x")


def warm_up() -> None:
    """Let the device's libraries load before the clock starts."""
    A = torch.eye(64, device=current_device().torch)
    torch.linalg.svd(A)
    torch.linalg.eigh(A @ A)


def seconds_of_svd(suite: Suite) -> float:
    """Of the authors' route: one block's matrices decomposed as stored, scaled up to all blocks."""
    session = MergeSession(suite, None, FactorStore())
    groups = [group for group in session.groups.members if group.decomposed]
    blocks = {group.name.split(".")[1] for group in groups if group.name.count(".") > 2}
    first = [group for group in groups if group.name.split(".")[1] == min(blocks)]
    place, taken = current_device().torch, 0.0
    for group in first:
        tau = torch.stack(group.members) - group.average
        k = count_directions(RANK, min(group.info.matrix_shape))

        def decompose(tau: Tensor = tau, k: int = k) -> None:
            for matrix in tau:
                U, S, Vh = torch.linalg.svd(as_matrix(matrix).to(place), full_matrices=False)
                ((U[:, :k] * S[:k]) @ Vh[:k]).cpu()

        taken += seconds(decompose)
        group.release()
    return taken * len(blocks)


def search_row(reference: Path, folder: Path) -> Row:
    """Seconds of a search for rank and scale of CART, with nothing stored."""
    suite = load_suite(reference)
    space = search_space("cart", str(reference), None, None, None)
    session = MergeSession(suite, space.base.tasks, FactorStore(folder / "factors of sentences"))
    evaluator = Evaluator(suite, PredictionStore(folder / "search.sqlite"))
    taken = seconds(lambda: adaptive_search(space, session, evaluator))
    return Row("search on the sentence suite", taken, None, "s", None, "at most 20 s")


@contextmanager
def report(deadline: float) -> Iterator[Callable[[str, Callable[[], Iterator[Row]]], list[Row]]]:
    """Runs parts one after another, and says of each what it gave or why it did not run."""

    def run(name: str, part: Callable[[], Iterator[Row]]) -> list[Row]:
        if time.monotonic() > deadline:
            print(f"{name}: left out, as the time is up.", flush=True)
            return []
        rows = []
        try:
            for row in part():
                rows.append(row)
                print(row.words(), flush=True)
        except ImportError as error:
            print(f"{name}: left out, as {error.name} is not installed.", flush=True)
        return rows

    yield run


def run_all(device: Device, asked: argparse.Namespace, sizes: Sizes) -> list[Row]:
    """All parts on a device, in a folder of their own."""
    small = "; small sizes, whose ratios mean nothing" if asked.quick else ""
    print(f"{device.words()}, torch {torch.__version__}{small}", flush=True)
    with (
        tempfile.TemporaryDirectory() as text,
        report(time.monotonic() + asked.seconds) as run,
        torch.no_grad(),
    ):
        folder = Path(text)
        rows = run("ViT-B/32", lambda: vision_rows(folder, sizes))
        rows += run("MiniLM", lambda: text_rows(folder, sizes))
        if asked.sentences is None:
            print("search: left out, as --sentences names no suite.", flush=True)
        else:
            rows += run("search", lambda: iter([search_row(asked.sentences, folder)]))
        return rows + run("CART", lambda: merge_rows(folder, sizes))


def main() -> None:
    """Measure, or say that there is nothing to measure on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--sentences", type=Path, help="suite.yaml of the built plan 'sentences'")
    parser.add_argument("--seconds", type=float, default=200.0, help="no part begins after these")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    asked = parser.parse_args()
    if not asked.quick and not find_devices()[0].accelerates:
        print("There is no GPU here: nothing is measured (--device cpu --quick tests the script).")
        return
    try:
        with use_process_device(asked.device) as device:
            rows = run_all(device, asked, quick_sizes() if asked.quick else full_sizes())
    except MergeScopeError as error:
        parser.error(str(error))
    if asked.output is not None:
        asked.output.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
