import io
import os
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
from batches import save

from ditx.data import sources
from ditx.data.folders import find_images, inspect

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def names(path, **options):
    return find_images(path, **options).names


def test_hidden_and_system_folders_are_left_out_at_any_depth(tmp_path):
    for name in ("a/0", "a/deep/1", "b/0"):
        save(tmp_path / f"{name}.png", PIXELS[0])
    for name in (".a/0", "a/.ipynb_checkpoints/0", "a/deep/@eaDir/1", "__MACOSX/a/0", "b/._0", "lost+found/0"):
        save(tmp_path / f"{name}.png", PIXELS[0])
    assert names(tmp_path) == names(tmp_path, by_class=False) == ["a/0.png", "a/deep/1.png", "b/0.png"]
    assert find_images(tmp_path).class_names == ("a", "b")
    assert len(sources.images(tmp_path, 8)) == len(sources.open_images(str(tmp_path))) == 3


def test_links_are_followed_and_cycles_end(tmp_path):
    root = tmp_path / "root"
    for name in ("root/a/0", "root/b/0", "store/0", "store/1"):
        save(tmp_path / f"{name}.png", PIXELS[0])
    (root / "c").symlink_to(tmp_path / "store")
    (root / "a" / "inside").symlink_to("../../store")
    (root / "b" / "file.png").symlink_to(tmp_path / "store" / "1.png")
    for link, target in (("a/up", root), ("above", tmp_path), ("a/self", root / "a"), ("a/b", root / "b")):
        (root / link).symlink_to(target)
    (root / "b" / "a").symlink_to(root / "a")
    folder = find_images(root)
    a = ["a/0.png", "a/b/0.png", "a/b/file.png", "a/inside/0.png", "a/inside/1.png"]
    b = ["b/0.png", "b/a/0.png", "b/a/inside/0.png", "b/a/inside/1.png", "b/file.png"]
    assert folder.names == [*a, *b, "c/0.png", "c/1.png"] and folder.class_names == ("a", "b", "c")
    assert folder.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 2 and names(root, by_class=False) == folder.names


@pytest.mark.parametrize("place", ["b", "a/b", "a/0.png"])
def test_a_dead_link_is_named(tmp_path, place):
    for name in ("a/1", "c/0"):
        save(tmp_path / f"{name}.png", PIXELS[0])
    (tmp_path / place).symlink_to("nowhere")
    for open_folder in (lambda path: sources.images(path, 8), sources.open_images):
        with pytest.raises(ValueError, match=rf"link .*/{place} leads nowhere \(nowhere\); mend or remove it"):
            open_folder(str(tmp_path))


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    save(tmp_path / "a" / "deep" / "0.png", PIXELS[0])
    save(tmp_path / "a" / "1.png", PIXELS[0])
    code = (
        "import os, sys; from ditx.data.folders import find_images\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "find_images(sys.argv[1])"
    )
    # For root, another user reads the folder, who must get as far as there.
    for parent in (tmp_path, *tmp_path.parents[:3]):
        if parent.owner() == tmp_path.owner() and parent.name.startswith(("pytest", "popen", "test")):
            parent.chmod(0o755)
    (tmp_path / "a" / "deep").chmod(0)
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    (tmp_path / "a" / "deep").chmod(0o755)
    assert f"ValueError: cannot read folder {tmp_path}/a/deep (Permission denied); make it readable" in done.stderr


