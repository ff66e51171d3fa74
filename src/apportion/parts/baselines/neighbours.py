"""Rows of the training data whose logits are near the example's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.core import tree
from apportion.core.config import whole
from apportion.core.errors import BaselineError, kind_of
from apportion.core.field import Field
from apportion.core.question import Question
from apportion.core.score import main_output
from apportion.core.streams import Stream
from apportion.core.tree import Tree
from apportion.parts.baselines.data import check_rows, like_input
from apportion.parts.baselines.search import check_asks, everyone
from apportion.parts.baselines.simple import Baseline


def _distances(points: Tensor, centres: Tensor) -> Float[Tensor, "n k"]:
    """Give Euclidean distances by differences, which lose no digits where points are close."""
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")


def k_means(
    points: Float[Tensor, "n d"], clusters: int, *, seed: int = 0, name: object = "", rounds: int = 100
) -> tuple[Float[Tensor, "k d"], Int[Tensor, " n"]]:
    """Group points around centres: Lloyd's iteration from a k-means++ start (Arthur and Vassilvitskii 2007).

    A centre that loses all its points stays where it is.

    Args:
        points: rows to group.
        clusters: how many centres.
        seed: of the random start.
        name: tells several groupings under one seed apart.
        rounds: iterations at most; it ends once nothing changes.

    Returns:
        Centres in float64, and each row's centre.

    >>> centres, label = k_means(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), 2)
    >>> centres.flatten().sort().values, bool(label[0] == label[1]), bool(label[1] == label[2])
    (tensor([ 0.5000, 10.5000], dtype=torch.float64), True, False)
    """
    points, none = points.double(), torch.zeros(1, dtype=torch.long)
    u = Stream.of(seed, [str(name)], "k-means start").uniform(torch.zeros(1, clusters), none, none)[0].double()
    chosen = [min(int(u[0] * len(points)), len(points) - 1)]
    near = torch.full((len(points),), torch.inf, dtype=torch.float64, device=points.device)
    for j in range(1, clusters):  # the next start is drawn with a chance as its squared distance from the last ones
        near = torch.minimum(near, (points - points[chosen[-1]]).square().sum(1))
        steps = near.cumsum(0)
        at = torch.searchsorted(steps, u[j].to(steps.device) * steps[-1], right=True)
        chosen.append(min(int(at), len(points) - 1))
    centres = points[chosen]
    label = _distances(points, centres).argmin(1)
    for _ in range(rounds):
        count = torch.bincount(label, minlength=clusters)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, label, points)
        centres = torch.where(count > 0, sums / count.clamp(min=1), centres)
        before, label = label, _distances(points, centres).argmin(1)
        if torch.equal(before, label):
            break
    return centres, label


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Neighbours(Baseline):
    """Training rows of the cluster of logits that the example is in: the references of LPI (Yang et al. 2023).

    Every example gets the k rows of its nearest centre, which `fit` chose. All k count alike when a method
    averages over baselines, which keeps its total: f(x) minus the mean of f at the rows. The authors weight rows
    by density and then average plainly, so that their total shrinks with k. Here the densities sum to 1 in each
    cluster: a sum weighted with `density[nearest(q)]` keeps the total f(x) - Σ_j density_j f(r_j).

    An example that is itself a chosen row has a baseline equal to it, whose share of the map is 0.

    Attributes:
        centres: [clusters, classes] logits.
        references: [clusters, k, ...] rows at the field's site, in units of x.
        density: [clusters, k], the share of its cluster that each row stands for.

    Raises:
        BaselineError: parts of different size, or rows that do not fit the input.

    >>> import apportion as ap
    >>> field = ap.Field(lambda x: torch.cat([x, -x], 1))
    >>> data = torch.tensor([[-3.0], [-2.0], [-1.0], [4.0], [5.0], [6.0]])
    >>> near = Neighbours.fit(field, data, clusters=2, count=1)
    >>> near(field.bind(torch.tensor([[0.5], [3.0]]))).flatten()
    tensor([-2.,  5.])
    """

    centres: Tensor
    references: Tree
    density: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        count = check_rows(self.references, "references")
        shapes = [tuple(t.shape[:2]) for t in tree.leaves(self.references)]
        if self.centres.ndim != 2 or len(self.centres) != count or {tuple(self.density.shape)} != set(shapes):
            raise BaselineError(
                f"centres {tuple(self.centres.shape)}, density {tuple(self.density.shape)}, references {shapes}",
                "[clusters, classes], [clusters, k] and [clusters, k, ...]",
                "make them with Neighbours.fit(field, data, clusters=..., count=...)",
            )

    @classmethod
    def fit(
        cls, field: Field, data: Tree, *, clusters: int, count: int, seed: int = 0, rounds: int = 100
    ) -> Neighbours:
        """Cluster the logits of training data, and choose rows for each cluster.

        Each cluster is divided into `count` sub-clusters; the row nearest to a sub-centre is chosen, and its
        density is the sub-cluster's share. A cluster of fewer rows than that repeats them.

        Args:
            field: whose model gives the logits, one pass over the data.
            data: training rows at the model's input; for a field at an inner site their values there are kept.
            clusters: how many groups of logits.
            count: rows kept for each.
            seed: of the starts of k-means.
            rounds: of k-means, at most.

        Raises:
            BaselineError: no field, more clusters than rows, numbers that are not whole or below 1, or outputs
                that are no vectors.
        """
        if not isinstance(field, Field):
            raise BaselineError(
                f"{kind_of(field)} as field", "an ap.Field", "write Neighbours.fit(ap.Field(model), data, ...)"
            )
        have = check_rows(data, "training data")
        numbers = {"clusters": clusters, "count": count, "seed": seed, "rounds": rounds}
        for name, given in numbers.items():
            if whole(given) is None:
                raise BaselineError(f"{name}={given!r}", "a whole number", f"give a whole number for {name}")
        if clusters < 1 or count < 1 or clusters > have:
            raise BaselineError(
                f"clusters={clusters} and count={count} for {have} row(s)",
                f"clusters from 1 to {have}, and a count from 1",
                "ask for fewer clusters, or give more data",
            )
        data = field.admit(data)
        # bound to one row, of which all others are further points: they need no target
        q = field.bind(tree.index(data, slice(0, 1)))
        owner = torch.zeros(have, dtype=torch.long, device=q.device)
        rows = q.read(data, owner)
        z = _logits(q.outputs(rows, owner)).double()
        centres, label = k_means(z, clusters, seed=seed, name="clusters", rounds=rounds)
        chosen, density = [], []
        for c in range(clusters):
            members = (label == c).nonzero()[:, 0]
            if not len(members):  # equal points can leave a centre without any
                members = _distances(z, centres[c : c + 1]).argmin(0)
            picked, share = _representatives(z[members], count, seed, c, rounds)
            chosen.append(members[picked])
            density.append(share)
        return cls(centres, tree.index(rows, torch.stack(chosen)), torch.stack(density))

    @property
    def draws(self) -> int:
        return self.density.shape[1]

    @property
    def rows(self) -> int:
        return 1

    def nearest(self, q: Question) -> Int[Tensor, " B"]:
        """Name the cluster each example is in, by the Euclidean distance of its logits; one row forward each, once."""
        check_asks(q, "Neighbours")
        found = q.home.keep(("nearest", id(self)), lambda home: (self, self._nearest(home)))  # kept: so is its id
        return found[1][q.in_home]

    def _nearest(self, q: Question) -> Int[Tensor, " B"]:
        z = _logits(q.outputs(q.x, everyone(q))).double()
        if z.shape[1] != self.centres.shape[1]:
            raise BaselineError(
                f"{z.shape[1]} outputs for centres of {self.centres.shape[1]}",
                "the model the neighbours were fitted to",
                "fit them again with this one",
            )
        return _distances(z, self.centres.to(z)).argmin(1)

    def __call__(self, q: Question) -> Tree:
        cluster = self.nearest(q)
        return tree.index(like_input(q, self.references, "neighbours", axes=2), cluster)


def _logits(outputs: Any) -> Float[Tensor, "n classes"]:
    z = main_output(outputs)
    z = z[:, None] if z.ndim == 1 else z
    if z.ndim != 2:
        raise BaselineError(
            f"Neighbours on outputs {tuple(z.shape[1:])} per example", "one vector each", "use ap.baselines.Data"
        )
    return z


def _representatives(
    z: Float[Tensor, "m classes"], count: int, seed: int, name: int, rounds: int
) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"]]:
    """Choose rows that stand for a cluster, and the share each stands for."""
    have = len(z)
    if have <= count:
        picked = torch.arange(count, device=z.device) % have
        times = torch.bincount(picked, minlength=have)
        return picked, 1 / (have * times[picked].double())
    centres, label = k_means(z, count, seed=seed, name=name, rounds=rounds)
    apart = _distances(z, centres)
    outside = label[:, None] != torch.arange(count, device=z.device)
    size = torch.bincount(label, minlength=count)
    # an empty sub-cluster stands for nothing, and its row is just the nearest
    inside = torch.where(outside & (size > 0), torch.inf, apart)
    return inside.argmin(0), size.double() / have
