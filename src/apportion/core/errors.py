"""Errors: every one names what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import ClassVar


class ApportionError(Exception):
    """Base of every error this library raises on purpose."""

    cause: ClassVar[str] = ""
    fix: ClassVar[str] = ""

    def __init__(self, given: str, expected: str = "", do: str = "") -> None:
        """Compose the message from its three parts.

        Args:
            given: what was found.
            expected: what would have been right.
            do: the next step.
        """
        self.given, self.expected, self.do = given, expected, do
        parts = [given]
        if expected:
            parts.append(f"Expected: {expected}")
        if do:
            parts.append(f"To fix: {do}")
        super().__init__("\n".join(parts))

    def advising(self, do: str) -> ApportionError:
        """Give the same error with a further next step."""
        return type(self)(self.given, self.expected, f"{self.do}; {do}" if self.do else do)

    def about(self, whose: str) -> ApportionError:
        """Give the same error, which says first what it is about."""
        return type(self)(f"{whose}: {self.given}", self.expected, self.do)

    def __reduce__(self) -> tuple[type[ApportionError], tuple[str, str, str]]:
        return type(self), (self.given, self.expected, self.do)


class InputError(ApportionError, ValueError):
    """The input cannot be explained as given."""

    cause = "The input has the wrong type, dtype, shape, device or range, or holds NaN or infinity."
    fix = (
        "Pass floating-point tensors with the examples on the first axis, on the model's device. "
        "Integer inputs (token ids) are explained at the embedding: `Field(model, site=At('embeddings'))`."
    )


class TargetError(ApportionError, ValueError):
    """The target does not name one output per example."""

    cause = "A target is out of range, of the wrong shape or type, or missing where outputs have several axes."
    fix = "Give one int for all examples, a list or tensor of B ints, or a tuple that indexes the output axes."


class BaselineError(ApportionError, ValueError):
    """The baseline does not fit the input."""

    cause = "A baseline tensor has another shape, dtype or device than the input, or is not finite."
    fix = "Give shape [1, ...] (shared) or [B, ...] (one per example), with the input's dtype and device."


class ModelError(ApportionError, RuntimeError):
    """The model cannot be explained in its present state."""

    cause = (
        "The model is in train mode, keeps state between calls, draws random numbers, mixes the examples "
        "of a batch, was exported for one batch size, or has no weights on a real device."
    )
    fix = "Call `model.eval()`; make the forward pass a pure function of each example; export with a dynamic batch."


class ScoreError(ApportionError, ValueError):
    """The score is not one number per example."""

    cause = "A score returned another shape, or the model's output holds no tensor the score can read."
    fix = "Reduce over everything but the first axis, or pass `score=lambda outputs: ...` returning shape [rows]."


class NoGradientPathError(ApportionError, RuntimeError):
    """The score does not depend differentiably on what is to be explained."""

    cause = "The model detaches, rounds or ignores an input, or the site lies after what the score reads."
    fix = (
        "Move inputs that are not to be explained into `extra`, pass `Field(..., allow_unused=True)` "
        "to have zeros for them, or explain another site."
    )


class SiteError(ApportionError, ValueError):
    """A site does not address exactly one tensor of the forward pass."""

    cause = "The layer does not exist, was not called, was called several times, or gives several tensors."
    fix = "List the sites with `field.sites(x)`; give `At(name, call=...)` or `At(name, index=...)`."


class RuleError(ApportionError, RuntimeError):
    """A rule set cannot be applied to this model."""

    cause = "An operation carries gradient but has neither a rule nor the status 'linear', or a rule does not fit it."
    fix = "Add a rule for the operation, or rewrite it with operations the rule set knows."


class NonFiniteError(ApportionError, ArithmeticError):
    """A NaN or an infinity appeared, named with where."""

    cause = "The input, the output, the score or a gradient is NaN or infinite."
    fix = "Look at the named example and tensor; `Field(..., precision=torch.float64)` shows whether it overflowed."


class OutOfMemoryError(ApportionError, RuntimeError):
    """Not even one row fits into memory."""

    cause = "A single row needs more memory than there is; the chunk was already halved down to one."
    fix = "Use a smaller input, a lower precision or a larger device."


class ConfigError(ApportionError, ValueError):
    """A configuration cannot be written, read or used."""

    cause = "An option has an impossible value, or a stored result names a class or callable that is not there."
    fix = "Import the module that defines the class first; rebuild methods with user callables by hand."


class RegistryError(ApportionError, KeyError):
    """A name is not in the registry, or is taken."""

    cause = "The method's name is misspelled or its module was not imported."
    fix = "List the names with `ap.methods()`."

    def __str__(self) -> str:
        return str(self.args[0])


class OutputError(ApportionError, OSError):
    """A file cannot be written; nothing half-written is left behind."""

    cause = "The directory is missing or may not be written to, or the disk is full."
    fix = "Name a directory that exists, is yours and has room."


class NumericalWarning(UserWarning):
    """Something in a result deserves a look; also recorded on the result."""


def kind_of(value: object) -> str:
    """Name what a value is, for messages.

    >>> kind_of(3), kind_of("x"), kind_of(float)
    ('an int', 'a str', 'the class float')
    """
    return f"the class {value.__name__}" if isinstance(value, type) else with_article(type(value).__name__)


def with_article(name: str) -> str:
    """Put the article before a name.

    >>> with_article("int"), with_article("Tensor")
    ('an int', 'a Tensor')
    """
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def nearest(name: str, known: Iterable[str], count: int = 3, names: Mapping[str, str] | None = None) -> str:
    """Name the known spellings closest to a wrong one.

    Args:
        name: the wrong one.
        known: those compared with.
        count: the most that are named.
        names: what those are called, where that is another spelling.

    >>> nearest("sallency", ["saliency", "lrp"])
    "the nearest are 'saliency'"
    """
    known, names = list(known), names or {}
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.4)
    if not close:
        tail = name.rsplit(".", 1)[-1]
        close = [k for k in known if tail and tail in k][:count]
    if close:
        return "the nearest are " + ", ".join(repr(names.get(c, c)) for c in close)
    return "known are " + ", ".join(repr(names.get(k, k)) for k in known[:8]) + (", ..." if len(known) > 8 else "")


def errors_table() -> str:
    """Write all errors with cause and fix as a Markdown table, for the documentation."""
    lines = ["| error | cause | fix |", "|---|---|---|"]
    kinds = sorted(ApportionError.__subclasses__(), key=lambda k: k.__name__)
    lines += [f"| `{k.__name__}` | {k.cause} | {k.fix} |" for k in kinds]
    return "\n".join(lines) + "\n"
