"""The public API under other people's settings of JAX: rank promotion, dtype promotion, x64, half precision, NaNs."""

import contextlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import ditx
from ditx import flow, gaussian, guidance, likelihood, samplers
from ditx.diffusion.objective import ObjectiveConfig
from ditx.kernels.block import KernelConfig
from ditx.training.step import recompute

KEY = jax.random.key(0)
BLOCKS = ("adaln-zero", "adaln", "cross-attention", "in-context")
STEPS = (samplers.ddpm_step, samplers.ddim_step, samplers.heun_step, samplers.euler_maruyama_step)
FLAGS = {
    "rank_promotion": {"jax_numpy_rank_promotion": "raise"},
    "strict": {"jax_numpy_dtype_promotion": "strict"},
    "debug_nans": {"jax_debug_nans": True},
}


def dit(block="adaln-zero"):
    return ditx.DiT(ditx.DiTConfig(4, 2, 2, 16, 1, 2, num_classes=3, block=block), key=KEY)


def predict(x, t):
    return (0.5 * x).astype(x.dtype)


def results(x):
    """Dtypes of the public functions of an image, by name: of images, and of losses."""
    lin, straight = ditx.linear_schedule(30), flow.uniform_grid(3)
    images = [samplers.sample(samplers.ddpm_step, predict, lin, x, key=KEY)[0]]
    images += [samplers.sample(samplers.dpm_solver_step, predict, straight, x, key=KEY)[0]]
    images += [step(predict, lin, x, 1, x) for step in STEPS]
    images += [gaussian.q_sample(lin, x, 3, x)]
    weaker = guidance.guide(predict, lambda x, t: x, scale=jnp.float32(2), interval=(1, 2))
    images += [weaker(x, jnp.float32(1.5))]
    losses = [gaussian.training_loss(lin, predict, x, 3, x)["loss"]]
    losses += [flow.training_loss(predict, x, jnp.float32(0.5), x)["loss"]]
    losses += [likelihood.ode_bpd(lin, predict, x, key=KEY)]
    losses += [likelihood.variational_bpd(lin, predict, x, key=KEY)["total"]]
    return images, losses


@pytest.fixture(params=FLAGS)
def flags(request):
    with contextlib.ExitStack() as stack:
        for name, value in FLAGS[request.param].items():
            before = getattr(jax.config, name)
            jax.config.update(name, value)
            stack.callback(jax.config.update, name, before)
        yield request.param


@pytest.mark.slow
def test_networks_and_diffusion_run_under_strict_settings(flags):
    for block in BLOCKS:
        model = dit(block)
        for apply in ({}, {"apply_block": KernelConfig().apply_block()}):
            output = jax.vmap(lambda x, m=model, a=apply: m(x, 3, 1, **a))(jnp.ones((2, 4, 4, 2)))
            assert output.shape == (2, 4, 4, 4)
    vae = ditx.AutoencoderKL(ditx.VAEConfig(3, 2, (8, 8), 1, 4), key=KEY)
    assert vae.decode(vae.encode(jnp.ones((8, 8, 3)))[0]).shape == (8, 8, 3)
    results(jnp.ones((2, 2, 1)))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_results_have_the_dtype_of_the_images(dtype):
    x64 = dtype in ("float32", "float64")
    with jax.enable_x64(x64):
        images, losses = results(jnp.ones((2, 2, 1), dtype))
        assert {image.dtype for image in images} == {jnp.dtype(dtype)}
        assert {loss.dtype for loss in losses} == {jnp.promote_types(dtype, jnp.float32)}


@pytest.fixture
def unchecked():
    """Functions as they are without the tests' hook, whose own errors come before ours."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "choice"),
    [
        (lambda: ditx.sampling_grid(ditx.linear_schedule(30), 5, "logsnr"), "log-snr"),
        (lambda: ditx.linear_schedule(prediction="epsilon"), "eps"),
        (lambda: recompute(KernelConfig().apply_block(), "block"), "full"),
        (lambda: KernelConfig(attention="flash").apply_block(), "cudnn"),
        (lambda: KernelConfig(kernels="Fused").apply_block(), "fused"),
        (lambda: KernelConfig(matmul_dtype="float8").apply_block(), "fp8"),
        (lambda: ditx.DiTConfig(block="adaln-one"), "adaln-zero"),
        (lambda: ObjectiveConfig(schedule="linaer").check(False), "linear"),
    ],
)
def test_an_unknown_name_is_refused_with_the_choices(call, choice):
    with pytest.raises(ValueError, match=f"unknown .*{choice}"):
        call()


@pytest.mark.usefixtures("unchecked")
def test_a_batch_given_to_a_function_of_one_example_is_refused():
    lin, x, i = ditx.linear_schedule(30), jnp.ones((3, 4, 4, 2)), jnp.arange(3)
    model, one = dit(), jnp.ones((4, 4, 2))
    for call in (
        lambda: gaussian.training_loss(lin, predict, x, i, x),
        lambda: gaussian.q_sample(lin, one, i, one),
        lambda: gaussian.q_sample(lin, one, 3, x),
        lambda: flow.training_loss(predict, x, jnp.float32(0.5), x),
        lambda: flow.training_loss(predict, one, jnp.ones(3), one),
        lambda: samplers.sample(samplers.ddim_step, predict, lin, x, key=KEY),
        lambda: samplers.heun_step(predict, lin, x, 3, x),
        lambda: likelihood.ode_bpd(lin, predict, x, key=KEY),
        lambda: model(x, 3, 1),
        lambda: model(one, i, 1),
        lambda: model(one, 3, i),
    ):
        with pytest.raises(ValueError, match=r"has shape"):
            call()
    batched = jax.jit(jax.vmap(lambda x, i: gaussian.training_loss(lin, predict, x, i, x)["mse"]))(x, i)
    assert batched.shape == (3,)


def test_numpy_scalars_and_integers_are_taken_under_the_hook():
    lin, x, model = ditx.linear_schedule(np.int64(30)), jnp.ones((4, 4, 2)), dit()
    for i in (3, np.int64(3), np.int32(3), np.array(3)):
        assert gaussian.q_sample(lin, x, i, x).shape == x.shape
        assert jnp.array_equal(model.embed(x, i, np.int8(1))[0], model.embed(x, 3, 1)[0])
        guided = guidance.guide(predict, predict, scale=np.float32(2), interval=(0, np.float64(9)))
        assert guided(x, jnp.float32(3)).shape == x.shape
    assert len(ditx.sampling_grid(lin, np.int64(5))) == len(flow.uniform_grid(np.int16(5), shift=3)) == 5


def test_noise_prediction_from_pure_noise_is_refused():
    levels = np.array([1.0, 2.0]), np.array([0.5, 0.0]), np.array([0.5, 1.0])
    with pytest.raises(ValueError, match="pure noise"):
        flow.from_levels(*levels, path="linear", prediction="eps")
