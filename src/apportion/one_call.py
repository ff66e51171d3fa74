"""One call: a model, an example, a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex

from apportion.core.errors import ConfigError, kind_of
from apportion.core.explainer import Explainer
from apportion.core.field import Field, Normalize
from apportion.core.precision import Precision
from apportion.core.registry import method as find
from apportion.core.score import Target
from apportion.core.site import Site
from apportion.core.together import answers, named
from apportion.core.tree import Tree

Method = str | Explainer


def explain(  # noqa: PLR0913 (a field and its question, in one call)
    model: Any,
    x: Tree,
    method: Method | Sequence[Method],
    *,
    target: Target = None,
    score: Any = None,
    site: Site | None = None,
    extra: Any = None,
    bounds: tuple[float, float] | None = None,
    normalize: Normalize | None = None,
    precision: Precision = None,
    batch_size: SupportsIndex | Literal["auto"] = "auto",
    allow_unused: bool = False,
    fast: bool = True,
    compile: bool = False,
    ids: Sequence[Any] | None = None,
    seed: int = 0,
    differentiable: bool = False,
) -> Any:
    """Explain a model at x in one call.

    Args:
        model: a module or callable.
        x: examples on the first axis.
        method: a name from `ap.methods()`, an explainer, or a list of them.
        target: as in `Field.bind`.
        score: reads one number per example off the outputs; the target's logit unless given.
        site: where values are attributed; the input unless given.
        extra: further arguments of the model.
        bounds: lowest and highest admissible input.
        normalize: the normalization between x and the network.
        precision: see `Field`.
        batch_size: rows per pass.
        allow_unused: give zeros for an input the score does not depend on.
        fast: fold batch-norms and lay pictures out channels last.
        compile: compile passes without gradient.
        ids: names of the examples, which key their random numbers.
        seed: of all random numbers.
        differentiable: keep the graph of the values back to x.

    Returns:
        One attribution, or a list of them for a list of methods: the same as asked one by one, but passes that
        several need are made once, and `cost.shared` says which. With `differentiable` each makes its own.

    Raises:
        RegistryError: an unknown name, with the nearest ones.
        ConfigError: something that is neither a name nor an explainer.
        ApportionError: what a method raises; in a list with the method's name.

    >>> import torch
    >>> explain(lambda x: (x**2).sum(1), torch.tensor([[3.0]]), "gradient").values
    tensor([[6.]])
    """
    field = Field(
        model,
        score,
        site,
        extra=extra,
        bounds=bounds,
        normalize=normalize,
        precision=precision,
        batch_size=batch_size,
        allow_unused=allow_unused,
        fast=fast,
        compile=compile,
    )

    asked: dict[str, Any] = {"target": target, "ids": ids, "seed": seed}
    if not isinstance(method, list | tuple):
        return as_explainer(method)(field, x, differentiable=differentiable, **asked)
    explainers = [as_explainer(m) for m in method]
    if differentiable or len(explainers) < 2:
        return [e(field, x, differentiable=differentiable, **asked) for e in explainers]
    found = []
    for i, answer in enumerate(answers(field, x, explainers, **asked)):
        if isinstance(answer, Exception):
            raise named(answer, explainers[i], f"method {i + 1} of {len(explainers)}")
        found.append(answer)
    return found


def as_explainer(method: Any) -> Explainer:
    """Find a method by name, or take an explainer as it is."""
    if isinstance(method, str):
        return find(method)()
    if isinstance(method, Explainer):
        return method
    if isinstance(method, type) and issubclass(method, Explainer):
        raise ConfigError(
            f"the class {method.__name__} as method", "an instance or a name", f"write {method.__name__}()"
        )
    raise ConfigError(
        f"{kind_of(method)} as method",
        "a name from ap.methods() or an explainer",
        "ap.methods() lists the names",
    )
