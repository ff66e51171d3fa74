"""The run-time checker of annotations: an int is welcome where a float is asked for, as type checkers have it."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_made: dict[Any, Callable[..., Any]] = {}


def check(fn: Any) -> Any:
    """Check calls of a function, or of a class.

    jaxtyping hands over stand-ins that have the signature of the function and do nothing, and makes new ones each
    time an inner function is defined. Compiling their checks anew takes longer than most of the functions, so those
    of equal signatures share one.
    """
    if isinstance(fn, type) or "<locals>" not in fn.__qualname__:
        return _check(fn)
    code = fn.__code__
    signature = (code.co_varnames, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    asked = tuple((name, repr(hint)) for name, hint in fn.__annotations__.items())
    key = (fn.__module__, fn.__qualname__, signature, asked, len(fn.__defaults__ or ()), tuple(fn.__kwdefaults__ or ()))
    if key not in _made:
        _made[key] = _check(fn)
    return _made[key]
