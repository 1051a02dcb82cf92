"""The public API under other people's settings of JAX: ranks, dtypes, x64, half precision, NaNs, Explicit axes."""

import contextlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from networks import random_dit

import ditx
from ditx import flow, gaussian, guidance, likelihood, samplers
from ditx.diffusion.objective import ObjectiveConfig, make_objective
from ditx.evaluation.evaluate import compute_metrics
from ditx.kernels.block import KernelConfig
from ditx.nn import inception
from ditx.parallel.compile import resolve_dtype
from ditx.sampling import SamplingConfig
from ditx.training.step import TrainState, adamw, recompute, train_step
from ditx.weights import pretrained
from ditx.weights.frozen import load_vae

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


def autoencoder():
    return ditx.AutoencoderKL(ditx.VAEConfig(3, 2, (8, 8), 1, 4), key=KEY)


def predict(x, t):
    return (0.5 * x).astype(x.dtype)


def results(x, i=3):
    """Dtypes of the public functions of an image, by name: of images, and of losses."""
    lin, straight = ditx.linear_schedule(30), flow.uniform_grid(3)
    images = [samplers.sample(samplers.ddpm_step, predict, lin, x, key=KEY)[0]]
    images += [samplers.sample(samplers.dpm_solver_step, predict, straight, x, key=KEY)[0]]
    images += [step(predict, lin, x, i, x) for step in STEPS]
    images += [gaussian.q_sample(lin, x, i, x)]
    weaker = guidance.guide(predict, lambda x, t: x, scale=jnp.float32(2), interval=(1, 2))
    images += [weaker(x, jnp.float32(1.5))]
    losses = [gaussian.training_loss(lin, predict, x, i, x)["loss"]]
    losses += [flow.training_loss(predict, x, jnp.float32(0.5), x)["loss"]]
    losses += [likelihood.ode_bpd(lin, predict, x, key=KEY)]
    losses += [likelihood.ode_log_density(lin, predict, x, x[None])]
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
    vae = autoencoder()
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
        (lambda: recompute(KernelConfig().apply_block(), "ful"), "full"),
        (lambda: KernelConfig(attention="cudn").apply_block(), "cudnn"),
        (lambda: KernelConfig(kernels="Fused").apply_block(), "fused"),
        (lambda: KernelConfig(matmul_dtype="f8").apply_block(), "fp8"),
        (lambda: ditx.DiTConfig(block="adaln-one"), "adaln-zero"),
        (lambda: ObjectiveConfig(schedule="linaer").check(False), "linear"),
        (lambda: ObjectiveConfig(flow_times="unifrom").check(False), "uniform"),
        (lambda: SamplingConfig(sampler="ddmp").check(dit().config, ObjectiveConfig()), "ddpm"),
        (lambda: SamplingConfig(spacing="times").check(dit().config, ObjectiveConfig()), "time"),
        (lambda: resolve_dtype("float23"), "float32"),
        (lambda: load_vae("ft-emma"), "ft-ema"),
        (lambda: inception.prepare(jnp.ones((8, 8, 3)), "pytorch_fid"), "pytorch-fid"),
        (lambda: compute_metrics(None, None, None, ("fod",)), "fid"),
        (lambda: ditx.load("a.safetensors", wieghts="live"), "weights"),
        (lambda: pretrained.load("a.safetensors", None, weights="alive"), "live"),
        (lambda: ditx.sample(dit(), None, stpes=3), "steps"),
    ],
)
def test_an_unknown_name_is_refused_with_the_choices(call, choice):
    with pytest.raises(ValueError, match=f"unknown .*did you mean '{choice}'"):
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
        lambda: likelihood.ode_log_density(lin, predict, x, x),
        lambda: guidance.guide(predict, predict, scale=2.0, interval=(1, 2))(x, jnp.float32(1)),
        lambda: guidance.classifier_free(lambda x, t, y: x, 1, null_label=3, scale=2.0)(one, jnp.ones(3)),
        lambda: autoencoder().encode(jnp.ones((3, 8, 8, 3))),
        lambda: autoencoder().decode(x),
        lambda: inception.prepare(jnp.ones((3, 8, 8, 3))),
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


@pytest.fixture
def explicit():
    """How a batch is split over two devices on a mesh with Explicit axes, JAX's default."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    return NamedSharding(mesh, P("data"))


def batch():
    """Images, steps, labels and keys of two examples."""
    x = jax.random.normal(KEY, (2, 4, 4, 2))
    return x, jnp.array([3, 7]), jnp.array([0, 2]), jax.random.split(KEY, 2)


def trained(model, x, i, y, keys):
    """The mean loss of a batch and its gradient, and samples of a batch with guidance in an interval."""
    lin = ditx.linear_schedule(30)

    def loss(model):
        losses = jax.vmap(lambda x, i, y: gaussian.training_loss(lin, lambda x, t: model(x, t, y), x, i, x)["loss"])
        return losses(x, i, y).mean()

    def sample(x, y, key):
        guided = guidance.classifier_free(model, y, null_label=3, scale=2.0, interval=(5, 20))
        return samplers.sample(samplers.heun_step, guided, ditx.respace(lin, 3), x, key=key)[0]

    return jax.value_and_grad(loss)(model), jax.vmap(sample)(x, y, keys)


def test_a_batch_split_over_explicit_axes_gives_the_same_numbers(explicit):
    model, tree = random_dit(dit().config), batch()
    expected = jax.jit(trained)(model, *tree)
    with jax.set_mesh(explicit.mesh):
        split = jax.jit(trained)(model, *jax.device_put(tree, explicit))
    assert split[1].sharding.spec == P("data", None, None, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), split, expected)


@pytest.mark.slow
def test_everything_runs_on_explicit_axes(explicit):
    with jax.set_mesh(explicit.mesh):
        check_everything(explicit)


def check_everything(explicit):
    def shapes(tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=explicit), tree)

    x, i, y, keys = shapes(batch())
    outputs = [jax.eval_shape(jax.vmap(results), x, i)]
    for block in BLOCKS:
        model = dit(block)
        for apply in ({}, {"apply_block": KernelConfig().apply_block()}):
            forward = jax.vmap(lambda x, t, y, m=model, a=apply: m(x, t, y, **a))
            outputs += [jax.eval_shape(forward, x, i, y)]
    images = shapes(jnp.ones((2, 8, 8, 3)))
    outputs += [jax.eval_shape(jax.vmap(lambda image: autoencoder().decode(autoencoder().encode(image)[0])), images)]
    outputs += [jax.eval_shape(jax.vmap(lambda image: inception.Inception(key=KEY)(image)), images)]
    for objective in (ObjectiveConfig(), ObjectiveConfig("cosine", "v"), ObjectiveConfig("flow", "velocity")):
        loss = make_objective(objective)
        outputs += [jax.eval_shape(jax.vmap(lambda x, key, loss=loss: loss(predict, x, key)), x, keys)]
    for leaf in jax.tree.leaves(outputs):
        assert leaf.sharding.spec[0] == "data"
    optimizer = adamw(1e-3)
    state = TrainState.create(dit().config, optimizer, key=KEY)
    options = {"objective": make_objective(ObjectiveConfig()), "optimizer": optimizer, "ema_decay": 0.9}
    step = jax.eval_shape(lambda *args: train_step(*args, **options), state, {"x": x, "y": y}, KEY)
    assert jax.tree.structure(step[0]) == jax.tree.structure(state)
