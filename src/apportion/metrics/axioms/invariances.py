"""Invariances: networks that are one function, inputs that are one picture, features that are alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion.core import tree
from apportion.core.card import Paper
from apportion.core.errors import ConfigError, InputError, ModelError, kind_of
from apportion.core.external import fitted
from apportion.core.question import Question
from apportion.core.score import Logit
from apportion.core.streams import key_of
from apportion.core.tree import Tree
from apportion.metrics.fidelity.copies import at_examples, of_model
from apportion.metrics.metric import Found, Judges, Metric, MetricCard, Subject, as_asked, register
from apportion.metrics.randomization.parameters import of_class
from apportion.metrics.scores import Direction
from apportion.planted import variants as equal

_PAPER = Paper("Sundararajan, Taly, Yan", 2017, "Axiomatic attribution for deep networks", "ICML")


def apart(a: Tree, b: Tree) -> Float[Tensor, " B"]:
    """Give ‖a - b‖ / ‖a‖ by example, by Euclid's norm; 0 where both are zero, infinite where only a is.

    What is below the root of the precision of a and b counts as 0: such numbers are of rounding, which is another one
    in every batch, and methods would be ranked by it.
    """
    least = max(torch.finfo(t.dtype).eps for t in (*tree.leaves(a), *tree.leaves(b)) if t.is_floating_point()) ** 0.5
    far = tree.total(tree.apply(lambda u, v: (u.double() - v.double()).square(), a, b)).sqrt()
    size = tree.total(tree.apply(lambda u: u.double().square(), a)).sqrt()
    return torch.where(far <= least * size, 0.0, far / size)


def _module(q: Question, who: str) -> tuple[nn.Module, Tensor]:
    model = q.field.model
    if not isinstance(model, nn.Module) or not isinstance(q.inputs, Tensor):
        given = kind_of(model) if not isinstance(model, nn.Module) else "several inputs"
        raise ModelError(f"{given} for {who}", "an nn.Module of one tensor", "judge another metric")
    return model, q.inputs


@register(
    MetricCard(
        title="Implementation invariance",
        paper=_PAPER,
        intent="How far maps of networks that are the same function are apart.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(0.0, None),
        chance="0 for maps that know nothing of the model; about √2 for maps that share nothing",
        blind_is_best=True,
        cost="the explainer's, once for the network and once for each other network",
        cautions=("Methods pass that do not look at the network at all: judge ap.controls.Edges() beside.",),
    )
)
@dataclass(frozen=True)
class ImplementationInvariance(Metric):
    """The largest ‖φ_g - φ_f‖ / ‖φ_f‖ over networks g that are f as a function, made from the user's own.

    Channels are permuted, ReLUs rescaled by positive factors, batch-norms folded into the layers before them: each of
    them where the network allows it, and at least one. Outputs agree to 1e-4 of the largest, or the network is refused.
    `parts` has the distance to each.

    Undefined where the map is zero and the other is not.

    Attributes:
        permute: channels.
        rescale: ReLUs.
        fold: batch-norms.

    Raises:
        ModelError: a network of which none of these can be made; it says why, layer by layer.

    Source: Sundararajan et al. (2017), section 2.2.

    >>> import apportion as ap
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> s = ImplementationInvariance()(ap.Field(net), torch.rand(2, 4), ap.Gradient())
    >>> sorted(s.parts), bool((s.values < 1e-5).all())
    (['permuted', 'rescaled'], True)
    """

    permute: bool = True
    rescale: bool = True
    fold: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.permute or self.rescale or self.fold):
            raise ConfigError("no other network", "permute, rescale or fold", "leave one of them on")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Make the other networks, and explain each."""
        _ = subject.for_any_model  # refuses functions
        own = at_examples(subject, q)
        far = {name: apart(own, of_model(subject, q, m)) for name, m in self._others(q).items()}
        worst = torch.stack(list(far.values())).amax(0)
        return Found(
            torch.where(worst.isinf(), torch.nan, worst),
            parts=far,
            undefined={"a map of zeros beside one that is not": worst.isinf()},
        )

    def _others(self, q: Question) -> dict[str, nn.Module]:
        model, x = _module(q, "ImplementationInvariance")
        z = x if q.field.normalize is None else q.field.normalize(x)
        makers: dict[str, Callable[[], Any]] = {
            "permuted": lambda: equal.permuted(model, z, q.seed, 1e-4),
            "rescaled": lambda: equal.rescaled(model, z, q.seed, 1e-4),
            "folded": lambda: equal.folded(model, z, 1e-4),
        }
        wanted = {"permuted": self.permute, "rescaled": self.rescale, "folded": self.fold}
        made, refused = {}, []
        for name, make in makers.items():
            if wanted[name]:
                try:
                    made[name] = make().other
                except ModelError as error:
                    refused.append(f"{name}: {error.given}")
        if not made:
            raise ModelError("; ".join(refused), "a network of which one of these can be made", "leave this metric out")
        return made

    def explanations(self, q: Question) -> int:
        """Once for each network."""
        return 1 + len(self._others(q))

    def questions(self, q: Question) -> int:
        """As many."""
        return self.explanations(q)


