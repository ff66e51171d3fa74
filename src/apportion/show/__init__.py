"""Pictures of attributions: maps, figures, sheets and the report.

This room knows attributions and nothing of methods or models. It needs the image extra:
`pip install apportion[image]`. `import apportion` does not import it.
"""

from __future__ import annotations

from importlib.util import find_spec

from apportion.core.errors import ConfigError

for _package in ("PIL", "matplotlib", "jinja2"):
    if find_spec(_package) is None:
        raise ConfigError(f"{_package} is not installed", "the image extra", "pip install 'apportion[image]'")
