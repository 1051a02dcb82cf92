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
from gaussian_data import MU, S

from ditx.diffusion import flow
from ditx.diffusion.objective import ObjectiveConfig
from ditx.diffusion.parameterization import NoiseLevel, to_target
from ditx.nn.dit import DiT, DiTConfig
from ditx.sampling import STEPS, SamplingConfig, batch_size, make_draw, sample_keys

CONFIG = DiTConfig(8, 4, 1, 16, 1, 1, num_classes=1)
OBJECTIVES = [
    ObjectiveConfig(),
    ObjectiveConfig("cosine", "x0"),
    ObjectiveConfig("flow", "velocity"),
    ObjectiveConfig("flow", "x0", flow_shift=2.0),
    ObjectiveConfig("flow", "eps"),
]


class Best:
    """The best network for data of deviation S, of mean `mean` under label 0 and `without` under none."""

    patch = SimpleNamespace(weight=jnp.zeros(1))

    def __init__(self, objective, mean=MU, without=0.0, num_classes=1):
        self.objective, self.means = objective, jnp.array([mean, without])
        self.config = SimpleNamespace(num_classes=num_classes, null_label=num_classes)

    def __call__(self, x, t, y, *, compute, unroll=1):
        if self.objective.is_flow:
            here = flow.level(t / 1000)
        else:
            whole = self.objective.sampler_grid()
            alpha = jnp.exp(jnp.interp(t, jnp.asarray(whole.time), jnp.log(jnp.asarray(whole.alpha))))
            sigma = jnp.sqrt(1 - alpha**2)
            here = NoiseLevel(t, alpha, sigma, -sigma, alpha)
        a, b, mean = here.alpha, here.sigma, self.means[1 if y is None else y]
        rest = (x - a * mean) / (a**2 * S**2 + b**2)
        return to_target(self.objective.prediction, mean + a * S**2 * rest, b * rest, here)


@cache
def generate_samples(objective, guide=None, params=(), **fields):
    draw = make_draw(SamplingConfig(**fields), CONFIG, objective, by_another=guide is not None)
    other = None if guide is None else Best(objective, *guide)
    labels, keys = jnp.zeros(64, jnp.int32), sample_keys(0, 0, 64)

    def samples(params):
        return draw(Best(objective), labels, keys, guide=other, params=params)[0]

    return np.asarray(jax.jit(samples)(SamplingConfig(**dict(params)).params(objective) if params else None))


@pytest.mark.parametrize("sampler", STEPS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda config: f"{config.schedule}-{config.prediction}")
def test_any_sampler_draws_the_data_of_any_objective(objective, sampler):
    samples = generate_samples(objective, sampler=sampler, steps=240)
    # 4,096 numbers: standard errors 0.006; the rest is the length of the steps.
    assert samples.mean() == pytest.approx(MU, abs=0.02)
    assert samples.std() == pytest.approx(S, rel=0.06)


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
    assert generate_samples(objective, guidance_scale=3.0, **settings).mean() == pytest.approx(3 * MU, abs=0.03)
    # Another network, of mean 0.5 with a label or without: 0.5 + 2 (MU - 0.5).
    for guide in ((0.5, 9.0), (9.0, 0.5, 0)):
        samples = generate_samples(objective, guide=guide, guidance_scale=2.0, **settings)
        assert samples.mean() == pytest.approx(2 * MU - 0.5, abs=0.03)
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


@pytest.mark.parametrize(("sampler", "evaluations"), [("euler", 1), ("dpm-solver", 1), ("heun", 2)])
def test_outside_the_interval_the_program_of_a_batch_has_one_evaluation(sampler, evaluations):
    config = replace(CONFIG, learn_sigma=False)

    def compiled(**fields):
        draw = make_draw(SamplingConfig(sampler, 6, **fields), config, OBJECTIVES[2])
        arguments = DiT(config, key=jax.random.key(0)), jnp.zeros(4, jnp.int32), sample_keys(0, 0, 4)
        return compiled_work(jax.jit(lambda *given: draw(*given)[0]).lower(*arguments).compile().as_text())

    plain, conditions = compile_checked()
    # Heun's last step has no second evaluation, which is a condition of its own.
    assert len(conditions) == evaluations - 1 and all(branches == [0, plain] for branches in conditions)
    outside, conditions = compile_checked(guidance_scale=2.0, guidance_interval=(300.0, 700.0))
    guided = [branches for branches in conditions if all(branches)]
    # The patches and the time of both evaluations are embedded once.
    assert outside == 0 and len(guided) == evaluations
    assert all(alone == plain and 1.5 * plain < both < 2 * plain for alone, both in guided)


