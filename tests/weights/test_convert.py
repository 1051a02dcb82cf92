import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from networks import NETWORKS, example, forward, random_dit
from references import assert_close, chw, formula, hwc, load, tiny_diffusers_config, tiny_dit, tiny_vae, weights

import ditx
from ditx.testing import dit_configs
from ditx.weights.convert import (
    dit_from_diffusers,
    dit_from_torch,
    dit_to_diffusers,
    dit_to_torch,
    inception_from_torch,
    vae_from_torch,
    vae_to_torch,
)
from ditx.weights.files import write_safetensors


def diffusers():
    golden = load("diffusers_dit_tiny.npz")
    return weights(golden), golden


def assert_same(written, expected):
    assert written.keys() == expected.keys()
    for name, value in written.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, expected[name])


def test_reference_weights_come_back_bit_for_bit():
    model, golden = tiny_dit()
    assert_same(dit_to_torch(model), weights(golden))


def test_diffusers_weights_come_back_bit_for_bit():
    state, _ = diffusers()
    assert_same(dit_to_diffusers(dit_from_diffusers(state, tiny_diffusers_config())), state)


def test_autoencoder_weights_come_back_bit_for_bit():
    model, golden = tiny_vae()
    assert_same(vae_to_torch(model), weights(golden))


def test_diffusers_weights_give_the_outputs_of_diffusers(highest_precision):
    state, golden = diffusers()
    model = dit_from_diffusers(state, tiny_diffusers_config())
    assert model.config.frequency_shift == 1
    output = jax.jit(jax.vmap(model))(hwc(golden["x"]), golden["t"], golden["y"])
    assert_close(chw(output), golden["output"], 1e-4)
    # With the authors' frequencies, only time 0 gives the same.
    other = dit_from_diffusers(state, tiny_diffusers_config(), frequency_shift=0)
    errors = np.abs(chw(jax.vmap(other)(hwc(golden["x"]), golden["t"], golden["y"])) - golden["output"]).max((1, 2, 3))
    assert golden["t"][0] == 0 and errors[0] < 1e-4 and (errors[1:] > 0.1).all()


def test_sampling_from_sit_weights_equals_sit(highest_precision):
    """Ma et al. 2024: time from 0 (noise) to 1 (data), velocity data - noise, the second half of channels dropped."""
    model, golden = tiny_dit()  # the same names and shapes
    sit = dit_from_torch(dit_to_torch(model), dataclasses.replace(model.config, convention="sit"))
    x = expected = jnp.asarray(hwc(golden["x"])[0])
    for step in range(5):
        expected = expected + forward(model, expected, jnp.asarray(step / 5), 3)[..., : x.shape[-1]] / 5
    grid = ditx.flow.uniform_grid(5)
    drawn, _ = ditx.samplers.sample(ditx.samplers.euler_step, lambda x, t: sit(x, t, 3), grid, x, key=jax.random.key(0))
    assert_close(drawn, expected, 1e-5)


def later(name, tmp_path, **facts):
    """A network of a later program, read from a file as users do, and its whole golden file."""
    golden = load(f"{name}.npz")
    write_safetensors(tmp_path / "later.safetensors", weights(golden))
    model, described = ditx.load(tmp_path / "later.safetensors", **facts)
    assert_same_within(dit_to_torch(model), weights(golden), 1e-7)
    return model, described, golden


def assert_same_within(written, expected, tolerance):
    assert written.keys() == expected.keys()
    for name, value in written.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["lightningdit_tiny", "lightningdit_mixed_tiny"])
