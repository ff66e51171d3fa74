"""How much a picture says: bytes after lossless compression, or likeness to the original."""

from __future__ import annotations

import io
import zlib
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.core.config import Configurable
from apportion.core.errors import ConfigError, InputError

Bytes = np.ndarray
"""Pictures [K, H, W, channels] of 8 bits a channel."""


@dataclass(frozen=True)
class Information(Configurable):
    """Base of the measures: pictures and the one they come from in, a number each out."""

    @abstractmethod
    def __call__(self, pictures: Bytes, original: Bytes) -> np.ndarray:
        """Measure pictures [K, H, W, channels] beside the original [H, W, channels]; more is more."""

    def told(self) -> str:
        """Say what is measured, and by which program, for the record."""
        return type(self).__name__

    def settled(self) -> Information:
        """Name the program that is there, where any would do."""
        return self


@dataclass(frozen=True)
class Zlib(Information):
    """Bytes of the raw pixels after zlib, which comes with Python.

    Attributes:
        level: from 1, fast, to 9, small.
        encoder: the version it must be, such as "zlib 1.3"; any unless given.

    >>> flat = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    >>> Zlib()(flat, flat[0]).tolist()
    [12]
    """

    level: int = 9
    encoder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.level <= 9:
            raise ConfigError(f"Zlib(level={self.level})", "1 to 9", "write level=9")

    def __call__(self, pictures: Bytes, original: Bytes) -> np.ndarray:
        _check(self.encoder, self._installed(), "Zlib")
        return np.array([len(zlib.compress(p.tobytes(), self.level)) for p in pictures])

    def told(self) -> str:
        return f"bytes by {self._installed()}"

    def settled(self) -> Information:
        return replace(self, encoder=self.encoder or self._installed())

    def _installed(self) -> str:
        return f"zlib {zlib.ZLIB_RUNTIME_VERSION}"


def _check(asked: str | None, found: str, name: str) -> None:
    if asked is not None and found != asked:
        raise ConfigError(
            f"{found}, where {name} asks for {asked}",
            "the program the sizes were taken with",
            "install it, or leave encoder out: sizes change with it",
        )


@dataclass(frozen=True)
class _Encoded(Information):
    """Bytes of a file.

    Attributes:
        encoder: the program it must be, as results state it; any unless given, and results name the one that was there.
    """

    encoder: str | None = None

    def __call__(self, pictures: Bytes, original: Bytes) -> np.ndarray:
        _check(self.encoder, self._installed(), type(self).__name__)
        if pictures.shape[-1] not in (1, 3):
            raise InputError(
                f"pictures of {pictures.shape[-1]} channels for {type(self).__name__}", "1 or 3", "measure with Zlib()"
            )
        from PIL import Image

        return np.array([self._bytes(Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p)) for p in pictures])

    def told(self) -> str:
        return f"bytes of {type(self).__name__} by {self._installed()}"

    def settled(self) -> Information:
        try:
            return replace(self, encoder=self.encoder or self._installed())
        except ConfigError:  # nothing is there: whoever measures is told
            return self

    def _installed(self) -> str:
        try:
            import PIL
            import PIL.features
        except ImportError as error:
            raise ConfigError("Pillow is not installed", "the image extra", "pip install 'apportion[image]'") from error
        name, library = self._library()
        version = PIL.features.version(name)
        if version is None:
            raise ConfigError(f"a Pillow without {library}", "one with it", "install Pillow's own wheel, or use Zlib()")
        return f"Pillow {PIL.__version__}, {library} {version}"

    def _bytes(self, image: Any) -> int:
        file = io.BytesIO()
        self._save(image, file)
        return file.getbuffer().nbytes

    @abstractmethod
    def _library(self) -> tuple[str, str]:
        """Name what Pillow encodes with, as it calls it and in full."""

    @abstractmethod
    def _save(self, image: Any, file: io.BytesIO) -> None:
        """Write a picture."""


@dataclass(frozen=True)
class WebP(_Encoded):
    """Bytes of lossless WebP with the greatest effort, as the authors of the curves take them.

    Attributes:
        encoder: the program asked for.
        quality: how hard the encoder tries, to 100; nothing is lost at any.

    Raises:
        ConfigError: Pillow is not installed, or another than asked for.
        InputError: neither one channel nor three.
    """

    quality: int = 100

    def _library(self) -> tuple[str, str]:
        return "webp", "libwebp"

    def _save(self, image: Any, file: io.BytesIO) -> None:
        image.save(file, format="webp", lossless=True, quality=self.quality)


@dataclass(frozen=True)
class PNG(_Encoded):
    """Bytes of PNG, whose encoder changes less often than that of WebP.

    Attributes:
        encoder: likewise.
    """

    def _library(self) -> tuple[str, str]:
        return "zlib", "zlib"

    def _save(self, image: Any, file: io.BytesIO) -> None:
        image.save(file, format="png", optimize=True)


@dataclass(frozen=True)
class MultiScaleSSIM(Information):
    """Likeness to the original by MS-SSIM (Wang et al. 2003): products of structure over scales, 1 for the original.

    Windows of 11 pixels with σ = 1.5, K = (.01, .03), means over 2 × 2 pixels between scales, and the paper's exponents
    for five scales. Five need 176 pixels a side; smaller pictures have as many as fit, with the exponents' sum kept 1,
    and colors are averaged; both are ours. Code of papers that put it on the axis of these curves was not compared.

    Raises:
        InputError: pictures smaller than a window.

    >>> picture = np.arange(192, dtype=np.uint8).reshape(1, 12, 16, 1)
    >>> MultiScaleSSIM()(picture, picture[0]).tolist()
    [1.0]
    """

    def __call__(self, pictures: Bytes, original: Bytes) -> np.ndarray:
        x, y = (_planes(p) for p in (pictures, original[None]))
        fit = min(x.shape[2:]) // 11
        if not fit:
            raise InputError(
                f"MultiScaleSSIM of pictures {tuple(x.shape[2:])}", "11 × 11 pixels or more", "measure with WebP()"
            )
        weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333][: fit.bit_length()]
        total: Tensor = x.new_ones(len(x), x.shape[1])
        for scale, weight in enumerate(weights):
            light, structure = _ssim(x, y)
            found = light * structure if scale + 1 == len(weights) else structure
            total = total * found.mean((2, 3)).clamp(min=0) ** (weight / sum(weights))
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return total.mean(1).numpy()

    def told(self) -> str:
        return "MS-SSIM with the original"


def _planes(pictures: Bytes) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).double() / 255


def _ssim(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Give what light and what structure have in common at each full window."""
    at = torch.arange(-5, 6, dtype=x.dtype)
    line = torch.exp(-0.5 * (at / 1.5) ** 2)
    line = line / line.sum()

    def mean(t: Tensor) -> Tensor:
        rows = F.conv2d(t.flatten(0, 1)[:, None], line[None, None, :, None])
        return F.conv2d(rows, line[None, None, None])[:, 0].unflatten(0, t.shape[:2])

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return (2 * mx * my + c1) / (mx * mx + my * my + c1), (2 * vxy + c2) / (vx + vy + c2)


__all__ = ["PNG", "Information", "MultiScaleSSIM", "WebP", "Zlib"]
