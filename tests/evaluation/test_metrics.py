import functools
from operator import add

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from references import load

from ditx.evaluation.metrics import Moments, frechet_distance, inception_score, precision_recall, squared_radii
from ditx.testing import x64

SEEDS = st.integers(0, 999)


@functools.cache
def golden():
    """`metrics.npz` and the arrays behind it, made again from their seed and checked at every hundredth row."""
    file, random = load("metrics.npz"), np.random.RandomState(0)
    mixing = random.standard_normal((64, 64))
    reference = (random.standard_normal((700, 64)) @ mixing / 8).astype(np.float32)
    samples = (1.05 * (random.standard_normal((900, 64)) @ mixing / 8) + 0.15).astype(np.float32)
    random.randint(0, 256, (2, 40, 56, 3))  # the images of the test of resizing
    logits = (2 * random.standard_normal((1200, 100))).astype(np.float32).astype(np.float16)
    made = {"reference": reference, "samples": samples, "logits": logits}
    for name, array in made.items():
        np.testing.assert_allclose(array[::100], file[name], rtol=1e-3 if name == "logits" else 1e-6)
    return file | made


def gaussian(features):
    moments = Moments.of(features)
    return moments.mean, moments.covariance


def orthogonal(random, size):
    return np.linalg.qr(random.standard_normal((size, size)))[0]


def squared_distances(x, y):
    return np.square(x[:, None] - y[None]).sum(-1)


def brute_force(reference, samples, k):
    """Precision and recall by their definition, in float64."""
    radii = [np.sort(squared_distances(x, x), axis=1)[:, k] for x in (reference, samples)]
    distances = squared_distances(reference, samples)
    return (distances <= radii[0][:, None]).any(0).mean(), (distances <= radii[1]).any(1).mean()


def test_frechet_distance_equals_the_suites():
    file = golden()
    reference = gaussian(file["reference"])
    assert frechet_distance(*reference, *gaussian(file["samples"])) == pytest.approx(file["frechet"], rel=1e-6)
    few = gaussian(file["samples"][:40])
    assert frechet_distance(*reference, *few) == pytest.approx(file["frechet_40_samples"], rel=1e-6)


def test_inception_score_equals_the_suites():
    file = golden()
    score = inception_score(file["logits"], int(file["is_split"]))
    assert score == pytest.approx(file["inception_score"], rel=1e-6)


def test_precision_and_recall_equal_the_suites():
    file = golden()
    # The suite's sums of half-precision numbers are rounded on their way, in an order that is not known.
    np.testing.assert_allclose(squared_radii(file["reference"]), file["radii_reference"][:, 0], rtol=2**-9)
    precision, recall = precision_recall(jnp.asarray(file["reference"]), file["samples"])
    assert abs(precision - file["precision"]) < 1.01 / 900
    assert abs(recall - file["recall"]) < 1.01 / 700


@given(SEEDS, st.integers(1, 6), st.integers(0, 6), st.integers(0, 6))
def test_frechet_distance_of_covariances_with_the_same_axes(seed, size, rank_a, rank_b):
    random = np.random.default_rng(seed)
    mean_a, mean_b = random.standard_normal((2, size))
    a, b = (random.exponential(size=size) * (np.arange(size) < rank) for rank in (rank_a, rank_b))
    axes = orthogonal(random, size)
    distance = frechet_distance(mean_a, axes * a @ axes.T, mean_b, axes * b @ axes.T)
    expected = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert distance == pytest.approx(expected, rel=1e-10, abs=1e-12)


@given(SEEDS, st.integers(2, 5))
def test_frechet_distance_of_planes(seed, size):
    # tr sqrt(A B) is |u . v| for the covariances u u^T and v v^T, which no rounding of small eigenvalues may hide.
    random = np.random.default_rng(seed)
    u, v = random.standard_normal((2, size))
    zero = np.zeros(size)
    distance = frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v))
    assert distance == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-10, abs=1e-10)


@given(SEEDS, st.integers(1, 5))
def test_frechet_distance_is_a_distance(seed, size):
    random = np.random.default_rng(seed)
    a, b = (gaussian(random.standard_normal((9, size))) for _ in range(2))
    assert frechet_distance(*a, *a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-10)
    turn = orthogonal(random, size)
    turned = [(turn @ mean, turn @ cov @ turn.T) for mean, cov in (a, b)]
    assert frechet_distance(*turned[0], *turned[1]) == pytest.approx(frechet_distance(*a, *b), rel=1e-10, abs=1e-12)