@register(
    MetricCard(
        title="Input invariance",
        paper=Paper(
            "Kindermans, Hooker, Adebayo, Alber, Schütt, Dähne, Erhan, Kim",
            2019,
            "The (un)reliability of saliency methods",
            "LNCS 11700",
        ),
        intent="How far the map moves when the input is shifted and the first bias takes the shift off again.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(0.0, None),
        chance="0 for maps that know nothing of the model; about √2 for maps that share nothing",
        blind_is_best=True,
        cost="the explainer's, twice",
        cautions=(
            "A method with a baseline passes if the baseline moves along, and fails with a fixed one: the choice of "
            "reference is what is judged.",
        ),
    )
)
@dataclass(frozen=True)
class InputInvariance(Metric):
    """‖φ_g(x + m) - φ_f(x)‖ / ‖φ_f(x)‖, where g(x + m) = f(x): the first layer's bias takes the shift m off.

    Undefined where the map is zero and that of shifted inputs is not.

    Attributes:
        shift: m, the same for every element, in units of the input the network itself gets.

    Raises:
        ModelError: something that is not linear comes first in the network.
        InputError: bounds or a normalization on the field, under which shifted inputs are other ones.

    Source: Kindermans et al. (2019), section 2.

    >>> import apportion as ap
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> x = torch.rand(2, 4)
    >>> far = [InputInvariance()(ap.Field(net), x, m).values for m in (ap.Gradient(), ap.GradientTimesInput())]
    >>> [bool((v < 1e-4).all()) for v in far]
    [True, False]
    """

    shift: float = 1.0

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Shift both, and explain both."""
        model, x = _module(q, "InputInvariance")
        if q.field.bounds is not None or q.field.normalize is not None:
            raise InputError(
                "a field with bounds or normalize for InputInvariance",
                "the network's own input",
                "normalize x beforehand, and leave both out of the field",
            )
        other = equal.shifted(model, x, self.shift, 1e-4).other
        _ = subject.for_any_model  # refuses functions
        own = at_examples(subject, q)
        moved = q.field.with_model(other).bind(x + self.shift, as_asked(q.target), q.ids, q.seed)
        far = apart(own, at_examples(subject, moved))
        q.charge(moved.account)
        return Found(
            torch.where(far.isinf(), torch.nan, far), undefined={"a map of zeros beside one that is not": far.isinf()}
        )

    def explanations(self, q: Question) -> int:
        """Once for each network."""
        return 2

    def questions(self, q: Question) -> int:
        """As many."""
        return self.explanations(q)


@register(
    MetricCard(
        title="Linearity",
        paper=_PAPER,
        intent="How far the map of a weighted sum of outputs is from the weighted sum of their maps.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(0.0, None),
        chance="|1 - a - b| for maps that do not depend on the score, 2 at the default weights",
        cost="the explainer's, three times",
        cautions=("Methods that take magnitudes, or positive parts, fail by definition.",),
    )
)
@dataclass(frozen=True)
class Linearity(Metric):
    """‖φ(a f_c + b f_k) - a φ(f_c) - b φ(f_k)‖ / ‖φ(a f_c + b f_k)‖, for the class c and another one k of the network.

    k is the class after the target, in order. All three are explained with the same random numbers.

    Undefined where the map of the sum is zero and the sum of maps is not.

    Attributes:
        weights: a and b.

    Raises:
        InputError: outputs that are not two or more classes.

    Source: Sundararajan et al. (2017), section 3, linearity.

    >>> import apportion as ap
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    >>> far = Linearity()(ap.Field(net), torch.rand(2, 4), ap.Gradient()).values
    >>> bool((far < 1e-5).all())
    True
    """

    weights: tuple[float, ...] = (1.0, -2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.weights) != 2:
            raise ConfigError(f"{len(self.weights)} weights", "two: of the class and of another", "write (1.0, -2.0)")

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Explain both, and their sum."""
        target = q.target
        with q.uncounted():
            outputs = q.outputs(q.x, q.owners)
        fits = isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.shape[1] > 1
        fits = fits and isinstance(target, Tensor) and target.ndim == 2 and target.shape[1] == 1
        if not fits or not isinstance(q.field.score, Logit):
            raise InputError(
                f"{type(q.field.score).__name__} of these outputs for Linearity",
                "ap.Logit() of outputs [B, classes]",
                "judge the logits of a classifier",
            )
        a, b = self.weights
        model, _ = _module(q, "Linearity")
        _ = subject.for_any_model  # refuses functions
        own = at_examples(subject, q)
        second = of_class(q, (target[:, 0] + 1) % outputs.shape[1])
        other = at_examples(subject, second)
        q.charge(second.account)
        mixed = of_model(subject, q, _Mixed(model, a, b))
        far = apart(mixed, tree.apply(lambda u, v: a * u + b * v, own, other))
        return Found(
            torch.where(far.isinf(), torch.nan, far), undefined={"a map of zeros beside one that is not": far.isinf()}
        )

    def explanations(self, q: Question) -> int:
        """Once for each class, and for the sum."""
        return 3

    def questions(self, q: Question) -> int:
        """As many."""
        return self.explanations(q)


