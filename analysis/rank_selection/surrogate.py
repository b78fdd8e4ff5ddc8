"""What few images at some settings say about all images at all settings.

Every image of a task is scored at every setting p = (rank, scale) at which it is run. Its scores
are modelled as m(p) + g(p): a surface m common to all images, and the image's own deviation g, a
draw of a Gaussian process with covariance K; images of a suite are independent. Settings are run on
nested sets of images, in levels: level a adds a group of images, and y_a(p) is the mean score of
that group. Hence, with w_a the group's share of all images and n_a their number,

    cov(y_a(p), y_b(q)) = M(p, q) + [a = b] K(p, q) / n_a,
    f(p) = Σ_a w_a y_a(p)    (the score on all images),

and posteriors of f and m are those of Gaussian conditioning. Because groups are shared between
settings, differences between settings are known better than either of them.

Source: [derived]; Gaussian processes as in Rasmussen & Williams, Gaussian Processes for Machine
Learning (2006), chapters 2 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.optimize import minimize

# Lengths are shares of an axis, (log rank, scale). They and the spreads of the priors come from
# CART merges of the bundled suite; the data of each search correct them.
SHORT, LONG, SURFACE = np.array([0.035, 0.4]), np.array([1.0, 2.1]), np.array([0.25, 0.8])
SHORT_SHARE, NUGGET = 0.22, 0.005
FITTED_SETTINGS = 100
# Weight of the measured covariance between settings against the fitted one.
MEASURED = 0.3


@dataclass(frozen=True)
class Levels:
    """Groups of images.

    Attributes:
        images: n_a, the images of a group over all tasks, as 1 / the variance of its mean for
            unit variance per image.
        shares: w_a, summing to 1.
    """

    images: np.ndarray
    shares: np.ndarray


class Surrogate:
    """The model above, its covariances fitted to the first level.

    Args:
        places: P x d, the settings' axes, each scaled to [0, 1].
        axes: which axes these are: indices into (log rank, scale).
        levels: the groups.
        first: settings (numbers below P, ascending) run on the first group.
        scores: per task, len(first) x images of the task in the first group.
    """

    def __init__(
        self,
        places: np.ndarray,
        axes: list[int],
        levels: Levels,
        first: np.ndarray,
        scores: list[np.ndarray],
    ) -> None:
        self.places, self.axes, self.levels = places, axes, levels
        centred = np.concatenate([s - s.mean(axis=1, keepdims=True) for s in scores], axis=1)
        free = sum(s.shape[1] - 1 for s in scores)
        measured = centred @ centred.T / max(free, 1)
        means = np.mean([s.mean(axis=1) for s in scores], axis=0)
        if free == 0 or measured.trace() == 0:  # nothing to learn a covariance from
            measured = (means.var() or 1.0) * np.eye(len(first))
        self.deviation = self._fit_deviation(first, measured, max(free, 1))
        self.sigma = float(np.sqrt(np.diag(self.deviation).mean()))
        self.centre = float(means.mean())
        self.surface = self._fit_surface(first, means)

    def posterior(
        self, settings: np.ndarray, groups: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What is known of every setting, from the mean scores of groups at some.

        Args:
            settings: number of the setting of each value.
            groups: its group.
            values: y.

        Returns:
            Mean (P) and covariance (P x P) of the score on all images, f; mean and standard
            deviation (P) of the surface m, which is the score expected on new images.
        """
        images, shares = self.levels.images, self.levels.shares
        own = self.deviation[np.ix_(settings, settings)] / images[groups][:, None]
        seen = self.surface[np.ix_(settings, settings)] + own * (groups[:, None] == groups)
        factor = _factor(seen)
        common = self.surface[:, settings]
        both = common + self.deviation[:, settings] * (shares / images)[groups]
        gap = cho_solve(factor, values - self.centre)
        whole = self.surface + self.deviation * (shares**2 / images).sum()
        covariance = whole - both @ cho_solve(factor, both.T)
        expected = self.centre + common @ gap
        left = np.diag(self.surface) - (common * cho_solve(factor, common.T).T).sum(axis=1)
        return self.centre + both @ gap, covariance, expected, np.sqrt(np.maximum(left, 0))

    def _fit_deviation(self, first: np.ndarray, measured: np.ndarray, images: int) -> np.ndarray:
        """K by maximum likelihood over `images` images, then moved to the measured covariance."""
        step = max(len(first) // FITTED_SETTINGS, 1)
        some = self.places[first][::step]
        target = measured[::step, ::step]

        def correlation(theta: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
            stretch, share, nugget = np.exp(theta[0]), np.exp(theta[1]), np.exp(theta[2])
            near = np.exp(-_distance(a, b, stretch * SHORT[self.axes]))
            far = np.exp(-_distance(a, b, stretch * LONG[self.axes]))
            same = _distance(a, b, np.ones(len(self.axes))) < 1e-9
            result: np.ndarray = (share * near + far + nugget * same) / (share + 1 + nugget)
            return result

        start = np.log([1.0, SHORT_SHARE / (1 - SHORT_SHARE), NUGGET])

        def loss(theta: np.ndarray) -> float:
            try:
                factor = cho_factor(correlation(theta, some, some), lower=True)
            except LinAlgError:
                return np.inf
            # The variance is where the likelihood is highest, given all else.
            variance = np.trace(cho_solve(factor, target)) / len(some)
            fit = 2 * np.log(np.diag(factor[0])).sum() + len(some) * np.log(variance)
            return float(images * fit + ((theta - start) ** 2).sum())

        theta = _minimum(loss, start)
        factor = _factor(correlation(theta, some, some))
        variance = np.trace(cho_solve(factor, target)) / len(some)
        fitted = variance * correlation(theta, self.places, self.places)
        block = fitted[np.ix_(first, first)]
        # As if the values at `first` had the mixed covariance and the rest followed from them.
        onto = cho_solve(_factor(block), fitted[first]).T
        mixed: np.ndarray = fitted + MEASURED * onto @ (measured - block) @ onto.T
        return mixed

    def _fit_surface(self, first: np.ndarray, means: np.ndarray) -> np.ndarray:
        """M (Matérn 5/2) by maximum likelihood with log-normal priors."""
        places = self.places[first]
        noise = self.deviation[np.ix_(first, first)] / self.levels.images[0]
        gap = means - means.mean()
        spread = max(float(means.var()), 1e-6 * self.sigma**2)
        start = np.log(np.append(SURFACE[self.axes], spread))
        width = np.append(np.full(len(self.axes), 0.5), 1.0)

        def matern(theta: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
            d = np.sqrt(5) * _distance(a, b, np.exp(theta[:-1]))
            result: np.ndarray = np.exp(theta[-1]) * (1 + d + d**2 / 3) * np.exp(-d)
            return result

        def loss(theta: np.ndarray) -> float:
            try:
                factor = cho_factor(matern(theta, places, places) + noise, lower=True)
            except LinAlgError:
                return np.inf
            fit = 2 * np.log(np.diag(factor[0])).sum() + gap @ cho_solve(factor, gap)
            return float(fit + (((theta - start) / width) ** 2).sum())

        return matern(_minimum(loss, start), self.places, self.places)


def _distance(a: np.ndarray, b: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Euclidean distances (len(a) x len(b)) in units of `lengths`."""
    a, b = a / lengths, b / lengths
    square = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    result: np.ndarray = np.sqrt(np.maximum(square, 0))
    return result


def _minimum(loss: object, start: np.ndarray) -> np.ndarray:
    options = {"maxiter": 60, "xatol": 0.05, "fatol": 0.5}
    found: np.ndarray = minimize(loss, start, method="Nelder-Mead", options=options).x
    return found


def root(covariance: np.ndarray) -> np.ndarray:
    """L (lower triangular) with L Lᵀ = a covariance, which rounding may have made singular."""
    jitter = 1e-9 * max(float(np.diag(covariance).mean()), 1e-12)
    while True:
        try:
            return np.linalg.cholesky(covariance + jitter * np.eye(len(covariance)))
        except np.linalg.LinAlgError:
            jitter *= 10


def _factor(covariance: np.ndarray) -> tuple[np.ndarray, bool]:
    return root(covariance), True
