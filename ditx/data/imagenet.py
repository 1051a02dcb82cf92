"""The 1,000 classes of ImageNet (ILSVRC 2012), in the order of their numbers."""

import functools
from pathlib import Path

from ditx.checks import suggestion


@functools.cache
def classes() -> dict[str, tuple[str, ...]]:
    """Each class's WordNet identifier, which is its folder's name in ImageNet, and its names, the most common first."""
    text = (Path(__file__).parents[1] / "assets" / "imagenet-classes.txt").read_text()
    rows = (line.split("\t") for line in text.splitlines())
    return {identifier: tuple(names.split(", ")) for identifier, names in rows}


def names_of(class_name: str) -> tuple[str, ...]:
    """All names of a class: the given one, its parts ("tench, Tinca tinca"), or those of an identifier of WordNet."""
    parts = tuple(class_name.split(", "))
    return (class_name, *classes().get(class_name, parts if len(parts) > 1 else ()))


def usual_name(class_name: str) -> str:
    """The name to display: the most common name in WordNet for an identifier of ImageNet, else the given name."""
    return names_of(class_name)[:2][-1]


def find_labels(names: tuple[str, ...], class_names: tuple[str, ...]) -> list[int]:
    """Class indices of names or numbers; all classes if there are none.

    Raises ValueError for an unknown class, or for a name of several classes.
    """
    labels = []
    for name in names:
        if name.isascii() and name.isdigit() and name not in class_names:
            matches = [int(name)] if int(name) < len(class_names) else []
        else:
            matches = [k for k, known in enumerate(class_names) if name.lower() in map(str.lower, names_of(known))]
        if not matches:
            known = ", ".join(usual_name(known) for known in class_names[:20])
            known += ", ..." if len(class_names) > 20 else ""
            guess = (
                "" if name.isdigit() else suggestion(name, (own for names in class_names for own in names_of(names)))
            )
            raise ValueError(f"unknown class {name!r}; {guess}choose from 0 to {len(class_names) - 1}: {known}")
        if len(matches) > 1:
            raise ValueError(f"{name!r} is the name of several classes; give one of {', '.join(map(str, matches))}")
        labels += matches
    return labels or list(range(len(class_names)))
