"""The nearest point of another class, found with the model's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.core import tree
from apportion.core.errors import BaselineError
from apportion.core.question import Question
from apportion.core.score import Logit, Target
from apportion.core.tree import Tree
from apportion.parts.baselines.search import check_asks, everyone, listed, norm, number, own_classes, put
from apportion.parts.baselines.simple import Baseline, bounds_of


@dataclass(frozen=True)
class _Margin(Logit):
    """z_c - max of z_j over j ≠ c: above 0 where the class is the decision."""

    def _of_class(self, z: Tensor, target: Tensor) -> Tensor:
        own = z.gather(1, target)
        return (own - z.scatter(1, target, -torch.inf).amax(1, keepdim=True))[:, 0]


@dataclass(frozen=True)
class _NumberMargin(_Margin):
    """A model's only number: above 0 where the decision is yes."""

    def resolve(self, target: Target, shown: Any, outputs: Callable[[], Any], batch: int) -> Tree:
        return None

    def __call__(self, outputs: Any, target: Tree) -> Float[Tensor, " R"]:
        value = number(outputs)
        assert value is not None  # seen when the search began
        return value


class Nearest(NamedTuple):
    """What a search for the nearest point of another class came to.

    Attributes:
        points: one per example, shaped as x.
        success: whether the decision changes there.
        distance: from the example, Euclidean, in units of x.
    """

    points: Tree
    success: Bool[Tensor, " B"]
    distance: Float[Tensor, " B"]


