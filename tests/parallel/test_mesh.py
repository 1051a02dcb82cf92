"""Where arrays lie, and what one step sends between eight devices: read from XLA's own text and figures."""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ditx.diffusion.objective import ObjectiveConfig, make_objective
from ditx.kernels.block import KernelConfig
from ditx.nn.blocks import InContextBlock
from ditx.nn.dit import DiT, DiTConfig
from ditx.nn.layers import Linear
from ditx.parallel import fsdp
from ditx.parallel import mesh as sharding
from ditx.parallel.compile import compiler_options
from ditx.parallel.fsdp import with_shardings
from ditx.parallel.mesh import MeshConfig, batch_sharding, check_mesh, local_batch_indices, make_mesh, put_batch
from ditx.sampling import SamplingConfig, make_sampler
from ditx.training.step import TrainState, train_step

CONFIG = DiTConfig(8, 4, 2, 32, 3, 8, num_classes=7)
BATCH = 16
OPTIMIZER = optax.adamw(1e-2)
MESHES = {
    "data": MeshConfig(),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=8),
    "data-fsdp": MeshConfig(data=2, fsdp=4),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
}


def make_batch(size=BATCH):
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (size, 8, 8, 2)).astype(np.float32)
    return {"x": x, "y": rng.integers(0, 7, size).astype(np.int32)}


def create(config=CONFIG):
    return TrainState.create(config, OPTIMIZER, key=jax.random.key(0))


def put_state(tree, mesh):
    return jax.tree.map(
        lambda leaf, placed: sharding.shard_host_array(leaf, placed.sharding), tree, with_shardings(tree, mesh)
    )


def make_step(mesh=None, **options):
    defaults = {"objective": make_objective(ObjectiveConfig()), "optimizer": OPTIMIZER, "ema_decay": 0.9}
    options = defaults | {"apply_block": KernelConfig().apply_block()} | options
    return partial(train_step, mesh=mesh, **options)


@cache
def compiled(name, config=CONFIG, batch=BATCH, **options):
    mesh = make_mesh(MESHES[name])
    abstract = with_shardings(jax.eval_shape(partial(create, config)), mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    rows = batch_sharding(mesh)
    data = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows), make_batch(batch))
    step = jax.jit(make_step(mesh, **options), donate_argnums=0, out_shardings=(places, None))
    return step.lower(abstract, data, jax.random.key(0)).compile()


def run_steps(step, state, put, count=3):
    terms = []
    for _ in range(count):
        state, each = step(state, put(make_batch()), jax.random.key(1))
        terms.append({name: np.asarray(value) for name, value in each.items()})
    return state, terms


@pytest.fixture(scope="module")
def alone():
    return run_steps(jax.jit(make_step()), create(), lambda batch: batch)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in MESHES),
        pytest.param("fsdp", {"remat": "full"}, marks=pytest.mark.slow),
        pytest.param("fsdp", {"remat": "dots", "unroll": 3}, marks=pytest.mark.slow),
        pytest.param("data-fsdp", {"accumulate": 2}, marks=pytest.mark.slow),
        ("all", {"accumulate": 2, "remat": "full", "unroll": 3}),
        pytest.param(
            "data-fsdp", {"apply_block": KernelConfig("fused", attention="fused").apply_block()}, marks=pytest.mark.slow
        ),
    ],
)
def test_eight_devices_equal_one(alone, name, options):
    mesh = make_mesh(MESHES[name])
    state = put_state(create(), mesh)
    rows = local_batch_indices(mesh, BATCH)
    step = compiled(name, **options)
    state, terms = run_steps(step, state, lambda batch: put_batch(batch, mesh, rows, BATCH))
    for one, eight in zip(alone[1], terms, strict=True):
        assert one["by_time"][0].sum() == pytest.approx(1)
        for term in one:
            np.testing.assert_allclose(eight[term], one[term], rtol=2e-5, atol=1e-7, err_msg=term)
    for one, eight in zip(jax.tree.leaves(alone[0].ema), jax.tree.leaves(state.ema), strict=True):
        # Adam divides by the root of a mean square, so that rounding grows where gradients are next to nothing.
        np.testing.assert_allclose(eight, one, atol=2e-4)


COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(text):
    """Shapes of what is sent, by computation and operation; loops are computations of their own."""
    found, inside = defaultdict(list), ""
    for line in text.splitlines():
        if not line.startswith(" ") and line.endswith("{"):
            inside = "entry" if line.startswith("ENTRY") else line.split(" ")[0]
        sent = re.search(rf" = (.*?) ({COLLECTIVES})(?:-start)?\(", line)
        if sent:
            shapes = [
                tuple(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w+\[([\d,]*)\]", sent[1])
            ]
            found[inside, sent[2]].append(shapes)
    return dict(found)


def sizes(step):
    """How many numbers are sent by each kind of operation, within loops and outside, in one go through each."""
    total = Counter()
    for (inside, operation), groups in collectives(step.as_text()).items():
        total[inside == "entry", operation] += sum(math.prod(shape) for group in groups for shape in group)
    return total


def sorts(shapes):
    """How often each shape comes, whatever the order of its axes."""
    return Counter(tuple(sorted(shape)) for shape in shapes)


def split(groups):
    return sorts(shape for group in groups for shape in group)


def leaves(tree):
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def test_data_parallel_gradients_are_reduced_in_one_operation():
    model = jax.eval_shape(create).model
    sent = collectives(compiled("data").as_text())
    assert set(sent) == {("entry", "all-reduce")}
    (reduced,) = sent["entry", "all-reduce"]
    scalars = [shape for shape in reduced if shape == ()]
    others = Counter(reduced) - Counter(scalars)
    assert others == Counter([*leaves(model), (2, 10)]) and len(scalars) == 3  # gradients; terms, one of them by time


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fsdp", {}),
        ("fsdp", {"remat": "full"}),
        ("fsdp", {"remat": "dots"}),
        ("fsdp", {"dtype": jnp.dtype("bfloat16")}),
        ("data-fsdp", {}),
    ],
)
def test_fsdp_gathers_each_block_once_a_direction_and_reduces_once(name, options):
    state = jax.eval_shape(create)
    sent = collectives(compiled(name, **options).as_text())
    block = [shape[1:] for shape in leaves(state.model.blocks)]
    matrices = [shape[1:] for shape in leaves(state.model.blocks) if len(shape) > 2 and shape[1] != 3]
    others = Counter(leaves(state.model)) - Counter(leaves(state.model.blocks))
    loops = {inside for inside, _ in sent} - {"entry"}
    assert len(loops) == 2
    (backward,) = [inside for inside, operation in sent if operation == "reduce-scatter" and inside != "entry"]
    (forward,) = loops - {backward}
    assert split(sent[forward, "all-gather"]) == sorts(block)
    again = split(sent[backward, "all-gather"])
    assert sorts(matrices) <= again <= sorts(block)  # biases are not needed where nothing is recomputed
    assert sum(map(len, sent[backward, "reduce-scatter"])) == len(block)
    assert split(sent["entry", "all-gather"]) == Counter({tuple(sorted(k)): 0 for k in others}) + sorts(
        others.elements()
    )
    assert {operation for _, operation in sent} <= {"all-gather", "reduce-scatter", "all-reduce"}
    # What is left: over `data`, all that a device holds, else leaves that no axis splits; and the losses by time.
    placed = jax.tree.leaves(with_shardings(state.model, make_mesh(MESHES[name])))
    left = placed if name == "data-fsdp" else [leaf for leaf in placed if "fsdp" not in leaf.sharding.spec]
    reduced = Counter(shape for group in sent["entry", "all-reduce"] for shape in group if shape)
    assert reduced == Counter([*(leaf.sharding.shard_shape(leaf.shape) for leaf in left), (2, 10)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "fsdp", "data-fsdp"])
def test_twice_the_batch_sends_no_more(name):
    assert sizes(compiled(name)) == sizes(compiled(name, batch=2 * BATCH))


