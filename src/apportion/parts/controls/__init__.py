"""Controls: maps that know nothing of the model, which a metric must tell from those that do."""

from apportion.core.explainer import Explainer
from apportion.core.registry import snake, spelled
from apportion.parts.controls.controls import AllOnes, CenterGaussian, Edges, InputMagnitude, Laplace, Random

__all__ = ["AllOnes", "CenterGaussian", "Edges", "InputMagnitude", "Laplace", "Random"]


def names() -> tuple[str, ...]:
    """List the names of the controls."""
    return tuple(map(snake, __all__))


def named(name: str) -> type[Explainer]:
    """Find a control by its name, in any spelling.

    Raises:
        RegistryError: there is none, with the nearest.

    >>> named("center-gaussian")()
    CenterGaussian(width=0.25)
    """
    known = dict(zip(names(), (globals()[c] for c in __all__), strict=True))
    return known[spelled(name, known, "control", f"take one of {', '.join(known)}")]
