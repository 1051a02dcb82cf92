"""Batches of samples by networks of which all is known: the best ones for Gaussian data, whose mean is by the label."""

import math
import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditx import sampling
from ditx.diffusion import flow
from ditx.diffusion.objective import ObjectiveConfig
from ditx.diffusion.parameterization import NoiseLevel, to_target
from ditx.nn.dit import DiT, DiTConfig
from ditx.parallel.fsdp import with_shardings
from ditx.parallel.mesh import MeshConfig, make_mesh, shard_host_array
from ditx.sampling import STEPS, SamplingConfig, choose_batch_size, make_sampler
from ditx.testing import MEAN, STD

CONFIG = DiTConfig(8, 4, 1, 16, 1, 1, num_classes=1)
OBJECTIVES = [
    ObjectiveConfig(),
    ObjectiveConfig("cosine", "x0"),
    ObjectiveConfig("flow", "velocity"),
    ObjectiveConfig("flow", "x0", flow_shift=2.0),
    ObjectiveConfig("flow", "eps"),
]


@jax.tree_util.register_static
class Best:
    """The optimal network for data of deviation STD, with mean `mean` under label 0 and `unlabelled` under none."""

    patch = SimpleNamespace(weight=jnp.zeros(1))

    def __init__(self, objective, mean=MEAN, unlabelled=0.0, num_classes=1):
        self.objective, self.means = objective, jnp.array([mean, unlabelled])
        self.config = SimpleNamespace(num_classes=num_classes, null_label=num_classes)

    def __call__(self, x, t, y, *, apply_block, unroll=1):
        if self.objective.is_flow:
            level = flow.noise_level(t / 1000)
        else:
            whole = self.objective.sampler_grid()
            alpha = jnp.exp(jnp.interp(t, jnp.asarray(whole.time), jnp.log(jnp.asarray(whole.alpha))))
            sigma = jnp.sqrt(1 - alpha**2)
            level = NoiseLevel(t, alpha, sigma, -sigma, alpha)
        a, b, mean = level.alpha, level.sigma, self.means[1 if y is None else y]
        rest = (x - a * mean) / (a**2 * STD**2 + b**2)
        return to_target(self.objective.prediction, mean + a * STD**2 * rest, b * rest, level)


MESH = make_mesh(MeshConfig(), jax.devices()[:1])


def make(objective, config=CONFIG, batch_size=64, **fields):
    guided = fields.pop("guided_by_network", False)
    settings = {"batch_size": batch_size, "guided_by_network": guided}
    return make_sampler(SamplingConfig(**fields), config, objective, MESH, **settings)


@cache
def generate_samples(objective, guide=None, params=(), **fields):
    sampler = make(objective, guided_by_network=guide is not None, **fields)
    other = None if guide is None else Best(objective, *guide)
    params = SamplingConfig(**dict(params)).params(objective) if params else sampler.params
    return np.asarray(
        sampler.program(Best(objective), other, np.zeros(64, np.int32), np.uint32(0), np.int32(0), params)
    )


