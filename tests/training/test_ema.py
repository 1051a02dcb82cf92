import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditx.testing import x64
from ditx.training import ema

STEPS = 4000


def profile(gamma, step, count=STEPS):
    """The share of each step's weights in the average at `step`."""
    edges = np.clip(np.arange(count + 1) / step, 0, 1) ** (gamma + 1)
    return np.diff(edges)


@given(st.floats(0.005, 0.28))
def test_length_is_the_deviation_of_the_profile(length):
    gamma = ema.gamma_of(length)
    assert ema.length_of(gamma) == pytest.approx(length, rel=1e-9)
    shares, middles = profile(gamma, STEPS), (np.arange(STEPS) + 0.5) / STEPS
    mean = shares @ middles
    assert np.sqrt(shares @ (middles - mean) ** 2) == pytest.approx(length, rel=1e-2)


def test_published_powers():
    """Karras et al. 2024, section 3.1: lengths 0.05 and 0.10 are powers 16.97 and 6.94."""
    assert ema.gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert ema.gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.29, float("nan")])
def test_impossible_lengths_are_named(length):
    with pytest.raises(ValueError, match=f"length is {length} of the run; give a share above 0 and below 0.289"):
        ema.gamma_of(length)


def track(values, gamma):
    """The average after each update, as a training step keeps it."""

    def update(average, entry):
        step, value = entry
        average = average + ema.update_rate(step, gamma) * (value - average)
        return average, average

    return np.asarray(
        jax.lax.scan(update, jnp.zeros(values.shape[1:]), (jnp.arange(1, len(values) + 1), jnp.asarray(values)))[1]
    )


@x64
def test_updates_keep_the_mean_over_the_profile():
    values = np.random.default_rng(0).standard_normal(50)
    averages = track(values, 6.94)
    for step in (1, 2, 17, 50):
        np.testing.assert_allclose(averages[step - 1], profile(6.94, step, 50) @ values, rtol=1e-10, atol=1e-12)


def test_late_updates_are_not_lost_in_float32():
    assert float(ema.update_rate(jnp.asarray(2_000_000), 16.97)) == pytest.approx(17.97 / 2e6, rel=1e-4)


@given(st.floats(0, 20), st.floats(0, 20), st.integers(200, STEPS), st.integers(200, STEPS))
def test_inner_product_is_that_of_the_profiles(gamma1, gamma2, step1, step2):
    arguments = (np.array([float(value)]) for value in (step1, gamma1, step2, gamma2))
    numeric = profile(gamma1, step1) @ profile(gamma2, step2)
    assert ema.inner_product(*arguments) == pytest.approx(numeric, rel=2e-2)


@pytest.mark.parametrize("step", [STEPS, STEPS - 1000])
@x64
def test_any_length_is_reconstructed_from_two_as_if_tracked(step):
    walks = np.cumsum(np.random.default_rng(0).standard_normal((STEPS, 64)), 0)
    ema_gammas = [ema.gamma_of(0.05), ema.gamma_of(0.10)]
    tracked = [track(walks, gamma) for gamma in ema_gammas]
    kept = [(s, g) for s in range(250, STEPS + 1, 250) for g in range(2)]
    for length in (0.06, 0.075, 0.15):
        gamma = ema.gamma_of(length)
        weights = ema.reconstruction([s for s, _ in kept], [ema_gammas[g] for _, g in kept], step=step, gamma=gamma)
        assert weights.sum() == pytest.approx(1, abs=2e-3)
        exact = track(walks, gamma)[step - 1]
        error = np.linalg.norm(weights @ [tracked[g][s - 1] for s, g in kept] - exact)
        nearest = min(np.linalg.norm(average[step - 1] - exact) for average in tracked)
        assert error < 0.03 * nearest, (length, error / nearest)


def test_a_stored_average_is_reconstructed_as_itself():
    weights = ema.reconstruction([100, 200, 200], [7.0, 7.0, 17.0], step=200, gamma=17.0)
    np.testing.assert_allclose(weights, [0, 0, 1], atol=1e-8)


def test_a_later_step_than_any_stored_is_refused():
    with pytest.raises(ValueError, match=r"no average of step 300 or later is stored \(there are \[100, 200\]\)"):
        ema.reconstruction([200, 100], [7.0, 7.0], step=300, gamma=7.0)
