import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from strategies import x64

from ditx.diffusion import flow, loss_weights
from ditx.diffusion.objective import BINS, ObjectiveConfig, make_objective
from ditx.diffusion.parameterization import to_target
from ditx.diffusion.schedule import cosine_schedule, level, linear_schedule, respace

close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-10)
X0 = np.linspace(-1, 1, 32).reshape(4, 4, 2)
ERROR = 0.1
CONFIGS = [
    ObjectiveConfig(),
    ObjectiveConfig("x0", "cosine"),
    ObjectiveConfig("v", "cosine"),
    ObjectiveConfig("v", weighting="min-snr"),
    ObjectiveConfig("x0", weighting="sigmoid"),
    ObjectiveConfig("flow"),
    ObjectiveConfig("flow", prediction="x0", flow_density="uniform"),
    ObjectiveConfig("sit", flow_shift=3.0),
]


def expected(config, here, i):
    """The squared error in what is predicted, as the loss counts it."""
    snr = float(here.alpha / here.sigma) ** 2
    if config.weighting == "min-snr":  # v = (noise - sigma x) / alpha, so an error in v is one / alpha in the noise
        return min(1, 5 / snr) * float(here.alpha) ** 2 * ERROR**2
    if config.weighting == "sigmoid":
        fall = float(loss_weights.log_snr_fall(linear_schedule(), i))
        return fall / (1 + snr) * snr * ERROR**2
    return ERROR**2 / (max(float(here.sigma), 0.05) ** 2 if config.prediction == "x0" else 1)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@x64
def test_a_network_is_asked_for_what_its_objective_says(config):
    sit = config.objective == "sit"
    for seed in range(5):
        noise = jax.random.normal(jax.random.split(jax.random.key(seed))[1], X0.shape)
        seen = []

        def predict(x, t, noise=noise, seen=seen):
            if config.is_flow:
                s = 1 - t if sit else t / 1000
                here, i, place = flow.level(s), 0, s
            else:
                schedule = linear_schedule() if config.schedule == "linear" else cosine_schedule()
                i = int(t)
                here, place = level(schedule, i), i / 1000
            close(x, here.alpha * X0 + here.sigma * noise)
            seen.append((here, i, float(place)))
            kind = config.prediction if config.is_flow else config.objective
            return (-1 if sit else 1) * to_target(kind, jnp.asarray(X0), noise, here) + ERROR

        terms = make_objective(config)(predict, jnp.asarray(X0), jax.random.key(seed))
        ((here, i, place),) = seen
        close(terms["loss"], expected(config, here, i))
        by_time = np.zeros((2, BINS))
        by_time[:, int(BINS * place)] = 1, terms["loss"]
        close(terms["by_time"], by_time)


def test_flow_times_are_uniform_or_shifted_towards_the_noise():
    def shares(**fields):
        objective = make_objective(ObjectiveConfig("flow", flow_density="uniform", **fields))
        draw = jax.vmap(lambda key: objective(lambda x, t: x, jnp.zeros((1, 1, 1)), key)["by_time"][0])
        return np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(0), 20_000)).mean(0))

    np.testing.assert_allclose(shares(), 0.1, atol=0.01)  # standard error 0.002
    edges = np.linspace(0, 1, 11)
    np.testing.assert_allclose(shares(flow_shift=3.0), np.diff(edges / (3 - 2 * edges)), atol=0.01)


def test_levels_are_those_of_training_and_shorter_ones():
    same = functools.partial(np.testing.assert_array_equal)
    same(ObjectiveConfig().levels().time, linear_schedule().time)
    same(ObjectiveConfig("v", "cosine").levels(7).alpha, respace(cosine_schedule(), 7).alpha)
    shifted = ObjectiveConfig("flow", flow_shift=3.0).levels(4)
    close(shifted.sigma, [0.5, 0.75, 0.9, 1])
    for config in CONFIGS:
        for spacing in ("log-snr", "karras"):
            levels = config.levels(9, spacing)
            assert len(levels) == 9 and np.isfinite(levels.log_snr).all()
            assert levels.prediction == (config.prediction if config.is_flow else config.objective)