def test_tensor_parallelism_sums_twice_a_block_and_direction_and_moves_no_weights():
    sent = collectives(compiled("tensor").as_text())
    tokens = (BATCH * CONFIG.num_tokens, CONFIG.hidden_size)
    loops = [[sorted(group) for group in groups] for (inside, _), groups in sent.items() if inside != "entry"]
    # Beside attention's result goes what the bias of its values makes of a token. The gradient of the tokens through
    # queries, keys and values is three arrays, though sent at once.
    assert loops == [[[(CONFIG.hidden_size,), tokens], [tokens]], [[tokens], [tokens] * 3]]
    assert {operation for _, operation in sent} == {"all-reduce"}
    assert all(shape == () for group in sent["entry", "all-reduce"] for shape in group)


def test_all_three_axes_gather_over_fsdp_alone():
    state, sent = jax.eval_shape(create), collectives(compiled("all").as_text())
    mesh, parts = make_mesh(MESHES["all"]), []
    for leaf in jax.tree.leaves(with_shardings(state.model, mesh).blocks):
        spec = leaf.sharding.spec
        if "fsdp" in spec:
            whole = NamedSharding(mesh, P(*("tensor" if name == "tensor" else None for name in spec)))
            parts.append(whole.shard_shape(leaf.shape)[1:])
    gathered = {
        inside: sorts(shape for group in groups for shape in group)
        for (inside, operation), groups in sent.items()
        if operation == "all-gather" and inside != "entry"
    }
    assert len(gathered) == 2 and max(gathered.values(), key=Counter.total) == sorts(parts)
    assert all(each <= sorts(parts) for each in gathered.values())
    assert {operation for _, operation in sent} <= {"all-gather", "reduce-scatter", "all-reduce"}


@pytest.mark.slow
def test_fsdp_holds_an_eighth_on_each_device_by_xlas_own_figures():
    config = dataclasses.replace(CONFIG, hidden_size=128, depth=4)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(partial(create, config))))
    step = compiled("fsdp", config, remat="full")
    batch = sum(array.nbytes for array in make_batch().values()) / 8
    held = step.memory_analysis().argument_size_in_bytes - batch
    assert whole / 8 <= held <= 1.1 * whole / 8
    # Nor are they gathered all at once: what a step needs besides is less than the weights.
    assert (
        step.memory_analysis().temp_size_in_bytes
        < compiled("data", config, remat="full").memory_analysis().temp_size_in_bytes
    )


def test_every_leaf_of_model_average_and_moments_lies_alike():
    mesh = make_mesh(MESHES["all"])
    state = fsdp.specs(jax.eval_shape(create), mesh)
    assert state.model == state.ema == state.opt_state[0].mu == state.opt_state[0].nu
    blocks = state.model.blocks
    assert blocks.attention.qkv.weight == P(None, "fsdp", None, "tensor")
    assert blocks.attention.qkv.bias == P(None, None, "tensor")
    assert blocks.attention.out.weight == P(None, "tensor", "fsdp") and blocks.attention.out.bias == P(None, "fsdp")
    assert blocks.mlp.up.weight == P(None, "fsdp", "tensor") and blocks.mlp.down.weight == P(None, "tensor", "fsdp")
    assert blocks.modulation.weight == P(None, None, "fsdp")
    assert state.model.time.up.weight == P("fsdp", None)
    deep = dataclasses.replace(CONFIG, depth=64)
    assert fsdp.specs(jax.eval_shape(partial(create, deep)), make_mesh(MESHES["fsdp"])).model.blocks.mlp.up.bias == P(
        None, "fsdp"
    )


