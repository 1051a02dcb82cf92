import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from references import load

import ditx
from ditx import flow
from ditx.diffusion.schedule import at, time_at
from ditx.testing import kept_steps, schedules

FULL = ditx.linear_schedule()
TABLES = {
    "timestep_map": "time",
    "betas": "beta",
    "alphas_cumprod": "alpha_bar",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
    "posterior_mean_coef1": "posterior_mean_x0",
    "posterior_mean_coef2": "posterior_mean_xt",
}


def tables(schedule):
    return {name: table for name, table in vars(schedule).items() if not isinstance(table, str)}


def assert_same(ours, theirs, tolerance=1e-12):
    for name, table in tables(theirs).items():
        np.testing.assert_allclose(getattr(ours, name), table, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("steps", ["full", "10", "50", "250", "ddim10", "ddim50", "ddim250"])
def test_tables_equal_the_reference(steps):
    golden = load("diffusion.npz")
    schedule = FULL if steps == "full" else ditx.respace(FULL, steps)
    for theirs, ours in TABLES.items():
        table = getattr(schedule, ours)
        assert table.dtype == np.float64
        np.testing.assert_allclose(table, golden[f"{steps}/{theirs}"], rtol=1e-12, atol=1e-12)


def test_variances_rise_linearly():
    np.testing.assert_allclose(FULL.beta[[0, -1]], [1e-4, 0.02], rtol=1e-12)
    np.testing.assert_allclose(np.diff(FULL.beta), (0.02 - 1e-4) / 999, rtol=1e-9)  # differences of close numbers
    np.testing.assert_array_equal(FULL.time, np.arange(1000))
    np.testing.assert_allclose(ditx.linear_schedule(100).beta[[0, -1]], [1e-3, 0.2], rtol=1e-12)
    assert len(ditx.linear_schedule(21)) == 21


@given(schedules())
def test_derived_tables_agree_with_alpha_bar(schedule):
    signal, noise = schedule.alpha_bar, 1 - schedule.alpha_bar
    # 1 - a is rounded where a is near 1.
    np.testing.assert_allclose(schedule.sigma**2, noise, rtol=1e-10)
    np.testing.assert_allclose(np.exp(schedule.log_snr), signal / noise, rtol=1e-10)
    np.testing.assert_allclose(np.exp(schedule.log_beta), schedule.beta, rtol=1e-12)
    np.testing.assert_allclose(np.cumprod(1 - schedule.beta), signal, rtol=1e-12)
    assert np.all(schedule.posterior_variance < schedule.beta) and schedule.posterior_variance[0] == 0
    np.testing.assert_allclose(np.exp(schedule.posterior_log_variance[1:]), schedule.posterior_variance[1:], rtol=1e-12)
    assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[1]


def test_small_noise_next_to_the_data_is_accurate_in_float32():
    # 1 - alpha_bar formed in float32 would be off by 1.7e-4.
    assert float(at(FULL.sigma, 0)) == pytest.approx(0.01, rel=1e-7)
    assert float(at(FULL.log_snr, 0)) == pytest.approx(np.log(0.9999 / 0.0001), rel=1e-7)


@given(kept_steps())
def test_respacing_keeps_alpha_bar_and_time(kept):
    respaced = ditx.respace(FULL, kept)
    np.testing.assert_allclose(respaced.alpha_bar, FULL.alpha_bar[kept], rtol=1e-12)
    np.testing.assert_array_equal(respaced.time, kept)


@given(schedules())
def test_respacing_to_all_steps_changes_nothing(schedule):
    assert_same(ditx.respace(schedule, len(schedule)), schedule, 1e-10)  # betas are recomputed from quotients near 1
    assert_same(ditx.respace(schedule, range(len(schedule))), schedule, 1e-10)


@given(kept_steps(sizes=(20,)), kept_steps(total=20))
def test_respacings_compose(outer, inner):
    twice = ditx.respace(ditx.respace(FULL, outer), inner)
    assert_same(twice, ditx.respace(FULL, [outer[i] for i in inner]), 1e-10)


def test_the_two_grids_of_250_steps():
    np.testing.assert_array_equal(ditx.respace(FULL, "250").time, [round(i * 999 / 249) for i in range(250)])
    np.testing.assert_array_equal(ditx.respace(FULL, "ddim250").time, range(0, 1000, 4))
    np.testing.assert_array_equal(ditx.respace(FULL, "250").time[[0, 1, 2, -2, -1]], [0, 4, 8, 995, 999])


@given(st.integers(1, 1000))
def test_a_count_keeps_that_many_steps_from_first_to_last(count):
    respaced = ditx.respace(FULL, count)
    assert len(respaced) == count
    assert respaced.time[0] == 0 and (count == 1 or respaced.time[-1] == 999)
    assert np.all(np.diff(respaced.time) > 0)
    assert_same(ditx.respace(FULL, str(count)), respaced)
    for table in tables(respaced).values():
        assert np.all(np.isfinite(table))


def test_order_of_the_kept_steps_does_not_matter():
    assert_same(ditx.respace(FULL, [900, 3, 77]), ditx.respace(FULL, [3, 77, 900]))


def test_schedule_passes_through_jit():
    schedule = ditx.respace(FULL, "10")
    read = jax.jit(lambda schedule, i: at(schedule.log_beta, i))
    np.testing.assert_allclose(read(schedule, 3), schedule.log_beta[3], rtol=1e-6)
    np.testing.assert_array_equal(read(schedule, 3), at(schedule.log_beta, jnp.asarray(3)))


@pytest.mark.parametrize("steps", [20, 1, 0, -5])
def test_linear_schedule_refuses_too_few_steps(steps):
    with pytest.raises(ValueError, match=f"linear schedule of {steps} steps has variances above 1"):
        ditx.linear_schedule(steps)


@pytest.mark.parametrize("steps", ["0", "1001", "ten", "", "ddim", "ddim0", "ddim-4", "-3", "²", "2.5", 0, -1, 1001])
def test_impossible_counts_are_named(steps):
    with pytest.raises(ValueError, match=r"cannot keep .* of 1000 steps; give 1 to 1000, or") as error:
        ditx.respace(FULL, steps)
    assert repr(steps) in str(error.value)


def test_a_count_without_a_stride_is_named():
    with pytest.raises(ValueError, match="no constant stride keeps 300 of 1000 steps; try '300'"):
        ditx.respace(FULL, "ddim300")


@pytest.mark.parametrize("steps", [[], [0, 1000], [-1, 5]])
def test_impossible_indices_are_named(steps):
    with pytest.raises(ValueError, match="must be integers from 0 to 999, got") as error:
        ditx.respace(FULL, steps)
    assert str(steps) in str(error.value)


COSINE = ditx.cosine_schedule()
BASES = {"linear": FULL, "cosine": COSINE, "flow": flow.uniform_grid(1000)}


def test_cosine_schedule_is_the_squared_cosine_except_at_the_last_step():
    t = np.arange(1, 1000) / 1000
    start = np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(
        COSINE.alpha_bar[:-1], np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / start, rtol=1e-9, atol=1e-12
    )
    assert COSINE.beta[-1] == pytest.approx(0.999) and COSINE.beta[:-1].max() < 0.999
    with pytest.raises(ValueError, match="cosine schedule of 1 steps cannot go"):
        ditx.cosine_schedule(1)


@pytest.mark.parametrize("name", BASES)
def test_grid_of_all_steps_is_the_schedule(name):
    grid = ditx.sampling_grid(BASES[name], 1000)
    assert (grid.path, grid.prediction) == (BASES[name].path, BASES[name].prediction)
    for table in ("time", "alpha", "sigma", "beta"):
        np.testing.assert_allclose(getattr(grid, table), getattr(BASES[name], table), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", BASES)
@given(st.integers(2, 60))
def test_grid_levels_are_equally_spaced_from_noisiest_to_cleanest(name, steps):
    base = BASES[name]
    even, log_snr, karras = (ditx.sampling_grid(base, steps, spacing) for spacing in ("time", "log-snr", "karras"))
    data = 2 * base.time[0] - base.time[1]
    np.testing.assert_allclose(np.diff(even.time, prepend=data), (base.time[-1] - data) / steps, rtol=1e-9)
    finite = base.log_snr[np.isfinite(base.log_snr)][[0, -1]]
    np.testing.assert_allclose(log_snr.log_snr, np.linspace(*finite, steps), rtol=1e-9, atol=1e-9)
    roots = (karras.sigma / karras.alpha) ** (1 / 7)
    np.testing.assert_allclose(roots, np.linspace(*np.exp(-finite / 14), steps), rtol=1e-9)
    for grid in (even, log_snr, karras):
        assert len(grid) == steps
        total = grid.alpha**2 + grid.sigma**2 if base.path == "vp" else grid.alpha + grid.sigma
        np.testing.assert_allclose(total, 1, rtol=1e-12)
        # At whole times of training, and between them by log alpha (or alpha), the levels are those of training.
        kind = np.log if base.path == "vp" else np.asarray
        between = np.interp(grid.time, base.time, kind(base.alpha))
        inside = (grid.time >= base.time.min()) & (grid.time <= base.time.max())
        np.testing.assert_allclose(kind(grid.alpha)[inside], between[inside], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("i", [3, 500, 990])
def test_time_at_inverts_sigma_over_alpha(name, i):
    base = BASES[name]
    assert time_at(base, base.sigma[i] / base.alpha[i]) == pytest.approx(base.time[i], rel=1e-9)


def test_one_step_starts_at_the_noisiest_level():
    for spacing in ("time", "log-snr", "karras"):
        assert ditx.sampling_grid(FULL, 1, spacing).time[0] == pytest.approx(999)


@pytest.mark.parametrize(("kept", "steps"), [(10, 0), (10, -2), (1, 5)])
def test_impossible_grids_are_refused(kept, steps):
    with pytest.raises(ValueError, match=f"cannot take {steps} of {kept} levels; give at least 1 step and 2 levels"):
        ditx.sampling_grid(ditx.respace(FULL, kept), steps)
