"""MeanFlow against the authors' programs (tests/golden) and on Gaussian data, whose mean velocity is known."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditx import flow
from ditx.diffusion import meanflow
from ditx.diffusion.meanflow import Guidance
from ditx.diffusion.samplers import sample
from ditx.diffusion.schedule import from_levels
from ditx.testing import MEAN, STD, mean_oracle, oracle, outcome, x64

GOLDEN = Path(__file__).parents[1] / "golden"
close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
near = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


@functools.cache
def golden(name):
    arrays = np.load(GOLDEN / f"{name}.npz")
    config = json.loads(str(arrays["config"]))
    weights = {key.removeprefix("weight/"): jnp.asarray(arrays[key]) for key in arrays if key.startswith("weight/")}
    return arrays, config, weights


def network(weights, y, heads):
    """The stored toy network for a label, with times in training steps."""

    def predict(x, t, duration, *guidance):
        times = jnp.stack(jnp.broadcast_arrays(t / 1000, duration / 1000, *guidance)).astype(jnp.float32)
        z = jnp.tanh(x.ravel() @ weights["w_x"] + times @ weights["w_t"] + weights["label"][y] + weights["b"])
        outputs = [(z @ weights[f"w_{head}"] + weights[f"b_{head}"]).reshape(x.shape) for head in heads]
        return outputs[0] if len(heads) == 1 else tuple(outputs)

    return predict


@pytest.mark.parametrize("name", golden("meanflow")[1]["cases"])
def test_loss_and_gradients_are_the_authors(name):
    arrays, config, weights = golden("meanflow")
    case = {"omega": 1.0, "kappa": 0.0, "t_start": 0.0, "t_end": 1.0, "dropped": 0, "norm_p": 1.0}
    case |= config["cases"][name]
    null, dropped = config["num_classes"], jnp.arange(config["batch"]) < case["dropped"]

    def loss(weights):
        def one(x0, noise, y, s, r, dropped):
            label = jnp.where(dropped, null, y)
            predict, free = (network(weights, each, ["out"]) for each in (label, null))
            scale, mixing = jnp.where(dropped, 1, case["omega"]), jnp.where(dropped, 0, case["kappa"])
            guidance = {"unconditional": free, "scale": scale, "mixing": mixing}
            guidance["interval"] = case["t_start"], case["t_end"]
            guidance = guidance if case["guidance_eq"] else {}
            return meanflow.training_loss(predict, x0, s, r, noise, power=case["norm_p"], **guidance)

        terms = jax.vmap(one)(*(arrays[key] for key in ("image", "noise", "y", "t", "r")), dropped)
        return terms["loss"].mean(), terms

    (value, terms), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)
    near(value, arrays[f"{name}/loss"])
    near(terms["mse"] * arrays["image"][0].size, arrays[f"{name}/squared_error_sum"])
    for key, leaf in gradient.items():
        near(leaf, arrays[f"{name}/grad/{key}"])


@pytest.mark.parametrize("name", golden("imeanflow")[1]["cases"])
def test_improved_loss_and_gradients_are_the_authors(name):
    arrays, config, weights = golden("imeanflow")
    case = {"dropped": 0, "norm_p": 1.0} | config["cases"][name]
    null, dropped = config["num_classes"], jnp.arange(config["batch"]) < case["dropped"]

    def loss(weights):
        def one(x0, noise, y, s, r, dropped, *guidance):
            labels = jnp.where(dropped, null, y), y, null
            networks = (network(weights, label, ["u", "v"]) for label in labels)
            options = {"dropped": dropped, "power": case["norm_p"]}
            return meanflow.improved_training_loss(*networks, x0, s, r, noise, Guidance(*guidance), **options)

        rows = (arrays[key] for key in ("image", "noise", "y", "t", "r"))
        terms = jax.vmap(one)(*rows, dropped, *(arrays[key] for key in ("omega", "t_min", "t_max")))
        return terms["loss"].mean(), terms

    (value, terms), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)
    near(value, arrays[f"{name}/loss"])
    for key, head in (("mse", "u"), ("mse_v", "v")):
        near(terms[key] * arrays["image"][0].size, arrays[f"{name}/squared_error_sum_{head}"])
    for key, leaf in gradient.items():
        near(leaf, arrays[f"{name}/grad/{key}"])


def test_samples_and_guidance_scales_are_the_authors():
    def draw(predict, s, noise):
        grid = from_levels(1000 * s, 1 - s, s, path="linear", prediction="velocity")
        return sample(meanflow.mean_velocity_step, predict, grid, noise, key=jax.random.key(0))[0]

    arrays, config, weights = golden("meanflow")
    for times in config["sample_times"]:
        s = np.array(times[:-1])[::-1]
        x = jax.vmap(lambda y, noise, s=s: draw(network(weights, y, ["out"]), s, noise))(arrays["y"], arrays["noise"])
        near(x, arrays["sample/" + "-".join(map(str, times))])
    arrays, config, weights = golden("imeanflow")
    guidance = config["sample_omega"], *config["sample_interval"]
    for steps in config["sample_steps"]:

        def one(y, noise, steps=steps):
            predict = network(weights, y, ["u", "v"])
            return draw(lambda *args: predict(*args, *guidance)[0], np.arange(1, steps + 1) / steps, noise)

        near(jax.vmap(one)(arrays["y"], arrays["noise"]), arrays[f"sample/{steps}"])
    for power in (1.0, 2.0):
        near(
            jax.vmap(lambda u, p=power: meanflow.power_law_scale(u, p))(arrays["scale_uniform"]),
            arrays[f"scale/{power}"],
        )


TIMES = [(1.0, 0.0), (0.8, 0.3), (0.5, 0.5), (0.02, 0.0)]


@pytest.mark.parametrize(("s", "r"), TIMES)
@x64
def test_exact_mean_velocity_obeys_the_identity_and_its_residual_regresses_to_zero(s, r):
    s, r, x = jnp.asarray(s), jnp.asarray(r), jnp.linspace(-3, 3, 8).reshape(2, 2, 2)
    velocity = oracle(flow.uniform_grid(10))(x, 1000 * s)
    close(mean_oracle(x, 1000 * s, 0.0), velocity)
    u, slope = meanflow.total_derivative(mean_oracle, x, s, r, velocity)
    close(u, velocity - (s - r) * slope)

    # The velocity of one pair makes the residual affine in data and noise; it must have mean 0 given x_s.
    def residual(x0, noise):
        x, velocity = (1 - s) * x0 + s * noise, noise - x0
        u, slope = meanflow.total_derivative(mean_oracle, x, s, r, velocity)
        return u - velocity + (s - r) * slope

    one = jnp.ones((1, 1, 1))
    offset = residual(0 * one, 0 * one)
    of_data, of_noise = residual(one, 0 * one) - offset, residual(0 * one, one) - offset
    close(offset + MEAN * of_data, 0)
    close((1 - s) * STD**2 * of_data + s * of_noise, 0)
    # A loss of squares at power 0 is that residual.
    x0, noise = x / 3, x[::-1]
    terms = meanflow.training_loss(mean_oracle, x0, s, r, noise, power=0.0)
    close(terms["loss"], jnp.square(residual(x0, noise)).sum())


@pytest.mark.parametrize("steps", [1, 2, 3])
@x64
def test_any_number_of_steps_draws_exactly_the_data(steps):
    result = outcome(meanflow.mean_velocity_step, mean_oracle, flow.uniform_grid(steps), 0.0, 1.0)
    close(result, (MEAN, STD**2))


def test_times_are_ordered_and_a_share_is_equal():
    s, r = jax.vmap(meanflow.order_times)(jnp.array([0.2, 0.9]), jnp.array([0.7, 0.1]), jnp.array([False, True]))
    np.testing.assert_array_equal(s, np.float32([0.7, 0.9]))
    np.testing.assert_array_equal(r, np.float32([0.2, 0.9]))
