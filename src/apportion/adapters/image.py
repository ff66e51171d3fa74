"""Pictures: reading, and cropping to what a network expects, outside the explained model.

Needs Pillow: `pip install apportion[image]`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from apportion.core.config import Configurable
from apportion.core.errors import ApportionError, ConfigError, InputError, kind_of

if TYPE_CHECKING:
    from PIL import Image
else:
    Image = Any

LARGEST = 100_000_000
"""Pixels beyond which a picture is refused unread."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture and its name.

    Attributes:
        name: the file's name, or one given.
        pixels: red, green and blue in [0, 1].
    """

    name: str
    pixels: Float[Tensor, "3 H W"]


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ConfigError("Pillow is not installed", "the image extra", "pip install apportion[image]") from error
    return PIL


_NOT_SEARCHED = frozenset({"BUFR", "GRIB", "HDF5", "WMF", "MPEG", "EPS"})  # Pillow knows them and needs help to read


@cache
def suffixes() -> frozenset[str]:
    """Name the endings of files that a directory is searched for: all that this Pillow reads.

    >>> {".png", ".jpg", ".jfif", ".tif", ".tga"} <= suffixes(), ".txt" in suffixes()
    (True, False)
    """
    pil = _pillow()
    known = pil.Image.registered_extensions().items()
    return frozenset(end for end, name in known if name in pil.Image.OPEN and name not in _NOT_SEARCHED)


def read(source: Any, name: str | None = None) -> Picture:
    """Read a picture from a file, a Pillow image, an array or a tensor.

    Grey, palette, transparent (on white), 16-bit and CMYK pictures become RGB; the rotation a camera noted
    is applied.

    Args:
        source: a path; a Pillow image; an array [H, W] or [H, W, 1 | 3 | 4]; a tensor [H, W] or [1 | 3 | 4, H, W].
            Unsigned integers span the range of their type, floats [0, 1].
        name: the name; the file's unless given.

    Raises:
        InputError: a file that is not there, empty, no picture, or too large; an array of another shape or range.

    >>> read(np.zeros((2, 4), dtype=np.uint8), "black").pixels.shape
    torch.Size([3, 2, 4])
    """
    if isinstance(source, str | Path):
        return Picture(name or Path(source).name, _open(Path(source)))
    if isinstance(source, Tensor):
        return Picture(name or "tensor", _from_array(_channels_last(source)))
    if isinstance(source, np.ndarray):
        return Picture(name or "array", _from_array(source))
    if isinstance(source, _pillow().Image.Image):
        return Picture(name or "picture", _from_pillow(source))
    raise InputError(
        f"{kind_of(source)} as picture",
        "a path, a Pillow image, an array or a tensor",
        "read it with Pillow first",
    )


def read_all(sources: Sequence[str | Path]) -> Iterator[Picture]:
    """Read files, and the picture files of directories, in order of name.

    Other files in a directory, hidden files and directories inside it are passed over.

    Args:
        sources: files and directories.

    Raises:
        InputError: a directory without pictures, or a file that `read` refuses.

    >>> list(read_all([]))
    []
    """
    for source in sources:
        path = Path(source)
        if not path.is_dir():
            yield read(path)
            continue
        found = sorted(p for p in _inside(path) if p.suffix.lower() in suffixes() and p.name[0] != "." and p.is_file())
        if not found:
            raise InputError(
                f"no pictures in the directory {path}",
                "files that end in .png, .jpg or another suffix of pictures",
                "give another directory",
            )
        for one in found:
            yield read(one)


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise InputError(
            f"{folder} cannot be listed: {error.strerror}", "a readable directory", "check its permissions"
        ) from error


def _open(path: Path) -> Tensor:
    pil = _pillow()
    if not path.exists():
        raise InputError(f"no file {path}", "a picture file", "check the path")
    if path.is_dir():
        raise InputError(f"{path} is a directory", "a picture file", "read_all reads the pictures of a directory")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{path} is empty", "a picture file", "write the file again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size is judged below, and damage shows in the decoding
            with pil.Image.open(path) as image:
                if image.width * image.height > LARGEST:
                    raise InputError(
                        f"{path} has {image.width} x {image.height} pixels", f"at most {LARGEST:,}", "scale it down"
                    )
                image.load()
                return _from_pillow(image)
    except ApportionError:
        raise
    except pil.UnidentifiedImageError as error:
        raise InputError(f"{path} is no picture", "a file Pillow can read", "convert it to PNG or JPEG") from error
    except pil.Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}", f"at most {LARGEST:,} pixels", "scale it down") from error
    except Exception as error:  # decoders raise whatever the damage leads them to
        raise InputError(
            f"{path} cannot be read as a picture: {getattr(error, 'strerror', None) or error}",
            "a whole file that Pillow can read",
            "convert it to PNG or JPEG",
        ) from error


def _from_pillow(image: Image.Image) -> Tensor:
    pil = _pillow()
    image = pil.ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        raw = np.asarray(image).astype(np.float64)
        top = 65535.0 if raw.size == 0 or raw.max() <= 65535 else float(2**32 - 1)  # files of 32 bits are rare
        return _grey(np.clip(raw / top, 0, 1))
    if image.mode == "F":
        return _from_array(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = pil.Image.new("RGBA", image.size, "white")
        image = pil.Image.alpha_composite(white, image)
    array = np.asarray(image.convert("RGB"))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255


def _grey(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).float()[None].expand(3, *array.shape).contiguous()


def _channels_last(t: Tensor) -> np.ndarray:
    if t.ndim == 4 and t.shape[0] == 1:
        t = t[0]
    if t.ndim == 3 and t.shape[0] in (1, 3, 4):
        t = t.permute(1, 2, 0)
    t = t.detach().cpu()
    return (t.float() if t.is_floating_point() else t).numpy()


def _from_array(array: np.ndarray) -> Tensor:
    if array.dtype == bool:
        array = array.astype(np.float32)
    if np.issubdtype(array.dtype, np.unsignedinteger):
        array = array.astype(np.float64) / np.iinfo(array.dtype).max
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not fits or 0 in array.shape:
        raise InputError(
            f"an array of shape {array.shape} as picture", "[H, W] or [H, W, 1 | 3 | 4]", "put the channels last"
        )
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"an array of {array.dtype} as picture, whose range is not known",
            "unsigned integers, or floats in [0, 1]",
            "convert it: array.astype(np.uint8)",
        )
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        raise InputError(
            f"pixels from {np.nanmin(array):.4g} to {np.nanmax(array):.4g}",
            "floats in [0, 1], or unsigned integers",
            "divide by the largest value",
        )
    if array.ndim == 2:
        return _grey(array)
    if array.shape[2] == 4:
        array = array[:, :, :3] * array[:, :, 3:] + 1 - array[:, :, 3:]
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1).float()


@dataclass(frozen=True)
class CenterCrop(Configurable):
    """Crop the middle square and resize it: the picture the network sees.

    Attributes:
        size: the side after resizing.
        share: the side of the crop as a share of the shorter side of the picture.
    """

    size: int
    share: float = 0.875

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 < self.share <= 1:
            raise ConfigError(
                f"CenterCrop(size={self.size}, share={self.share})",
                "a positive size, a share in (0, 1]",
                "write CenterCrop(224)",
            )

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Tell which part of a picture is seen: left, top, right, bottom in its pixels."""
        side = max(1, round(min(height, width) * self.share))
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side

    def __call__(self, picture: Picture) -> Float[Tensor, "3 size size"]:
        """Crop and resize, bicubically and antialiased; values stay in [0, 1]."""
        left, top, right, bottom = self.box(*picture.pixels.shape[1:])
        part = picture.pixels[None, :, top:bottom, left:right]
        sized = torch.nn.functional.interpolate(
            part, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False
        )
        return sized[0].clamp_(0, 1)
