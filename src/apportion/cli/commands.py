"""The commands and their arguments."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

import apportion
from apportion.adapters import models
from apportion.adapters.zoo import PictureModel
from apportion.cli import judging, tables, work
from apportion.cli.output import Output
from apportion.core.errors import ApportionError, ConfigError, ModelError, NumericalWarning, OutputError
from apportion.core.field import Field
from apportion.core.memory import keep_memory
from apportion.core.progress import progress
from apportion.core.write import write_bytes

app = App(
    name="apportion",
    help="Feature attribution of PyTorch networks, always with evidence whether to trust it.",
    version=apportion.__version__,
    help_format="markdown",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative=()),
)


def run(arguments: list[str]) -> bool:
    """Run the command that the arguments name.

    Returns:
        Whether all that was asked for was done.

    Raises:
        ConfigError: arguments that no command takes.
    """
    try:
        return app(arguments, exit_on_error=False, print_error=False) is not False
    except CycloptsError as error:
        command = (
            f"apportion {arguments[0]}"
            if arguments and arguments[0] in ("evaluate", "explain", "methods", "metrics")
            else "apportion"
        )
        raise ConfigError(f"{error}".strip(), "the arguments of the command", f"{command} --help lists them") from error


@app.command
def methods(name: str | None = None, /) -> None:
    """List the methods, or show one: what it answers, claims and costs, and what to beware of.

    Parameters
    ----------
    name
        A method, as the list spells it.
    """
    if name is None:
        tables.print_methods()
    else:
        tables.print_card(name)


@app.command
def metrics(name: str | None = None, /) -> None:
    """List the metrics of `apportion evaluate`, or show one: what it measures, and what to beware of.

    Parameters
    ----------
    name
        A metric, as the list spells it.
    """
    if name is None:
        tables.print_metrics()
    else:
        tables.print_metric(name)


@app.command(usage="Usage: apportion explain [PICTURES...] [OPTIONS]")
def explain(
    *pictures: str,
    model: Annotated[str, Parameter(alias="-m")] = "zoo:efficientnet_lite0",
    method: Annotated[tuple[str, ...], Parameter(name=("--method", "--methods"), show_default=", ".join)] = ("quick",),
    target: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    out: Annotated[str, Parameter(alias="-o")] = "out",
    colors: str = "red-blue",
    percentile: float = 99.0,
    contrast: str = "one",
    seed: int = 0,
    quiet: Annotated[bool, Parameter(alias="-q", show_default=False)] = False,
    size: int | None = None,
    mean: str | None = None,
    std: str | None = None,
) -> bool:
    """Explain what a network says about pictures.

    Writes DIR/report.html and the numbers in it as DIR/report.json, one sheet per picture and, in DIR/values,
    every attribution.

    apportion explain my_pictures/ --method gradient --method grad_cam

    apportion explain cat.jpg --model my_file.py:network --size 64 --mean 0.5 --std 0.25

    Parameters
    ----------
    pictures
        Files, directories, or names of bundled pictures; a few of these unless given.
    model
        zoo:NAME, hf:NAME, torchvision:NAME, timm:NAME, module:CALLABLE, file.py:CALLABLE or program.pt2.
    method
        A method, or the set quick or all; may be repeated.
    target
        The class to explain, by index or name; each picture's top class unless given.
    out
        The directory for the results.
    colors
        Of the maps: red-blue, orange-purple (any colour vision) or grey (brighter is larger, no sign).
    percentile
        Of a map's magnitudes, which has the full colour; 100 is the largest.
    contrast
        Which methods also explain the runner-up, or the prediction where --target names another class, and the
        difference: the name of one of the methods, all or none; one is the first that adds up.
    seed
        Of all random numbers.
    quiet
        Print nothing but errors.
    size
        Side of the pictures in pixels, for a model of your own; 224 unless it or its file says another.
    mean
        What is subtracted from pictures in [0, 1] for a model of your own: one number, or one each for red, green
        and blue, as in 0.485,0.456,0.406; nothing unless given.
    std
        What they are divided by after that, as in 0.229,0.224,0.225; 1 unless given.
    """
    if not out.strip():
        raise OutputError("--out without a name", "a directory", "write --out . for the current directory")
    sources = pictures or work.PICTURES
    choices = work.choose(method)
    norm = _numbers("mean", mean), _numbers("std", std)
    contrast = work.contrast_by_name(choices, contrast)
    with Output(out, work.files(sources)) as output, warnings.catch_warnings(), keep_memory():
        warnings.simplefilter("ignore", NumericalWarning)  # they are on the results, and printed from there
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # torch's, about exported programs
        from apportion.show import maps, report

        maps.check_percentile(percentile)
        look = {"colors": maps.colors_by_name(colors), "percentile": percentile}
        network = models.load(model, size=size, mean=norm[0], std=norm[1])
        _say(*network.notes, quiet=quiet)
        index = None if target is None else network.index(target)
        seen = [work.look(network, picture, is_bundled) for picture, is_bundled in work.read(sources)]
        _say(*(one.note for one in seen if one.note), quiet=quiet)
        task = _Task(network, network.field(), choices, index, seed, contrast, look)
        work.warm_up(task.field, seen[0], choices, index)
        if "all" in method and not quiet:
            tables.print_estimate(work.estimate(task.field, seen[0], choices, index, contrast), len(seen))
        results, records = _explain_all(output, task, seen, quiet)
        said = {"model": network.name, "seed": seed, "pictures": records}
        with output.file("report.json") as path:
            write_bytes(path, f"{json.dumps(said, indent=1, allow_nan=False)}\n".encode())
        with output.file("report.html") as path:
            pages = [one.page for one in results]
            report.write_report(path, pages, title="What the network saw", model=network.name, **look)
    if not quiet:
        tables.print_results(results)
        print(f"\nreport: {output.folder / 'report.html'}")
        print(f"numbers: {output.folder / 'report.json'}")
        for path in output.written:
            if path.suffix == ".png":
                print(f"sheet: {path}")
    else:
        tables.print_failures(results, sys.stderr)
    return not any(one.failures for one in results)


@app.command(usage="Usage: apportion evaluate [PICTURES...] [OPTIONS]")
def evaluate(
    *pictures: str,
    model: Annotated[str, Parameter(alias="-m")] = "zoo:efficientnet_lite0",
    method: Annotated[tuple[str, ...], Parameter(name=("--method", "--methods"), show_default=", ".join)] = ("quick",),
    metric: Annotated[
        tuple[str, ...], Parameter(name=("--metric", "--metrics"), show_default=", ".join)
    ] = judging.METRICS,
    control: Annotated[
        tuple[str, ...], Parameter(name=("--control", "--controls"), show_default=", ".join)
    ] = judging.CONTROLS,
    target: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    out: Annotated[str, Parameter(alias="-o")] = "evaluation",
    seed: int = 0,
    quiet: Annotated[bool, Parameter(alias="-q", show_default=False)] = False,
    size: int | None = None,
    mean: str | None = None,
    std: str | None = None,
) -> bool:
    """Judge methods by metrics on pictures, beside maps that know nothing of the network.

    Says first how many passes it takes. Writes DIR/evaluation.json, which ap.Evaluation.load reads, DIR/evaluation.png,
    and DIR/finished, from which the same command goes on where it was stopped.

    apportion evaluate my_pictures/ --method gradient --method grad_cam --metric insertion_deletion

    Parameters
    ----------
    pictures
        Files, directories, or names of bundled pictures; a few of these unless given.
    model
        As for explain.
    method
        A method, or the set quick or all; may be repeated.
    metric
        A metric of `apportion metrics`; may be repeated.
    control
        What is judged beside: random, edges, laplace, center_gaussian, input_magnitude, all_ones or none; may be
        repeated.
    target
        The class whose maps are judged, by index or name; each picture's top class unless given.
    out
        The directory for the results.
    seed
        Of all random numbers.
    quiet
        Print nothing but errors.
    size
        As for explain.
    mean
        As for explain.
    std
        As for explain.
    """
    if not out.strip():
        raise OutputError("--out without a name", "a directory", "write --out . for the current directory")
    sources = pictures or work.PICTURES
    judged, left = judging.methods(work.choose(method))
    by, beside = judging.metrics(metric), judging.beside(control)
    norm = _numbers("mean", mean), _numbers("std", std)
    with Output(out, work.files(sources)) as output, warnings.catch_warnings(), keep_memory():
        warnings.simplefilter("ignore", NumericalWarning)  # they are among the notes
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # torch's, about exported programs
        network = models.load(model, size=size, mean=norm[0], std=norm[1])
        _say(*network.notes, quiet=quiet)
        index = None if target is None else network.index(target)
        seen = [work.look(network, picture, is_bundled) for picture, is_bundled in work.read(sources)]
        _say(*(one.note for one in seen if one.note), quiet=quiet)
        _say(*(f"{name} is left out: it learns from data first, and a command has none" for name in left), quiet=quiet)
        x, field = judging.stacked(seen), network.field()
        located = any(judging.needs_object(m) for m in by.values())
        asked = {
            "controls": beside,
            "truth": judging.objects(seen) if located else None,
            "target": index,
            "ids": judging.names(seen),
            "seed": seed,
            "quiet": True,
        }
        if not quiet:
            expected = apportion.evaluate(judged, field, x, by, dry_run=True, **asked)
            tables.print_passes(expected, judging.seconds(field, x, index, expected))
        line = _Line(f"{len(seen)} picture(s)", quiet)
        with progress(line):
            found = apportion.evaluate(judged, field, x, by, batch=1, out=output.folder / "finished", **asked)
        line.end(f"{len(found.methods)} method(s), {len(found.metrics)} metric(s)")
        with output.file("evaluation.json") as path:
            found.to_json(path)
        with output.file("evaluation.png") as path:
            found.show().savefig(path, format="png")
    if not quiet:
        tables.print_evaluation(found)
        for path in output.written:
            print(f"{path.suffix[1:]}: {path}")
    whole = [name for name, held in found.scores.items() if not all(s.values.isnan().all() for s in held.values())]
    if quiet:
        for told in found.told_failures():
            print(f"error: {tables.plain(told).plain}", file=sys.stderr)
    return len(whole) == len(found.methods)


@dataclass(frozen=True)
class _Task:
    """What is asked about every picture."""

    network: PictureModel
    field: Field
    choices: Sequence[work.Choice]
    target: int | None
    seed: int
    contrast: str
    look: dict[str, Any]


def _explain_all(
    output: Output, task: _Task, seen: Sequence[work.Seen], quiet: bool
) -> tuple[list[work.Explained], list[dict[str, Any]]]:
    """Explain each picture and write what belongs to it alone."""
    from apportion.show import report

    results, records, complete = [], [], 0
    wanted = work.names([one.name for one in seen])
    try:
        for number, one in enumerate(seen, 1):
            line = _Line(f"{number}/{len(seen)} {tables.plain(one.name).plain}", quiet)
            with progress(line):
                explained = work.explain(
                    task.network, task.field, one, task.choices, task.target, task.seed, line.begin, task.contrast
                )
            name = output.name(wanted[number - 1], [".png"])
            results.append(explained)
            records.append(work.record(explained, name))
            if not explained.panels:
                line.end("no maps")
                continue
            for key, attribution in explained.values.items():
                with output.file(f"values/{name}.{key}.safetensors") as path:
                    attribution.save(path)
            with output.file(f"{name}.png") as path:
                report.write_sheet(path, explained.page, **task.look)
            complete += 1
            line.end(f"{len(explained.panels)} maps")
    except KeyboardInterrupt as error:
        done = f"{complete} of {len(seen)} picture(s) are complete in {output.folder}, without a report"
        raise KeyboardInterrupt(done) from error
    if not any(one.panels for one in results):  # nothing to show: the first error says why
        title, error = next(iter(results[0].failures.items()))
        if isinstance(error, ApportionError):
            raise error
        why = dict(results[0].page.failures)[title]
        raise ModelError(f"{title}: {why}", "a map by one method at least", "try another method") from error
    return results, records


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--{name} {text}", "numbers with commas", f"write --{name} 0.5,0.5,0.5") from error
    if len(numbers) not in (1, 3):
        raise ConfigError(f"--{name} {text}", "one number or three", f"write --{name} 0.5,0.5,0.5")
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"--{name} {text}", "finite numbers", f"write --{name} 0.5,0.5,0.5")
    return numbers * 3 if len(numbers) == 1 else numbers


def _say(*lines: str, quiet: bool) -> None:
    for line in () if quiet else lines:
        print(f"note: {tables.plain(line).plain}", file=sys.stderr)


class _Line:
    """Progress on one picture: a line rewritten on a terminal, and one line when done elsewhere."""

    def __init__(self, head: str, quiet: bool) -> None:
        self.head, self.quiet = head, quiet
        self.start = self.last = time.monotonic()
        self.title = ""
        self.live = not quiet and sys.stderr.isatty()

    def begin(self, title: str) -> None:
        """Name what is run next."""
        self.title = title
        self._write(title)

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= 0.2:
            self.last = now
            self._write(f"{self.title}, {done}/{total} rows")

    def end(self, text: str) -> None:
        """Say that the picture is done."""
        if not self.quiet:
            start = "\r\x1b[K" if self.live else ""
            print(f"{start}{self.head}: {text}, {time.monotonic() - self.start:.1f} s", file=sys.stderr)

    def _write(self, text: str) -> None:
        if self.live:
            sys.stderr.write(f"\r\x1b[K{self.head}: {text}, {time.monotonic() - self.start:.0f} s"[:120])
            sys.stderr.flush()
