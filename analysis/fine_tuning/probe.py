"""Linear classifiers fitted to frozen features, by scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.fine_tuning.plan import ProbeSpec
from analysis.outputs.heads import Head
from merge_core.errors import SuiteError

MOST_ITERATIONS = 2000


def fit_probe(
    features: Tensor, labels: np.ndarray, classes: int, spec: ProbeSpec, what: str
) -> Head:
    """A linear classifier of features whose variance is 1 on average.

    They are shifted and scaled before the fit, which is folded into weight and bias, so that one
    penalty suits networks of any scale. All features have one scale: one that hardly varies in the
    base would get so large a weight that the first step of fine-tuning made it outweigh all
    others. Logits of logistic regression are logarithms of probabilities up to a constant; those
    of ridge regression estimate +1 for the class and −1 for the others.

    Args:
        features: N x width.
        labels: N classes; each of them has an example.
        classes: how many.
        spec: how it is fitted.
        what: whose data these are, for messages.

    Raises:
        SuiteError: a class without example, one class only, or a fit that does not converge.
    """
    missing = np.setdiff1d(np.arange(classes), labels)
    if len(missing) or classes < 2:
        reason = f"there is none of class {missing[0]}" if len(missing) else "there is one class"
        raise SuiteError(
            f"{what[0].upper()}{what[1:]}: a classifier needs training examples of every class, "
            f"and {reason}. Add some, raise 'examples', or leave the class out."
        )
    if spec.normalize:
        features = features / features.norm(dim=-1, keepdim=True)
    X = features.double().numpy()
    mean, scale = X.mean(axis=0), float(np.sqrt(X.var(axis=0).mean()))
    if scale == 0:
        raise SuiteError(f"{what[0].upper()}{what[1:]}: the base gives the same features for all.")
    model = _fit((X - mean) / scale, labels, spec, what)
    weight, bias = np.atleast_2d(model.coef_) / scale, np.atleast_1d(model.intercept_)
    bias = bias - weight @ mean
    if classes == 2:  # one row that stands for the difference of two
        weight, bias = np.concatenate([-weight, weight]), np.concatenate([-bias, bias])
        if spec.kind == "logistic":
            weight, bias = weight / 2, bias / 2
    rounded = [torch.from_numpy(each).float() for each in (weight, bias)]
    return Head(rounded[0], rounded[1], spec.normalize)


def choose_shots(labels: np.ndarray, shots: int | None) -> np.ndarray:
    """Numbers of the first so many examples of each class, ascending; of all where None.

    Example:
        >>> choose_shots(np.array([0, 1, 1, 1, 0, 0]), 2).tolist()
        [0, 1, 2, 4]
    """
    if shots is None:
        return np.arange(len(labels))
    chosen = [np.flatnonzero(labels == label)[:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def _fit(X: np.ndarray, labels: np.ndarray, spec: ProbeSpec, what: str) -> Any:
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # so that the last bits do not depend on the machine
        if spec.kind == "ridge":
            return RidgeClassifier(alpha=spec.penalty).fit(X, labels)
        model = LogisticRegression(C=1 / spec.penalty, max_iter=MOST_ITERATIONS).fit(X, labels)
    if int(model.n_iter_.max()) >= MOST_ITERATIONS:
        raise SuiteError(
            f"{what[0].upper()}{what[1:]}: logistic regression did not converge in "
            f"{MOST_ITERATIONS} iterations. Raise the probe's 'penalty'."
        )
    return model