def test_lightningdit_is_read_from_its_file(tmp_path, highest_precision, name):
    """Time from 0 (noise) to 1 (data), velocity data - noise, guidance of three channels above a time."""
    model, described, golden = later(name, tmp_path)
    config = json.loads(str(golden["config"]))
    kinds = model.config.qk_norm, model.config.mlp == "swiglu", model.config.positions == "both"
    assert kinds == (config["use_qknorm"], config["use_swiglu"], config["use_rope"])
    assert (model.config.norm == "rms") == config["use_rmsnorm"]
    assert model.config.modulation_shift != config["wo_shift"]
    assert (model.config.mlp_ratio, model.config.num_heads) == (4.0, config["num_heads"])
    assert described.objective.flow_shift == pytest.approx(1 / 0.3)

    def guided(x, t, y, interval):
        options = {"scale": float(golden["cfg_scale"]), "channels": 3, "interval": interval}
        return ditx.guidance.classifier_free(model, y, null_label=model.config.null_label, **options)(x, t)

    @jax.jit
    def everything(x, t, y, x0, noise, time, guided_x):
        def loss(x0, noise, time, y):
            return ditx.flow.training_loss(lambda x, t: model(x, t, y), x0, 1 - time, noise)["loss"]

        half, t_guided = guided_x[:2], 1000 * (1 - golden["cfg_t"][0])
        start = 1000 * (1 - float(golden["cfg_interval_start"]))
        calls = [
            jax.vmap(lambda x, y, i=i: guided(x, t_guided, y, i))(half, golden["cfg_y"][:2])
            for i in (None, (0.0, start))
        ]
        return jax.vmap(model)(x, 1000 * (1 - t), y), jax.vmap(loss)(x0, noise, time, y), *calls

    x, noise, guided_x = (hwc(golden[key]) for key in ("x", "noise", "cfg_x"))
    output, loss, above, below = everything(x, golden["t"], golden["y"], x, noise, golden["time"], guided_x)
    assert_close(-chw(output), golden["output"], 1e-4)
    assert_close(loss, golden["loss"], 1e-4)
    assert_close(-chw(above), golden["cfg_output"][:2], 1e-4)
    assert_close(-chw(below), golden["cfg_output_below_interval"][:2], 1e-4)


def test_jit_is_read_from_its_file(tmp_path, highest_precision):
    """Time from 0 (noise) to 1 (data), prediction of the data, the loss of the velocity that it implies."""
    with pytest.raises(ValueError, match="does not tell where its context tokens enter; give --context-start"):
        later("jit_tiny", tmp_path)
    (tmp_path / "later.safetensors").unlink()
    model, described, golden = later("jit_tiny", tmp_path, context_start=1)
    assert (described.objective.prediction, described.sampling.sampler) == ("x0", "heun")

    @jax.jit
    def output_and_loss(model, x, t, y, x0, noise, time):
        def loss(model):
            def one(x0, noise, time, y):
                options = {"prediction": described.objective.prediction}
                return ditx.flow.training_loss(lambda x, t: model(x, t, y), x0, 1 - time, noise, **options)["loss"]

            return jax.vmap(one)(x0, noise, time, y).mean()

        return jax.vmap(model)(x, 1000 * (1 - t), y), *jax.value_and_grad(loss)(model)

    arguments = hwc(golden["x"]), golden["t"], golden["y"], hwc(golden["image"]), hwc(golden["noise"]), golden["time"]
    output, loss, gradient = output_and_loss(model, *arguments)
    assert_close(chw(output), golden["output"], 1e-4)
    assert_close(loss, golden["loss"], 1e-4)
    tensors = dit_to_torch(gradient)
    for name in (name for name in golden if name.startswith("grad")):
        kind, _, tensor = name.partition("/")
        ours = tensors[tensor] if kind == "grad" else np.linalg.norm(tensors[tensor])
        assert_close(ours, golden[name], 1e-4)

    def sample(start, y):
        options = {"null_label": model.config.null_label, "scale": 2.5, "interval": (100.0, 900.0)}
        predict, grid = ditx.guidance.classifier_free(model, y, **options), described.objective.sampler_grid(4)
        return ditx.samplers.sample(ditx.samplers.heun_step, predict, grid, start, key=jax.random.key(0))[0]

    samples = jax.jit(jax.vmap(sample))(hwc(golden["start"]), golden["sample_y"])
    assert_close(chw(samples), golden["sample"], 1e-4)


