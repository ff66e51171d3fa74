"""Conformance: what every explainer must do, for ours and for anyone's.

`check_explainer(MyMethod())` in a test of one's own runs everything the library asks of its own methods.
"""

from apportion.testing.checks import CHECKS, ConformanceError, check_explainer
from apportion.testing.principles import PRINCIPLES, measure

__all__ = ["CHECKS", "PRINCIPLES", "ConformanceError", "check_explainer", "measure"]