@pytest.mark.parametrize("name", MESHES)
def test_samples_are_the_same_on_any_mesh(name):
    model = DiT(CONFIG, key=jax.random.key(0))
    noisy = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape), model)
    labels = np.arange(8, dtype=np.int32) % 7

    def samples(mesh, network):
        sampler = make_sampler(
            SamplingConfig(steps=4, guidance_scale=2.0), CONFIG, ObjectiveConfig(), mesh, batch_size=8
        )
        return np.asarray(sampler.program(network, None, labels, np.uint32(3), np.int32(0), sampler.params))

    alone = samples(make_mesh(MeshConfig(), jax.devices()[:1]), noisy)
    mesh = make_mesh(MESHES[name])
    np.testing.assert_allclose(samples(mesh, put_state(noisy, mesh)), alone, atol=3e-6 * np.abs(alone).max())


def test_batches_are_split_over_all_devices_but_those_that_share_an_example():
    for name, parts in {"data": 8, "data-fsdp": 8, "all": 4, "tensor": 1}.items():
        mesh = make_mesh(MESHES[name])
        rows = local_batch_indices(mesh, BATCH)
        assert rows.tolist() == list(range(BATCH)) and sharding.data_parallel_size(mesh) == parts
        batch = put_batch(make_batch(), mesh, rows, BATCH)
        assert batch["x"].sharding == batch_sharding(mesh)
        assert {shard.data.shape[0] for shard in batch["x"].addressable_shards} == {BATCH // parts}
        np.testing.assert_array_equal(batch["x"], make_batch()["x"])


@pytest.mark.parametrize(
    "mesh", [MeshConfig(3, -1), MeshConfig(2, 2), MeshConfig(-1, -1), MeshConfig(0, -1), MeshConfig(tensor=3)]
)
def test_a_mesh_that_does_not_make_up_the_devices_is_refused(mesh):
    with pytest.raises(ValueError, match=r"does not fit 8 devices; use -1"):
        make_mesh(mesh)


def test_what_tensor_does_not_divide_is_refused():
    mesh = make_mesh(MESHES["tensor"])
    check_mesh(mesh, num_heads=16, mlp_size=64)
    with pytest.raises(ValueError, match=r"mesh.tensor is 8, which does not divide num_heads, 6"):
        check_mesh(mesh, num_heads=6, mlp_size=64)
    with pytest.raises(ValueError, match=r"does not divide the MLP width, 100"):
        check_mesh(mesh, num_heads=8, mlp_size=100)


class Gated(InContextBlock):
    """A block with a matrix whose split over `tensor` it does not state."""

    gate: Linear

    def __init__(self, *sizes, key):
        super().__init__(*sizes, key=key)
        self.gate = Linear(sizes[0], sizes[0], key=key)


def test_a_block_that_does_not_state_the_split_of_a_matrix_is_refused():
    model = jax.eval_shape(lambda key: DiT(CONFIG, block=Gated, key=key), jax.random.key(0))
    assert fsdp.specs(model, make_mesh(MESHES["fsdp"])).blocks.gate.weight == P(None, "fsdp", None)
    with pytest.raises(ValueError, match=r"Gated\.gate does not state its split; name it in the class's tensor_split"):
        fsdp.specs(model, make_mesh(MESHES["tensor"]))


def test_the_table_tells_every_leaf():
    placed = with_shardings(jax.eval_shape(create).model, make_mesh(MESHES["all"]))
    lines = fsdp.table(placed).splitlines()
    assert len(lines) == 1 + len(jax.tree.leaves(placed))
    line = next(line for line in lines if "blocks.mlp.up.weight" in line)
    assert line.split() == "blocks.mlp.up.weight 3x32x128 axis 1 over fsdp, axis 2 over tensor 12,288 bytes".split()
    total = sum(int(line.split()[-2].replace(",", "")) for line in lines[1:])
    assert total == fsdp.bytes_per_device(placed)


class Gpu:
    """As much of a device as is asked of it."""

    platform, process_index = "gpu", 0

    def __init__(self, number):
        self.id = number


def gpus(*shape):
    devices = np.array([Gpu(number) for number in range(math.prod(shape))], object).reshape(shape)
    return jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))


