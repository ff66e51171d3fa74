"""Pictures that come inside installed packages, by name: there without a network connection."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from apportion.adapters.image import Picture, read
from apportion.core.errors import ConfigError, RegistryError, nearest

_WHERE = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "camera": ("skimage", "data/camera.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
_INSTALL = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def bundled() -> tuple[str, ...]:
    """List the names, whether or not their package is installed.

    >>> "chelsea" in bundled()
    True
    """
    return tuple(_WHERE)


def picture(name: str) -> Picture:
    """Read one of them.

    Raises:
        RegistryError: another name, with those that look like it.
        ConfigError: its package is not installed.
    """
    if name not in _WHERE:
        raise RegistryError(f"no picture named {name!r}", nearest(name, _WHERE), "list them with bundled()")
    package, inside = _WHERE[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ConfigError(
            f"{package} is not installed, which brings the picture {name!r}",
            "the package, or a file of your own",
            f"pip install {_INSTALL[package]}",
        )
    return read(Path(found.origin).parent / inside, name)
