"""A baseline that differs from the example in every element while the model's logits hardly change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apportion.core import tree
from apportion.core.errors import BaselineError
from apportion.core.question import Question
from apportion.core.score import Score, Target, main_output
from apportion.core.tree import Tree
from apportion.parts.baselines.search import check_asks, everyone, listed, number, own_classes, put
from apportion.parts.baselines.simple import Baseline, Blurred, bounds_of


@dataclass(frozen=True, eq=False)
class _LogitDistance(Score):
    """‖z - z(x)‖₂, with the gradient of what is descended, so that one pass gives both.

    Attributes:
        target: z(x), [B, classes].
        descend: the distance itself, or the cross-entropy with the class of x.
    """

    target: Any
    descend: str

    def resolve(self, target: Target, shown: Any, outputs: Callable[[], Any], batch: int) -> Tree:
        return self.target

    def __call__(self, outputs: Any, target: Tree) -> Float[Tensor, " R"]:
        z = main_output(outputs)
        squares = (z - target).square().sum(1)
        distance = squares.sqrt()
        if self.descend == "distance":
            # its own slope at 0 is 0/0; half the square points the same way everywhere, and signs are all we take
            return distance.detach() + (squares - squares.detach()) / 2
        entropy = F.cross_entropy(z, target.argmax(1), reduction="none")
        return distance.detach() + (entropy - entropy.detach())


@dataclass(frozen=True, eq=False)
class _NumberDistance(_LogitDistance):
    """|f - f(x)| of a model's only number, descended by half its square."""

    def __call__(self, outputs: Any, target: Tree) -> Float[Tensor, " R"]:
        value = number(outputs)
        assert value is not None  # seen when the search began
        half = (value - target).square() / 2
        return (value - target).abs().detach() + (half - half.detach())