@pytest.mark.parametrize("sampler", [name for name in STEPS if name != "mean-velocity"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda config: f"{config.schedule}-{config.prediction}")
def test_any_sampler_draws_the_data_of_any_objective(objective, sampler):
    samples = generate_samples(objective, sampler=sampler, steps=240)
    # 4,096 numbers: standard errors 0.006; the rest is the length of the steps.
    assert samples.mean() == pytest.approx(MEAN, abs=0.02)
    assert samples.std() == pytest.approx(STD, rel=0.06)


@pytest.mark.parametrize(
    ("objective", "spacing"), [(OBJECTIVES[0], "log-snr"), (OBJECTIVES[2], "time")], ids=["eps", "flow"]
)
def test_few_steps_of_the_second_order_are_near_many(objective, spacing):
    exact = generate_samples(objective, sampler="heun", steps=500, spacing="log-snr")
    settings = {"steps": 20, "spacing": spacing}
    errors = [
        np.abs(generate_samples(objective, sampler=name, **settings) - exact).mean() for name in ("ddim", "dpm-solver")
    ]
    assert errors[1] < 0.2 * errors[0], errors


@pytest.mark.parametrize("objective", [OBJECTIVES[0], OBJECTIVES[2]], ids=["eps", "flow"])
def test_guided_data_lie_so_far_from_those_of_the_weaker_predictor(objective):
    settings = {"sampler": "heun", "steps": 40}
    assert generate_samples(objective, guidance_scale=3.0, **settings).mean() == pytest.approx(3 * MEAN, abs=0.03)
    # Another network, of mean 0.5 with a label or without: 0.5 + 2 (MEAN - 0.5).
    for guide in ((0.5, 9.0), (9.0, 0.5, 0)):
        samples = generate_samples(objective, guide=guide, guidance_scale=2.0, **settings)
        assert samples.mean() == pytest.approx(2 * MEAN - 0.5, abs=0.03)
    wanted = {"guidance_scale": 3.0, "spacing": "log-snr", "guidance_interval": (100.0, 900.0), **settings}
    traced = generate_samples(objective, params=tuple(wanted.items()), guidance_scale=5.0, **settings)
    np.testing.assert_allclose(traced, generate_samples(objective, **wanted), atol=1e-5)


def test_guidance_is_limited_to_its_interval():
    settings = {"sampler": "euler", "steps": 20, "guidance_scale": 3.0}
    limited = generate_samples(OBJECTIVES[2], guidance_interval=(300.0, 700.0), **settings)
    guided, free = (
        generate_samples(OBJECTIVES[2], **settings).mean(),
        generate_samples(OBJECTIVES[2], sampler="euler", steps=20).mean(),
    )
    assert free + 0.1 < limited.mean() < guided - 0.1
    np.testing.assert_array_equal(
        generate_samples(OBJECTIVES[2], guidance_interval=(0.0, 0.0), **settings),
        generate_samples(OBJECTIVES[2], sampler="euler", steps=20),
    )


def compiled_work(text):
    """Numbers that matrix products of a compiled program make: outside all branches, and in those of each condition."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    conditions = []

    def work(name):
        total = 0
        for line in bodies[name].splitlines():
            total += sum(math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]\S* dot\(", line))
            if " conditional(" in line:
                names = re.findall(r"%?([\w.-]+)", "".join(re.findall(r"_computations?=(\{.*?\}|[^,]+)", line)))
                conditions.append([work(branch) for branch in names])
            else:
                total += sum(work(called) for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.-]+)", line))
        return total

    (entry,) = re.findall(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)
    return work(entry), conditions


def lower(config, objective, batch_size, **fields):
    """A sampler's program lowered for a DiT."""
    sampler, labels = make(objective, config, batch_size, **fields), np.zeros(batch_size, np.int32)
    return sampler.program.lower(DiT(config, key=jax.random.key(0)), None, labels, *2 * [np.uint32(0)], sampler.params)


@pytest.mark.parametrize(("sampler", "evaluations"), [("euler", 1), ("dpm-solver", 1), ("heun", 2)])
def test_outside_the_interval_the_program_of_a_batch_has_one_evaluation(sampler, evaluations):
    config = replace(CONFIG, learn_sigma=False)

    def program(**fields):
        return compiled_work(lower(config, OBJECTIVES[2], 4, sampler=sampler, steps=6, **fields).compile().as_text())

    plain, conditions = program()
    # Heun's last step has no second evaluation, which is a condition of its own.
    assert len(conditions) == evaluations - 1 and all(branches == [0, plain] for branches in conditions)
    outside, conditions = program(guidance_scale=2.0, guidance_interval=(300.0, 700.0))
    guided = [branches for branches in conditions if all(branches)]
    # The patches and the time of both evaluations are embedded once.
    assert outside == 0 and len(guided) == evaluations
    assert all(alone == plain and 1.5 * plain < both < 2 * plain for alone, both in guided)


def test_one_program_serves_all_labels_seeds_scales_intervals_and_schedules():
    program = make(OBJECTIVES[0], batch_size=4, sampler="euler", steps=4).program

    def distinct(**varied):
        fields = {"steps": 4, "guidance_scale": 2.0, "guidance_interval": (100.0, 900.0)} | varied
        labels, seed = np.full(4, fields.pop("label", 0), np.int32), np.uint32(fields.pop("seed", 0))
        params = SamplingConfig(**fields).params(OBJECTIVES[0])
        return np.asarray(program(network, None, labels, seed, np.int32(0), params))

    network = jax.tree.map(lambda leaf: leaf + 0.1, DiT(CONFIG, key=jax.random.key(0)))
    others = [{"label": 1}, {"seed": 1}, {"guidance_scale": 3.0}, {"guidance_interval": (0.0, 500.0)}]
    others += [{"spacing": "log-snr"}, {"spacing": "karras"}]
    results = [distinct(), *(distinct(**other) for other in others)]
    assert program._cache_size() == 1
    assert all(np.abs(a - b).max() > 1e-3 for k, a in enumerate(results) for b in results[:k])
    distinct(steps=5)
    distinct(guidance_scale=1.0)  # which has no second evaluation
    assert program._cache_size() == 3


def products(**fields):
    """Numbers that each product of a program's loop makes, by the text that JAX hands to XLA."""
    text = lower(CONFIG, OBJECTIVES[0], 5, sampler="euler", steps=4, **fields).as_text()
    shapes = re.findall(r"stablehlo.dot_general.* -> tensor<([\dx]+)xf32>", text)
    return [math.prod(map(int, shape.split("x"))) for shape in shapes]


def test_guidance_makes_the_same_products_over_twice_the_rows():
    alone, guided = products(), products(guidance_scale=2.0)
    times = [both / one for both, one in zip(guided, alone, strict=True)]
    # Patches and time are embedded once for both labels, and what the bias of values makes of a token is the same.
    assert set(times) == {1.0, 2.0} and times.count(1.0) == 4, times


def test_samples_are_the_same_on_one_device_and_on_eight_and_from_any_first_number():
    config = replace(CONFIG, learn_sigma=False, num_classes=10)
    network, labels = DiT(config, key=jax.random.key(0)), np.arange(16) % 10
    expected = make(OBJECTIVES[2], config, steps=2)(network, labels, seed=3)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    sampler = make_sampler(SamplingConfig(steps=2), config, OBJECTIVES[2], mesh, batch_size=5)
    placed = jax.tree.map(lambda leaf, to: shard_host_array(leaf, to.sharding), network, with_shardings(network, mesh))
    images = sampler(placed, labels[5:], seed=3, first=5)
    assert images.shape == (11, 8, 8, 1) and sampler.batch_size == 8  # a multiple of the devices
    assert np.abs(images.astype(int) - expected[5:]).max() <= 1  # rounding may tip a truncation
    with pytest.raises(ValueError, match="samples are not finite, since the weights have NaN or infinity"):
        sampler(jax.tree.map(lambda leaf: leaf * np.nan, placed), labels, seed=3)


def test_a_batch_is_computed_and_decoded_while_the_one_before_is_fetched(monkeypatch):
    network, events = DiT(CONFIG, key=jax.random.key(0)), []

    def note(event, function):
        return lambda *args: (events.append(event), function(*args))[1]

    sampler = make(OBJECTIVES[2], replace(CONFIG, learn_sigma=False), batch_size=8, sampler="euler", steps=2)
    sampler = replace(sampler, program=note("sample", sampler.program), decode=note("decode", lambda x: x))
    monkeypatch.setattr(sampling, "to_uint8", note("fetch", sampling.to_uint8))
    images = sampler(network, np.zeros(20, np.int32), seed=0)
    assert events == ["sample", "decode", "sample", "decode", "fetch", "sample", "decode", "fetch", "fetch"]
    assert images.shape == (20, 8, 8, 1) and images.dtype == np.uint8


@pytest.mark.parametrize("parts", [1, 8])
def test_few_sizes_of_batches_serve_all_numbers_and_little_is_drawn_in_vain(parts):
    sizes, most = set(), 100
    for num in range(1, 1001):
        size = choose_batch_size(num, most, parts)
        sizes.add(size)
        batches, share = -(-num // size), -(-num // parts)
        assert size % parts == 0 and size < most + parts and batches <= -(-num // most)
        assert batches * size <= 1.5 * parts * (share + batches - 1)
    assert len(sizes) <= 14
    assert [choose_batch_size(num, 100, 1) for num in (1, 3, 5, 10, 40, 100, 120, 1000)] == [
        1,
        3,
        6,
        12,
        48,
        100,
        64,
        100,
    ]
    assert choose_batch_size(10, 10, 1) == 10 and choose_batch_size(9, 3, 1) == 3 and choose_batch_size(10, 4, 8) == 8


def test_auto_is_the_usual_choice():
    def chosen(schedule, **fields):
        config = SamplingConfig(**fields).resolved(ObjectiveConfig(schedule))
        return config.sampler, config.steps

    assert chosen("linear") == chosen("cosine") == ("ddpm", 250)
    assert chosen("flow") == ("dpm-solver", 25)
    assert chosen("flow", sampler="heun", steps=4) == ("heun", 4)
    mean = SamplingConfig().resolved(ObjectiveConfig("flow", "mean-velocity"))
    assert (mean.sampler, mean.steps) == ("mean-velocity", 1)
    with pytest.raises(ValueError, match="sampler mean-velocity needs a network of mean velocities, not velocity"):
        SamplingConfig("mean-velocity").check(CONFIG, OBJECTIVES[2])
    assert len(SamplingConfig().params(ObjectiveConfig("flow", "velocity")).grid) == 25
