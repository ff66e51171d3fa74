"""Every registered method, in every variant it names, against every check: nothing here names a method."""

import pytest

from apportion import method, methods
from apportion.core.explainer import Explainer
from apportion.testing import CHECKS

CASES = [(name, i, v) for name in methods() for i, v in enumerate(method(name).variants())]
DEFAULTS = [(name, method(name)()) for name in methods() if method(name)() not in method(name).variants()]
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