@dataclass(frozen=True)
class Credible(Baseline):
    """A point δ away from x in every element, with nearly x's logits (Akhtar and Jalwana 2023, Def. 6).

    Their Algorithm 1 looks for min ‖z(x) - z(x')‖₂ subject to |x_i - x'_i| ≥ δ for all i (eq. 4): from the
    points of `init` it takes x' ← x' - η sgn(∇J(x')), clips to the field's bounds where there are any, and
    pushes elements nearer than δ away from x. What the paper leaves open is settled so:

    - pushed first, so that δ holds when nothing else is needed or `init` gives x itself, as a blur of a
      constant picture does;
    - clipping comes before the push, and the push goes to the other side of x where the near one has no room;
      an element equal to its x_i goes up, room permitting;
    - it ends after `max_iter` steps and gives the best point met, which is never farther in logits than the
      pushed start; a warning counts those that did not come within `eps`, and `distance` measures them.

    Distances hold up to rounding. Logits are compared with those of the user's example.

    Attributes:
        init: the starting points, one search each: several blurs for several baselines.
        eps: ε, the distance in logits that is near enough.
        eta: η, the step, in units of x.
        delta: δ, in units of x; 5/255 reads the paper's as of 8-bit pixels.
        max_iter: steps at most.
        descend: J, the cross-entropy with x's top class as in the paper (Lemma 1), or the distance itself.
        push: away "by" δ as in line 6, which leaves δ to 2δ, or "to" exactly δ.

    Raises:
        BaselineError: outputs that are not classes, or a δ for which some x within the bounds has no room.

    >>> import apportion as ap
    >>> field = ap.Field(lambda x: torch.stack([x.sum(1), 0 * x[:, 0]], 1), bounds=(0, 1))
    >>> start = ap.baselines.Constant(1.0)
    >>> Credible(start, eps=0.05, eta=0.01, delta=0.02)(field.bind(torch.tensor([[0.999, 0.5]]), target=0)).shape
    torch.Size([1, 1, 2])
    """

    _positive = ("eps", "eta", "delta", "max_iter")

    init: Baseline = Blurred(10.0)
    eps: float = 1.0
    eta: float = 1 / 255
    delta: float = 5 / 255
    max_iter: int = 100
    descend: Literal["cross_entropy", "distance"] = "cross_entropy"
    push: Literal["by", "to"] = "by"

    @property
    def draws(self) -> int:
        return self.init.draws

    @property
    def rows(self) -> int:
        return self.init.rows + 1 + self.draws * (self.max_iter + 1)

    @property
    def backward_rows(self) -> int:
        return self.init.backward_rows + self.draws * self.max_iter

    @property
    def exact(self) -> bool:
        return False

    def __call__(self, q: Question) -> Tree:
        check_asks(q, "Credible")
        bounds = bounds_of(q)
        if bounds is not None and not self.delta <= (bounds[1] - bounds[0]) / 2:
            raise BaselineError(
                f"delta={self.delta} within bounds {bounds}",
                f"at most half their range, {(bounds[1] - bounds[0]) / 2:.4g}",
                "lower delta; it is in units of x",
            )
        score = self._score(q)
        count = self.draws
        owner = everyone(q).repeat_interleave(count)
        start = tree.apply(lambda t: t.flatten(0, 1), self.init(q))
        rows = self._apart(q, start, owner, bounds)
        best = tree.apply(torch.clone, rows)
        least = torch.full((len(owner),), torch.inf, dtype=torch.float64, device=q.device)
        going = torch.arange(len(owner), device=q.device)  # searches that are not near enough yet
        for step in range(self.max_iter + 1):
            here, own = tree.index(rows, going), owner[going]
            slope = None
            if step < self.max_iter:
                value, slope = q.value_and_grad(here, own, score)
            else:
                value = q.value(here, own, score)
            better = value.double() < least[going]
            put(best, going[better], tree.index(here, better))
            least[going] = torch.where(better, value.double(), least[going])
            ahead = value > self.eps
            if slope is None or not bool(ahead.any()):
                break
            going = going[ahead]
            moved = tree.apply(lambda p, g, a=ahead: p[a] - self.eta * g[a].sign(), here, slope)
            put(rows, going, self._apart(q, moved, owner[going], bounds))
        self._tell(q, least.unflatten(0, (-1, count)))
        return tree.apply(lambda t: t.unflatten(0, (-1, count)), best)

    def distance(self, q: Question) -> Float[Tensor, "B k"]:
        """Measure how far the logits at the baselines used are from those at x; spends k + 1 rows forward."""
        owner = everyone(q).repeat_interleave(self.draws)
        rows = tree.apply(lambda t: t.flatten(0, 1), q.references(self).rows)
        return q.value(rows, owner, self._score(q)).unflatten(0, (-1, self.draws))

    def _score(self, q: Question) -> _LogitDistance:
        own, logits = own_classes(q, "Credible")
        score = _NumberDistance(logits, "distance") if own is None else _LogitDistance(logits, self.descend)
        return q.adopt(score, logits)

    def _apart(self, q: Question, points: Tree, owner: Tensor, bounds: tuple[float, float] | None) -> Tree:
        """Clip, then push what is nearer than δ away from x, towards the side with room."""

        def move(p: Tensor, every_x: Tensor) -> Tensor:
            x = every_x[owner]
            p = p if bounds is None else p.clamp(*bounds)
            apart = p - x
            # rounding must not count as too near, or pushed elements would be pushed again
            slack = 4 * torch.finfo(x.dtype).eps * (x.abs() + self.delta)
            up = apart >= 0
            if bounds is not None:
                up = torch.where(up, x + self.delta <= bounds[1] + slack, x - self.delta < bounds[0] - slack)
            side = torch.where(up, 1.0, -1.0).to(x.dtype)
            exact = x + self.delta * side
            by = torch.where(apart * side >= 0, p + self.delta * side, exact) if self.push == "by" else exact
            pushed = torch.where(apart.abs() < self.delta - slack, by, p)
            return pushed if bounds is None else pushed.clamp(*bounds)

        return tree.apply(move, points, q.x)

    def _tell(self, q: Question, least: Tensor) -> None:
        missed = least > self.eps
        if bool(missed.any()):
            q.warn(
                f"{int(missed.sum())} of {missed.numel()} credible baseline(s) have logits farther than "
                f"eps={self.eps:.4g} from the example's after {self.max_iter} steps, the farthest "
                f"{float(least.max()):.4g} (example(s) {listed(q, missed.any(1))})"
            )
