"""The work of `apportion explain`: pictures in, panels out; nothing here reads arguments or prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.adapters import bundled, image
from apportion.adapters.image import Picture
from apportion.adapters.zoo import PictureModel
from apportion.core.attribution import Attribution
from apportion.core.errors import ApportionError, InputError, ModelError, ScoreError, nearest
from apportion.core.explainer import Explainer
from apportion.core.field import Field
from apportion.core.registry import method, methods, snake
from apportion.core.score import Contrast, main_output
from apportion.methods import GradCAM, Gradient, GradientTimesInput, IntegratedGradients, SmoothGrad
from apportion.parts import baselines, quadrature

if TYPE_CHECKING:
    from apportion.show.report import Page, Panel
else:
    Page = Panel = Any

PICTURES = ("chelsea", "coffee", "rocket", "camera")
"""What is explained when no picture is given."""

SETS = ("quick", "all")
"""Names that stand for several methods."""


@dataclass(frozen=True)
class Choice:
    """A method to run.

    Attributes:
        explainer: the method.
        by_name: whether it was asked for by its own name: where it does not apply, that is an error; as a
            member of a set it is passed over.
    """

    explainer: Explainer
    by_name: bool

    @property
    def name(self) -> str:
        """Its name in the registry."""
        return snake(type(self.explainer).__name__)


def choose(names: Sequence[str]) -> list[Choice]:
    """Turn names of methods and of sets into explainers, each once.

    Raises:
        RegistryError: an unknown name, with the nearest.

    >>> [c.name for c in choose(["quick"])]
    ['gradient', 'gradient_times_input', 'integrated_gradients', 'smooth_grad', 'grad_cam']
    """
    found: dict[Explainer, bool] = {}
    for name in names:
        if name == "quick":
            members = (
                Gradient(),
                GradientTimesInput(),
                IntegratedGradients(baselines.Zero(), quadrature.Gauss(64)),
                SmoothGrad(Gradient(), samples=25),
                GradCAM(),
            )
        elif name == "all":
            members = tuple(method(m)() for m in methods())
        else:
            found[method(snake(name.replace("-", "_")))()] = True
            continue
        for member in members:
            found.setdefault(member, False)
    return [Choice(explainer, by_name) for explainer, by_name in found.items()]


def files(sources: Sequence[str]) -> list[Path]:
    """List the files among the pictures asked for, which must not be written over."""
    listed = []
    for source in sources:
        path = Path(source)
        listed += path.iterdir() if path.is_dir() else [path] if path.exists() else []
    return listed


def read(sources: Sequence[str]) -> Iterator[Picture]:
    """Read files, the pictures in directories, and bundled pictures by name.

    Raises:
        InputError: what is none of these, or cannot be read.
    """
    for source in sources:
        path = Path(source)
        if path.exists():
            yield from image.read_all([path])
        elif source in bundled.bundled():
            yield bundled.picture(source)
        else:
            near = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
            close = nearest(str(path), [*near, *bundled.bundled()])
            raise InputError(f"no file {source}", close, "check the path, or name a bundled picture")


@dataclass(frozen=True, eq=False)
class Seen:
    """A picture as the network sees it, and what the network says.

    Attributes:
        name: the picture's.
        x: its pixels.
        outputs: the model's, one per class.
        top: indices of the highest classes, the highest first.
        chances: their shares.
    """

    name: str
    x: Float[Tensor, "3 S S"]
    outputs: Float[Tensor, " C"]
    top: tuple[int, ...]
    chances: tuple[float, ...]


def look(model: PictureModel, picture: Picture) -> Seen:
    """Show the network a picture.

    Raises:
        ModelError: it fails on it.
        ScoreError: it does not give one number per class.
    """
    x = model.crop(picture)
    try:
        with torch.no_grad():
            given = model.model(model.normalize(x[None]))
    except Exception as error:  # whatever goes wrong inside a stranger's model
        message = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{model.name} failed on a picture of shape {tuple(x[None].shape)}: {type(error).__name__}: {message}",
            "a model for colour pictures of this size",
            "try another --size, or call the model by hand on torch.rand of this shape",
        ) from error
    z = main_output(given)
    if z.ndim != 2:
        raise ScoreError(
            f"{model.name} gives outputs of shape {tuple(z.shape)}",
            "[pictures, classes]",
            "explain other outputs in Python, with a score of your own",
        )
    z = z[0].float()
    if len(z) == 1:
        share = z.sigmoid()
    else:
        is_share = bool((z >= 0).all()) and abs(float(z.sum()) - 1) < 1e-4
        share = z if is_share else z.softmax(0)
    chances, top = share.topk(min(5, len(z)))
    return Seen(picture.name, x, z, tuple(top.tolist()), tuple(chances.tolist()))


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        rows: method, rows forward and rows backward per picture.
        seconds: for one picture; rough.
    """

    rows: tuple[tuple[str, int, int], ...]
    seconds: float


