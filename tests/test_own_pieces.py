"""Pieces of one's own, from outside the package: a block, an objective, a source and a sampler."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ditx
import train
from ditx import costs, flags
from ditx.diffusion import flow
from ditx.nn.blocks import AdaLNBlock
from ditx.nn.layers import Linear
from ditx.parallel import fsdp
from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.training import run as runs


class Mixer(AdaLNBlock):
    """A block with a layer that no block of ditx has."""

    mix: Linear

    def __init__(self, hidden_size, num_heads, mlp_size, *, key):
        super().__init__(hidden_size, num_heads, mlp_size, key=key)
        self.mix = Linear(hidden_size, hidden_size, key=jax.random.fold_in(key, 1))

    def __call__(self, x, c):
        return super().__call__(x + self.mix(x), c)


class Stripes:
    """Eight images of 8 x 8 without classes, computed when read."""

    image_shape, class_names, checksum, latents = (8, 8, 1), (), 8, None

    def __len__(self):
        return 8

    def take(self, indices, mirrored):
        x = np.ones((len(indices), 8, 8, 1), np.float32) * (np.arange(8)[:, None] % (indices[:, None, None, None] + 2))
        return {"x": x.clip(-1, 1), "y": np.zeros(len(indices), np.int32)}


def plain(predict, x0, key):
    time_key, noise_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x0.shape)
    terms = flow.training_loss(predict, x0, jax.random.uniform(time_key), noise)
    return {"loss": terms["loss"], "twice": 2 * terms["loss"]}


MODEL = ditx.DiTConfig(8, 4, 1, 16, 2, 2, num_classes=0, learn_sigma=False, block=Mixer)


def test_an_own_block_is_counted_and_sharded():
    plainer = dataclasses.replace(MODEL, block="adaln")
    assert costs.parameters(MODEL) - costs.parameters(plainer) == 2 * (16 * 16 + 16)
    assert costs.macs(MODEL) - costs.macs(plainer) == 2 * 4 * 16 * 16
    shapes = jax.eval_shape(lambda key: ditx.DiT(plainer, block=Mixer, key=key), jax.random.key(0))
    assert shapes.config == MODEL
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    assert "fsdp" in fsdp.specs(shapes, mesh).blocks.mix.weight
    with pytest.raises(ValueError, match=r"Mixer\.mix does not state its split; name it in the class's tensor_split"):
        fsdp.specs(shapes, make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2]))


def test_costs_that_cannot_be_known_are_not_guessed():
    def opaque(x):
        return jax.pure_callback(lambda x: x @ x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(ValueError, match="the multiply-adds of pure_callback cannot be counted; use jax"):
        costs.count_macs(jax.make_jaxpr(opaque)(jnp.ones((4, 4))).jaxpr)


def test_a_class_that_is_no_block_is_refused():
    with pytest.raises(ValueError, match=r"block Linear has no enter and no final; derive it from AdaLNBlock"):
        ditx.DiTConfig(block=Linear)


@pytest.mark.slow
def test_own_pieces_train_resume_and_are_sampled(tmp_path, capsys):
    run = tmp_path / "run"
    config = train.Config(
        run=str(run), model=MODEL, steps=4, batch_size=8, learning_rate=1e-3, dtype="float32", sample_every=0,
        log_every=2, schedule="flow", prediction="velocity",
    )  # fmt: skip
    pieces = {"objective": plain, "source": Stripes()}
    assert train.train(config, **pieces) == 0
    assert train.train(dataclasses.replace(config, steps=6), **pieces) == 0
    said = capsys.readouterr().out
    assert "resume    from step 4" in said and "Stripes: 8 images of 8x8x1" in said, said
    assert runs.read_config(run)["own"] == {"block": "Mixer", "objective": "plain", "source": "Stripes"}
    for line in runs.read_metrics(run):
        assert line["twice"] == pytest.approx(2 * line["loss"])
    with pytest.raises(ValueError, match=r"own.objective was 'plain' and is None; resume it by the program"):
        train.train(config, source=Stripes())
    with pytest.raises(ValueError, match="run was trained by your own block Mixer and objective plain and source Stri"):
        flags.parse(["--resume", str(run)])
    with pytest.raises(ValueError, match=r"run has blocks of your own class Mixer; load it in Python: ditx.load"):
        ditx.load(run)

    model, info = ditx.load(run, block=Mixer)
    assert isinstance(model.blocks, Mixer)
    ditx.save(tmp_path / "own.safetensors", model, info)
    again, _ = ditx.load(tmp_path / "own.safetensors", block=Mixer)
    assert eqx.tree_equal(model, again)

    def one_jump(predict, schedule, x, i, noise):
        return jnp.full_like(x, 0.5)

    images = ditx.sample(model, info, num=2, steps=2, sampler=one_jump)
    assert (images == np.uint8(127.5 * 0.5 + 128)).all() and images.shape == (2, 8, 8, 1)


def test_a_source_without_a_member_is_refused():
    class Nothing:
        image_shape = (8, 8, 1)

        def __len__(self):
            return 3

    with pytest.raises(ValueError, match=r"source Nothing has no class_names and no checksum and no latents and no ta"):
        train.train(train.Config(model=MODEL, schedule="flow", prediction="velocity"), source=Nothing())


def test_a_block_is_chosen_by_name_on_the_command_line(capsys):
    assert flags.parse(["digits", "--model.block", "adaln"])["config"].model.block == "adaln"
    with pytest.raises(SystemExit):
        flags.parse(["digits", "--model.block", "Mixer"])
    assert "in-context" in capsys.readouterr().err
    assert json.dumps(MODEL.described())
