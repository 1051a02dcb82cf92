import shutil
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ditx.parallel.mesh import MeshConfig, make_mesh
from ditx.training import checkpoint


def trees(value):
    return {"weights": {"a": jnp.full((64, 8), float(value)), "b": jnp.arange(5)}, "step": jnp.array(value)}


def abstract(tree, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints, at steps 10, 20 and 30."""
    manager = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (10, 20, 30):
        manager.save(step, trees(step))
    manager.close()
    return tmp_path / "checkpoints"


def largest_file(path):
    return max((file for file in path.glob("weights/**/*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_newest_is_read_back_exactly(folder):
    step, read, damaged = checkpoint.load_newest(folder, abstract(trees(0)))
    assert (step, damaged) == (30, [])
    jax.tree.map(np.testing.assert_array_equal, read, trees(30))
    assert jax.tree.map(lambda leaf: leaf.dtype, read) == jax.tree.map(lambda leaf: leaf.dtype, trees(30))


def test_one_tree_can_be_read_alone(folder):
    read = checkpoint.load(folder, 20, abstract({"step": trees(0)["step"]}))
    assert set(read) == {"step"} and int(read["step"]) == 20


def test_only_the_newest_are_kept(tmp_path):
    manager = checkpoint.Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        manager.save(step, trees(step))
    manager.close()
    assert checkpoint.steps(tmp_path) == [4, 5]


def test_other_devices_can_read_it(folder):
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    wanted = abstract({"weights": trees(0)["weights"]})
    wanted["weights"]["a"] = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=sharding)
    read = checkpoint.load(folder, 30, wanted)["weights"]["a"]
    assert read.sharding == sharding
    np.testing.assert_array_equal(read, trees(30)["weights"]["a"])


def damage(path, how):
    file = largest_file(path)
    content = bytearray(file.read_bytes())
    if how == "missing":
        return file.unlink()
    if how == "flipped":
        content[len(content) // 2] ^= 1
    file.write_bytes(content[: len(content) // 2] if how == "truncated" else b"" if how == "empty" else content)


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "missing"])
def test_damage_falls_back_to_the_one_before_and_says_so(folder, how):
    damage(folder / "30", how)
    step, read, damaged = checkpoint.load_newest(folder, abstract(trees(0)))
    assert step == 20
    jax.tree.map(np.testing.assert_array_equal, read, trees(20))
    ((number, sentence),) = damaged
    assert number == 30 and "weights/" in sentence and "missing, truncated or altered" in sentence
    aside = checkpoint.quarantine(folder, 30)
    assert aside.exists() and checkpoint.steps(folder) == [10, 20]


def test_nothing_sound_is_an_error_and_nothing_at_all_is_none(folder, tmp_path):
    for step in (10, 20, 30):
        damage(folder / str(step), "truncated")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: .*30.*20.*10"):
        checkpoint.load_newest(folder, abstract(trees(0)))
    assert checkpoint.load_newest(tmp_path / "nowhere", abstract(trees(0))) is None


def test_an_unfinished_write_is_not_taken(folder):
    (folder / "30").rename(folder / "40.orbax-checkpoint-tmp-1")
    assert checkpoint.steps(folder) == [10, 20]


def test_a_checkpoint_of_other_trees_is_refused(folder):
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(folder, 30, abstract({"other": jnp.zeros(3)}))


def test_a_full_disk_is_said_before_anything_is_written(folder, monkeypatch):
    manager = checkpoint.Checkpoints(folder, keep=3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000))
    with pytest.raises(OSError, match=r"takes 2,\d{3} bytes, and the disk has 1,000 left.*whole: 10, 20, 30"):
        manager.save(40, trees(40))
    manager.close()
    assert checkpoint.steps(folder) == [10, 20, 30]


def test_the_best_by_the_metric_asked_for_is_kept(tmp_path):
    manager = checkpoint.Checkpoints(tmp_path, keep=1, keep_best=1, best="fid")
    for step, metrics in [
        (1, {"fid": 3.0}),
        (2, {"fid": 1.0, "loss": 9.0}),
        (3, {"fid": None, "loss": 0.1}),
        (4, {}),
        (5, {"fid": 2.0}),
    ]:
        manager.save(step, trees(step), metrics=metrics)
    manager.close()
    assert checkpoint.steps(tmp_path) == [2, 5]
