import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditx.diffusion import flow, loss_weights
from ditx.diffusion.objective import BINS, ObjectiveConfig, make_objective
from ditx.diffusion.parameterization import to_target
from ditx.diffusion.schedule import cosine_schedule, linear_schedule, noise_level, respace
from ditx.testing import x64

close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-10)
X0 = np.linspace(-1, 1, 32).reshape(4, 4, 2)
ERROR = 0.1
CONFIGS = [
    ObjectiveConfig(),
    ObjectiveConfig("cosine", "x0"),
    ObjectiveConfig("cosine", "v"),
    ObjectiveConfig("cosine", "velocity"),
    ObjectiveConfig("linear", "v", "min-snr"),
    ObjectiveConfig("linear", "x0", "sigmoid"),
    ObjectiveConfig("flow", "velocity"),
    ObjectiveConfig("flow", "x0", flow_times="uniform"),
    ObjectiveConfig("flow", "eps", flow_times=(2.0, 1.0), flow_shift=3.0),
    ObjectiveConfig("flow", "v", flow_shift=3.0),
]


def expected(config, level, i):
    """The loss of an output that is off by ERROR."""
    alpha, sigma = float(level.alpha), float(level.sigma)
    if config.is_flow:  # Errors of the velocity, each output's error divided by its determinant.
        divisor = {"velocity": 1, "x0": sigma, "eps": alpha, "v": alpha**2 + sigma**2}[config.prediction]
        return ERROR**2 / max(divisor, 0.05) ** 2
    snr = (alpha / sigma) ** 2
    if config.loss_weight == "min-snr":  # v = (noise - sigma x) / alpha, so an error in v is one / alpha in the noise
        return min(1, 5 / snr) * alpha**2 * ERROR**2
    if config.loss_weight == "sigmoid":
        fall = float(loss_weights.log_snr_decay(linear_schedule(), i))
        return fall / (1 + snr) * snr * ERROR**2
    return ERROR**2


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@x64
def test_network_reads_and_predicts_as_the_objective_says(config):
    for seed in range(5):
        noise = jax.random.normal(jax.random.split(jax.random.key(seed))[1], X0.shape)
        seen = []

        def predict(x, t, noise=noise, seen=seen):
            if config.is_flow:
                s = t / 1000
                level, i, place = flow.noise_level(s), 0, s
            else:
                schedule = linear_schedule() if config.schedule == "linear" else cosine_schedule()
                i = int(t)
                level, place = noise_level(schedule, i), i / 1000
            close(x, level.alpha * X0 + level.sigma * noise)
            seen.append((level, i, float(place)))
            return to_target(config.prediction, jnp.asarray(X0), noise, level) + ERROR

        terms = make_objective(config)(predict, jnp.asarray(X0), jax.random.key(seed))
        ((level, i, place),) = seen
        close(terms["loss"], expected(config, level, i))
        by_time = np.zeros((2, BINS))
        by_time[:, int(BINS * place)] = 1, terms["loss"]
        close(terms["by_time"], by_time)


def test_flow_times_are_uniform_or_shifted_towards_the_noise():
    def shares(**fields):
        objective = make_objective(ObjectiveConfig("flow", "velocity", flow_times="uniform", **fields))
        draw = jax.vmap(lambda key: objective(lambda x, t: x, jnp.zeros((1, 1, 1)), key)["by_time"][0])
        return np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(0), 20_000)).mean(0))

    np.testing.assert_allclose(shares(), 0.1, atol=0.01)  # standard error 0.002
    edges = np.linspace(0, 1, 11)
    np.testing.assert_allclose(shares(flow_shift=3.0), np.diff(edges / (3 - 2 * edges)), atol=0.01)


def test_sampler_grids_are_the_training_levels_or_fewer():
    same = functools.partial(np.testing.assert_array_equal)
    same(ObjectiveConfig().sampler_grid().time, linear_schedule().time)
    same(ObjectiveConfig("cosine", "v").sampler_grid(7).alpha, respace(cosine_schedule(), 7).alpha)
    shifted = ObjectiveConfig("flow", "velocity", flow_shift=3.0).sampler_grid(4)
    close(shifted.sigma, [0.5, 0.75, 0.9, 1])
    for config in CONFIGS:
        for spacing in ("log-snr", "karras"):
            levels = config.sampler_grid(9, spacing)
            assert len(levels) == 9 and np.isfinite(levels.log_snr).all()
            assert levels.prediction == config.prediction


def unchecked(name, value):
    """A configuration that beartype, which only the scripts and tests turn on, would have refused."""
    config = ObjectiveConfig()
    object.__setattr__(config, name, value)
    return config


@pytest.mark.parametrize(
    ("config", "learn_sigma", "sentence"),
    [
        (unchecked("schedule", "sine"), False, r"unknown schedule 'sine'; did you mean 'cosine'\? choose from linear"),
        (unchecked("prediction", "noise"), False, "unknown prediction 'noise'; choose from eps, x0, v, velocity"),
        (ObjectiveConfig("flow"), True, "schedule flow trains no variance; add --model.no-learn-sigma"),
        (
            ObjectiveConfig("flow", loss_weight="min-snr"),
            False,
            "schedule flow weights times by how often they are drawn",
        ),
        (ObjectiveConfig("linear", "mean-velocity"), False, "mean-velocity has no schedule linear; use"),
        (ObjectiveConfig(mean_equal=1.5), False, "mean_equal is 1.5; give a share from 0 to 1"),
        (ObjectiveConfig(flow_shift=0.0), False, "flow_shift is 0.0; give a number above 0"),
        (ObjectiveConfig(flow_times=(0.0, -1.0)), False, "flow_times has a standard deviation of -1.0"),
    ],
)
def test_impossible_objectives_are_named(config, learn_sigma, sentence):
    with pytest.raises(ValueError, match=sentence):
        config.check(learn_sigma)


def test_every_schedule_takes_every_prediction():
    for schedule, prediction in itertools.product(("linear", "cosine", "flow"), ("eps", "x0", "v", "velocity")):
        ObjectiveConfig(schedule, prediction).check(False)
