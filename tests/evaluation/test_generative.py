"""Distances of features and the score of logits against their definitions."""

import numpy as np
import pytest
import scipy.linalg
from sklearn.metrics.pairwise import polynomial_kernel

from convnorm_jax.evaluation.generative import FeatureStatistics, frechet_distance, inception_score, kernel_distance


@pytest.fixture
def random():
    return np.random.default_rng(0)


def gaussian(random, size, rank):
    """(mean, covariance of the given rank)."""
    root = random.standard_normal((size, rank))
    return random.standard_normal(size), root @ root.T / rank


@pytest.mark.parametrize(('size', 'rank'), [(1, 1), (7, 20), (40, 60)])
def test_frechet_against_the_matrix_root(random, size, rank):
    (m1, c1), (m2, c2) = gaussian(random, size, rank), gaussian(random, size, rank)
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    np.testing.assert_allclose(frechet_distance(m1, c1, m2, c2), expected, rtol=1e-10)
    np.testing.assert_allclose(frechet_distance(m2, c2, m1, c1), expected, rtol=1e-10)


def test_frechet_of_diagonal_covariances(random):
    m1, m2 = random.standard_normal((2, 30))
    a, b = random.uniform(0, 3, (2, 30))
    a[:10], b[5:15] = 0, 0  # of no variance in one, the other, or both
    expected = ((m1 - m2) ** 2).sum() + ((a - b) ** 2).sum()
    np.testing.assert_allclose(frechet_distance(m1, np.diag(a**2), m2, np.diag(b**2)), expected, rtol=1e-12)


def test_frechet_of_singular_covariances(random):
    # Within one subspace the distance is that of the smaller Gaussians.
    (m1, c1), (m2, c2) = gaussian(random, 20, 30), gaussian(random, 20, 30)
    basis = scipy.linalg.qr(random.standard_normal((200, 20)), mode='economic')[0]
    expected = frechet_distance(m1, c1, m2, c2)
    up = lambda c: basis @ c @ basis.T
    np.testing.assert_allclose(frechet_distance(basis @ m1, up(c1), basis @ m2, up(c2)), expected, rtol=1e-9)
    _, deficient = gaussian(random, 200, 50)
    assert 0 <= frechet_distance(np.zeros(200), deficient, np.zeros(200), deficient) < 1e-9 * np.trace(deficient)
    zero = np.zeros((20, 20))
    np.testing.assert_allclose(frechet_distance(m1, c1, m1, zero), np.trace(c1))
    assert frechet_distance(m1, zero, m1, zero) == 0


def test_frechet_scales_with_the_square(random):
    (m1, c1), (m2, c2) = gaussian(random, 9, 5), gaussian(random, 9, 20)
    one = frechet_distance(m1, c1, m2, c2)
    for scale in (1e-6, 1e6):
        scaled = frechet_distance(scale * m1, scale**2 * c1, scale * m2, scale**2 * c2)
        np.testing.assert_allclose(scaled, scale**2 * one, rtol=1e-9)


def test_frechet_mistakes(random):
    mean, cov = gaussian(random, 4, 9)
    with pytest.raises(ValueError, match=r'expected \[D\], \[D, D\], \[D\], \[D, D\] of one D'):
        frechet_distance(mean, cov, mean[:3], cov[:3, :3])
    with pytest.raises(ValueError, match='cov2: 1 of 16 numbers are not finite'):
        frechet_distance(mean, cov, mean, np.where(np.arange(16).reshape(4, 4) == 5, np.nan, cov))
    with pytest.raises(ValueError, match='cov1: expected a symmetric matrix'):
        frechet_distance(mean, np.triu(cov), mean, cov)
    with pytest.raises(ValueError, match='cov1: its smallest eigenvalue is -'):
        frechet_distance(mean, -cov, mean, cov)


