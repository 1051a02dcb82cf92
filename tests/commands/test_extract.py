import json
import random
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from scripts import finish, start

from ditx import cli
from ditx.commands import extract
from ditx.data.image_files import read, to_unit
from ditx.data.latents import LatentSource
from ditx.nn.vae import AutoencoderKL, VAEConfig
from ditx.weights import convert
from ditx.weights.files import write_safetensors

FLAGS = ("--size", 16, "--batch-size", 8, "--shard-size", 7)


class Corners(AutoencoderKL):
    """The mean is the first pixel of each block, the deviation 1 where that is positive, else 0."""

    weight: jax.Array

    def __init__(self, weight=1.0):
        self.encoder = self.quant = self.post_quant = self.decoder = None
        self.config, self.weight = VAEConfig(latent_channels=3), jnp.full((), weight)

    def encode(self, image):
        mean = image[::8, ::8] * self.weight
        return mean, jnp.where(mean > 0, 0.0, -jnp.inf)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 images of three classes; one is damaged and none is square."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(24):
        file = folder / f"class-{number % 3}" / f"{number:02d}.png"
        file.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (20 + number, 50 - number, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(file)
    (folder / "class-1" / "13.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def corners(monkeypatch):
    monkeypatch.setattr(extract, "load_vae", lambda name: (Corners(), f"{name} (CRC-32 0)"))


@pytest.fixture
def encoded(run, corners, photos, tmp_path):
    """The latents of all images by the stand-in, and the output."""
    code, said = run.ditx("extract", photos, tmp_path / "encoded", *FLAGS)
    assert code == 0, said
    return tmp_path / "encoded", said


def files(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def expected(file):
    """The latents of a file by `Corners`, computed by hand."""
    image = to_unit(read(str(file), 16))
    means = np.stack([image[::8, ::8], image[:, ::-1][::8, ::8]])
    return np.stack([means, means > 0], 1).astype(np.float16)


# Output


def test_latents_of_image_and_mirror_image_with_label_and_name(encoded, photos):
    folder, said = encoded
    source = LatentSource(folder)
    names = [f"class-{k}/{number:02d}.png" for k in range(3) for number in range(k, 24, 3) if number != 13]
    assert (
        len(source) == 23
        and source.image_shape == (2, 2, 3)
        and source.class_names == ("class-0", "class-1", "class-2")
    )
    for number, name in enumerate(names):
        example = source[number]
        assert (example["name"], example["label"]) == (name, int(name[6]))
        np.testing.assert_array_equal(example["latents"], expected(photos / name))
    metadata = source.metadata
    assert {n: metadata[n] for n in ("vae", "scale", "image_size", "count", "images")} == {
        "vae": "ft-mse (CRC-32 0)",
        "scale": 0.18215,
        "image_size": 16,
        "count": 23,
        "images": 24,
    }
    assert (
        list(metadata["skipped"]) == ["class-1/13.png"] and "cannot identify" in metadata["skipped"]["class-1/13.png"]
    )
    assert "24 of 3 classes" in said and "skipped class-1/13.png: cannot identify" in said
    assert "skipped 1 images in all" in said and "done 23 latents of 2x2x3" in said


def test_latents_do_not_depend_on_batches_shards_workers_or_processes(encoded, run, photos, tmp_path):
    whole = LatentSource(encoded[0])
    variants = {
        "batch": ("--batch-size", 16, "--shard-size", 100),
        "workers": ("--workers", 1),
        "small": ("--shard-size", 1, "--batch-size", 8),
    }
    for name, flags in variants.items():
        code, said = run.ditx("extract", photos, tmp_path / name, *FLAGS, *flags)
        assert code == 0, said
        other = LatentSource(tmp_path / name)
        assert len(other) == 23
        for number in range(23):
            np.testing.assert_array_equal(other[number]["latents"], whole[number]["latents"])
            assert other[number]["name"] == whole[number]["name"]
    for index in (1, 0):
        flags = ("--process-index", index, "--process-count", 2)
        code, said = run.ditx("extract", photos, tmp_path / "two", *FLAGS, *flags)
        assert code == 0 and f"2 of 2 are missing, {(10, 14)[1 - index]} of" in said, said
        assert ("2 of 4 shards are left to others" in said) == (index == 1)
    assert files(tmp_path / "two") == files(encoded[0])


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A small autoencoder of random weights, in diffusers' layout, and its file."""
    config = VAEConfig(block_channels=(4, 4, 4, 8), layers_per_block=1, norm_groups=2)
    shapes = jax.eval_shape(lambda key: AutoencoderKL(config, key=key), jax.random.key(0))
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("vae")
    model = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", convert.vae_to_torch(model))
    fields = {"block_out_channels": config.block_channels, "layers_per_block": 1, "norm_num_groups": 2}
    described = {"_class_name": "AutoencoderKL", "scaling_factor": config.scale, "latent_channels": 4} | fields
    (folder / "config.json").write_text(json.dumps(described))
    return model, folder


@pytest.fixture(scope="module")
def undisturbed(photos, vae, tmp_path_factory):
    """The folder and the output of an undisturbed extraction, in a process of its own."""
    out = tmp_path_factory.mktemp("undisturbed") / "latents"
    code, said = finish(start("-m", "ditx", "extract", photos, out, "--vae", vae[1], *FLAGS))
    assert code == 0, said
    return out, said


def test_an_autoencoder_gives_the_mean_and_deviation_of_its_posterior(undisturbed, photos, vae):
    source = LatentSource(undisturbed[0])
    assert source.image_shape == (2, 2, 4) and str(vae[1]) in source.metadata["vae"]
    example = source[5]
    image = to_unit(read(str(photos / example["name"]), 16))
    for half, pixels in zip(example["latents"], (image, image[:, ::-1]), strict=True):
        mean, log_variance = vae[0].encode(jnp.asarray(pixels))
        np.testing.assert_allclose(half[0], mean, rtol=1e-3, atol=1e-4)  # half precision
        np.testing.assert_allclose(half[1], np.exp(log_variance / 2), rtol=1e-3)


# Kills


@pytest.mark.slow
def test_a_killed_and_resumed_extraction_equals_an_undisturbed_one(undisturbed, photos, vae, tmp_path):
    out = tmp_path / "latents"
    command = ("-m", "ditx", "extract", photos, out, "--vae", vae[1], *FLAGS)
    process = start(*command)
    while process.poll() is None and "compiled" not in process.stdout.readline():
        pass
    time.sleep(random.Random(time.time_ns()).uniform(0, 0.15))
    process.kill()
    process.communicate()
    code, said = finish(start(*command))
    assert code == 0, said
    assert files(out) == files(undisturbed[0])


def test_every_state_that_a_kill_can_leave_is_resumable(corners, run, photos, tmp_path, monkeypatch):
    """Copies the folder before every write, rename and removal, and resumes from each copy."""
    out, states = tmp_path / "out", []

    def keep(cls, name):
        original = getattr(cls, name)

        def kept(self, *arguments, **keywords):
            states.append(tmp_path / str(len(states)))
            shutil.copytree(out, states[-1])
            return original(self, *arguments, **keywords)

        patch.setattr(cls, name, kept)

    with monkeypatch.context() as patch:
        keep(extract.latents.ShardWriter, "write")
        for name in ("write_text", "replace", "unlink"):
            keep(Path, name)
        code, said = run.ditx("extract", photos, out, *FLAGS)
    assert code == 0 and len(states) > 35, said
    for state in states:
        code, said = run.ditx("extract", photos, state, *FLAGS)
        assert code == 0, said
        assert files(state) == files(out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_and_the_same_command_resumes(corners, run, photos, tmp_path, monkeypatch, number):
    """Raises the signal in this process while the tenth image is written."""
    write = extract.latents.ShardWriter.write
    written = []

    def interrupted(self, *arguments):
        written.append(arguments)
        if len(written) == 10:
            signal.raise_signal(number)
        write(self, *arguments)

    monkeypatch.setattr(extract.latents.ShardWriter, "write", interrupted)
    before = signal.getsignal(number)
    code, said = run.ditx("extract", photos, tmp_path / "out", *FLAGS)
    assert code == 128 + number and signal.getsignal(number) == before
    assert "stopped with 7 of 24 images in finished shards; run the same command to resume" in said
    assert {file.name for file in (tmp_path / "out" / "shards").iterdir()} == {
        f"00000-of-00004.{kind}" for kind in ("json", "array_record")
    }
    with pytest.raises(ValueError, match="unfinished"):
        LatentSource(tmp_path / "out")
    code, said = run.ditx("extract", photos, tmp_path / "out", *FLAGS)
    assert code == 0 and "3 of 4 are missing, 17 of 24 images" in said, said
    assert len(LatentSource(tmp_path / "out")) == 23


# Resuming


def test_a_finished_extraction_is_unchanged(encoded, run, photos):
    before = {file: file.stat().st_mtime_ns for file in (encoded[0] / "shards").iterdir()}
    code, said = run.ditx("extract", photos, encoded[0], *FLAGS)
    assert code == 0 and "0 of 4 are missing" in said and "done 23 latents" in said, said
    assert {file: file.stat().st_mtime_ns for file in (encoded[0] / "shards").iterdir()} == before


def test_a_lost_or_truncated_shard_is_replaced(encoded, run, photos):
    before = files(encoded[0])
    shards = sorted((encoded[0] / "shards").glob("*.array_record"))
    shards[1].unlink()
    shards[3].write_bytes(b"cut")
    code, said = run.ditx("extract", photos, encoded[0], *FLAGS)
    assert code == 0 and "2 of 4 are missing, 10 of 24 images" in said, said
    assert files(encoded[0]) == before


def test_a_repaired_image_is_added(corners, run, photos, tmp_path):
    copy, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, copy)
    run.ditx("extract", copy, out, *FLAGS)
    shutil.copyfile(photos / "class-1" / "10.png", copy / "class-1" / "13.png")
    code, said = run.ditx("extract", copy, out, *FLAGS)
    assert code == 0 and "1 of 4 are missing, 7 of 24 images" in said and "skipped" not in said, said
    source = LatentSource(out)
    assert len(source) == 24
    np.testing.assert_array_equal(source[12]["latents"], source[11]["latents"])
    (copy / "class-2" / "02.png").unlink()
    code, said = run.ditx("extract", copy, out, *FLAGS)
    assert code == 2 and "images was 24 and is 23, names_checksum was" in said


def test_images_that_change_at_the_same_size_are_extracted_again(corners, run, tmp_path):
    photos, out, rng = tmp_path / "photos", tmp_path / "out", np.random.default_rng(0)
    (photos / "cat").mkdir(parents=True)
    for number in range(14):
        PIL.Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(photos / "cat" / f"{number:02}.bmp")
    whole = (photos / "cat" / "09.bmp").read_bytes()
    (photos / "cat" / "09.bmp").write_bytes(bytes(len(whole)))  # its place on the disk, before its bytes arrive
    code, said = run.ditx("extract", photos, out, *FLAGS)
    assert code == 0 and "skipped 1 images in all" in said and len(LatentSource(out)) == 13, said
    (photos / "cat" / "09.bmp").write_bytes(whole)
    shutil.copyfile(photos / "cat" / "08.bmp", photos / "cat" / "00.bmp")
    code, said = run.ditx("extract", photos, out, *FLAGS)
    assert code == 0 and "2 of 2 are missing, 14 of 14 images" in said and "skipped" not in said, said
    for number in (0, 9):
        np.testing.assert_array_equal(
            LatentSource(out)[number]["latents"], expected(photos / "cat" / f"{number:02}.bmp")
        )


def test_damage_in_a_png_is_skipped_and_a_flat_folder_has_no_classes(corners, run, tmp_path):
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for number in range(3):
        PIL.Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(photos / f"{number}.png")
    contents = bytearray((photos / "1.png").read_bytes())
    contents[len(contents) // 2] ^= 1
    (photos / "1.png").write_bytes(contents)
    (photos / "notes.txt").write_text("no image")
    code, said = run.ditx("extract", photos, tmp_path / "out", *FLAGS)
    assert code == 0 and "3 of 0 classes" in said and "skipped 1.png: " in said and "1 files that are no images" in said
    source = LatentSource(tmp_path / "out")
    assert (len(source), source.class_names, [source[n]["label"] for n in range(2)]) == (2, (), [0, 0])


def test_other_settings_are_refused_by_field(encoded, run, photos):
    before = files(encoded[0])
    flags = ("--size", 24, "--batch-size", 8, "--shard-size", 8, "--vae", "ft-ema", "--dtype", "bfloat16")
    code, said = run.ditx("extract", photos, encoded[0], *flags)
    assert code == 2 and "holds other latents: shard_size was 7 and is 8, image_size was 16 and is 24" in said, said
    assert "image_size was 16 and is 24, dtype was 'float32' and is 'bfloat16'" in said
    assert files(encoded[0]) == before


def test_two_processes_cannot_write_the_same_shard(corners, run, photos, tmp_path):
    (tmp_path / "out" / "shards").mkdir(parents=True)
    with extract.lock(tmp_path / "out" / "shards" / "00001-of-00004.partial"):
        code, said = run.ditx("extract", photos, tmp_path / "out", *FLAGS, "--process-index", 1, "--process-count", 4)
        assert code == 2 and "another process is writing" in said and "give each its --process-index" in said, said
        code, said = run.ditx("extract", photos, tmp_path / "out", *FLAGS, "--process-index", 2, "--process-count", 4)
        assert code == 0 and "3 of 4 shards are left to others" in said, said


# Mistakes and failures


def test_strict_stops_at_the_first_damaged_image(corners, run, photos, tmp_path):
    copy, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, copy)
    (copy / "class-2" / "23.png").write_bytes(b"")
    code, said = run.ditx("extract", copy, out, *FLAGS, "--strict")
    assert code == 2 and f"cannot read image {copy / 'class-1' / '13.png'}" in said and "drop --strict" in said, said
    code, said = run.ditx("extract", copy, out, *FLAGS)
    assert code == 0 and "3 of 4 are missing" in said and "skipped 2 images in all" in said, said


def test_a_folder_without_readable_images_is_refused(corners, run, tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "a.png").write_bytes(b"no image")
    code, said = run.ditx("extract", tmp_path / "photos", tmp_path / "out", *FLAGS)
    assert code == 2 and "none of the 1 images can be read" in said, said


def test_non_finite_latents_stop_it(run, photos, tmp_path, monkeypatch):
    broken = Corners(jnp.nan)
    monkeypatch.setattr(extract, "load_vae", lambda name: (broken, name))
    code, said = run.ditx("extract", photos, tmp_path / "out", *FLAGS)
    assert code == 2 and "non-finite numbers" in said and not list((tmp_path / "out" / "shards").iterdir())


MISTAKES = {
    "absent is not a folder": ["absent", "out"],
    "size is 20; the autoencoder needs a multiple of 8": ["photos", "out", "--size", 20],
    "size is 0; it must be at least 1": ["photos", "out", "--size", 0],
    "batch_size is 4; make it a multiple of the 8 devices": ["photos", "out", "--batch-size", 4],
    "shard_size is -1": ["photos", "out", "--shard-size", -1],
    "workers is -2": ["photos", "out", "--workers", -2],
    "process_index is 2 of 2 processes": ["photos", "out", "--process-index", 2, "--process-count", 2],
    "process_index is 0 of 0 processes": ["photos", "out", "--process-count", 0],
    "photos/latents is inside the folder of images": ["photos", "photos/latents"],
    "taken exists and is not of `ditx extract`": ["photos", "taken"],
    "file exists and is not of `ditx extract`": ["photos", "file"],
    "folder photos/empty contains no images": ["photos", "out"],
    "--dtype": ["photos", "out", "--dtype", "float16"],
    "unknown autoencoder 'nowhere'": ["photos", "out", "--vae", "nowhere"],
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_mistake_gets_one_sentence_and_writes_nothing(sentence, request, run, photos, tmp_path, monkeypatch):
    if "autoencoder 'no" not in sentence:
        request.getfixturevalue("corners")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, "photos")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    if "empty" in sentence:
        Path("photos/empty").mkdir()
    before = files(tmp_path)
    code, said = run.ditx("extract", *MISTAKES[sentence])
    assert code == 2 and sentence in said.replace(f"{tmp_path}/", "") and "Traceback" not in said, said
    assert files(tmp_path) == before and not Path("out").exists()


def test_progress_is_printed_as_lines_without_a_terminal(corners, run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.Progress, "SECONDS_BETWEEN_LINES", 0)
    code, said = run.ditx("extract", photos, tmp_path / "out", *FLAGS)
    assert code == 0 and "24 of 24 images" in said and "images/s 0 s left" in said, said


def test_strict_retries_images_that_were_skipped_before(encoded, run, photos):
    code, said = run.ditx("extract", photos, encoded[0], *FLAGS, "--strict")
    assert code == 2 and "13.png" in said and "cannot read image" in said


def test_metadata_is_removed_before_a_shard_is_replaced(encoded, run, photos, monkeypatch):
    next((encoded[0] / "shards").glob("00001-*.array_record")).unlink()
    monkeypatch.setattr(extract, "finish", lambda *_: None)  # as if it were killed there
    assert run.ditx("extract", photos, encoded[0], *FLAGS)[0] == 0
    with pytest.raises(ValueError, match="is unfinished"):
        LatentSource(encoded[0])


@pytest.mark.parametrize("text", ["{", "[]", "null", "{}"])
def test_a_damaged_plan_is_refused(encoded, run, photos, text):
    (encoded[0] / "plan.json").write_text(text)
    code, said = run.ditx("extract", photos, encoded[0], *FLAGS)
    assert code == 2 and ("plan.json is damaged" in said or "holds other latents" in said), said


def test_weights_may_move(encoded, run, photos, monkeypatch):
    monkeypatch.setattr(extract, "load_vae", lambda name: (Corners(), f"/moved/{name} (CRC-32 0)"))
    assert run.ditx("extract", photos, encoded[0], *FLAGS)[0] == 0
    monkeypatch.setattr(extract, "load_vae", lambda name: (Corners(), f"{name} (CRC-32 1)"))
    code, said = run.ditx("extract", photos, encoded[0], *FLAGS)
    assert code == 2 and "vae was" in said


def test_more_shards_than_can_be_open_at_once_are_refused(corners, run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "MAX_SHARDS", 4)
    code, said = run.ditx("extract", photos, tmp_path / "out", *FLAGS[:-1], 5)
    assert code == 2 and "shard_size 5 makes more than 4 shards; give 6 or more" in said
