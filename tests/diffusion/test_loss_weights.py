import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ditx
from ditx.diffusion.loss_weights import log_snr_decay, min_snr, sigmoid
from ditx.diffusion.parameterization import loss_ratio
from ditx.diffusion.schedule import at, noise_level
from ditx.testing import steps, x64

FULL = ditx.linear_schedule()


@given(steps(), st.floats(0.5, 20))
@x64
def test_min_snr_equals_the_paper_for_each_prediction(step, gamma):
    schedule, i = step
    level = noise_level(schedule, i)
    snr = schedule.alpha[i] ** 2 / schedule.sigma[i] ** 2
    expected = {"x0": min(snr, gamma), "eps": min(snr, gamma) / snr, "v": min(snr, gamma) / (snr + 1)}
    for kind, weight in expected.items():
        actual = min_snr(at(schedule.log_snr, i), gamma) * loss_ratio(kind, "eps", level)
        np.testing.assert_allclose(actual, weight, rtol=1e-10)


@given(steps(), st.floats(-4, 4))
@x64
def test_sigmoid_weight_of_the_noise_implies_that_of_the_data(step, bias):
    schedule, i = step
    level, log_snr = noise_level(schedule, i), schedule.log_snr[i]
    np.testing.assert_allclose(sigmoid(at(schedule.log_snr, i), bias), 1 / (1 + math.exp(log_snr - bias)), rtol=1e-9)
    actual = sigmoid(at(schedule.log_snr, i), bias) * loss_ratio("x0", "eps", level)
    # Hoogeboom et al. 2024: the weight of the data's error is e^b sigmoid(log_snr - b).
    np.testing.assert_allclose(actual, math.exp(bias) / (1 + math.exp(bias - log_snr)), rtol=1e-9)


@x64
def test_log_snr_decay_is_the_derivative():
    falls = np.array([log_snr_decay(FULL, jnp.asarray(i)) for i in (0, 400, 999)])
    difference = np.array([FULL.log_snr[0] - FULL.log_snr[1], (FULL.log_snr[399] - FULL.log_snr[401]) / 2, 0])
    difference[2] = FULL.log_snr[998] - FULL.log_snr[999]
    np.testing.assert_allclose(falls, 1000 * difference, rtol=1e-9)
    # The exact derivative of the continuous schedule, -d log alpha_bar / dt / (1 - alpha_bar).
    beta = FULL.beta[400]
    assert falls[1] == pytest.approx(1000 * beta / (1 - FULL.alpha_bar[400]), rel=0.01)
