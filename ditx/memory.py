"""What one device holds and peaks at in a training step, told from the traced step: nothing is compiled or run."""

import math
from bisect import bisect_left
from collections import defaultdict
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ditx.diffusion.objective import ObjectiveConfig, make_objective
from ditx.nn.dit import DiTConfig
from ditx.parallel import fsdp as shards
from ditx.parallel import mesh as sharding
from ditx.training.step import Remat, TrainState, adamw, train_step


def step_memory(
    config: DiTConfig,
    *,
    batch_size: int,
    mesh: dict[str, int],
    dtype: jnp.dtype = jnp.float32,
    accumulate: int = 1,
    unroll: int = 1,
    remat: Remat = "none",
    power_emas: int = 0,
) -> dict[str, int]:
    """Bytes of one device in a step of `ditx.training.step.train_step`, by what they are for; their sum is its peak.

    The devices of `mesh`, sizes by axis, need not be at hand; the backend at hand is taken for theirs. Raises
    ValueError where the mesh does not fit the network or the batch.
    """
    data, fsdp, tensor = mesh["data"], mesh["fsdp"], mesh["tensor"]
    whole = _mesh(data, fsdp, tensor)
    sharding.check_mesh(whole, num_heads=config.num_heads, mlp_size=config.mlp_size)
    sharding.check_batch(whole, batch_size, accumulate)
    optimizer, key = adamw(0.0), jax.random.key(0)

    def create(config) -> Any:
        return jax.eval_shape(lambda key: TrainState.create(config, optimizer, power_emas=power_emas, key=key), key)

    placed = shards.with_shardings(create(config), whole)

    def along_tensor(leaf):
        spec = P(*(axis if axis == "tensor" else None for axis in leaf.sharding.spec))
        return jax.ShapeDtypeStruct(NamedSharding(whole, spec).shard_shape(leaf.shape), leaf.dtype)

    # What a device runs does not depend on `data`, and is that of a network with its share of the heads and the MLP.
    narrow = jax.tree.structure(create(replace(config, num_heads=config.num_heads // tensor)))
    state = jax.tree.unflatten(narrow, map(along_tensor, jax.tree.leaves(placed)))
    rows, size = batch_size // (data * fsdp), config.input_size
    x, y = (2 * fsdp * rows, size, size, config.in_channels), (2 * fsdp * rows,)
    batch = {"x": jax.ShapeDtypeStruct(x, jnp.float32), "y": jax.ShapeDtypeStruct(y, jnp.int32)}
    objective = make_objective(ObjectiveConfig() if config.learn_sigma else ObjectiveConfig("flow", "velocity"))
    step = partial(train_step, objective=objective, optimizer=optimizer, ema_decay=0.0, dtype=jnp.dtype(dtype))
    step = partial(step, ema_gammas=power_emas * (1.0,), accumulate=accumulate, unroll=unroll, remat=remat)
    step = partial(step, mesh=_mesh(2, fsdp, 1))
    traced = jax.make_jaxpr(step)(state, batch, key)
    (local,) = (equation for equation in traced.eqns if equation.primitive.name == "shard_map")
    live, kept = _peak(local.params["jaxpr"])

    weights = shards.bytes_per_device(placed.model)
    gradients = weights * (2 if accumulate > 1 else 1)  # of one part, and their sum
    own = max(sum(live), gradients)
    kept = min(kept, own - gradients)
    return {
        "weights": weights,
        "ema": shards.bytes_per_device((placed.ema, placed.power_emas)),
        "moments": shards.bytes_per_device(placed.opt_state),
        "batch": 4 * rows * (math.prod(x[1:]) + 1),
        "gradients": gradients,
        "activations": kept,
        "working_room": own - gradients - kept,
        "copies": _copies(placed.model, live) if jax.default_backend() == "cpu" else 0,
    }


def _mesh(*sizes: int) -> Mesh:
    """A mesh to tell shapes by: one device in all places."""
    return Mesh(np.full(sizes, jax.devices()[0]), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def _copies(model: Any, live: list[int]) -> int:
    """What XLA for CPUs adds: it copies weights and moments at first, and has other values lie where they lay."""
    left = sorted(3 * [shards.bytes_per_device(leaf) for leaf in jax.tree.leaves(model)])
    copies = sum(left)
    for size in sorted(live, reverse=True):
        place = bisect_left(left, size)
        if place < len(left):
            copies -= size
            left.pop(place)
    return copies


# What reads its inputs from memory, and what writes its outputs there. XLA fuses all else (sums, products, broadcasts,
# casts) with what comes after, computing it wherever it is needed, unless it is read from memory or returned.
_READS = {"dot_general", "scan", "while", "gather", "scatter-add", "all_gather", "reduce_scatter", "sort"}
_READS |= {"dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"}
_WRITES = _READS | {"exp", "tanh", "logistic", "div", "rsqrt", "sqrt", "pow", "log", "sin", "cos", "erf_inv"}
_WRITES |= {"reduce_sum", "reduce_max", "psum", "concatenate", "reduce_precision"}
_VIEWS = {"reshape", "squeeze", "transpose", "slice"}


class _Program:
    """A traced program as one list of operations on numbered values, calls and unrolled loops written out."""

    def __init__(self, jaxpr: Any):
        # XLA for CPUs keeps halves as float32. It drops the barriers that set recomputation apart, too: what a loop all
        # unrolled would compute twice is computed once, and blocks in a row are at work all at once.
        self.cpu = jax.default_backend() == "cpu"
        self.sizes: list[int] = []
        self.operations: list[tuple[str, list[int], list[int], tuple[list[int], int]]] = []
        """name, inputs, outputs, and of a loop's body what `_peak` says"""
        self.known: dict[Any, list[int]] = {}
        self.turn: int | None = None
        """how many operations come before the first loop that runs backwards, that of the backward pass"""
        outputs = self.inline(jaxpr, [self.value() for _ in jaxpr.invars])
        self.outputs = [value for value in map(self.stacked, outputs) if isinstance(value, int)]

    def value(self, aval: Any = None) -> int:
        dtype = getattr(aval, "dtype", None)
        itemsize = dtype.itemsize if isinstance(dtype, np.dtype) else 0  # keys are small, and have none
        self.sizes.append(math.prod(getattr(aval, "shape", ())) * (4 if self.cpu and itemsize == 2 else itemsize))
        return len(self.sizes) - 1

    def add(self, name: str, inputs: list, avals: list, detail: Any = None, body: Any = ([], 0)) -> list[int]:
        key = (name, detail, tuple(inputs))
        if key not in self.known or not self.cpu:
            self.known[key] = [self.value(aval) for aval in avals]
            self.operations.append((name, [v for v in inputs if isinstance(v, int)], self.known[key], body))
        return self.known[key]

    def stacked(self, value: Any) -> Any:
        """One value in place of a list of them, which an unrolled loop stacks."""
        if isinstance(value, list):
            total = sum(self.sizes[part] for part in value)
            (value,) = self.add("concatenate", value, [None])
            self.sizes[value] = total
        return value

    def inline(self, jaxpr: Any, inputs: list[Any]) -> list[Any]:
        values = dict(zip(jaxpr.invars, inputs, strict=True)) | {v: self.value() for v in jaxpr.constvars}

        def read(variables):
            return [str(v) if isinstance(v, Literal) else values[v] for v in variables]

        for equation in jaxpr.eqns:
            name, params, inputs = equation.primitive.name, equation.params, read(equation.invars)
            inner = list(jaxprs_in_params(params))
            if self.turn is None and params.get("reverse"):
                self.turn = len(self.operations)
            if name == "scan" and params["unroll"] >= params["length"] > 1:
                outputs = self.unroll(inner[0], params, inputs)
            elif len(inner) == 1 and name != "scan" and len(inner[0].invars) == len(inputs):
                outputs = self.inline(inner[0], inputs)
            else:
                inputs, body = [self.stacked(value) for value in inputs], ([], 0)
                if name == "scan":
                    first = params["num_consts"]
                    del inputs[first : first + params["num_carry"]]  # written over by what is returned
                    live, kept = _peak(inner[0])
                    body = live * (params["unroll"] if self.cpu else 1), kept
                detail = id(equation) if inner else str(params)
                outputs = self.add(name, inputs, [v.aval for v in equation.outvars], detail, body)
            values |= dict(zip(equation.outvars, outputs, strict=True))
        return read(jaxpr.outvars)

    def unroll(self, body: Any, params: dict[str, Any], inputs: list[Any]) -> list[Any]:
        first, length = params["num_consts"], params["length"]
        last = first + params["num_carry"]
        carry, steps = inputs[first:last], {}
        for i in reversed(range(length)) if params["reverse"] else range(length):
            parts = [
                stack[i] if isinstance(stack, list) else self.add("slice", [stack], [v.aval], i)[0]
                for stack, v in zip(inputs[last:], body.invars[last:], strict=True)
            ]
            outputs = self.inline(body, inputs[:first] + carry + parts)
            carry, steps[i] = outputs[: len(carry)], outputs[len(carry) :]
        return carry + [list(column) for column in zip(*(steps[i] for i in range(length)), strict=True)]


def _peak(jaxpr: Any) -> tuple[list[int], int]:
    """Bytes of each of a program's own values at its fullest, and of all that the forward pass leaves together."""
    program = _Program(jaxpr)
    sizes, operations = program.sizes, program.operations
    made = {v: (name, inputs) for name, inputs, outputs, _ in operations for v in outputs}
    stored = {v for v in range(len(sizes)) if v not in made or made[v][0] in _WRITES}
    for v in [v for name, inputs, _, _ in operations if name in _READS for v in inputs] + program.outputs:
        while v not in stored and made[v][0] in _VIEWS:
            v = made[v][1][0]
        stored.add(v)

    @cache
    def sources(v):
        return {v} if v in stored else set().union(*map(sources, made[v][1]))

    ends = {v: len(operations) for v in program.outputs}
    for i, (_, inputs, outputs, _) in reversed(list(enumerate(operations))):
        if not stored.isdisjoint(outputs):
            for v in set().union(*map(sources, inputs)):
                ends.setdefault(v, i)
    dying = defaultdict(set)
    for v, i in ends.items():
        dying[i].add(v)
    live: dict[int, int] = {}
    peak, kept = [], 0
    for i, (name, _, outputs, (inner, inner_kept)) in enumerate(operations):
        if i == program.turn or inner_kept:
            kept = sum(live.values()) + inner_kept
        new = {v: sizes[v] for v in outputs if v in stored and v in ends}
        dead = {v: live[v] for v in dying[i] if v in live}
        # What is computed element by element is written over what it is computed from.
        over = {} if name in _READS else min(new, dead, key=lambda values: sum(values.values()))
        live |= new
        now = [size for v, size in live.items() if v not in over] + inner
        peak = max(peak, now, key=sum)
        live = {v: size for v, size in live.items() if v not in dying[i]}
    return peak, kept