@dataclass(frozen=True)
class NearestAdversarial(Baseline):
    """The nearest point found on the decision boundary, just beyond it: x' of BIG (Wang et al. 2022, eq. 4).

    Projected gradient descent on s (z_c - max of the other z_j), with s = 1 where class c is the decision at x
    and -1 where it is not, so that the boundary of c's region is sought from either side. c is the target, or
    the example's top class for scores that are not about a class. Every ball radius ε is tried, each with steps
    along the normalized gradient, back into the ball, and into the field's bounds where it declares them. A try
    ends at its first point across. The try that ended nearest to x is kept, and the segment from x to it is
    halved until the crossing is known.

    Where no try crosses, the point whose margin came nearest to 0 is given, with a warning that names the
    examples; `success` and `search` tell. A gradient of 0 leaves a try where it is. On a binary linear model the
    answer is exact, x - f w / ‖w‖². With more classes the steepest way may lead to a rival whose boundary is not
    the nearest: what is found is near, and never proven nearest.

    Attributes:
        epsilons: the radii, Euclidean, in units of x; the default is the authors' for pictures in [0, 1].
        steps: steps of each try.
        travel: how far the steps of a try lead if they agree, in units of its ε. The authors' own steps are
            2 ε² / steps long, by a factor applied twice, and do not reach the sphere for ε below 1/2.
        random_start: start anywhere in the ball rather than at x.
        tolerance: of the crossing, in units of the distance found.

    Raises:
        BaselineError: outputs that are neither classes nor one number, whose sign decides.

    >>> import apportion as ap
    >>> model = lambda x: torch.stack([x[:, 0] - 1, 0 * x[:, 0]], 1)
    >>> NearestAdversarial()(ap.Field(model).bind(torch.tensor([[1.5, 7.0]]))).round(decimals=4)
    tensor([[[1., 7.]]])
    """

    _positive = ("steps", "travel", "tolerance")

    epsilons: tuple[float, ...] = (36 / 255, 64 / 255, 0.3, 0.5, 0.7, 0.9, 1.1)
    steps: int = 40
    travel: float = 2.0
    random_start: bool = False
    tolerance: float = 1e-7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilons or not min(self.epsilons) > 0:
            raise BaselineError(f"epsilons={self.epsilons}", "one radius or more, all above 0", "write (0.5, 1.0)")
        if not self.tolerance < 1:
            raise BaselineError(f"tolerance={self.tolerance}", "a share of the distance, below 1", "write 1e-7")

    @property
    def _halvings(self) -> int:
        return math.ceil(-math.log2(self.tolerance))

    @property
    def rows(self) -> int:
        return 2 + len(self.epsilons) * (self.steps + 1) + self._halvings

    @property
    def backward_rows(self) -> int:
        return len(self.epsilons) * self.steps

    @property
    def exact(self) -> bool:
        return False

    def __call__(self, q: Question) -> Tree:
        found = self.search(q)
        missed = ~found.success
        if bool(missed.any()):
            q.warn(
                f"NearestAdversarial found no point of another class within {max(self.epsilons):.4g} of "
                f"{int(missed.sum())} example(s) ({listed(q, missed)}): their baseline is on x's own side"
            )
        return tree.apply(lambda t: t[:, None], found.points)

    def search(self, q: Question) -> Nearest:
        """Give each example's nearest point of another class; searched for once, and told again for nothing.

        Raises:
            BaselineError: the field's outputs cannot be attacked, or a derivative of the search is wanted.
        """
        check_asks(q, "NearestAdversarial")
        found = q.home.keep(self, self._search)
        return Nearest(*(tree.index(part, q.in_home) for part in found))

    def _search(self, q: Question) -> Nearest:
        margin = self._margin(q)
        side = self._side(q, q.x, margin)
        rows, crossed, left = self._tries(q, margin, side)
        count = len(self.epsilons)
        owner = everyone(q).repeat_interleave(count)
        length = norm(tree.apply(lambda p, x: p - x[owner], rows, q.x))
        crossed, success = crossed.unflatten(0, (-1, count)), crossed.unflatten(0, (-1, count)).any(1)
        nearest = torch.where(crossed, length.unflatten(0, (-1, count)), torch.inf).argmin(1)
        closest = left.unflatten(0, (-1, count)).argmin(1)
        kept = torch.where(success, nearest, closest) + count * everyone(q)
        points = tree.index(rows, kept)
        self._halve(q, margin, side, points, success)
        return Nearest(points, success, norm(tree.apply(torch.sub, points, q.x)))

    def success(self, q: Question) -> Bool[Tensor, " B"]:
        """Tell for which examples the baseline used is across."""
        return self.search(q).success

    def _margin(self, q: Question) -> _Margin:
        own, _ = own_classes(q, "NearestAdversarial")
        return q.adopt(_NumberMargin(), None) if own is None else q.adopt(_Margin(), own[:, None])

    @staticmethod
    def _side(q: Question, rows: Tree, margin: _Margin) -> Float[Tensor, " B"]:
        value = q.value(rows, everyone(q), margin)
        return torch.where(value < 0, -1.0, 1.0).to(value.dtype)

    def _tries(self, q: Question, margin: _Margin, side: Tensor) -> tuple[Tree, Tensor, Tensor]:
        """Make all tries; give where each ended, whether across, and s times its last margin."""
        owner = everyone(q).repeat_interleave(len(self.epsilons))
        radius = torch.tensor(self.epsilons, dtype=torch.float64, device=q.device).repeat(len(q))
        rows = self._start(q, owner, radius)
        crossed, left = torch.zeros_like(owner, dtype=torch.bool), torch.zeros_like(radius)
        going = torch.arange(len(owner), device=q.device)  # tries that have not crossed yet
        for step in range(self.steps + 1):
            here, own = tree.index(rows, going), owner[going]
            slope = None
            if step < self.steps:
                value, slope = q.value_and_grad(here, own, margin)
            else:
                value = q.value(here, own, margin)
            left[going] = (side[own] * value).double()
            across = left[going] < 0
            crossed[going] = across
            if slope is None or bool(across.all()):
                break
            ahead = ~across
            going, own = going[ahead], own[ahead]
            moved = self._step(q, tree.index(here, ahead), tree.index(slope, ahead), own, side[own], radius[going])
            put(rows, going, moved)
        return rows, crossed, left

    def _start(self, q: Question, owner: Tensor, radius: Tensor) -> Tree:
        start = tree.index(q.x, owner)
        if not self.random_start:
            return start
        stream = q.stream("adversarial start")
        draw = torch.arange(len(self.epsilons)).repeat(len(q))
        way = stream.normal(q.x, owner.cpu(), draw)
        share = stream.derive(owner.cpu(), draw).uniform(
            torch.zeros(1, 1), torch.arange(len(owner)), torch.zeros_like(draw)
        )
        size = sum(t[0].numel() for t in tree.leaves(q.x))
        length = radius * share[:, 0].double().to(radius.device) ** (1 / size) / norm(way)  # uniform in the ball
        return self._into_bounds(q, tree.apply(lambda x, w: x + tree.per_row(length, w) * w, start, way))

    def _step(self, q: Question, here: Tree, slope: Tree, owner: Tensor, side: Tensor, radius: Tensor) -> Tree:
        steep = norm(slope)
        pace = torch.where(steep > 0, side.double() * self.travel / self.steps * radius / steep, 0.0)
        away = tree.apply(lambda p, g, x: p - tree.per_row(pace, g) * g - x[owner], here, slope, q.x)
        length = norm(away)
        within = torch.where(length > radius, radius / length, 1.0)
        back = tree.apply(lambda a, x: x[owner] + tree.per_row(within, a) * a, away, q.x)
        return self._into_bounds(q, back)

    @staticmethod
    def _into_bounds(q: Question, points: Tree) -> Tree:
        """Clip; since x is within the bounds, no element comes to lie farther from it."""
        bounds = bounds_of(q)
        return points if bounds is None else tree.apply(lambda t: t.clamp(*bounds), points)

    def _halve(self, q: Question, margin: _Margin, side: Tensor, points: Tree, success: Tensor) -> None:
        """Draw points that are across towards x, in place, until they are just across."""
        going = success.nonzero()[:, 0]
        ends = tree.index(points, slice(None))
        ends = tree.apply(torch.clone, ends)
        low, high = torch.zeros(len(q), dtype=torch.float64, device=q.device), torch.ones(len(q), device=q.device)
        high = high.double()
        fine = max(torch.finfo(t.dtype).eps for t in tree.leaves(q.x))
        for _ in range(self._halvings):
            going = going[high[going] - low[going] > max(self.tolerance, 4 * fine) * high[going]]
            if not len(going):
                return
            middle = (low[going] + high[going]) / 2
            rows = tree.apply(lambda x, e, at=going, m=middle: x[at] + tree.per_row(m, e) * (e[at] - x[at]), q.x, ends)
            across = side[going] * q.value(rows, going, margin) < 0
            put(points, going[across], tree.index(rows, across))
            high[going] = torch.where(across, middle, high[going])
            low[going] = torch.where(across, low[going], middle)
