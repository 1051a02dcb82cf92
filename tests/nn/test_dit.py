import dataclasses
import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from networks import BLOCKS, NETWORKS, abstract_dit, example, forward, random_dit
from references import assert_close, chw, formula, hwc, load, tiny_dit
from traced import equations

import ditx
from ditx.kernels.block import KernelConfig
from ditx.nn.dit import call_block
from ditx.nn.embeddings import grid_positions
from ditx.testing import dit_configs
from ditx.training.step import recompute

SMALL = ditx.DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=24, depth=2, num_heads=2, num_classes=100)


GRID = ditx.respace(ditx.linear_schedule(), 3)


@functools.cache
def new(config=SMALL):
    return ditx.DiT(config, key=jax.random.key(0))


@functools.cache
def reference():
    return tiny_dit()


def test_output_equals_the_reference(highest_precision):
    model, golden = reference()
    output = jax.jit(jax.vmap(model))(hwc(golden["x"]), golden["t"], golden["y"])
    assert_close(chw(output), golden["output"], 1e-4)


def test_output_of_a_published_size_equals_the_reference(highest_precision):
    golden, name = load("dit_s8_formula.npz"), "DiT-S/8"
    weights = {k: formula(k, shape) for k, shape in load("dit_state_dict_shapes.json")[name].items()}
    model = ditx.weights.convert.dit_from_torch(weights, ditx.DIT_CONFIGS[name])
    output = jax.jit(jax.vmap(model))(hwc(golden["x"]), golden["t"], golden["y"])
    assert_close(chw(output), golden["output"], 1e-4)


def test_guided_output_equals_the_reference(highest_precision):
    model, golden = reference()
    half = len(golden["cfg_x"]) // 2
    # The released code evaluates the first half of the states under both halves of the labels: class, then null.
    assert set(golden["cfg_y"][half:]) == {model.config.null_label}

    def guided(x, t, y):
        null = model.config.null_label
        return ditx.guidance.classifier_free(model, y, null_label=null, scale=float(golden["cfg_scale"]), channels=3)(
            x, t
        )

    arguments = hwc(golden["cfg_x"])[:half], golden["cfg_t"][:half].astype(np.float32), golden["cfg_y"][:half]
    output = jax.jit(jax.vmap(guided))(*arguments)
    # Guided channels agree in both halves; the others are those of the class in the first half.
    assert_close(chw(output), golden["cfg_output"][:half], 1e-4)


def test_loss_and_gradients_equal_the_reference(highest_precision):
    model, golden = reference()
    schedule = ditx.linear_schedule()

    def mean_loss(model, x, t, y, noise):
        def one(x, t, y, noise):
            return ditx.gaussian.training_loss(schedule, lambda x, t: model(x, t, y), x, t, noise)

        losses = jax.vmap(one)(x, t, y, noise)
        return losses["loss"].mean(), losses

    batch = hwc(golden["x"]), golden["t"], golden["y"], hwc(golden["noise"])
    gradient, losses = jax.jit(jax.grad(mean_loss, has_aux=True))(model, *batch)
    for name in ("mse", "vb", "loss"):
        assert_close(losses[name], golden[name], 1e-4)
    tensors = ditx.weights.convert.dit_to_torch(gradient)
    names = [name for name in golden if name.startswith("grad/")]
    assert len(names) > 20
    for name in names:
        assert_close(tensors[name.removeprefix("grad/")], golden[name], 1e-4)


def test_time_is_the_same_whole_or_real():
    model, (x, t, y) = random_dit(SMALL), example(SMALL)
    np.testing.assert_array_equal(forward(model, x, t, y), forward(model, x, t.astype(jnp.float32), y))


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_new_network_puts_out_exactly_zero(block, learn_sigma):
    config = dataclasses.replace(SMALL, learn_sigma=learn_sigma, block=block)
    output = forward(new(config), *example(config))
    assert output.shape == (8, 8, 6 if learn_sigma else 3)
    assert not np.any(output)


def test_new_block_is_the_identity():
    block = jax.tree.map(lambda leaf: leaf[1], new().blocks)
    tokens, c = jax.random.normal(jax.random.key(1), (16, 24)), jax.random.normal(jax.random.key(2), (24,))
    np.testing.assert_array_equal(jax.jit(lambda *arguments: block(*arguments))(tokens, c), tokens)


def test_initial_weights_have_their_distributions():
    tensors = ditx.weights.convert.dit_to_torch(new())
    tensors.pop("pos_embed")  # fixed
    for name, value in tensors.items():
        if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer"):
            assert not value.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert value.std() == pytest.approx(0.02, rel=0.1), name
        else:
            bound = math.sqrt(6 / (value.shape[0] + math.prod(value.shape[1:])))
            assert 0.97 * bound < np.abs(value).max() <= bound, name
            assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
    first, second = (tensors[f"blocks.{i}.mlp.fc1.weight"] for i in range(2))
    assert np.abs(first - second).max() > 0.1, "blocks start alike"


