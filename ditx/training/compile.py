"""A training step with the shapes of its arguments, compiled before anything is allocated."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditx.nn.dit import DiTConfig
from ditx.parallel.compile import compile_checked, compiler_options
from ditx.parallel.fsdp import bytes_per_device, table, with_shardings
from ditx.parallel.mesh import batch_sharding, replicated
from ditx.training.step import Optimizer, TrainState


@dataclass(frozen=True, eq=False)
class AbstractStep:
    """`function(state, batch, key) -> state, terms`, with shapes, dtypes and shardings of state and batch.

    The batch is of pixels, or of means and standard deviations of latents.
    """

    function: Callable[..., Any]
    model: DiTConfig
    optimizer: Optimizer
    mesh: Mesh
    batch_size: int
    latent: bool = False
    power_emas: int = 0
    fp8: bool = False
    remedy: str = "a smaller --batch-size"
    """advice where a device has too little memory"""

    def create(self, key: Any) -> TrainState:
        """The state before the first step; to be called within `jax.jit` with the state's shardings."""
        return TrainState.create(self.model, self.optimizer, power_emas=self.power_emas, key=key)

    @cached_property
    def state(self) -> TrainState:
        """The shapes of the state."""
        return with_shardings(jax.eval_shape(self.create, jax.random.key(0)), self.mesh)

    @property
    def shardings(self) -> Any:
        """The shardings of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)

    @property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch."""
        model, place = self.model, partial(jax.ShapeDtypeStruct, sharding=batch_sharding(self.mesh))
        shape = (self.batch_size, *model.input_shape)
        dtypes: dict[str, Any] = {"x": jnp.float16, "std": jnp.float16} if self.latent else {"x": jnp.float32}
        return {name: place(shape, dtype) for name, dtype in dtypes.items()} | {"y": place(shape[:1], jnp.int32)}

    @property
    def sums(self) -> dict[str, np.ndarray]:
        """Zeros, to sum the terms of steps in."""
        terms = jax.eval_shape(self.function, self.state, self.batch, jax.random.key(0))[1]
        return {"count": np.zeros(())} | {name: np.zeros(term.shape) for name, term in terms.items()}

    def summary(self) -> str:
        """Devices, mesh and memory of the state, and on several devices the split of each weight."""
        mesh, state = self.mesh, self.state
        axes = ", ".join(f"{axis} {count}" for axis, count in mesh.shape.items())
        options = "".join(f", {name}={value}" for name, value in self._options.items())
        parts = {"weights": state.model, "averages": (state.ema, state.power_emas), "moments": state.opt_state}
        memory = ", ".join(f"{name} {bytes_per_device(part) / 2**20:,.1f}" for name, part in parts.items())
        lines = [
            f"devices   {mesh.size} x {mesh.devices.flat[0].device_kind} ({axes}){options}",
            f"memory    {bytes_per_device(state) / 2**20:,.1f} MiB a device: {memory}",
        ]
        return "\n".join([*lines, table(state.model)] if mesh.size > 1 else lines)

    @property
    def _options(self) -> dict[str, bool]:
        return compiler_options(self.mesh, fp8=self.fp8)

    @cached_property
    def compiled(self) -> tuple[jax.stages.Compiled, float, int]:
        """The program, which donates its state; the seconds its compilation took, and its bytes on each device.

        Raises ValueError where a device has too little memory.
        """
        places, options = (self.shardings, None), self._options
        jitted = jax.jit(self.function, donate_argnums=0, out_shardings=places, compiler_options=options)
        key = jax.random.key(0)
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(self.mesh))
        return compile_checked(jitted, self.state, self.batch, key, remedy=self.remedy)
