"""The work of `apportion explain`: pictures in, panels out; nothing here reads arguments or prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.adapters import bundled, image
from apportion.adapters.image import Picture
from apportion.adapters.zoo import PictureModel
from apportion.core.attribution import Attribution
from apportion.core.card import Need, Principle
from apportion.core.errors import (
    ApportionError,
    ConfigError,
    InputError,
    ModelError,
    NoGradientPathError,
    RegistryError,
    RuleError,
    ScoreError,
    SiteError,
    TargetError,
    nearest,
)
from apportion.core.explainer import Explainer
from apportion.core.field import Field
from apportion.core.question import Question
from apportion.core.registry import method, methods, snake, spelled
from apportion.core.score import Contrast, main_output
from apportion.core.together import answers
from apportion.methods import CLIME, RISE, GradCAM, Gradient, GradientTimesInput, IntegratedGradients, SmoothGrad
from apportion.parts import baselines, quadrature
from apportion.parts.masks import fills, groups
from apportion.parts.surrogate.explainer import Surrogate

if TYPE_CHECKING:
    from apportion.show.report import Marked, Page, Panel
else:
    Marked = Page = Panel = Any

PICTURES = ("chelsea", "coffee", "rocket", "camera")
"""What is explained when no picture is given."""

SETS = ("quick", "all")
"""Names that stand for several methods."""

CONTRASTS = ("one", "all", "none")
"""Which methods also explain another class and the difference: the first that adds up, every one, or none."""

NOT_FOR_THIS = (SiteError, RuleError, NoGradientPathError)
"""Errors that say that a method does not apply to a model; after others it has failed."""

_ONLY_PYTHON = {
    Need.DATA: "it learns from data first, and a command has none",
    Need.LOSS: "it explains a loss, which needs labels",
}

_DARK = 0.1  # a picture whose largest value is below is noted

_MOST_ROWS = 32  # timed together


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

    @property
    def title(self) -> str:
        """Its name for readers."""
        return self.explainer.card.title


def choose(names: Sequence[str]) -> list[Choice]:
    """Turn names of methods and of sets, also several with commas between, into explainers, each once.

    Raises:
        RegistryError: an unknown name, with the nearest.

    Methods that take groups of elements are given superpixels.

    >>> [c.name for c in choose(["quick"])]
    ['gradient', 'gradient_times_input', 'integrated_gradients', 'smooth_grad', 'grad_cam']
    """
    found: dict[Explainer, bool] = {}
    for name in (part.strip() for listed in names for part in listed.split(",")):
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
            found[named(name)()] = True
            continue
        for member in members:
            found.setdefault(member, False)
    return [Choice(_of_pictures(explainer), by_name) for explainer, by_name in found.items()]


def _of_pictures(explainer: Explainer) -> Explainer:
    """Let methods that remove single elements, of which a picture has too many, remove superpixels.

    RISE, whose masks are of pixels, takes a quarter of its masks, and is centred: a map on a scale that begins at 0
    shows little else than the mean score otherwise.
    """
    if explainer == RISE():
        return RISE(budget=1000, centred=True)
    if getattr(explainer, "groups", None) != groups.Elements() or getattr(explainer, "rows", None) is not None:
        # of C-LIME's samples every number is kept until they are regressed
        return replace(explainer, samples=100) if isinstance(explainer, CLIME) else explainer
    if isinstance(explainer, Surrogate):
        return replace(explainer, groups=groups.Superpixels(), fill=fills.SegmentMean())
    return replace(explainer, groups=groups.Superpixels())  # pyright: ignore[reportCallIssue]


def named(name: str) -> type[Explainer]:
    """Look a method up, in any spelling.

    Raises:
        RegistryError: there is none, with the nearest.

    >>> named("GradCAM") is named("grad-cam")
    True
    """
    try:
        return method(name)
    except RegistryError as error:
        raise RegistryError(error.given, error.expected, "list the methods with `apportion methods`") from error


def files(sources: Sequence[str]) -> list[Path]:
    """List the files among the pictures asked for, which must not be written over.

    Raises:
        InputError: what is neither there nor a bundled picture, with the nearest.
    """
    listed = []
    for source in sources:
        path = Path(source)
        if not source.strip():
            raise InputError("a picture without a name", "a file, a directory or a bundled picture", "name one")
        if path.exists():
            listed += path.iterdir() if path.is_dir() else [path]
        elif source not in bundled.bundled():
            near = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
            close = nearest(str(path), [*near, *bundled.bundled()])
            raise InputError(f"no file {source}", close, "check the path, or name a bundled picture")
    return listed


def names(pictures: Sequence[str]) -> list[str]:
    """Choose what the files of pictures are to be called: without the suffix, where that tells them apart.

    >>> names(["a.jpg", "a.png", "b.png"])
    ['a_jpg', 'a_png', 'b']
    """
    suffixes: dict[str, set[str]] = {}
    for path in map(Path, pictures):
        suffixes.setdefault(path.stem.casefold(), set()).add(path.suffix)
    return [
        p.stem if len(suffixes[p.stem.casefold()]) == 1 else "_".join((p.stem, *filter(None, [p.suffix[1:]])))
        for p in map(Path, pictures)
    ]


def read(sources: Sequence[str]) -> Iterator[tuple[Picture, bool]]:
    """Read files, the pictures in directories, and bundled pictures by name.

    Yields:
        A picture, and whether it is a bundled one: a file may have the name of one.

    Raises:
        InputError: what is none of these, or cannot be read.
    """
    files(sources)
    for source in sources:
        if Path(source).exists():
            yield from ((one, False) for one in image.read_all([source]))
        else:
            yield bundled.picture(source), True


@dataclass(frozen=True, eq=False)
class Seen:
    """A picture as the network sees it, and what the network says.

    Attributes:
        name: the picture's.
        x: its pixels.
        outputs: the model's, one per class.
        top: indices of the highest classes, the highest first.
        chances: their shares.
        objects: what is drawn by hand on it, by name, in its pixels.
        note: what its user should know of it; empty for nothing.
    """

    name: str
    x: Float[Tensor, "3 S S"]
    outputs: Float[Tensor, " C"]
    top: tuple[int, ...]
    chances: tuple[float, ...]
    objects: Mapping[str, bundled.Truth] = field(default_factory=dict)
    note: str = ""


def look(model: PictureModel, picture: Picture, is_bundled: bool = False) -> Seen:
    """Show the network a picture.

    Args:
        model: the network.
        picture: before cropping.
        is_bundled: whether it is the bundled picture of its name, so that what is drawn on that holds for it.

    Raises:
        ModelError: it fails on it.
        ScoreError: it does not give one number per class.
    """
    side = model.crop.size
    try:
        x = model.crop(picture)
        with torch.no_grad():
            given = model.model(model.normalize(x[None]))
    except Exception as error:  # whatever goes wrong inside a stranger's model
        message = " ".join(str(error).split())[:300]
        other = {p.dtype for p in model.model.parameters() if p.is_floating_point()} - {torch.float32}
        raise ModelError(
            f"{model.name} failed on a picture of shape {(1, 3, side, side)}: {type(error).__name__}: {message}",
            "a model of float32" if other else "a model for colour pictures of this size",
            f"its weights are {', '.join(sorted(map(str, other)))}: return model.float()"
            if other
            else "try another --size, or call the model by hand on torch.rand of this shape",
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
    objects = {}
    for thing in bundled.drawn().get(picture.name, ()) if is_bundled else ():
        high, wide = picture.pixels.shape[1:]
        truth = bundled.truth(picture.name, thing).through(model.crop, high, wide)
        if any(truth.box):  # something of it is seen
            objects[thing] = truth
    note, brightest = "", float(picture.pixels.max())
    if brightest < _DARK:
        note = (
            f"{picture.name} is very dark: its largest value is {brightest:.3g}, where 1 is white; "
            "if it holds fewer bits than its format, as 10 in 16, scale it up before"
        )
    return Seen(picture.name, x, z, tuple(top.tolist()), tuple(chances.tolist()), objects, note)


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        rows: method, rows forward and rows backward per picture, and whether these are exact or at most.
        seconds: for one picture; rough.
    """

    rows: tuple[tuple[str, int, int, bool], ...]
    seconds: float