def test_several_gpus_send_while_they_compute_unless_it_is_said_otherwise(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = compiler_options(gpus(2, 1, 1))
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2  # XLA knows them
    assert len(options) == 1 and compiler_options(gpus(1, 1, 1)) == compiler_options(make_mesh(MESHES["data"])) == {}
    monkeypatch.setenv("XLA_FLAGS", f"--{next(iter(options))}=false")
    assert compiler_options(gpus(2, 1, 1)) == {}


def test_fp8_has_its_products_made_before_tritons(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = compiler_options(gpus(1, 1, 1), fp8=True)
    assert options == {"xla_gpu_enable_triton_gemm": False} == options | compiler_options(gpus(1, 1, 1))
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    assert compiler_options(make_mesh(MESHES["data"]), fp8=True) == {}


@pytest.mark.parametrize(("capability", "fit"), [("8.0", 0), ("8.9", 1), ("9.0", 1), ("10.0", 1), ("gfx942", 0)])
def test_fp8_needs_ada_or_hopper(monkeypatch, capability, fit):
    monkeypatch.setattr(Gpu, "compute_capability", capability, raising=False)
    monkeypatch.setattr(Gpu, "device_kind", "a card", raising=False)
    check = partial(KernelConfig(matmul_dtype="fp8").check_kernels, dtype="bfloat16", model=DiTConfig())
    check(make_mesh(MESHES["all"]))
    if fit:
        check(gpus(2, 2, 2))
    else:
        with pytest.raises(ValueError, match=rf"capability 8\.9 or later .* not {capability} \(a card\); use compute"):
            check(gpus(2, 2, 2))
    monkeypatch.setattr(Gpu, "platform", "tpu")
    with pytest.raises(ValueError, match="needs GPUs, not tpu; use compute"):
        check(gpus(1, 1, 1))


def test_gpus_compute_blocks_by_every_choice():
    for choice in (
        KernelConfig(),
        KernelConfig("fused"),
        KernelConfig(attention="cudnn"),
        KernelConfig("fused", attention="fused"),
    ):
        choice.check_kernels(gpus(2, 2, 1), "bfloat16", DiTConfig())
    KernelConfig(attention="cudnn").check_kernels(gpus(1, 1, 2), "bfloat16", DiTConfig())
    KernelConfig(attention="xla").check_kernels(make_mesh(MESHES["tensor"]), "float32", DiTConfig(num_heads=6))


@pytest.mark.parametrize(
    ("kernels", "tensor", "dtype", "heads", "sentence"),
    [
        (KernelConfig("fused"), 2, "bfloat16", 16, r"kernels is fused, .* mesh\.tensor 2; use xla"),
        (KernelConfig("fused"), None, "bfloat16", 16, "kernels is fused, .* not cpu; use xla"),
        (KernelConfig(attention="fused"), 2, "bfloat16", 16, r"attention is fused, .* mesh\.tensor 2; use auto"),
        (KernelConfig(attention="fused"), None, "bfloat16", 16, "attention is fused, .* not cpu; use auto"),
        (KernelConfig(attention="fused"), 1, "bfloat16", 6, "heads up to 128 wide, .* with heads 192 wide; use auto"),
        (
            KernelConfig(attention="fused"),
            1,
            "float32",
            16,
            "fused, which needs bfloat16 .* computes in float32 with heads 72",
        ),
        (KernelConfig(attention="cudnn"), None, "bfloat16", 16, "attention is cudnn, .* not cpu; use auto"),
        (KernelConfig(attention="cudnn"), 1, "float32", 16, "computes in float32 with heads 72 wide; use auto"),
        (KernelConfig(attention="cudnn"), 1, "bfloat16", 32, "computes in bfloat16 with heads 36 wide; use auto"),
        (KernelConfig(attention="cudnn"), 1, "bfloat16", 6, "computes in bfloat16 with heads 192 wide; use auto"),
    ],
)
def test_what_cannot_compute_blocks_is_refused(kernels, tensor, dtype, heads, sentence):
    mesh = make_mesh(MESHES["data"]) if tensor is None else gpus(1, 1, tensor)
    with pytest.raises(ValueError, match=sentence):
        kernels.check_kernels(mesh, dtype, DiTConfig(num_heads=heads))
