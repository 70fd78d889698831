"""Compares generated images with real ones by features and logits of a net: in float64, on the host.

The meaning of these numbers depends on the net that the features come from, see
`convnorm_jax.evaluation.features`: only those of the 2015 Inception are FID, KID and IS as published.
"""

from typing import Any

import numpy as np
import scipy.linalg
import scipy.special

from convnorm_jax.errors import UserError


class FeatureStatistics:
    """Running mean and covariance of features, batch by batch (Chan, Golub, LeVeque 1979), in float64.

    The order and the size of the batches change the result by rounding errors only.

    >>> statistics = FeatureStatistics()
    >>> statistics.update([[0.0, 0.0], [2.0, 4.0]])
    >>> statistics.update([[1.0, 2.0]])
    >>> statistics.count, statistics.mean.tolist(), statistics.covariance.tolist()
    (3, [1.0, 2.0], [[1.0, 2.0], [2.0, 4.0]])

    Attributes:
      count: number of features seen.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._scatter = np.zeros(0)

    def update(self, features: Any) -> None:
        """Adds a batch.

        Args:
          features: [N, D], any float type; N may be 0.

        Raises:
          ValueError: not two axes, another D than before, or features that are not finite.
        """
        features = _checked_features('features', features)
        if not len(features):
            return
        mean = features.mean(0)
        centred = features - mean
        self._add(len(features), mean, centred.T @ centred)

    def merge(self, other: 'FeatureStatistics') -> None:
        """Adds the features that another `FeatureStatistics` has seen.

        Raises:
          ValueError: its features have another D.
        """
        if other.count:
            self._add(other.count, other._mean, other._scatter)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if not self.count:
            self.count, self._mean, self._scatter = count, mean.copy(), scatter.copy()
            return
        if mean.shape != self._mean.shape:
            raise UserError(
                f'features of {len(mean)} numbers each: expected {len(self._mean)}, as in the batches before; '
                'use one extractor for all of them'
            )
        total, delta = self.count + count, mean - self._mean
        self._scatter += scatter + np.outer(delta, delta) * (self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self.count = total

    @property
    def mean(self) -> np.ndarray:
        """Mean, float64 [D].

        Raises:
          ValueError: no features seen.
        """
        if self.count < 1:
            raise UserError('count=0: expected at least one feature for a mean; call update first')
        return self._mean.copy()

    @property
    def covariance(self) -> np.ndarray:
        """Covariance with divisor count - 1, as of `numpy.cov`, float64 [D, D].

        Raises:
          ValueError: fewer than two features seen.
        """
        if self.count < 2:
            raise UserError(f'count={self.count}: expected at least 2 features for a covariance; give more images')
        return self._scatter / (self.count - 1)


def frechet_distance(mean1: Any, cov1: Any, mean2: Any, cov2: Any) -> float:
    r"""Squared Frechet distance of two Gaussians (Heusel et al. 2017, arXiv 1706.08500), the number that FID reports.

    .. math::
        d^2 = \|\mu_1 - \mu_2\|_2^2 + \text{tr}\left(\Sigma_1 + \Sigma_2
            - 2 \left(\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2}\right)^{1/2}\right)

    The trace of the last root is the sum of the singular values of :math:`\Sigma_1^{1/2} \Sigma_2^{1/2}`. This is
    accurate for singular covariances (fewer images than features) too, so nothing is added to the diagonal.

    >>> frechet_distance([0.0, 0.0], np.eye(2), [3.0, 4.0], np.eye(2))
    25.0

    Args:
      mean1: [D].
      cov1: [D, D], symmetric and positive semidefinite.
      mean2: [D].
      cov2: [D, D], symmetric and positive semidefinite.

    Returns:
      float >= 0.

    Raises:
      ValueError: shapes that do not fit, numbers that are not finite, or matrices that are not covariances.
    """
    mean1, mean2 = (np.asarray(m, np.float64) for m in (mean1, mean2))
    cov1, cov2 = (np.asarray(c, np.float64) for c in (cov1, cov2))
    size = mean1.size
    given = [a.shape for a in (mean1, cov1, mean2, cov2)]
    if given != [(size,), (size, size)] * 2:
        raise UserError(
            f'mean1, cov1, mean2, cov2 of shapes {given}: expected [D], [D, D], [D], [D, D] of one D; '
            'compare statistics of one extractor'
        )
    root1, root2 = _root('cov1', cov1), _root('cov2', cov2)
    distance = _finite('mean1', mean1) - _finite('mean2', mean2)
    overlap = scipy.linalg.svdvals(root1.T @ root2).sum() if root1.size and root2.size else 0.0
    return float(max(distance @ distance + np.trace(cov1) + np.trace(cov2) - 2 * overlap, 0.0))


def _root(name: str, covariance: np.ndarray) -> np.ndarray:
    """[D, rank] R with R R^T = covariance, without the directions whose eigenvalue is zero up to rounding."""
    scale = np.abs(_finite(name, covariance)).max(initial=0.0)
    if np.abs(covariance - covariance.T).max(initial=0.0) > 1e-6 * scale:
        raise UserError(f'{name}: expected a symmetric matrix; give it as FeatureStatistics.covariance or numpy.cov')
    values, vectors = scipy.linalg.eigh((covariance + covariance.T) / 2)
    largest = values.max(initial=0.0)
    if values.size and values[0] < -1e-6 * scale:
        raise UserError(
            f'{name}: its smallest eigenvalue is {values[0]:.3g}, expected none below zero; '
            'give it as FeatureStatistics.covariance or numpy.cov'
        )
    # eigh returns rounding errors in place of zeros, and their roots would be eight digits larger.
    kept = values > len(values) * np.finfo(np.float64).eps * largest
    return vectors[:, kept] * np.sqrt(values[kept])


def inception_score(logits: Any, splits: int = 10) -> tuple[float, float]:
    r"""Inception score (Salimans et al. 2016, arXiv 1606.03498).

    .. math::
        \exp\left(\mathbb{E}_x\, \text{KL}\left(p(y \mid x)\ \|\ p(y)\right)\right)

    The images are split by order, as in the reference code: part i of N images is i N // splits to
    (i + 1) N // splits, and each part has a p(y) of its own. Shuffle samples that are sorted by class.

    >>> inception_score(100 * np.eye(4), splits=1)
    (4.0, 0.0)

    Args:
      logits: [N, K], any float type.
      splits: number of parts.

    Returns:
      (mean, standard deviation) of the scores of the parts; the deviation has the divisor `splits`.

    Raises:
      ValueError: fewer images than parts, not two axes, or logits that are not finite.
    """
    logits = _checked_features('logits', logits)
    total = len(logits)
    if not 1 <= splits <= total:
        raise UserError(
            f'splits={splits}: expected 1 to the number of images, {total}; give more images or fewer splits'
        )
    log_p = scipy.special.log_softmax(logits, axis=1)
    scores = []
    for i in range(splits):
        part = log_p[i * total // splits : (i + 1) * total // splits]
        # In logarithms, where a class that never occurs adds 0 instead of 0 log 0.
        log_mean = scipy.special.logsumexp(part, axis=0) - np.log(len(part))
        scores.append(np.exp((np.exp(part) * (part - log_mean)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    features1: Any, features2: Any, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    r"""Kernel distance KID (Binkowski et al. 2018, arXiv 1801.01401): the unbiased squared MMD of features.

    .. math::
        \frac{1}{n (n - 1)} \sum_{i \ne j} \left( k(x_i, x_j) + k(y_i, y_j) \right)
            - \frac{2}{n^2} \sum_{i, j} k(x_i, y_j), \qquad k(x, y) = \left(\frac{x^\top y}{D} + 1\right)^3

    It is computed on subsets of n features drawn without replacement. An unbiased estimate can be negative.

    Args:
      features1: [N, D], any float type.
      features2: [M, D], any float type.
      subsets: number of subsets.
      subset_size: n.
      seed: of the draws.

    Returns:
      (mean, standard deviation) over the subsets; the deviation has the divisor `subsets`.

    Raises:
      ValueError: fewer features than subset_size, shapes that do not fit, features that are not finite.
    """
    features1, features2 = _checked_features('features1', features1), _checked_features('features2', features2)
    if features1.shape[1] != features2.shape[1]:
        raise UserError(
            f'features1, features2 of shapes {features1.shape}, {features2.shape}: expected the same second axis; '
            'compare features of one extractor'
        )
    smaller = min(len(features1), len(features2))
    if not 2 <= subset_size <= smaller:
        raise UserError(
            f'subset_size={subset_size}: expected 2 to the number of features of the smaller set, {smaller}; '
            'give more images or smaller subsets'
        )
    if subsets < 1:
        raise UserError(f'subsets={subsets}: expected at least 1')
    random = np.random.default_rng(seed)
    distances = []
    for _ in range(subsets):
        x, y = (f[random.choice(len(f), subset_size, replace=False)] for f in (features1, features2))
        distances.append(_squared_mmd(x, y))
    return float(np.mean(distances)), float(np.std(distances))


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    n, size = x.shape
    kxx, kyy, kxy = ((a @ b.T / size + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = kxx.sum() - np.trace(kxx) + kyy.sum() - np.trace(kyy)
    return within / (n * (n - 1)) - 2 * kxy.mean()


def _checked_features(name: str, array: Any) -> np.ndarray:
    array = np.asarray(array, np.float64)
    if array.ndim != 2:
        raise UserError(f'{name} of shape {array.shape}: expected two axes, [images, numbers]')
    return _finite(name, array)


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    wrong = array.size - np.count_nonzero(np.isfinite(array))
    if wrong:
        raise UserError(
            f'{name}: {wrong} of {array.size} numbers are not finite, expected all of them to be; '
            'look for images or weights with nan or inf'
        )
    return array