def test_one_program_serves_all_labels_seeds_scales_intervals_and_schedules():
    draw = make_draw(SamplingConfig(sampler="euler", steps=4), CONFIG, OBJECTIVES[0])

    @jax.jit
    def program(network, labels, seed, params):
        return draw(network, labels, sample_keys(seed, 0, 4), params=params)[0]

    def distinct(**varied):
        fields = {"steps": 4, "guidance_scale": 2.0, "guidance_interval": (100.0, 900.0)} | varied
        labels, seed = np.full(4, fields.pop("label", 0), np.int32), np.uint32(fields.pop("seed", 0))
        return np.asarray(program(network, labels, seed, SamplingConfig(**fields).params(OBJECTIVES[0])))

    network = jax.tree.map(lambda leaf: leaf + 0.1, DiT(CONFIG, key=jax.random.key(0)))
    others = [{"label": 1}, {"seed": 1}, {"guidance_scale": 3.0}, {"guidance_interval": (0.0, 500.0)}]
    others += [{"spacing": "log-snr"}, {"spacing": "karras"}]
    results = [distinct(), *(distinct(**other) for other in others)]
    assert program._cache_size() == 1
    assert all(np.abs(a - b).max() > 1e-3 for k, a in enumerate(results) for b in results[:k])
    distinct(steps=5)
    distinct(guidance_scale=1.0)  # which has no second evaluation
    assert program._cache_size() == 3


def matmul_dtype(**fields):
    """Numbers that each product of the loop of a program makes, by the text that JAX hands to XLA."""
    draw = make_draw(SamplingConfig(sampler="euler", steps=4, **fields), CONFIG, OBJECTIVES[0])
    arguments = DiT(CONFIG, key=jax.random.key(0)), jnp.zeros(5, jnp.int32), sample_keys(0, 0, 5)
    text = jax.jit(lambda *given: draw(*given)[0]).lower(*arguments).as_text()
    shapes = re.findall(r"stablehlo.dot_general.* -> tensor<([\dx]+)xf32>", text)
    return [math.prod(map(int, shape.split("x"))) for shape in shapes]


def test_guidance_makes_the_same_products_over_twice_the_rows():
    alone, guided = matmul_dtype(), matmul_dtype(guidance_scale=2.0)
    times = [both / one for both, one in zip(guided, alone, strict=True)]
    # Patches and time are embedded once for both labels, and what the bias of values makes of a token is the same.
    assert set(times) == {1.0, 2.0} and times.count(1.0) == 4, times


@pytest.mark.parametrize("parts", [1, 8])
def test_few_sizes_of_batches_serve_all_numbers_and_little_is_drawn_in_vain(parts):
    sizes, most = set(), 100
    for num in range(1, 1001):
        size = batch_size(num, most, parts)
        sizes.add(size)
        batches, share = -(-num // size), -(-num // parts)
        assert size % parts == 0 and size < most + parts and batches <= -(-num // most)
        assert batches * size <= 1.5 * parts * (share + batches - 1)
    assert len(sizes) <= 14
    assert [batch_size(num, 100, 1) for num in (1, 3, 5, 10, 40, 100, 120, 1000)] == [1, 3, 6, 12, 48, 100, 64, 100]
    assert batch_size(10, 10, 1) == 10 and batch_size(9, 3, 1) == 3 and batch_size(10, 4, 8) == 8


def test_auto_is_the_usual_choice():
    def names(schedule, **fields):
        return SamplingConfig(**fields).resolved(ObjectiveConfig(schedule)).sampler

    assert (names("linear"), names("cosine"), names("flow")) == ("ddpm", "ddpm", "heun")
    assert names("flow", sampler="dpm-solver") == "dpm-solver"