@NETWORKS
@given(dit_configs())
def test_every_leaf_is_a_float32_array(config):
    leaves = jax.tree.leaves(abstract_dit(config))
    assert len(leaves) == {"adaln-zero": 21, "adaln": 21, "cross-attention": 33, "in-context": 23}[config.block]
    for leaf in leaves:
        assert isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == jnp.float32


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_null_label_is_the_row_after_the_classes(dropout):
    config = dataclasses.replace(SMALL, label_dropout=dropout)
    rows = abstract_dit(config).label.table.shape[0]
    assert (config.null_label, rows) == ((100, 101) if dropout else (None, 100))


@pytest.mark.parametrize("block", BLOCKS)
def test_label_and_time_reach_the_output(block):
    model, (x, t, y) = random_dit(dataclasses.replace(SMALL, block=block)), example(SMALL)
    outputs = [forward(model, x, *condition) for condition in [(t, y), (t + 1, y), (t, y - 1), (t, jnp.asarray(100))]]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize("block", BLOCKS)
def test_unrolling_and_rematerialising_change_nothing(block):
    model, (x, t, y) = random_dit(dataclasses.replace(SMALL, block=block)), example(SMALL)

    @functools.partial(jax.jit, static_argnames="remat")
    def gradient(model, remat):
        return jax.grad(lambda m: jnp.square(m(x, t, y, apply_block=recompute(call_block, remat))).mean())(model)

    unrolled = jax.jit(functools.partial(model, unroll=2))(x, t, y)
    assert_close(unrolled, forward(model, x, t, y), 1e-5)
    ours, expected = gradient(model, "full"), gradient(model, "none")
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        # The gradient of a key's bias is 0 but for rounding, since it moves all logits of a query alike.
        np.testing.assert_allclose(a, b, rtol=0, atol=max(1e-5 * np.abs(b).max(), 1e-7 * largest))


def count_products(jaxpr):
    """How many products, of one example or of a batch, a traced program has; a loop has those of one turn."""
    return sum(equation.primitive.name in ("product", "dot_general") for equation, _ in equations(jaxpr))


@pytest.mark.parametrize("block", BLOCKS)
def test_dots_recomputes_no_product_with_a_weight(block):
    apply_block = KernelConfig().apply_block()
    model, inputs = new(dataclasses.replace(SMALL, block=block)), [jnp.asarray(one)[None] for one in example(SMALL)]

    def example_loss(model, x, t, y, remat):
        return jnp.square(model(x, t, y, apply_block=recompute(apply_block, remat))).mean()

    def batch_loss(model, *inputs, remat):
        return jax.vmap(lambda *one: example_loss(model, *one, remat))(*inputs).mean()

    def of_one(*given, remat):
        return jax.grad(example_loss)(given[0], *(each[0] for each in given[1:]), remat)

    def of_each(*given, remat):
        return jax.vmap(lambda m, *one: jax.grad(example_loss)(m, *one, remat), (None, 0, 0, 0))(*given)

    for gradient in (jax.grad(batch_loss), of_one, of_each):
        counts = {
            remat: count_products(jax.make_jaxpr(functools.partial(gradient, remat=remat))(model, *inputs).jaxpr)
            for remat in ("none", "dots", "full")
        }
        # Of attention, logits and their products with values are recomputed: two a block, which the trace has once.
        attentions = 2 if block == "cross-attention" else 1
        assert counts["dots"] == counts["none"] + 2 * attentions < counts["full"], counts


def test_bfloat16_weights_give_bfloat16_output_near_the_float32_one():
    model, (x, t, y) = random_dit(SMALL, scale=0.1), example(SMALL)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    x16 = x.astype(jnp.bfloat16)
    output = forward(half, x16, t, y)
    assert output.dtype == jnp.bfloat16
    # Eight bits of mantissa through some ten layers.
    assert_close(output.astype(jnp.float32), forward(model, x, t, y), 0.05)
    assert np.any(forward(half, x16, jnp.asarray(998), y) != forward(half, x16, jnp.asarray(999), y))


@pytest.mark.parametrize("time_dtype", [jnp.int32, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("block", BLOCKS)
def test_forward_mixes_no_types(block, dtype, time_dtype):
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), random_dit(dataclasses.replace(SMALL, block=block)))
    x, t, y = example(SMALL)
    with jax.numpy_dtype_promotion("strict"):
        output = jax.eval_shape(model, x.astype(dtype), t.astype(time_dtype), y)
    assert output.dtype == dtype