def test_conventions_of_velocity_networks_differ_by_time_and_sign(highest_precision):
    """SiT: 1 - t / 1000 and data - noise; REPA: t / 1000 and noise - data, with projectors beside the network."""
    model, golden = tiny_dit()
    tensors = dit_to_torch(model) | {"projectors.0.0.weight": np.ones((2, 2), np.float32)}
    repa = dit_from_torch(tensors, dataclasses.replace(model.config, convention="repa"))
    x, y = jnp.asarray(hwc(golden["x"])[0]), 3
    assert_close(forward(repa, x, jnp.asarray(700.0), y), forward(model, x, jnp.asarray(0.7), y), 1e-5)
    with pytest.raises(ValueError, match=r"projectors\.0\.0\.weight"):
        dit_from_torch(tensors, dataclasses.replace(model.config, convention="sit"))


def test_a_norm_of_queries_needs_its_convention(tmp_path):
    config = dataclasses.replace(tiny_diffusers_config(), qk_norm=True)
    write_safetensors(tmp_path / "q.safetensors", dit_to_torch(random_dit(config)))
    with pytest.raises(ValueError, match="has a q_norm, as LightningDiT's and REPA's networks; give --convention"):
        ditx.load(tmp_path / "q.safetensors")
    model, _ = ditx.load(tmp_path / "q.safetensors", convention="repa")
    assert model.config == dataclasses.replace(config, convention="repa")


def test_embedders_that_differ_between_blocks_are_named():
    state, _ = diffusers()
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    with pytest.raises(ValueError, match=rf"not repeated in every block \['{name}'\]"):
        dit_from_diffusers(state | {name: state[name] + 1}, tiny_diffusers_config())


@NETWORKS
@given(dit_configs(blocks=["adaln-zero"]))
def test_any_network_comes_back_bit_for_bit(config):
    model = random_dit(config)
    for back in (
        dit_from_torch(dit_to_torch(model), config),
        dit_from_diffusers(dit_to_diffusers(model), config, frequency_shift=0),
    ):
        assert jax.tree.structure(back) == jax.tree.structure(model)
        jax.tree.map(np.testing.assert_array_equal, back, model)


@pytest.mark.parametrize("block", ["adaln", "cross-attention", "in-context"])
def test_blocks_that_other_layouts_lack_are_refused(block):
    config = dataclasses.replace(tiny_diffusers_config(), block=block)
    model = random_dit(config)
    for convert in (dit_to_torch, dit_to_diffusers):
        with pytest.raises(ValueError, match=f"block is '{block}'; other programs only have 'adaln-zero'"):
            convert(model)
    with pytest.raises(ValueError, match=f"block is '{block}'"):
        dit_from_torch({}, config)


def test_layers_that_other_layouts_lack_are_refused():
    config = tiny_diffusers_config()
    with pytest.raises(ValueError, match="qk_norm is True, which diffusers' DiT lacks; use the layout of ditx"):
        dit_to_diffusers(random_dit(dataclasses.replace(config, qk_norm=True)))
    with pytest.raises(ValueError, match="positions are rotary; the layout of the authors needs sincos or both"):
        dit_to_torch(random_dit(dataclasses.replace(config, positions="rotary")))


