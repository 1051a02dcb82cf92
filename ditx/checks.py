"""Checks of names and of single examples, and functions of one example on meshes with Explicit axes."""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

P = ParamSpec("P")
R = TypeVar("R")


def unknown(kind: str, name: Any, choices: Collection[str]) -> ValueError:
    """The error for a name that does not exist, with the nearest existing one."""
    return ValueError(f"unknown {kind} {name!r}; {suggestion(name, choices)}choose from {', '.join(choices)}")


def suggestion(name: Any, choices: Iterable[str]) -> str:
    """A question with the choice nearest to a name, empty if none is near."""
    near = difflib.get_close_matches(str(name), list(choices), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def check_choice(kind: str, name: Any, choices: Collection[str]) -> None:
    """Raise ValueError unless `name` is one of the choices."""
    if name not in choices:
        raise unknown(kind, name, choices)


def check_names(config: Any) -> None:
    """Raise ValueError if a field of a configuration whose type is a choice of names has another name."""
    for field in dataclasses.fields(config):
        if get_origin(field.type) is Literal:
            check_choice(field.name, getattr(config, field.name), get_args(field.type))


def check_options(options: dict[str, Any], config: type) -> None:
    """Raise ValueError if an option is not a field of a configuration."""
    for name in options:
        check_choice("option", name, [field.name for field in dataclasses.fields(config)])


def check_example(most: int, **arrays: Any) -> None:
    """Raise ValueError for the first array of more axes than one example has: a batch."""
    for name, array in arrays.items():
        if jnp.ndim(array) > most:
            axes = f"{most} axes" if most else "no axes"
            raise ValueError(f"{name} has shape {jnp.shape(array)}; one example has {axes}: use jax.vmap for a batch")


def any_mesh(function: Callable[P, R]) -> Callable[P, R]:
    """Compute a function of one example on any mesh: inside it, Explicit axes are Auto ones.

    JAX asks for the sharding of each reshape and lookup on Explicit axes, which are the default of `jax.make_mesh`.
    `jax.vmap` splits a batch over them as its arguments are split; each result is replicated within the example.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        axes = jax.sharding.get_abstract_mesh().explicit_axes
        automatic: Any = jax.sharding.auto_axes(axes=axes, out_sharding=PartitionSpec()) if axes else lambda f: f
        return automatic(function)(*args, **kwargs)

    return wrapped


def branch(condition: Any, true: Callable[..., Any], false: Callable[..., Any], *operands: Any) -> Any:
    """`jax.lax.cond`; on Explicit axes, where JAX cannot batch it over constants, both sides with a selection."""
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return jax.lax.cond(condition, true, false, *operands)
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), true(*operands), false(*operands))
