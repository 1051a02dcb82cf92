"""From a folder of JPEGs to decoded samples, through the commands alone."""

import json

import numpy as np
import PIL.Image
import pytest
import scripts
from references import load, weights

from ditx.data.latents import LatentSource
from ditx.weights import pretrained
from ditx.weights.files import write_safetensors

TINY = (
    "--model.input-size 8 --model.hidden-size 16 --model.depth 1 --model.num-heads 2 --model.patch-size 4"
    " --batch-size 8 --steps 6 --log-every 3 --sample-every 6 --sampling.steps 2 --dtype float32"
).split()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A small autoencoder in diffusers' layout, of random weights, that halves the sides of images."""
    folder, golden = tmp_path_factory.mktemp("vae"), load("vae_tiny.npz")
    config = json.loads(str(golden["config"])) | {"_class_name": "AutoencoderKL", "scaling_factor": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", weights(golden))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEGs of two classes, none of them square."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, base in (("n02099601", 60), ("n02123045", 180)):
        (folder / name).mkdir()
        for i in range(10):
            pixels = random.normal(base, 30, (5, 7, 3)).clip(0, 255).astype(np.uint8)
            PIL.Image.fromarray(pixels).resize((56 + i, 40), PIL.Image.Resampling.BICUBIC).save(
                folder / name / f"{i}.jpeg", quality=95
            )
    return folder


@pytest.mark.slow
def test_images_become_latents_a_run_and_samples(run, photos, vae, tmp_path):
    shards, folder = tmp_path / "latents", tmp_path / "run"
    code, said = run.ditx("extract", photos, shards, "--vae", vae, "--size", 16, "--batch-size", 8, "--shard-size", 7)
    assert code == 0 and "20" in said, said
    source = LatentSource(shards)
    assert (len(source), source.image_shape, source.metadata["scale"]) == (20, (8, 8, 4), 0.5)

    flags = ["imagenet256-s8", *TINY, "--data-path", shards, "--run", folder]
    code, said = run.train(*flags, "--vae", vae)
    assert code == 0 and "20 latents of 8x8x4, 2 classes" in said and "no pictures" not in said, said
    with PIL.Image.open(folder / "samples" / "step-0000006.png") as picture:
        assert picture.mode == "RGB" and np.asarray(picture).std() > 5
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(0.5 < loss < 2 for loss in losses)

    # The run knows its autoencoder; one of another scale is refused.
    described = pretrained.describe(folder)
    assert (described.vae, described.latent_scale) == (str(vae), 0.5)
    code, said = run.sample(
        folder, "--num-samples", 3, "--labels", "golden retriever", "1", "--npz", "--separate", "--steps", 2
    )
    assert code == 0 and "decoder" in said and "guidance 4.0 on 3 of 4 channels" in said, said
    with np.load(folder / "samples-000.npz") as drawn:
        assert drawn["arr_0"].shape == (3, 16, 16, 3) and drawn["labels"].tolist() == [0, 1, 0]
    assert (folder / "samples-000" / "000000-golden_retriever.png").exists()

    weights_file = tmp_path / "exported.safetensors"
    code, said = run.ditx("convert", folder, weights_file)
    assert code == 0 and "at step 6" in said, said
    draw = (
        "--vae",
        vae,
        "--num-samples",
        3,
        "--labels",
        0,
        1,
        "--npz",
        "--steps",
        2,
        "--decode-batch",
        1,
        "--batch",
        2,
    )
    code, said = run.sample(weights_file, *draw, "--out", tmp_path / "again.png")
    assert code == 0, said
    with np.load(tmp_path / "again.npz") as again, np.load(folder / "samples-000.npz") as drawn:
        assert np.abs(again["arr_0"].astype(int) - drawn["arr_0"]).max() <= 1  # of other batches
        reference = scripts.write_reference(tmp_path / "reference.npz", np.concatenate(list(drawn.values())[:1]))

    # What is judged are the decoded images, those of sample.py.
    code, said = run.sample(
        weights_file, *draw, "--num-samples", 8, "--guidance-scale", 1, "--out", tmp_path / "eight.png"
    )
    assert code == 0, said
    fids = []
    for source in (
        [tmp_path / "eight.npz"],
        [weights_file, "--vae", vae, "--num-samples", 8, "--balanced", "--steps", 2],
    ):
        code, said = run.ditx("evaluate", source[0], reference, *source[1:], "--json")
        assert code == 0, said
        fids.append(json.loads(said[said.index("{") : said.rindex("}") + 1])["metrics"]["fid"])
    assert fids[0] == pytest.approx(fids[1], rel=1e-2)  # a pixel may differ by one, of other batches


@pytest.mark.slow
def test_without_an_autoencoder_it_trains_and_says_that_there_are_no_pictures(run, photos, vae, tmp_path):
    shards, folder = tmp_path / "latents", tmp_path / "run"
    run.ditx("extract", photos, shards, "--vae", vae, "--size", 16)
    code, said = run.train("imagenet256-xl2-adaln", *TINY, "--data-path", shards, "--run", folder)
    assert code == 0 and "no pictures, which need --vae to decode latents" in said, said
    assert not list((folder / "samples").glob("*"))
    code, said = run.train("imagenet256-s8", *TINY, "--data-path", photos, "--run", tmp_path / "other")
    assert code == 2 and "contains no latents; give a folder that `ditx extract` wrote" in said
    other = tmp_path / "vae"
    other.mkdir()
    config = json.loads((vae / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.25}))
    write_safetensors(other / "diffusion_pytorch_model.safetensors", weights(load("vae_tiny.npz")))
    code, said = run.sample(folder, "--vae", other, "--num-samples", 1)
    assert code == 2 and "scales latents by 0.25, but the data's are scaled by 0.5" in said
    assert not list(folder.glob("samples-*"))