def _rows_of(choices: Sequence[Choice], q: Question) -> dict[Choice, tuple[int, int, bool]]:
    """Count rows as results do: forward and backward, without f(x); methods that do not apply are left out."""
    counted = {}
    for choice in choices:
        if _only_python(choice):
            continue
        try:
            p = choice.explainer.passes(q)
        except ApportionError:
            continue
        exact = p.exact and choice.explainer.card.exact_cost
        counted[choice] = p.forward + p.once, p.backward + p.once_backward, exact
    return counted


def _only_python(choice: Choice) -> str:
    """Say why only Python can use a method, or nothing."""
    return next((why for need, why in _ONLY_PYTHON.items() if need in choice.explainer.card.needs), "")


def _bound(asked: Field, seen: Seen, target: int | None) -> Question:
    return asked.bind(seen.x[None], target=_target(seen, target))


def chunk(asked: Field, q: Question, most: int) -> tuple[Tensor, Tensor]:
    """Rows as many as a method sends at once, and their owners."""
    n = max(1, min(asked.chunk, _MOST_ROWS, most))
    return q.x.expand(n, *q.x.shape[1:]).contiguous(), torch.zeros(n, dtype=torch.long)


def warm_up(asked: Field, seen: Seen, choices: Sequence[Choice], target: int | None) -> None:
    """Spend what only the first passes cost, so that no method's time has it in."""
    q = _bound(asked, seen, target)
    rows = _rows_of(choices, q).values()
    try:
        q.value_and_grad(*chunk(asked, q, max((there for there, _, _ in rows), default=1)))
    except ApportionError:  # it comes again where the method is known
        return