@pytest.mark.parametrize(("size", "channels", "patch"), [(28, 1, 4), (28, 1, 7), (32, 3, 4)])
def test_pixels_of_other_sizes_are_welcome(size, channels, patch):
    config = dataclasses.replace(SMALL, input_size=size, in_channels=channels, patch_size=patch, num_classes=10)
    output = forward(random_dit(config), *example(config))
    assert output.shape == (size, size, 2 * channels)
    assert np.all(np.isfinite(output)) and np.std(output) > 0.1


def between_patches_only():
    """A network whose blocks are the identity: each output patch is a function of its input patch alone."""
    return eqx.tree_at(lambda m: m.final.linear, new(), random_dit(SMALL).final.linear)


def test_patches_are_read_and_written_in_the_order_of_the_released_weights():
    model, (x, t, y) = between_patches_only(), example(SMALL)
    p, side, channels, out = 2, 4, 3, 6
    weight, bias = np.asarray(model.patch.weight, np.float64), np.asarray(model.patch.bias, np.float64)
    positions = grid_positions(side, 24)
    expected = np.zeros((8, 8, out))
    for row in range(side):
        for column in range(side):
            token = bias + positions[row * side + column]
            for a in range(p):
                for b in range(p):
                    for c in range(channels):
                        token = token + float(x[row * p + a, column * p + b, c]) * weight[(a * p + b) * channels + c]
            token = (token - token.mean()) / np.sqrt(token.var() + 1e-6)
            patch = token @ np.asarray(model.final.linear.weight, np.float64) + np.asarray(model.final.linear.bias)
            for a in range(p):
                for b in range(p):
                    at = (a * p + b) * out
                    expected[row * p + a, column * p + b] = patch[at : at + out]
    assert_close(forward(model, x, t, y), expected, 1e-5)


def test_a_pixel_moves_only_its_own_patch():
    model, (x, t, y) = between_patches_only(), example(SMALL)
    before = forward(model, x, t, y)
    for row, column, channel in [(0, 7, 0), (5, 2, 1), (6, 3, 2)]:
        moved = np.any(forward(model, x.at[row, column, channel].add(1.0), t, y) != before, axis=-1)
        r, c = row // 2 * 2, column // 2 * 2
        assert moved[r : r + 2, c : c + 2].all()
        assert moved.sum() == 4


def test_final_weights_write_one_pixel_and_channel_of_every_patch():
    model, (x, t, y) = new(), example(SMALL)
    for a, b, channel in [(0, 1, 0), (1, 0, 4), (1, 1, 5), (0, 0, 2)]:
        expected = np.zeros((8, 8, 6))
        expected[a::2, b::2, channel] = 1
        bias = jnp.zeros(24).at[(a * 2 + b) * 6 + channel].set(1.0)
        written = forward(eqx.tree_at(lambda m: m.final.linear.bias, model, bias), x, t, y)
        np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 0}, "input_size is 0; it must be at least 1"),
        ({"patch_size": 0}, "patch_size is 0; it must be at least 1"),
        ({"in_channels": -1}, "in_channels is -1; it must be at least 1"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be at least 1"),
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"num_heads": 0}, "num_heads is 0; it must be at least 1"),
        ({"num_classes": -1}, "num_classes is -1; it must be at least 1"),
        (
            {"num_classes": 0, "label_dropout": 0.0},
            "num_classes is 0; it must be at least 1, or, for a network without",
        ),
        ({"patch_size": 3}, "patch_size 3 does not divide input_size 32; choose a divisor"),
        ({"num_heads": 7}, "hidden_size 1152 is not divisible by num_heads 7; change one"),
        ({"hidden_size": 30, "num_heads": 3}, "hidden_size 30 is not divisible by 4.*; try 32"),
        ({"label_dropout": 1.0}, "label_dropout is 1.0; give a probability"),
        ({"label_dropout": -0.1}, "label_dropout is -0.1; give a probability"),
        ({"frequency_shift": 2}, "frequency_shift is 2; give 0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio 0.0 gives the MLP a width of 0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ditx.DiTConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "rms", "mlp_norm_eps": 1e-5}, "mlp_norm_eps is 1e-05; give 1e-6"),
        (
            {"positions": "both", "hidden_size": 32, "num_heads": 16},
            "16 heads of hidden_size 32 are 2 wide; change one",
        ),
        ({"modulation_shift": False, "block": "in-context"}, "blocks in-context have no modulation; leave it on"),
        ({"patch_bottleneck": -1}, "patch_bottleneck -1; give at least 0"),
        ({"context_tokens": 4, "block": "in-context"}, "in blocks in-context the label is a token already; give 0"),
        ({"context_start": 2}, "context_start is 2 in 28 blocks with 0 context tokens; give 0 to depth - 1"),
        ({"context_tokens": 4, "context_start": 28}, "context_start is 28 in 28 blocks with 4 context tokens"),
        ({"input_size": (32, 33)}, r"patch_size 2 does not divide input_size \(32, 33\)"),
    ],
)
def test_kinds_of_layers_that_exclude_each_other_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ditx.DiTConfig(**changes)


