"""Checks of names and of shapes: unknown names, and batches given to functions of one example."""

import difflib
from collections.abc import Collection, Iterable
from typing import Any

import jax.numpy as jnp


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


def check_example(most: int, **arrays: Any) -> None:
    """Raise ValueError for the first array of more axes than one example has: a batch."""
    for name, array in arrays.items():
        if jnp.ndim(array) > most:
            axes = f"{most} axes" if most else "no axes"
            raise ValueError(f"{name} has shape {jnp.shape(array)}; one example has {axes}: use jax.vmap for a batch")
