"""What models give does not depend on the device, its memory, or what is prepared ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.evaluation import evaluator as evaluators
from analysis.evaluation.ahead import Ahead
from analysis.evaluation.evaluator import Evaluator
from analysis.evaluation.precision import precision_words
from analysis.outputs import suite_outputs
from analysis.outputs.prediction_store import PredictionStore
from analysis.outputs.prepared_inputs import PreparedInputs
from analysis.outputs.suite_outputs import SuiteOutputs
from merge_core import devices
from merge_core.devices import CPU, Device
from merge_core.factors.store import FactorStore
from merge_core.files import digest_of
from merge_core.merging.engine import MergeSession
from merge_core.merging.recipe import make_recipe
from merge_core.suites.suite import Suite
from tests.evaluable import IMAGES, TASKS, by_hand, copy_evaluable, state_of
from tests.fake_accelerator import Fake, fake, only

REAL = [device for device in devices.find_devices() if device.accelerates]
MEASURED = ("classes", "entropy", "l2", "divergence")


def accelerators() -> list[Callable[[], Device]]:
    return [fake, *(lambda device=device: device for device in REAL)]


@pytest.fixture(params=accelerators(), ids=lambda make: make().name + "-" + type(make()).__name__)
def device(request: pytest.FixtureRequest) -> Device:
    made: Device = request.param()
    return made


@pytest.fixture(autouse=True)
def nothing_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_outputs, "PREPARED", PreparedInputs())


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return copy_evaluable(tmp_path / "suite")


def measure(suite: Suite, path: Path, **options: Any) -> dict[str, Any]:
    evaluator = Evaluator(suite, PredictionStore(path), **options)
    images = evaluator.outputs.images(suite.tasks, "val")
    assert suite.base is not None
    return evaluator.measure_member(suite.base, images, "val", MEASURED)


def test_outputs_agree_with_the_cpu_and_timm(suite: Suite, device: Device, tmp_path: Path) -> None:
    here = measure(suite, tmp_path / "here")
    with only(device):
        there = measure(suite, tmp_path / "there")
    for task in TASKS:
        expected, _ = by_hand(state_of(suite), suite.root, task, "val")
        for name in MEASURED[1:]:
            np.testing.assert_allclose(there[task][name], here[task][name], rtol=1e-3, atol=1e-4)
        assert (there[task]["classes"] == expected).all()
    if isinstance(device, Fake):
        weights = sum(value.numel() for value in state_of(suite).values())
        assert sum(device.sent) >= weights * (1 + len(TASKS))  # the base, and the experts


def no_more_than(most: int, seen: list[int]) -> Callable[[Tensor], None]:
    """Memory for so many images at once, and for all weights."""

    def room(tensor: Tensor) -> None:
        if tensor.ndim == 4 and tensor.shape[-1] == tensor.shape[-2] == 16:
            seen.append(len(tensor))
            if len(tensor) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    return room


@pytest.mark.parametrize("most", [40, 7, 1, 0])
def test_batches_are_halved_until_they_fit_and_never_fail(
    suite: Suite, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    # Inputs that are prepared on the CPU, as where memory is too short to keep them there.
    monkeypatch.setattr(suite_outputs.SuiteOutputs, "_normalise", normalise_on_cpu)
    here = measure(suite, tmp_path / "here")
    with only(fake(room=no_more_than(most, seen))):
        there = measure(suite, tmp_path / "there")
    for task in TASKS:
        assert (there[task]["classes"] == here[task]["classes"]).all()
    assert seen[0] == IMAGES * len(TASKS)  # as many at once as there are
    fitting = [count for count in seen if count <= most]
    assert bool(fitting) == (most > 0)
    if most:
        # Once halved, the size is kept: what does not fit is not tried again and again.
        assert sum(count > most for count in seen) <= 6
        assert max(fitting) > most // 2


def normalise_on_cpu(self: SuiteOutputs, images: np.ndarray, task: str) -> Tensor:
    return suite_outputs.normalise_for_task(images, self.suite, task)


def test_weights_that_do_not_fit_are_run_on_the_cpu(suite: Suite, tmp_path: Path) -> None:
    def room(tensor: Tensor) -> None:
        if tensor.ndim == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    here = measure(suite, tmp_path / "here")
    with only(fake(room=room)):
        there = measure(suite, tmp_path / "there")
    for task in TASKS:
        np.testing.assert_allclose(there[task]["entropy"], here[task]["entropy"], rtol=1e-5)


@pytest.mark.parametrize("method", ["adamerging", "regmean", "regmean_plus_plus", "fisher"])
def test_learners_agree_with_the_cpu(
    suite: Suite, device: Device, method: str, tmp_path: Path
) -> None:
    if method == "fisher" and isinstance(device, Fake):
        pytest.skip("torch's function transforms do not pass through the fake")
    extra = {"parameters": {"steps": 3}} if method == "adamerging" else {}
    recipe = make_recipe({"method": method, "tasks": suite.tasks, **extra})

    def merge(name: str) -> dict[str, Tensor]:
        session = MergeSession(suite, None, FactorStore(tmp_path / name))
        evaluator = Evaluator(suite, PredictionStore(tmp_path / f"{name}.sqlite"))
        return session.merge(recipe, learned=evaluator.learn(recipe, session))

    here = merge("here")
    with only(device):
        there = merge("there")
    base = state_of(suite)
    for name, value in here.items():
        assert (there[name] - value).norm() <= 1e-4 * (value - base[name]).norm() + 1e-6, name


def test_the_next_weights_are_made_while_the_last_ones_run(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, float]] = []
    original = evaluators._merge_as_written

    def watched(recipe: Any, *rest: Any) -> Any:
        made.append((threading.current_thread().name, recipe.parameters["scale"]))
        return original(recipe, *rest)

    monkeypatch.setattr(evaluators, "_merge_as_written", watched)
    scales = (0.1, 0.2, 0.3)
    found = {}
    for name, place in (("here", CPU), ("there", fake())):
        made.clear()
        session = MergeSession(suite, None, FactorStore(tmp_path / name))
        evaluator = Evaluator(suite, PredictionStore(tmp_path / f"{name}.sqlite"))
        recipes = [
            make_recipe(
                {"method": "task_arithmetic", "tasks": suite.tasks, "parameters": {"scale": s}}
            )
            for s in scales
        ]
        with only(place):
            images = evaluator.outputs.images(suite.tasks, "val")
            for recipe, following in zip(recipes, [*recipes[1:], None], strict=True):
                if following is not None:
                    evaluator.expect(following, session, images)
                found[name, recipe.parameters["scale"]] = evaluator.measure_recipe(
                    recipe, session, images
                )
        assert [scale for _, scale in made] == list(scales)  # each once
        ahead = [scale for thread, scale in made if thread == "mergescope-ahead"]
        assert ahead == ([] if place == CPU else [0.2, 0.3])
    for scale in scales:
        for task in TASKS:
            here, there = found["here", scale][task], found["there", scale][task]
            assert (here["classes"] == there["classes"]).all()


def test_what_is_expected_and_not_asked_for_changes_nothing() -> None:
    ahead, made = Ahead(), list[str]()

    def make(name: str) -> Callable[[], dict[str, Tensor]]:
        return lambda: made.append(name) or {name: torch.ones(1)}  # type: ignore[func-returns-value]

    ahead.expect("b", make("b"))
    assert list(ahead.take("a", make("a"))) == ["a"]
    assert list(ahead.take("c", make("c"))) == ["c"]
    assert list(ahead.take("b", make("b"))) == ["b"]
    assert sorted(made) == ["a", "b", "b", "c"]

    def fail() -> dict[str, Tensor]:
        raise ValueError("no weights")

    ahead.expect("e", fail)
    ahead.take("d", make("d"))
    with pytest.raises(ValueError, match="no weights"):
        ahead.take("e", fail)


def test_the_key_of_float32_is_what_it_always_was_and_bfloat16_has_its_own(
    suite: Suite, tmp_path: Path
) -> None:
    keys = {}
    for precision in ("float32", "bfloat16"):
        outputs = SuiteOutputs(suite, PredictionStore(tmp_path / "p"), precision=precision)  # type: ignore[arg-type]
        data = outputs.data_digest("digits")
        keys[precision] = outputs._output_key("weights", "digits", "val", "classes")
        if precision == "float32":
            assert keys[precision] == digest_of("predictions-1", "weights", data, "val", "None")
    assert keys["float32"] != keys["bfloat16"]


def test_bfloat16_computes_in_it_and_what_it_changes_is_said(suite: Suite, tmp_path: Path) -> None:
    fine = measure(suite, tmp_path / "p")
    coarse = measure(suite, tmp_path / "p", precision="bfloat16")
    off = np.abs(fine["digits"]["entropy"] - coarse["digits"]["entropy"])
    assert 0 < off.max() < 0.1  # 8 bits rather than 24
    rough = Evaluator(suite, PredictionStore(tmp_path / "p"), precision="bfloat16")
    exact = Evaluator(suite, PredictionStore(tmp_path / "p"))
    assert precision_words(exact, TASKS, "val") is None
    words = precision_words(rough, TASKS, "val")
    changed = {}
    for who in ("expert", "base"):
        count = 0
        for task in TASKS:
            state = state_of(suite, task if who == "expert" else None)
            right, _ = by_hand(state, suite.root, task, "val")
            count += int((right != rough.outputs.predict(state, task, "val")).sum())
        changed[who] = count / (IMAGES * len(TASKS))
    assert words == (
        f"bfloat16 changes {changed['expert']:.2%} of the experts' predictions and "
        f"{changed['base']:.2%} of the base's (60 each) against float32."
    )


def test_prepared_inputs_are_shared_and_bounded(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    original = suite_outputs.load_inputs

    def counted(suite: Suite, task: str, *rest: Any) -> Any:
        reads.append(task)
        return original(suite, task, *rest)

    monkeypatch.setattr(suite_outputs, "load_inputs", counted)
    first, second = (SuiteOutputs(suite, PredictionStore(tmp_path / "p")) for _ in range(2))
    assert first.raw_inputs("digits", "test") is second.raw_inputs("digits", "test")
    assert reads == ["digits"]

    monkeypatch.setattr("analysis.outputs.prepared_inputs.ALL_BYTES", 100)
    held, made = PreparedInputs(), list[str]()

    def prepare(name: str) -> Tensor:
        made.append(name)
        return torch.zeros(10)  # 40 bytes

    for name in ("a", "b", "a", "c", "a", "b"):
        held.get(name, CPU, lambda name=name: prepare(name))  # type: ignore[misc]
    assert made == ["a", "b", "c", "b"]  # b was used longest ago when c came