MODERN = dataclasses.replace(
    SMALL, norm="rms", qk_norm=True, mlp="swiglu", positions="rotary", context_tokens=3, patch_bottleneck=5
)


def test_a_new_modern_block_is_the_identity():
    block = jax.tree.map(lambda leaf: leaf[1], new(MODERN).blocks)
    tokens, c = jax.random.normal(jax.random.key(1), (19, 24)), jax.random.normal(jax.random.key(2), (24,))
    np.testing.assert_array_equal(block(tokens, c), tokens)


def test_context_tokens_enter_at_their_block_however_the_blocks_are_run():
    config = dataclasses.replace(MODERN, depth=3, context_start=1)
    model, (x, t, y) = random_dit(config), example(config)
    tokens, condition = model.embed(x, t, y)
    np.testing.assert_allclose(tokens[16:], model.label.table[y] + model.context, rtol=1e-6)
    expected = call_block(jax.tree.map(lambda leaf: leaf[0], model.blocks), tokens[:16], condition)
    first = model.run(tokens, condition, blocks=slice(0, 1))
    assert_close(first, jnp.concatenate([expected, tokens[16:]]), 1e-5)
    parts = model.run(model.run(first, condition, blocks=slice(1, 2)), condition, blocks=slice(2, 3))
    whole = model.run(tokens, condition, unroll=3)
    assert_close(parts, whole, 1e-5)
    assert np.abs(whole[16:] - tokens[16:]).max() > 0.1
    # The tokens of another label differ, although the condition is the same.
    assert np.abs(model.run(tokens.at[16:].set(0), condition) - whole)[:16].max() > 1e-3


def test_rectangles_have_rows_and_columns():
    config = dataclasses.replace(MODERN, input_size=(4, 8), depth=1, positions="both")
    model, (x, t, y) = random_dit(config), example(config)
    assert config.grid == (2, 4) and model(x, t, y).shape == (4, 8, 6)
    np.testing.assert_allclose(grid_positions((2, 4), 24)[4:], grid_positions(4, 24)[4:8], atol=1e-12)
    with pytest.raises(ValueError, match="input_size is 4 x 8, but data sets have square images"):
        _ = config.side


def test_unknown_block_is_named():
    # The annotation would stop it in the tests, where types are checked; for others the sentence does.
    with pytest.raises(Exception, match="in-contekst"):
        ditx.DiTConfig(block="in-contekst")


@pytest.mark.parametrize("shape", [(8, 8, 4), (4, 8, 3), (16, 16, 3)])
def test_input_of_another_shape_is_named(shape):
    model = new()
    message = rf"input has shape \({shape[0]}, {shape[1]}, {shape[2]}\), but the network was built for \(8, 8, 3\)"
    with pytest.raises(ValueError, match=message):
        model(jnp.zeros(shape), jnp.asarray(0), jnp.asarray(0))


def test_without_a_label_it_is_the_null_label():
    x, t, _ = example(SMALL)
    model = random_dit(SMALL)
    np.testing.assert_array_equal(model(x, t), model(x, t, SMALL.null_label))
    assert np.abs(model(x, t) - model(x, t, 0)).max() > 1e-3
    with pytest.raises(ValueError, match="built without a null label"):
        random_dit(dataclasses.replace(SMALL, label_dropout=0.0))(x, t)


def test_an_unconditional_network_has_the_null_label_alone_and_is_a_predictor_as_it_is():
    config = dataclasses.replace(SMALL, num_classes=0, learn_sigma=False)
    model, (x, _, _) = random_dit(config), example(config)
    assert config.null_label == 0 and model.label.table.shape == (1, 24)
    draw = jax.jit(lambda x: ditx.samplers.sample(ditx.samplers.ddim_step, model, GRID, x, key=jax.random.key(0))[0])
    assert np.isfinite(draw(x)).all()
    # As any network, it is guided by a weaker one.
    guided = ditx.guidance.guide(model, random_dit(config, seed=1), scale=2.0)(x, jnp.asarray(5.0))
    assert guided.shape == x.shape


def test_a_duration_needs_the_second_embedding_and_is_0_by_default():
    model = random_dit(dataclasses.replace(SMALL, mean_velocity=True, depth=1))
    x, t, y = example(SMALL)
    outputs = [model(x, t, y, *duration) for duration in ((), (0.0,), (300.0,))]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[2] - outputs[0]).max() > 1e-3
    with pytest.raises(ValueError, match=r"no embedding of a duration; build it with DiTConfig\(mean_velocity=True\)"):
        new()(x, t, y, 300.0)
    with pytest.raises(ValueError, match="predicts mean velocities, which no other program's layout has"):
        ditx.weights.convert.dit_to_torch(model)