def test_inception_score_by_hand(random):
    logits = 3 * random.standard_normal((23, 5))
    scores = []
    for i in range(4):  # 23 pictures: parts of 5, 6, 6, 6
        part = logits[i * 23 // 4 : (i + 1) * 23 // 4]
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        kl = (p * (np.log(p) - np.log(p.mean(0)))).sum(1)
        scores.append(np.exp(kl.mean()))
    np.testing.assert_allclose(inception_score(logits, 4), (np.mean(scores), np.std(scores)), rtol=1e-12)
    np.testing.assert_allclose(inception_score(logits + 700, 4), (np.mean(scores), np.std(scores)), rtol=1e-9)


def test_inception_score_of_extremes():
    # Certain and evenly spread over 10 classes: 10. All alike: 1. Also where exp underflows.
    certain = 1e4 * np.eye(10)[np.arange(200) % 10]
    np.testing.assert_allclose(inception_score(certain), (10, 0), atol=1e-9)
    np.testing.assert_allclose(inception_score(certain[::10]), (1, 0), atol=1e-9)
    with pytest.raises(ValueError, match='splits=10: expected 1 to the number of images, 9'):
        inception_score(certain[:9])
    with pytest.raises(ValueError, match='logits: 1 of 10 numbers are not finite'):
        inception_score(np.where(np.arange(10) == 3, np.inf, 0.0)[None], 1)


def test_kernel_distance_by_explicit_sums(random):
    x, y = random.standard_normal((12, 6)), random.standard_normal((12, 6)) + 0.3
    # All of each set is one subset, whatever its order.
    kernel = lambda a, b: polynomial_kernel(a, b, degree=3, gamma=1 / 6, coef0=1)
    kxx, kyy, kxy = kernel(x, x), kernel(y, y), kernel(x, y)
    total = 0.0
    for i in range(12):
        for j in range(12):
            total += (kxx[i, j] + kyy[i, j]) / (12 * 11) if i != j else 0
            total -= 2 * kxy[i, j] / 12**2
    mean, deviation = kernel_distance(x, y, subsets=3, subset_size=12)
    np.testing.assert_allclose(mean, total, rtol=1e-12)
    assert deviation < 1e-12


def test_kernel_distance_is_unbiased_and_seeded(random):
    x, y = random.standard_normal((2, 2000, 4))
    mean, deviation = kernel_distance(x, y, subsets=200, subset_size=50)
    assert abs(mean) < 4 * deviation / np.sqrt(200) + 0.01 < kernel_distance(x, y + 1, 5, 50)[0]
    assert kernel_distance(x, y, 2, 50, seed=3) == kernel_distance(x, y, 2, 50, seed=3)
    assert kernel_distance(x, y, 2, 50, seed=3) != kernel_distance(x, y, 2, 50, seed=4)


def test_kernel_distance_mistakes(random):
    x = random.standard_normal((30, 4))
    with pytest.raises(
        ValueError, match='subset_size=1000: expected 2 to the number of features of the smaller set, 20'
    ):
        kernel_distance(x, x[:20])
    with pytest.raises(ValueError, match='expected the same second axis'):
        kernel_distance(x, x[:, :2], subset_size=5)
    with pytest.raises(ValueError, match='subsets=0'):
        kernel_distance(x, x, subsets=0, subset_size=5)
    with pytest.raises(ValueError, match=r'features1 of shape \(4,\): expected two axes'):
        kernel_distance(x[0], x)


def test_statistics_batch_by_batch(random):
    # Far from zero, where a sum of squares would lose the variance.
    features = (1e4 + random.standard_normal((101, 8))).astype(np.float32)
    whole, left, right = FeatureStatistics(), FeatureStatistics(), FeatureStatistics()
    for part in np.array_split(features, [1, 1, 30, 77]):
        whole.update(part)
    left.update(features[:40])
    right.update(features[40:])
    left.merge(right)
    left.merge(FeatureStatistics())
    empty = FeatureStatistics()
    empty.merge(left)
    for statistics in (whole, left, empty):
        assert statistics.count == 101
        np.testing.assert_allclose(statistics.mean, features.astype(float).mean(0), rtol=1e-14)
        np.testing.assert_allclose(statistics.covariance, np.cov(features.astype(float).T), rtol=1e-9, atol=1e-11)
    left.update(features)  # what was merged shares no memory
    assert empty.count == 101
    np.testing.assert_allclose(empty.covariance, whole.covariance, rtol=1e-9)


def test_statistics_mistakes(random):
    statistics = FeatureStatistics()
    with pytest.raises(ValueError, match='count=0'):
        statistics.mean  # noqa: B018
    statistics.update(random.standard_normal((1, 3)))
    with pytest.raises(ValueError, match='count=1: expected at least 2 features'):
        statistics.covariance  # noqa: B018
    with pytest.raises(ValueError, match='of 4 numbers each: expected 3'):
        statistics.update(random.standard_normal((2, 4)))
    with pytest.raises(ValueError, match='2 of 6 numbers are not finite'):
        statistics.update([[1, 2, np.nan], [np.inf, 0, 0]])
    assert statistics.count == 1
