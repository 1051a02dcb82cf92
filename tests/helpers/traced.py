"""What a traced program consists of."""

from jax.extend.core import jaxprs_in_params


def equations(jaxpr, times=1):
    """All equations, those within others included, each with how often loops have it run."""
    for equation in jaxpr.eqns:
        yield equation, times
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner, times * equation.params.get("length", 1))
