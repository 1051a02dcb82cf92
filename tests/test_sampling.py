"""Batches of samples by networks of which all is known: the best ones for Gaussian data, whose mean is by the label."""

from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_data import MU, S

from ditx.diffusion import flow
from ditx.diffusion.predictions import Level, compose
from ditx.nn.dit import DiTConfig
from ditx.objectives import ObjectiveConfig
from ditx.sampling import STEPS, SamplingConfig, make_draw, sample_keys

CONFIG = DiTConfig(8, 4, 1, 16, 1, 1, num_classes=1)
OBJECTIVES = [
    ObjectiveConfig(),
    ObjectiveConfig("x0", "cosine"),
    ObjectiveConfig("flow"),
    ObjectiveConfig("flow", prediction="x0", flow_shift=2.0),
    ObjectiveConfig("sit"),
]


class Best:
    """The best network for data of deviation S, of mean `mean` under label 0 and `without` under none."""

    patch = SimpleNamespace(weight=jnp.zeros(1))

    def __init__(self, objective, mean=MU, without=0.0, num_classes=1):
        self.objective, self.means = objective, jnp.array([mean, without])
        self.config = SimpleNamespace(num_classes=num_classes, null_label=num_classes)

    def __call__(self, x, t, y, *, unroll=1, kernels="plain"):
        objective = self.objective
        if objective.straight:
            sit = objective.objective == "sit"
            here = flow.level(1 - t if sit else t / 1000, sit=sit)
        else:
            whole = objective.levels()
            alpha = jnp.exp(jnp.interp(t, jnp.asarray(whole.time), jnp.log(jnp.asarray(whole.alpha))))
            sigma = jnp.sqrt(1 - alpha**2)
            here = Level(t, alpha, sigma, -sigma, alpha)
        a, b, mean = here.alpha, here.sigma, self.means[1 if y is None else y]
        rest = (x - a * mean) / (a**2 * S**2 + b**2)
        kind = objective.prediction if objective.straight else objective.objective
        return compose(kind, mean + a * S**2 * rest, b * rest, here)


@cache
def drawn(objective, guide=None, scale=None, **fields):
    draw = make_draw(SamplingConfig(**fields), CONFIG, objective, by_another=guide is not None)
    other = None if guide is None else Best(objective, *guide)
    labels, keys = jnp.zeros(64, jnp.int32), sample_keys(0, 0, 64)

    def samples(scale):
        return draw(Best(objective), labels, keys, guide=other, scale=scale)[0]

    return np.asarray(jax.jit(samples)(None if scale is None else np.float32(scale)))


@pytest.mark.parametrize("sampler", STEPS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: f"{objective.objective}-{objective.prediction}")
def test_any_sampler_draws_the_data_of_any_objective(objective, sampler):
    samples = drawn(objective, sampler=sampler, steps=240)
    # 4,096 numbers: standard errors 0.006; the rest is the length of the steps.
    assert samples.mean() == pytest.approx(MU, abs=0.02)
    assert samples.std() == pytest.approx(S, rel=0.06)


@pytest.mark.parametrize("objective", [OBJECTIVES[0], OBJECTIVES[2]], ids=["eps", "flow"])
def test_few_steps_of_the_second_order_are_near_many(objective):
    exact = drawn(objective, sampler="heun", steps=500, spacing="log-snr")
    errors = [np.abs(drawn(objective, sampler=name, steps=20) - exact).mean() for name in ("ddim", "dpm-solver")]
    assert errors[1] < 0.2 * errors[0], errors


@pytest.mark.parametrize("objective", [OBJECTIVES[0], OBJECTIVES[2]], ids=["eps", "flow"])
def test_guided_data_lie_so_far_from_those_of_the_weaker_predictor(objective):
    settings = {"sampler": "heun", "steps": 40}
    assert drawn(objective, guidance_scale=3.0, **settings).mean() == pytest.approx(3 * MU, abs=0.03)
    # Another network, of mean 0.5 with a label or without: 0.5 + 2 (MU - 0.5).
    for guide in ((0.5, 9.0), (9.0, 0.5, 0)):
        samples = drawn(objective, guide=guide, guidance_scale=2.0, **settings)
        assert samples.mean() == pytest.approx(2 * MU - 0.5, abs=0.03)
    traced = drawn(objective, scale=3.0, guidance_scale=5.0, **settings)
    np.testing.assert_allclose(traced, drawn(objective, guidance_scale=3.0, **settings), atol=1e-5)


def test_the_interval_is_in_the_same_times_for_all_conventions():
    settings = {"sampler": "euler", "steps": 20, "guidance_scale": 3.0}
    flow_alone, sit = (
        drawn(objective, guidance_interval=(300.0, 700.0), **settings) for objective in (OBJECTIVES[2], OBJECTIVES[4])
    )
    np.testing.assert_allclose(sit, flow_alone, atol=1e-4)
    guided, free = drawn(OBJECTIVES[2], **settings).mean(), drawn(OBJECTIVES[2], sampler="euler", steps=20).mean()
    assert free + 0.1 < flow_alone.mean() < guided - 0.1
    np.testing.assert_array_equal(
        drawn(OBJECTIVES[2], guidance_interval=(0.0, 0.0), **settings), drawn(OBJECTIVES[2], sampler="euler", steps=20)
    )


def test_auto_is_the_usual_choice():
    def names(objective, **fields):
        config = SamplingConfig(**fields).resolved(ObjectiveConfig(objective))
        return config.sampler, config.spacing

    assert names("eps") == ("ddpm", "time") and names("flow") == names("sit") == ("heun", "time")
    assert names("v", sampler="dpm-solver")[1] == "log-snr" and names("flow", sampler="dpm-solver")[1] == "time"
    assert names("v", sampler="dpm-solver", spacing="karras") == ("dpm-solver", "karras")
