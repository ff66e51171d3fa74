"""The run-time checks of annotations: an int is welcome where a float is asked for, as type checkers have it.

jaxtyping's own decorator binds the arguments of every call to a signature and checks them twice, which takes three
times as long as all that the library computes in these tests. The one here asks the same of the same values: of the
arguments before a call and of the result after it, in one context of axis sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

Checks = tuple[Callable[..., Any] | None, Callable[[Any], Any] | None, bool]
"""Of a function's arguments and of its result, None where nothing is asked; whether shapes are among what is asked."""

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
_theirs: Any = getattr(jaxtyping.jaxtyped, "replaced", jaxtyping.jaxtyped)  # this file may be imported twice
_axes = _theirs("context")
_inner: dict[Any, Checks] = {}


def use() -> None:
    """Put the decorator below in the place of jaxtyping's, in modules imported from now on."""
    jaxtyped.replaced = _theirs  # pyright: ignore[reportFunctionMemberAccess]
    jaxtyping.jaxtyped = jaxtyped


def jaxtyped(*, typechecker: object) -> Callable[[Any], Any]:
    """Decorate a function or a class, as jaxtyping's import hook does with all in a package."""
    return _checked_class_or_function


def _checked_class_or_function(what: Any) -> Any:
    if not isinstance(what, type):
        return _checked(what)
    if dataclasses.is_dataclass(what) and "__init__" in vars(what) and not hasattr(what.__init__, "__wrapped__"):
        what.__init__ = _checked(what.__init__)
    return what


def _checked(fn: Any) -> Any:
    arguments, result, shaped = _checks(fn)
    if arguments is result is None:
        return fn

    @functools.wraps(fn)
    def plain(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        if arguments is not None:
            arguments(*args, **kwargs)
        return fn(*args, **kwargs) if result is None else result(fn(*args, **kwargs))

    @functools.wraps(fn)
    def in_axes(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        with _axes:
            try:
                return plain(*args, **kwargs)
            except jaxtyping.TypeCheckError as error:
                if not hasattr(error, "__notes__"):
                    with contextlib.redirect_stdout(io.StringIO()) as axes:
                        jaxtyping.print_bindings()
                    error.add_note(axes.getvalue())
                raise

    return in_axes if shaped else plain


def _checks(fn: Any) -> Checks:
    """Compile a function's checks; for an inner function once, however often it is defined."""
    if "<locals>" not in fn.__qualname__:
        return _compiled(fn)
    key = (fn.__module__, fn.__code__, *fn.__annotations__.items())
    if key not in _inner:
        _inner[key] = _compiled(fn)
    return _inner[key]


def _compiled(fn: Any) -> Checks:
    """Check stand-ins that take the arguments and do nothing, and that take the result and return it."""
    hints = {name: _meaning(hint, fn.__globals__) for name, hint in fn.__annotations__.items()}
    of_result = {"return": hints.pop("return", Any)}
    bare = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else None)
        for p in inspect.signature(fn).parameters.values()
    ]
    takes, returns = (_stand_in(fn, code) for code in (f"{inspect.Signature(bare)}: pass", "(found): return found"))
    takes.__defaults__, takes.__kwdefaults__ = fn.__defaults__, fn.__kwdefaults__
    takes.__annotations__, returns.__annotations__ = hints, of_result
    return (
        None if all(h is Any for h in hints.values()) else check(takes),
        None if of_result["return"] is Any else check(returns),
        any(_names_shapes(h) for h in (*hints.values(), *of_result.values())),
    )


def _names_shapes(hint: Any) -> bool:
    """Tell whether axis sizes may be asked for: not by plain classes and what is made of them."""
    if isinstance(hint, list | tuple):
        return any(_names_shapes(one) for one in hint)
    if get_origin(hint) is Literal or hint is Any or hint is ...:
        return False
    if get_origin(hint) is not None:
        return _names_shapes(get_args(hint))
    return not isinstance(hint, type) or issubclass(hint, jaxtyping.AbstractArray)


def _stand_in(fn: Any, code: str) -> Any:
    made: dict[str, Any] = {}
    exec(f"def {fn.__name__}{code}", made)
    made[fn.__name__].__module__, made[fn.__name__].__qualname__ = fn.__module__, fn.__qualname__
    return made[fn.__name__]


def _meaning(hint: object, scope: dict[str, Any]) -> Any:
    """Resolve an annotation; Any where it names what only type checkers see, or what is local."""
    try:
        return get_type_hints(SimpleNamespace(__annotations__={"it": hint}), scope, include_extras=True)["it"]
    except Exception:
        return Any