def estimate(
    asked: Field, seen: Seen, choices: Sequence[Choice], target: int | None, contrast: str = "one"
) -> Estimate:
    """Count the passes of methods, as results will, and time some; methods that do not apply count nothing.

    Args:
        asked: the network's logit, warmed up.
        seen: a picture.
        choices: the methods.
        target: as for `explain`.
        contrast: likewise.
    """
    q = _bound(asked, seen, target)
    counted = _rows_of(choices, q)
    rows, owner = chunk(asked, q, _MOST_ROWS)
    both, ahead = (fastest(lambda run=run: run(rows, owner)) / len(owner) for run in (q.value_and_grad, q.value))
    listed = [(c.name, *counts) for c, counts in counted.items()]
    again = contrasted(list(counted), contrast) if counted and _pair(seen, _target(seen, target)) else []
    for choice in again:
        there, back, exact = counted[choice]
        listed.append((f"{choice.name}, other class and contrast", 2 * there, 2 * back, exact))
    seconds = sum(back * both + max(0, there - back) * ahead for _, there, back, _ in listed)
    return Estimate(tuple(listed), seconds)


def fastest(run: Callable[[], object]) -> float:
    """Time the faster of two runs: the first may be a cold one."""
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


@dataclass
class Explained:
    """One picture, explained.

    Attributes:
        seen: what was explained.
        page: for the report and the sheet.
        values: attributions by a name for their file.
        passed_over: methods that do not apply, with why.
        failures: methods that gave no map although they were to, with the error.
    """

    seen: Seen
    page: Page
    values: dict[str, Attribution]
    passed_over: dict[str, str] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)

    @property
    def panels(self) -> tuple[Panel, ...]:
        """The methods' answers, in the order they were asked."""
        return self.page.panels


def contrast_by_name(choices: Sequence[Choice], name: str) -> str:
    """Check what is to be contrasted, in any spelling.

    Raises:
        RegistryError: it is neither one of `CONTRASTS` nor a method of this run.
        ConfigError: a method whose map is of no class.

    >>> contrast_by_name(choose(["quick"]), "SmoothGrad")
    'smooth_grad'
    """
    if name in CONTRASTS:
        return name
    known = [*CONTRASTS, *(c.name for c in choices)]
    found = spelled(name, known, "contrast", f"name a method of this run, or {', '.join(CONTRASTS)}")
    if any(c.name == found and not c.explainer.card.scored for c in choices):
        raise ConfigError(
            f"--contrast {name}, whose map is the same for every class",
            "a method that explains a score",
            f"name another method, or write --contrast {CONTRASTS[0]}",
        )
    return found


