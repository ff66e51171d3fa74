"""Every registered method, in every variant it names, against every check: nothing here names a method."""

import pytest

from apportion import ApportionError, method, methods
from apportion.core.explainer import Explainer
from apportion.testing import CHECKS

CASES = [(name, i, v) for name in methods() for i, v in enumerate(method(name).variants())]


def _is_long(explainer: Explainer) -> bool:
    """Tell whether a method takes hundreds of steps, one after another, of which its variants take a few."""
    try:
        return explainer.passes().forward > 300
    except ApportionError:  # as many as the input says
        return False


DEFAULTS = [
    (name, method(name)())
    for name in methods()
    if method(name)() not in method(name).variants() and not _is_long(method(name)())
]
AS_DEFAULT = ("cost", "claims", "principles")
"""What depends on the numbers a default chooses; all else is asked of the variants."""


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("explainer", [v for _, _, v in CASES], ids=[f"{n}-{i}" for n, i, _ in CASES])
def test_conforms(explainer: Explainer, check: str) -> None:
    CHECKS[check](explainer)


@pytest.mark.parametrize("check", AS_DEFAULT)
@pytest.mark.parametrize("explainer", [v for _, v in DEFAULTS], ids=[name for name, _ in DEFAULTS])
def test_default_conforms(explainer: Explainer, check: str) -> None:
    CHECKS[check](explainer)