def estimate(model: PictureModel, seen: Seen, choices: Sequence[Choice], target: int | None) -> Estimate:
    """Count the passes of methods and time one pass; methods that do not apply count nothing."""
    q = model.field().bind(seen.x[None], target=_target(seen, target))
    owner = torch.zeros(1, dtype=torch.long)
    start = time.perf_counter()
    q.value_and_grad(q.x, owner)
    both = time.perf_counter() - start
    start = time.perf_counter()
    q.value(q.x, owner)
    ahead = time.perf_counter() - start
    rows, seconds = [], 0.0
    for choice in choices:
        try:
            p = choice.explainer.passes(q)
        except ApportionError:
            continue
        forward = p.forward + p.at_x + p.once
        rows.append((choice.name, forward, p.backward))
        seconds += p.backward * both + max(0, forward - p.backward) * ahead
    return Estimate(tuple(rows), seconds)


@dataclass
class Explained:
    """One picture, explained.

    Attributes:
        seen: what was explained.
        page: for the report and the sheet.
        values: attributions by a name for their file.
        passed_over: methods that do not apply, with why.
    """

    seen: Seen
    page: Page
    values: dict[str, Attribution]
    passed_over: dict[str, str] = field(default_factory=dict)

    @property
    def panels(self) -> tuple[Panel, ...]:
        """The methods' answers, in the order they were asked."""
        return self.page.panels


def explain(
    model: PictureModel,
    field: Field,
    seen: Seen,
    choices: Sequence[Choice],
    target: int | None,
    seed: int,
    tell: Callable[[str], None],
) -> Explained:
    """Explain one picture by every method, and why its class rather than another.

    Args:
        model: the network.
        field: its logit, asked of every picture.
        seen: the picture.
        choices: the methods.
        target: the class explained; None for the picture's top class.
        seed: of all random numbers.
        tell: called with the title of what is run next.

    Raises:
        ApportionError: a method that was asked for by name cannot be applied, or none of a set can.
    """
    from apportion.show.report import Page, Panel

    x, explained = seen.x[None], _target(seen, target)
    panels: list[Panel] = []
    values: dict[str, Attribution] = {}
    passed_over: dict[str, str] = {}
    last: ApportionError | None = None

    def ask(key: str, title: str, explainer: Explainer, of: Field, to: int | None) -> None:
        tell(title)
        start = time.perf_counter()
        values[key] = explainer(of, x, target=to, seed=seed)
        panels.append(Panel(title, values[key], time.perf_counter() - start))

    for choice in choices:
        title = choice.explainer.card.title
        try:
            ask(choice.name, title, choice.explainer, field, explained)
        except ApportionError as error:
            if choice.by_name:
                raise
            passed_over[title] = error.given
            last = error
    if last is not None and not panels:
        raise last
    pair = _pair(seen, explained)
    if pair is not None:
        found = [c.explainer for c in choices if isinstance(c.explainer, IntegratedGradients)]
        explainer = found[0] if found else GradientTimesInput()
        why = "," if pair[0] == explained else f": {model.label(pair[0])}"
        title = f"{explainer.card.title}{why} rather than {model.label(pair[1])}"
        key = f"{snake(type(explainer).__name__)}.contrast"
        ask(key, title, explainer, model.field(Contrast(*pair)), None)
    label = "the output" if explained is None else model.label(explained)
    classes = tuple((model.label(i), p) for i, p in zip(seen.top, seen.chances, strict=True))
    page = Page(seen.name, seen.x, classes, label, tuple(panels), _baselines(panels))
    return Explained(seen, page, values, passed_over)


def _target(seen: Seen, target: int | None) -> int | None:
    if len(seen.outputs) == 1:
        return target  # checked where it is resolved: such a model has no classes
    return seen.top[0] if target is None else target


def _pair(seen: Seen, explained: int | None) -> tuple[int, int] | None:
    """Name the class to be told from another: the prediction, from the one explained or else the runner-up."""
    if explained is None or len(seen.outputs) < 2:
        return None
    return (seen.top[0], seen.top[1] if explained == seen.top[0] else explained)


def _baselines(panels: Sequence[Panel]) -> tuple[tuple[str, Tensor], ...]:
    """Give the baselines that methods used, where these are pictures, each once and with all its users."""
    shown: list[tuple[list[str], Tensor]] = []
    for panel in panels:
        made = panel.attribution.references
        rows = None if made is None else made.rows
        if not isinstance(rows, Tensor) or rows.ndim != 5 or rows.shape[2] != 3:
            continue
        user = panel.title.partition(":")[0].partition(",")[0]
        for row in rows[0]:
            same = next((users for users, other in shown if torch.equal(row, other)), None)
            if same is None:
                shown.append(([user], row))
            elif user not in same:
                same.append(user)
    only = len(shown) == 1
    return tuple(("baseline" if only else f"baseline of {', '.join(users)}", row) for users, row in shown)
