"""The names of ImageNet's 1,000 classes (ILSVRC 2012), in the order of their numbers."""

import functools
from pathlib import Path


@functools.cache
def classes() -> dict[str, tuple[str, ...]]:
    """WordNet's identifier of each class (the name of its folder in ImageNet), with its names, the usual one first."""
    text = (Path(__file__).parents[1] / "assets" / "imagenet-classes.txt").read_text()
    rows = (line.split("\t") for line in text.splitlines())
    return {identifier: tuple(names.split(", ")) for identifier, names in rows}


def names_of(class_name: str) -> tuple[str, ...]:
    """All names of a class: its own and, if that is an identifier of ImageNet's, WordNet's."""
    return (class_name, *classes().get(class_name, ()))


def usual_name(class_name: str) -> str:
    """The name to show a class by: WordNet's usual one for an identifier of ImageNet's, else its own."""
    return names_of(class_name)[:2][-1]