@given(SEEDS, st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1), st.randoms())
def test_moments_of_parts_in_any_order_are_those_of_the_whole(seed, sizes, order):
    random = np.random.default_rng(seed)
    parts = [random.standard_normal((size, 3)) + 10 * random.standard_normal() for size in sizes]
    whole = np.concatenate(parts)
    order.shuffle(parts)
    merged = functools.reduce(add, map(Moments.of, parts))
    assert merged.count == len(whole)
    np.testing.assert_allclose(merged.mean, whole.mean(0), rtol=1e-10)
    np.testing.assert_allclose(merged.covariance, np.cov(whole, rowvar=False), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(Moments.of(whole).covariance, merged.covariance, rtol=1e-10, atol=1e-10)


def test_moments_are_in_double_precision_and_stable():
    features = np.float32(4096) + np.random.default_rng(0).integers(-2, 3, (5000, 4)).astype(np.float32) / 64
    halves = Moments.of(jnp.asarray(features[:1234])) + Moments.of(features[1234:])
    np.testing.assert_allclose(
        halves.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("classes", [2, 7])
def test_inception_scores_between_one_and_the_number_of_classes(classes):
    assert inception_score(np.ones((10, classes)), 5) == pytest.approx(1, rel=1e-12)
    sure = 1e4 * np.tile(np.eye(classes), (3, 1)) - 1e4
    assert inception_score(sure) == pytest.approx(classes, rel=1e-12)
    assert inception_score(jnp.asarray(sure, jnp.float32), classes) == pytest.approx(classes, rel=1e-6)


@given(SEEDS, st.integers(1, 9), st.integers(1, 5))
def test_inception_score_is_the_mean_over_splits_in_order(seed, count, split):
    logits = 3 * np.random.default_rng(seed).standard_normal((count, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    parts = [p[start : start + split] for start in range(0, count, split)]
    scores = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in parts]
    assert inception_score(logits, split) == pytest.approx(np.mean(scores), rel=1e-10)


@given(SEEDS, st.sampled_from([1, 3]))
def test_precision_and_recall_by_their_definition(seed, k):
    random = np.random.default_rng(seed)
    # Small whole numbers are exact in half precision, with their distances and many ties of these.
    whole = [random.integers(-3, 4 + shift, (size, 2)).astype(np.float32) for size, shift in ((21, 0), (30, 3))]
    assert precision_recall(*whole, k) == pytest.approx(brute_force(*whole, k), abs=1e-12)
    for scale in (1, 100):  # the latter too large for half precision
        sets = [scale * (random.standard_normal((size, 3)) + shift) for size, shift in ((25, 0), (31, 1))]
        assert precision_recall(*sets, k, half=scale > 1) == pytest.approx(brute_force(*sets, k), abs=1e-12)


def test_more_rows_than_fit_at_once():
    random = np.random.default_rng(0)
    x, y = random.uniform(0, 1, (1100, 2)), random.uniform(0.5, 1.5, (1029, 2))
    assert precision_recall(x, y, half=False) == pytest.approx(brute_force(x, y, 3), abs=1e-12)
    fifth = np.sort(squared_distances(x, x), axis=1)[:, 5]
    np.testing.assert_allclose(squared_radii(x, 5, half=False), fifth, rtol=0, atol=1e-6)  # differences of squares of 1


@pytest.mark.parametrize("half", [True, False])
def test_sets_that_are_the_same_or_apart(half):
    x = np.random.default_rng(0).standard_normal((40, 5))
    assert precision_recall(x, x, half=half) == (1, 1)
    assert precision_recall(x, x + 50, half=half) == (0, 0)
    # One in a hundred thousand beside a mean of 100 would be lost to squares of 10000.
    assert precision_recall(1e-3 * x + 100, 1e-3 * x[::-1] + 100, half=False) == (1, 1)
    radii = squared_radii(1e-3 * x + 100, half=False)
    np.testing.assert_allclose(radii, np.sort(squared_distances(1e-3 * x, 1e-3 * x), axis=1)[:, 3], rtol=1e-4)


@x64
def test_precision_does_not_depend_on_that_of_jax():
    x, y = np.random.default_rng(0).standard_normal((2, 30, 4))
    assert precision_recall(x, y) == pytest.approx(brute_force(x, y, 3), abs=1.01 / 30)
    assert squared_radii(x).dtype == np.float32


EYE, ZERO, NAN = np.eye(2), np.zeros(2), np.full((2, 2), np.nan)


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda: Moments.of(np.zeros(4)), r"features have shape \(4,\); give one row a sample"),
        (lambda: Moments.of(NAN), "features are not finite in 2 of 2 rows, first in row 0"),
        (lambda: Moments.of(EYE[:1]).covariance, "needs at least 2 samples, and there are 1"),
        (lambda: Moments.of(EYE) + Moments.of(np.eye(3)), "moments of 2 and of 3 features cannot be added"),
        (lambda: frechet_distance(ZERO, EYE, ZERO, np.eye(3)), r"second .* shapes \(2,\) and \(3, 3\), not \(d,\)"),
        (lambda: frechet_distance(EYE, EYE, ZERO, EYE), r"first .* shapes \(2, 2\) and \(2, 2\)"),
        (lambda: frechet_distance(ZERO, EYE, np.zeros(3), np.eye(3)), "first distribution is of 2 .* second of 3"),
        (lambda: frechet_distance(ZERO, NAN, ZERO, EYE), "the first mean or covariance is not finite"),
        (
            lambda: frechet_distance(ZERO, EYE, ZERO, -EYE),
            "second covariance is not a covariance: its smallest eigenvalue is -1",
        ),
        (lambda: frechet_distance(ZERO, EYE, ZERO, np.array([[1.0, 0.5], [0, 1]])), "up to 0.5 from its transpose"),
        (lambda: inception_score(EYE, 0), "2 samples of 2 classes in splits of 0 give no Inception Score"),
        (lambda: inception_score(np.zeros((0, 5))), "0 samples of 5 classes"),
        (lambda: inception_score(NAN), "logits are not finite in 2 of 2"),
        (
            lambda: precision_recall(np.zeros((5, 2)), np.zeros((5, 3))),
            r"the reference and the samples have \[2, 3\] features",
        ),
        (lambda: precision_recall(np.zeros((5, 2)), EYE), "samples have 2 rows; neighbour 3 needs at least 4"),
        (lambda: precision_recall(EYE, EYE, 0), "reference have 2 rows; neighbour 0 needs at least 2"),
        (lambda: precision_recall(np.zeros((5, 2)), np.float32([[np.inf, 0]] * 5)), "samples are not finite in 5 of 5"),
    ],
)
def test_impossible_inputs_are_value_errors(compute, message):
    with pytest.raises(ValueError, match=message):
        compute()