def contrasted(choices: Sequence[Choice], contrast: str) -> list[Choice]:
    """Choose which methods explain two classes and their difference.

    Args:
        choices: methods that apply.
        contrast: a name among the choices, or one of `CONTRASTS`; `one` is the first method that was measured to
            add up and to be linear, or else the first. Maps that no score enters show no two classes, and are not
            among them.

    >>> [c.name for c in contrasted(choose(["quick"]), "one")]
    ['integrated_gradients']
    """
    choices = [c for c in choices if c.explainer.card.scored]
    if contrast in ("all", "none"):
        return choices if contrast == "all" else []
    if contrast != "one":
        return [c for c in choices if c.name == contrast]
    # of a difference of scores only a linear method gives the difference of the maps
    wanted = (Principle.COMPLETENESS, Principle.LINEARITY)
    adds_up = [c for c in choices if all(c.explainer.card.measured.get(p) for p in wanted)]
    return [*adds_up, *choices][:1]


def explain(
    model: PictureModel,
    field: Field,
    seen: Seen,
    choices: Sequence[Choice],
    target: int | None,
    seed: int,
    tell: Callable[[str], None],
    contrast: str = "one",
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
        contrast: which methods also explain the other class and the difference; see `contrasted`.

    Raises:
        ApportionError: no method applies, or the target is none.
    """
    from apportion.show.page import pictures_of
    from apportion.show.report import Marked, Page

    asking = _Asking(seen.x[None], seed, tell)
    explained, passed_over = _target(seen, target), {}
    failures: dict[str, Exception] = {}
    last: ApportionError | None = None
    for choice in filter(_only_python, choices):
        if choice.by_name:
            name = type(choice.explainer).__name__
            failures[choice.title] = ConfigError(
                f"{choice.name} from the command line: {_only_python(choice)}",
                "a method that needs a picture and a model alone",
                f"name another one, or write ap.{name}(...) in Python",
            )
        else:
            passed_over[choice.title] = _only_python(choice)
    able = [c for c in choices if not _only_python(c)]
    for choice, error in asking.ask(able, "", field, explained):
        if isinstance(error, TargetError):
            raise error  # a mistake in what was asked for
        if isinstance(error, NOT_FOR_THIS) and not choice.by_name:
            passed_over[choice.title] = error.given
            last = error
        elif error is not None:
            failures[choice.title] = error
    if last is not None and not asking.panels and not failures:
        raise last
    pair = _pair(seen, explained)
    if pair is not None:
        _contrast(model, field, seen, explained, pair, asking, contrasted(list(asking.panels), contrast), failures)
    panels = tuple(panel for some in asking.panels.values() for panel in some)
    label = "the output" if explained is None else model.label(explained)
    classes = tuple((model.label(i), p) for i, p in zip(seen.top, seen.chances, strict=True))
    marked = tuple(Marked(n, t.box, t.mask(*seen.x.shape[1:])) for n, t in seen.objects.items())
    extra = pictures_of(panels, tuple(seen.x.shape))
    told = tuple((title, _told(error)) for title, error in failures.items())
    page = Page(seen.name, seen.x, classes, label, panels, extra, marked, told)
    return Explained(seen, page, asking.values, passed_over, failures)


def _told(error: Exception) -> str:
    if isinstance(error, ApportionError):
        parts = (error.given, error.expected and f"Expected: {error.expected}", error.do and f"To fix: {error.do}")
        return ". ".join(" ".join(part.split()) for part in parts if part)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class _Asking:
    """Runs methods on one picture and keeps their answers, those of a method together."""

    def __init__(self, x: Tensor, seed: int, tell: Callable[[str], None]) -> None:
        self.x, self.seed, self.tell = x, seed, tell
        self.panels: dict[Choice, list[Panel]] = {}
        self.values: dict[str, Attribution] = {}

    def ask(
        self, choices: Sequence[Choice], what: str, of: Field, to: int | None, detail: str = "", key: str = ""
    ) -> Iterator[tuple[Choice, Exception | None]]:
        """Run methods, which share what they can; `what` follows their titles, `key` the names of their files.

        Yields:
            Each method when it is through, and how it failed: whatever goes wrong in one must not stop the others.
        """
        found = answers(of, self.x, [c.explainer for c in choices], target=to, seed=self.seed)
        unasked: Exception | None = None
        for choice in choices:
            title = f"{choice.title}: {what}" if what else choice.title
            self.tell(title)
            start = time.perf_counter()
            try:
                answer = unasked or next(found)
            except Exception as error:  # in what all methods have in common
                answer = unasked = error
            if isinstance(answer, Attribution):
                answer = self._keep(choice, answer, title, start, detail, key)
            yield choice, answer

    def _keep(
        self, choice: Choice, found: Attribution, title: str, start: float, detail: str, key: str
    ) -> Exception | None:
        from apportion.show import maps
        from apportion.show.report import Panel

        high, wide = self.x.shape[-2:]
        try:
            maps.scale_of(maps.picture_map(found, size=(high, wide)))  # what cannot be drawn fails here, alone
        except Exception as error:
            return error
        self.values[f"{choice.name}.{key}" if key else choice.name] = found
        self.panels.setdefault(choice, []).append(Panel(title, found, time.perf_counter() - start, detail))
        return None


def _contrast(
    model: PictureModel,
    field: Field,
    seen: Seen,
    explained: int | None,
    pair: tuple[int, int],
    asking: _Asking,
    choices: Sequence[Choice],
    failures: dict[str, Exception],
) -> None:
    """Add the map of the other class and that of the difference to methods that have explained one class."""
    top, other = pair
    second = "target" if explained == other else "runner-up"
    names = {top: "top class", other: second}
    missing = top if explained == other else other
    difference = f"{model.label(top)} − {model.label(other)}"
    asks = (
        (names[missing], field, missing, model.label(missing), _key(names[missing])),
        (f"contrast (top − {second})", model.field(Contrast(top, other)), None, difference, "contrast"),
    )
    for ask in asks:
        whole = [c for c in choices if f"{c.title}: two classes" not in failures]
        failures |= {f"{c.title}: two classes": e for c, e in asking.ask(whole, *ask) if e is not None}
    for choice in choices:
        main = asking.panels[choice][0]
        here = top if missing == other else other
        named = replace(main, title=f"{main.title}: {names[here]}", detail=model.label(here))
        asking.panels[choice][0] = named
        if missing == top:  # the top class first, whichever was asked for
            asking.panels[choice][:2] = asking.panels[choice][1::-1]


def _key(words: str) -> str:
    return words.replace(" ", "_").replace("-", "_")


def _target(seen: Seen, target: int | None) -> int | None:
    if len(seen.outputs) == 1:
        return target  # checked where it is resolved: such a model has no classes
    return seen.top[0] if target is None else target


def _pair(seen: Seen, explained: int | None) -> tuple[int, int] | None:
    """Name the class to be told from another: the prediction, from the one explained or else the runner-up."""
    if explained is None or len(seen.outputs) < 2:
        return None
    return (seen.top[0], seen.top[1] if explained == seen.top[0] else explained)


def record(one: Explained, name: str) -> dict[str, Any]:
    """Write what the report says of a picture as JSON values; `name` is that of its files.

    Numbers that are not finite are None.
    """
    from apportion.show.page import baseline, inside, unit, warnings_of

    page, maps = one.page, []
    files = {id(a): key for key, a in one.values.items()}
    for panel in page.panels:
        a = panel.attribution
        maps.append(
            {
                "title": panel.title,
                "detail": panel.detail,
                "values": f"values/{name}.{files[id(a)]}.safetensors",
                "kind": a.kind.value,
                "unit": unit(a),
                "score_at_picture": _finite(a.value),
                "gap": _finite(a.gap),
                "relative_gap": _finite(a.relative_gap),
                "forward": int(a.cost.forward[0]),
                "backward": int(a.cost.backward[0]),
                "seconds": round(panel.seconds, 3),
                "warnings": warnings_of(a),
                "baseline": baseline(a),
                "share_of_energy": [asdict(inside(a, marked, page.size)) for marked in page.marked],
            }
        )
    return {
        "picture": page.name,
        "explained": page.target,
        "classes": [{"label": label, "share": chance} for label, chance in page.classes],
        "objects": [{"name": marked.name, "box": list(marked.box)} for marked in page.marked],
        "maps": maps,
        "passed_over": one.passed_over,
        "failures": dict(page.failures),
    }


def _finite(number: Tensor | None) -> float | None:
    return float(number[0]) if number is not None and bool(torch.isfinite(number[0])) else None
