"""Released weights and our files: descriptions, the sampler of the authors, files of the first edition."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import random_dit
from references import GOLDEN, assert_close, chw, hwc, load, weights, write_tiny_vae

import ditx
from ditx.data import imagenet
from ditx.diffusion.objective import ObjectiveConfig
from ditx.kernels.block import KernelConfig
from ditx.sampling import SamplingConfig
from ditx.weights import pretrained
from ditx.weights.files import write_safetensors, write_torch

# A network of a published width, but small, on 64-pixel images by an autoencoder that halves the sides twice.
RELEASED = ditx.DiTConfig(input_size=16, patch_size=8, hidden_size=384, depth=1, num_heads=6)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "DiT-small-16x16.pt"
    write_torch(path, ditx.weights.convert.dit_to_torch(random_dit(RELEASED, scale=0.05)))
    return path


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_tiny_vae(tmp_path_factory.mktemp("vae") / "stable")


def test_released_weights_are_described_by_their_shapes(released):
    described = pretrained.describe(released)
    assert described.model == RELEASED and described.objective == ObjectiveConfig()
    assert described.sampling == SamplingConfig("ddpm", 250, guidance_scale=4.0, guidance_channels=3)
    assert len(described.class_names) == 1000


FIRST_EDITION = {
    "eps": ObjectiveConfig(loss_weight="min-snr"),
    "v": ObjectiveConfig("cosine", "v"),
    "flow": ObjectiveConfig("flow", "x0", flow_times=(0.5, 1.5), flow_shift=3.0),
    "flow-uniform": ObjectiveConfig("flow", "velocity", flow_times="uniform"),
    "sit": ObjectiveConfig("flow", "velocity"),
}


@pytest.mark.parametrize("name", FIRST_EDITION)
def test_files_of_the_first_edition_give_the_same_samples(name, highest_precision):
    """Files that ditx 0.1 (commit 57a9924) wrote, one for each kind of objective, and its samples of them."""
    file = GOLDEN / f"first_edition_{name}.safetensors"
    described = pretrained.describe(file)
    learn_sigma = name in ("eps", "sit")
    config = ditx.DiTConfig(4, 2, 1, 4, 1, 1, num_classes=2, learn_sigma=learn_sigma)
    config = dataclasses.replace(config, convention="sit" if name == "sit" else "dit")
    assert described.model == config and described.objective == FIRST_EDITION[name]
    assert described.sampling == SamplingConfig(steps=5, guidance_scale=1.5) and described.class_names == ("a", "b")
    model, _ = pretrained.load(file, described)
    x = np.random.default_rng(1).normal(size=(4, 4, 1)).astype(np.float32)
    grid, step = described.objective.sampler_grid(5), ditx.samplers.heun_step
    samples, _ = ditx.samplers.sample(step, lambda x, t: model(x, t, 1), grid, jnp.asarray(x), key=jax.random.key(0))
    assert_close(samples, load("first_edition_samples.npz")[name], 1e-4)


def test_fields_that_old_files_lack_have_their_defaults():
    fields = json.loads("""{"objective": "flow", "flow_time": [0.5, 1.0], "class_names": ["a"], "model": {
        "input_size": 8, "num_classes": 1, "learn_sigma": false}, "steps": 3, "sampling": {"sampler": "euler",
        "steps": 25, "eta": 0.0, "guidance_scale": 2.5, "guidance_channels": 0}}""")
    described = pretrained.Description.of(fields, "run")
    assert described.objective == ObjectiveConfig("flow", "velocity", flow_times=(0.5, 1.0))
    assert described.sampling == SamplingConfig(sampler="euler", steps=25, guidance_scale=2.5)
    for wrong in ({"objective": "noise"}, {"sampling": {"sampler": "euler", "colour": "red"}}):
        with pytest.raises(ValueError, match="run was written by another version of ditx, or is damaged"):
            pretrained.Description.of(fields | wrong, "run")


@pytest.mark.parametrize("name", ["DiT-S/8", "DiT-XL/2"])
def test_published_networks_are_recognised(tmp_path, name):
    # Each tensor takes four bytes of memory.
    config = ditx.DIT_CONFIGS[name]
    shapes = load("dit_state_dict_shapes.json")[name]
    empty = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    inferred = pretrained._infer(tmp_path, "authors", empty, {}, {})
    assert inferred == config


def diffusers_folder(folder, **changes):
    """A folder with the network of `diffusers_eps_tiny.npz`, whose `config.json` has other fields."""
    golden = load("diffusers_eps_tiny.npz")
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(str(golden["config"])) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", weights(golden))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_eps": ...},  # diffusers' default is 1e-5
        {"norm_eps": ..., "_class_name": "Transformer2DModel", "cross_attention_dim": None},  # before 2024
    ],
)
def test_diffusers_folders_of_any_age_compute_as_there(changes, tmp_path, highest_precision):
    golden, folder = load("diffusers_eps_tiny.npz"), diffusers_folder(tmp_path / "a", **changes)
    described = pretrained.describe(folder)
    assert described.model.mlp_norm_eps == 1e-5
    model, _ = pretrained.load(folder, described)
    x, t, y = hwc(golden["x"]), golden["t"].astype(np.float32), golden["y"]
    assert_close(chw(jax.vmap(model)(x, t, y)), golden["out"], 1e-4)
    kernel = KernelConfig().apply_block()
    assert_close(jax.vmap(lambda *xs: model(*xs, apply_block=kernel))(x, t, y), jax.vmap(model)(x, t, y), 1e-5)


def test_a_variant_is_named(tmp_path):
    folder = diffusers_folder(tmp_path / "transformer")
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert pretrained.load(tmp_path, pretrained.describe(tmp_path))[1].endswith("diffusers, variant 'fp16'")


def test_classes_of_a_pipeline_have_its_names(tmp_path):
    diffusers_folder(tmp_path / "transformer")
    names = {str(k): f"kind {k}, number {k}" for k in range(10)}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": names}))
    for source in (tmp_path, tmp_path / "transformer"):
        described = pretrained.describe(source)
        assert described.class_names == tuple(names.values())
    assert described.vae == ""
    (tmp_path / "vae").mkdir()
    index = {"id2label": list(names.values()), "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert pretrained.describe(tmp_path).vae == str(tmp_path)  # the pipeline's own decoder
    assert imagenet.find_labels(("Number 3", "kind 4"), described.class_names) == [3, 4]
    assert imagenet.usual_name(described.class_names[3]) == "kind 3"
    (tmp_path / "model_index.json").write_text(json.dumps({"id2label": {"0": "kind 0"}}))
    with pytest.raises(ValueError, match="has no name for class 1 of 10; add it"):
        pretrained.describe(tmp_path)
    official = {str(k): ", ".join(names) for k, names in enumerate(imagenet.classes().values())}
    assert pretrained._class_names("a", official, 1000) == tuple(imagenet.classes())


def test_positions_may_be_rounded_to_bfloat16(tmp_path):
    state = ditx.convert.dit_to_torch(random_dit(RELEASED, scale=0.05))
    write_torch(tmp_path / "a.pt", {name: array.astype(jnp.bfloat16) for name, array in state.items()})
    pretrained.load(tmp_path / "a.pt", pretrained.describe(tmp_path / "a.pt"))


def test_a_file_without_positions_needs_its_input_size(run, vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = ditx.convert.dit_to_torch(random_dit(RELEASED, scale=0.05))
    del state["pos_embed"]
    write_torch(tmp_path / "a.pt", state)
    draw = ("a.pt", "--vae", vae, "--steps", 1, "--num-samples", 1)
    code, said = run.sample(*draw)
    assert code == 2 and "a.pt has no positions, so that its input size is unknown; give --input-size" in said
    code, said = run.sample(*draw, "--input-size", 16)
    assert code == 0, said


def test_weights_that_are_not_finite_are_named(run, tmp_path):
    config = ditx.DiTConfig(4, 2, 1, 8, 1, 1, num_classes=2, learn_sigma=False)
    for value, sentence in ((np.nan, "since the weights have NaN or infinity"), (1e30, "try a lower --guidance-scale")):
        model = jax.tree.map(lambda leaf, value=value: jnp.full_like(leaf, value), random_dit(config))
        path, names = tmp_path / f"{value}.safetensors", ("a", "b")
        described = pretrained.Description(config, ObjectiveConfig(), SamplingConfig("euler", 1), names)
        pretrained.write(path, model, described)
        code, said = run.sample(path, "--num-samples", 1, "--out", tmp_path / "a.png")
        assert code == 2 and sentence in said and "--dtype" not in said, said


def test_sampling_from_released_weights(run, released, vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = [released, "--vae", vae, "--steps", 2, "--num-samples", 4, "--npz", "--separate"]
    code, said = run.sample(*draw, "--labels", "golden retriever", "360")
    assert code == 0 and "by ddpm in 2 steps, guidance 4.0 on 3 of 4 channels, computing in float32" in said, said
    folder = tmp_path / "samples" / "DiT-small-16x16"
    with np.load(folder / "samples-000.npz") as drawn:
        images = drawn["arr_0"]
        assert images.shape == (4, 32, 32, 3) and drawn["labels"].tolist() == [207, 360, 207, 360]
    with PIL.Image.open(folder / "samples-000" / "000001-otter.png") as image:
        np.testing.assert_array_equal(np.asarray(image), images[1])
    code, said = run.sample(*draw, "--labels", "Lutra lutra", "--dtype", "bfloat16")
    assert code == 2 and "unknown class 'Lutra lutra'" in said
    code, said = run.sample(*draw, "--labels", "207", "OTTER", "--dtype", "bfloat16", "--decode-batch", 1)
    assert code == 0 and "computing in bfloat16" in said
    with np.load(folder / "samples-001.npz") as drawn:
        difference = np.abs(drawn["arr_0"].astype(int) - images).mean()
        assert 0 < difference < 10  # eight bits of mantissa, guided four times as far


def test_mistakes_are_one_sentence_and_write_nothing(run, released, vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, sentence in [
        ([released], "the network makes latents of 4 channels; decode them with --vae ft-mse, as the paper, or a path"),
        ([released, "--vae", "ft-eme"], "unknown autoencoder 'ft-eme'; did you mean 'ft-mse'? choose from"),
        ([released, "--vae", vae, "--labels", "crane"], "'crane' is the name of several classes; give one of 134, 517"),
        ([released, "--vae", vae, "--labels", "1000"], "unknown class '1000'; choose from 0 to 999: tench, goldfish"),
        ([released, "--vae", vae, "--decode-batch", 0], "decode_batch is 0"),
        ([released, "--vae", released], "the weights do not fit the configuration: missing ["),
        ([released, "--vae", vae, "--steps", 1001], "steps is 1001; schedule linear samples in 1 to 1000 steps"),
        ([tmp_path / "missing.pt", "--vae", vae], "there is no such file"),
        ([tmp_path, "--vae", vae], "is neither a run nor a folder with diffusion_pytorch_model"),
    ]:
        code, said = run.sample(*arguments)
        assert code == 2 and sentence in said and "Traceback" not in said, said
        assert not list(tmp_path.iterdir())


def test_imagenet_has_its_classes():
    assert len(imagenet.classes()) == 1000
    names = list(imagenet.classes().values())
    for label, name in {0: "tench", 1: "goldfish", 207: "golden retriever", 360: "otter", 999: "toilet tissue"}.items():
        assert names[label][0] == name
    assert imagenet.names_of("cat") == ("cat",)


@given(st.integers(0, 999))
def test_every_class_is_found_by_identifier_and_number(label):
    class_names = tuple(imagenet.classes())
    assert imagenet.find_labels((class_names[label], str(label)), class_names) == [label, label]


def test_golden_files_are_small_and_all_read():
    read = {"dit_tiny.npz", "dit_s8_formula.npz", "diffusion.npz", "diffusers_dit_tiny.npz"}
    read |= {"diffusers_eps_tiny.npz", "vae_tiny.npz", "vae_sd_formula.npz", "inception_formula.npz", "metrics.npz"}
    read |= {"dit_state_dict_shapes.json", "vae_sd_state_dict_shapes.json", "inception_state_dict_shapes.json"}
    read |= {"lightningdit_tiny.npz", "lightningdit_mixed_tiny.npz", "lightningdit_state_dict_shapes.json"}
    read |= {"jit_tiny.npz", "jit_state_dict_shapes.json", "meanflow.npz", "imeanflow.npz"}
    read |= {"paper_tables.json", "official_training_curve.json", "first_edition_samples.npz"}
    read |= {f"first_edition_{name}.safetensors" for name in FIRST_EDITION}
    assert {path.name for path in GOLDEN.iterdir()} == read
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 6_000_000
