"""Heads against scikit-learn's own pipelines, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from analysis.fine_tuning.plan import ProbeSpec
from analysis.fine_tuning.probe import fit_probe
from merge_core.errors import SuiteError


def draw(classes: int) -> tuple[torch.Tensor, np.ndarray]:
    """Features of very different means and sizes, one of them constant, in single precision."""
    source = torch.Generator().manual_seed(classes)
    labels = np.arange(150) % classes
    features = torch.randn(150, 7, generator=source) + torch.from_numpy(labels)[:, None]
    features = features * torch.tensor([1, 1e-3, 50, 1, 2, 3, 0.0]) + 4
    return features, labels


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("kind", ["logistic", "ridge"])
@pytest.mark.parametrize("normalize", [False, True])
def test_logits_are_those_of_scikit_learn(classes: int, kind: str, normalize: bool) -> None:
    features, labels = draw(classes)
    spec = ProbeSpec(kind=kind, penalty=4.0, normalize=normalize)  # type: ignore[arg-type]
    head = fit_probe(features, labels, classes, spec, "features")
    assert head.weight.shape == (classes, 7)
    assert head.weight.dtype == head.bias.dtype == torch.float32

    X = features.double().numpy()
    if normalize:
        X = X / np.linalg.norm(X, axis=1, keepdims=True)
    model = (
        LogisticRegression(C=0.25, max_iter=5000) if kind == "logistic" else RidgeClassifier(4.0)
    )
    scaler = FunctionTransformer(lambda Z: (Z - X.mean(0)) / X.var(0).mean() ** 0.5)
    pipeline = make_pipeline(scaler, model).fit(X, labels)
    wanted = pipeline.decision_function(X)
    logits = head.logits(features).double().numpy()
    if classes == 2:  # scikit-learn gives the evidence for the second class
        factor = 1 if kind == "logistic" else 0.5
        logits = factor * (logits[:, 1] - logits[:, 0])
    # float32 weights: products of width 7 with terms of up to the norms' product.
    sizes = head.weight.norm(dim=1).max() * features.norm(dim=1).max() + head.bias.abs().max()
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=16 * 2.0**-24 * float(sizes) + 1e-6)
    if kind == "logistic":
        found = head.logits(features).softmax(dim=1).numpy()
        np.testing.assert_allclose(found, pipeline.predict_proba(X), atol=1e-3)


def test_a_feature_that_hardly_varies_gets_no_large_weight() -> None:
    features, labels = draw(3)
    plain = fit_probe(features, labels, 3, ProbeSpec(), "features")
    features[:, 6] = 1e-7 * features[:, 0]
    head = fit_probe(features, labels, 3, ProbeSpec(), "features")
    assert head.weight[:, 6].abs().max() < 1e-6 * head.weight.abs().max()
    torch.testing.assert_close(head.weight[:, :6], plain.weight[:, :6], rtol=1e-3, atol=1e-5)
    with pytest.raises(SuiteError, match="the same features for all"):
        fit_probe(torch.ones(150, 7), labels, 3, ProbeSpec(), "features")


def test_classes_without_examples_are_refused() -> None:
    features, labels = draw(3)
    with pytest.raises(SuiteError, match=r"there is none of class 3\. Add some"):
        fit_probe(features, labels, 4, ProbeSpec(), "data of task 'x'")
    with pytest.raises(SuiteError, match="there is one class"):
        fit_probe(features, np.zeros(150, dtype=np.int64), 1, ProbeSpec(), "data of task 'x'")