def empty(shapes):
    """Weights of any size, in four bytes."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def test_every_name_of_the_stable_diffusion_autoencoder_is_read():
    shapes = load("vae_sd_state_dict_shapes.json")
    model = vae_from_torch(empty(shapes), ditx.VAEConfig())
    assert {name: list(value.shape) for name, value in vae_to_torch(model).items()} == shapes


def test_old_names_of_the_autoencoders_attention_are_read():
    model, golden = tiny_vae()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = weights(golden)
    for name in list(old):
        for now, before in names.items():
            if f".{now}." in name:
                old[name.replace(now, before)] = old.pop(name)
    jax.tree.map(np.testing.assert_array_equal, vae_from_torch(old, model.config), model)


def test_every_tensor_of_the_inception_file_has_its_place():
    shapes = load("inception_state_dict_shapes.json")
    state = empty(shapes) | {"Mixed_7b.branch3x3dbl_3b.bn.num_batches_tracked": np.int64(1)}
    units = ["Conv2d_3b_1x1", "Mixed_6c.branch7x7dbl_2", "Mixed_7b.branch3x3dbl_3b", "Mixed_5d.branch_pool"]
    kinds = ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]
    state |= {name: formula(name, shapes[name]) for unit in units for name in [f"{unit}.{kind}" for kind in kinds]}
    model = inception_from_torch(state)
    ours = [
        model.stem[3],
        model.blocks[5][2].steps[1][0],
        model.blocks[9][2].steps[2][1],
        model.blocks[2][3].steps[0][0],
    ]
    for name, unit in zip(units, ours, strict=True):
        arrays = [np.moveaxis(unit.weight, (3, 2), (0, 1)), unit.scale, unit.bias, unit.mean, unit.variance]
        for kind, array in zip(kinds, arrays, strict=True):
            np.testing.assert_array_equal(array, state[f"{name}.{kind}"])
    # Everything but the bias of the logits is read.
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == sum(map(np.prod, shapes.values())) - 1008


def test_inception_files_may_lack_scales_and_logits():
    state = empty(load("inception_state_dict_shapes.json"))
    without = {name: value for name, value in state.items() if not name.startswith("fc.")}
    model = inception_from_torch({k: v.astype(np.float16) for k, v in without.items() if not k.endswith("bn.weight")})
    assert model.logits is None and {leaf.dtype for leaf in jax.tree.leaves(model)} == {np.dtype("float32")}
    assert (model.stem[0].scale == 1).all() and (model.blocks[0][0].steps[0][0].scale == 1).all()
    # A file may not lack only some scales, and torchvision's network, with 1000 classes, is another one.
    del without["Conv2d_1a_3x3.bn.weight"], without["Mixed_5b.branch1x1.conv.weight"]
    without |= {"fc.weight": np.zeros((1000, 2048)), "AuxLogits.fc.bias": np.zeros(1000)}
    with pytest.raises(ValueError, match="do not fit") as error:
        inception_from_torch(without)
    for fault in [
        "missing ['Conv2d_1a_3x3.bn.weight', 'Mixed_5b.branch1x1.conv.weight']",
        "surplus ['AuxLogits.fc.bias']",
        "wrong shapes ['fc.weight is (1000, 2048), not (1008, 2048)']",
    ]:
        assert fault in str(error.value)


@pytest.mark.parametrize("name", ["DiT-S/8", "DiT-XL/2"])
def test_names_and_shapes_are_those_of_released_checkpoints(name):
    state = empty(load("dit_state_dict_shapes.json")[name])
    with pytest.raises(ValueError, match=r"missing none; surplus \['extra'\]; wrong shapes none"):
        dit_from_torch(state | {"extra": np.zeros(1)}, ditx.DIT_CONFIGS[name])


def test_all_faults_are_listed_at_once():
    model, _ = tiny_dit()
    state = dit_to_torch(model)
    del state["blocks.1.attn.qkv.bias"], state["final_layer.linear.weight"]
    state |= {"stray": np.zeros(2), "blocks.2.mlp.fc1.bias": np.zeros(192)}
    state["x_embedder.proj.bias"] = np.zeros(47)
    state["y_embedder.embedding_table.weight"] = np.zeros((10, 48))
    with pytest.raises(ValueError, match="the weights do not fit the configuration") as error:
        dit_from_torch(state, model.config)
    for fault in [
        "missing ['blocks.1.attn.qkv.bias', 'final_layer.linear.weight']",
        "surplus ['stray', 'blocks.2.mlp.fc1.bias']",
        "x_embedder.proj.bias is (47,), not (48,)",
        "y_embedder.embedding_table.weight is (10, 48), not (11, 48)",
    ]:
        assert fault in str(error.value)


def test_weights_of_another_configuration_are_refused():
    model, _ = tiny_dit()
    without_null = dataclasses.replace(model.config, label_dropout=0.0)
    with pytest.raises(ValueError, match=r"embedding_table.weight is \(11, 48\), not \(10, 48\)"):
        dit_from_torch(dit_to_torch(model), without_null)


def test_half_precision_weights_become_float32():
    model, _ = tiny_dit()
    half = {name: value.astype(np.float16) for name, value in dit_to_torch(model).items()}
    back = dit_from_torch(half, model.config)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype("float32")}
    arguments = example(model.config)
    assert_close(forward(back, *arguments), forward(model, *arguments), 0.01)  # weights of 11 bits