class _Mixed(nn.Module):
    """Adds to each output, times a, the next one times b; the first follows the last."""

    def __init__(self, model: nn.Module, a: float, b: float) -> None:
        super().__init__()
        self.model, self.a, self.b = model, a, b

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        z = self.model(*args, **kwargs)
        return self.a * z + self.b * torch.cat([z[:, 1:], z[:, :1]], 1)


@register(
    MetricCard(
        title="Symmetry",
        paper=_PAPER,
        intent="How far the values of two features are apart that the function treats alike.",
        direction=Direction.LOWER,
        judges=Judges.EXPLAINER,
        range=(0.0, None),
        chance="about 1 for random maps",
        cost="the explainer's on a network of two passes, once for each pair",
        cautions=("Single paths that are not straight, and random ones of few draws, fail by definition.",),
    )
)
@dataclass(frozen=True)
class Symmetry(Metric):
    """The largest |φ_i - φ_j| / max |φ| over pairs i, j, on the network f(x) + f(x with i, j exchanged), at x_i = x_j.

    That function is symmetric in i and j whatever the user's network is. Pairs are drawn among the elements of one
    example that the field normalizes alike; both get the mean of their values. Explainers with a fixed layer, or whose
    baseline differs between i and j, are asked another question.

    Undefined for maps of zeros.

    Attributes:
        pairs: drawn, the same for all examples.

    Raises:
        ModelError: several inputs, or a function without modules.
        InputError: no two elements, or none that are normalized alike, as in tables with a mean for each column.

    Source: Sundararajan et al. (2017), section 4, symmetry-preserving.

    >>> import apportion as ap
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    >>> far = Symmetry(pairs=2)(ap.Field(net), torch.rand(2, 4), ap.IntegratedGradients()).values
    >>> bool((far < 1e-4).all())
    True
    """

    pairs: int = 4

    _positive = ("pairs",)

    def measure(self, q: Question, subject: Subject, truth: Any) -> Found:
        """Draw pairs, make networks that are symmetric in them, and explain."""
        _ = subject.for_any_model  # refuses functions
        model, x = _module(q, "Symmetry")
        kind = _normalized_alike(q, x)
        shared = torch.bincount(kind) > 1
        if not bool(shared.any()):
            one = "one element" if len(kind) < 2 else "elements that are normalized each in its own way"
            raise InputError(f"examples of {one} for Symmetry", "two alike or more", "normalize x beforehand")
        g = torch.Generator().manual_seed(key_of(q.seed, "pairs") >> 1)
        worst = torch.zeros(len(q), dtype=torch.float64, device=q.device)
        none = torch.zeros(len(q), dtype=torch.bool, device=q.device)
        for _ in range(self.pairs):
            drawn = torch.randperm(len(kind), generator=g)
            first = drawn[shared[kind[drawn]]][0]
            i, j = drawn[kind[drawn] == kind[first]][:2].tolist()
            flat = x.flatten(1).clone()
            flat[:, [i, j]] = flat[:, [i, j]].mean(1, keepdim=True)
            both = q.field.with_model(_Exchanged(model, i, j))
            at = both.bind(flat.reshape(x.shape), as_asked(q.target), q.ids, q.seed)
            values = fitted(at_examples(subject, at), x, subject.name)
            q.charge(at.account)
            v = values.expand(x.shape).flatten(1).double()
            size = v.abs().amax(1)
            none |= size == 0
            far = torch.where(size > 0, (v[:, i] - v[:, j]).abs() / size, 0.0)
            worst = torch.maximum(worst, torch.where(far <= torch.finfo(values.dtype).eps ** 0.5, 0.0, far))
        return Found(torch.where(none, torch.nan, worst), undefined={"a map of zeros": none})

    def explanations(self, q: Question) -> int:
        """Once for each pair; each row is two of the network's own."""
        return self.pairs

    def questions(self, q: Question) -> int:
        """As many."""
        return self.explanations(q)

    @classmethod
    def variants(cls) -> tuple[Metric, ...]:
        return (cls(pairs=2),)


def _normalized_alike(q: Question, x: Tensor) -> Int[Tensor, " P"]:
    """Number the ways in which elements of one example are normalized."""
    count, norm = x[0].numel(), q.field.normalize
    if norm is None or len(norm.mean) == 1:
        return torch.zeros(count, dtype=torch.long)
    ways = list(zip(norm.mean, norm.std, strict=True))
    return torch.tensor([ways.index(way) for way in ways]).repeat_interleave(count // len(ways))


class _Exchanged(nn.Module):
    """The sum of a network's outputs for x, and for x with two elements exchanged."""

    def __init__(self, model: nn.Module, i: int, j: int) -> None:
        super().__init__()
        self.model, self.i, self.j = model, i, j

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        order = torch.arange(x[0].numel(), device=x.device)
        order[self.i], order[self.j] = self.j, self.i
        other = x.flatten(1).index_select(1, order).reshape(x.shape)
        return self.model(x, *args, **kwargs) + self.model(other, *args, **kwargs)
