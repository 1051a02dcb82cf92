"""The 1,000 classes of ImageNet (ILSVRC 2012), in the order of their numbers."""

import functools
from pathlib import Path


@functools.cache
def classes() -> dict[str, tuple[str, ...]]:
    """Each class's WordNet identifier, which is its folder's name in ImageNet, and its names, the most common first."""
    text = (Path(__file__).parents[1] / "assets" / "imagenet-classes.txt").read_text()
    rows = (line.split("\t") for line in text.splitlines())
    return {identifier: tuple(names.split(", ")) for identifier, names in rows}


def names_of(class_name: str) -> tuple[str, ...]:
    """All names of a class: the given one and, if it is a WordNet identifier of ImageNet, the names in WordNet."""
    return (class_name, *classes().get(class_name, ()))


def usual_name(class_name: str) -> str:
    """The name to display: the most common name in WordNet for an identifier of ImageNet, else the given name."""
    return names_of(class_name)[:2][-1]