def test_images_are_known_by_content_and_other_files_counted(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for name, kind in {"none": "PNG", "x.jfif": "JPEG", "y.JPG": "JPEG", "z.tga": "TGA", "wrong.txt": "WEBP"}.items():
        PIL.Image.fromarray(PIXELS[0]).save(tmp_path / "a" / name, kind)
    for name in ("notes.txt", "more.txt", "Thumbs.db", "script.eps"):
        (tmp_path / "a" / name).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (tmp_path / "a" / "damaged.jpe").write_text("no image")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    folder = find_images(tmp_path)
    assert sorted(folder.names) == sorted(
        f"a/{n}" for n in ("damaged.jpe", "none", "wrong.txt", "x.jfif", "y.JPG", "z.tga")
    )
    assert list(folder.damaged) == ["a/damaged.jpe"]
    assert "passed over 4 files that are no images in" in (said := capsys.readouterr().err)
    assert "2 .txt" in said and "1 .eps" in said and "1 .db" in said


def test_flipped_bytes_of_a_png_are_found(tmp_path):
    save(tmp_path / "a" / "0.png", PIXELS[0])
    whole = (tmp_path / "a" / "0.png").read_bytes()
    damaged = 0
    for place in range(8, len(whole) - 12, 7):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (tmp_path / "a" / "0.png").write_bytes(flipped)
        damaged += bool(find_images(tmp_path).damaged)
    assert damaged == len(range(8, len(whole) - 12, 7))


def test_a_file_is_read_again_when_its_size_or_times_change(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = [str(tmp_path / "images" / f"{number}.bmp") for number in range(3)]
    for number in range(3):
        save(tmp_path / "images" / f"{number}.bmp", PIXELS[number])
    before = os.stat(files[0])
    first = inspect(files, str(tmp_path / "images"))
    assert [(content.width, content.height) for content in first.values()] == [(8, 8)] * 3
    assert len({content.checksum for content in first.values()}) == 3

    # At once, with the same size and time of change.
    save(tmp_path / "images" / "0.bmp", PIXELS[5])
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    second = inspect(files, str(tmp_path / "images"))
    assert [file for file in files if second[file] != first[file]] == files[:1]

    time.sleep(2.1)  # Younger files are not trusted to the cache.
    assert inspect(files, str(tmp_path / "images")) == second
    with monkeypatch.context() as patch:
        patch.setattr("ditx.data.folders._inspect", None)
        assert inspect(files, str(tmp_path / "images")) == second
    save(tmp_path / "images" / "0.bmp", PIXELS[0])
    assert inspect(files, str(tmp_path / "images")) == first
    for cache in (tmp_path / "cache").rglob("*.json"):
        cache.write_text("[1")
    assert inspect(files, str(tmp_path / "images")) == first


def test_folders_that_differ_in_pixels_only_have_other_checksums(tmp_path):
    for folder, pixels in (("one", PIXELS[:3]), ("two", PIXELS[3:]), ("same", PIXELS[:3])):
        for number, image in enumerate(pixels):
            save(tmp_path / folder / f"{number}.bmp", image)
    one, two, same = (sources.open_images(str(tmp_path / name)).checksum for name in ("one", "two", "same"))
    assert one == same != two
    assert sources.images(tmp_path / "one", 8).checksum == one


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    save(tmp_path / "images" / "0.png", PIXELS[0])
    assert len(find_images(tmp_path / "images").files) == 1


def test_a_png_with_megabytes_of_text_is_read(tmp_path):
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 5_000_000, zip=True)
    (tmp_path / "a").mkdir()
    PIL.Image.fromarray(PIXELS[0]).save(tmp_path / "a" / "0.png", pnginfo=text)
    with pytest.raises(ValueError, match="MAX_TEXT"):
        PIL.Image.open(tmp_path / "a" / "0.png")
    source = sources.images(tmp_path, 8, strict=True)
    np.testing.assert_array_equal(source[0]["image"], PIXELS[0])
    late = io.BytesIO()  # its text after the pixels
    PIL.Image.fromarray(PIXELS[1]).save(late, "PNG")
    chunk = (tmp_path / "a" / "0.png").read_bytes()
    start = chunk.index(b"zTXt") - 4
    chunk = chunk[start : start + 12 + int.from_bytes(chunk[start : start + 4], "big")]
    (tmp_path / "a" / "0.png").write_bytes(late.getvalue()[:-12] + chunk + late.getvalue()[-12:])
    np.testing.assert_array_equal(sources.images(tmp_path, 8, strict=True)[0]["image"], PIXELS[1])
