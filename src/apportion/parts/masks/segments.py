"""Superpixels: segments of each picture by its own content, through scikit-image."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.core import tree
from apportion.core.config import Configurable
from apportion.core.errors import ConfigError, InputError
from apportion.core.tree import Tree


def _segmentation() -> Any:
    try:
        return import_module("skimage.segmentation")
    except ImportError as error:
        raise ConfigError(
            "superpixels without scikit-image",
            "the image extra",
            "pip install 'apportion[image]', or give segments of your own with ap.groups.Labels",
        ) from error


@dataclass(frozen=True)
class _Segments(Configurable):
    """Segments of one tensor of pictures; each is stretched to [0, 1] first, as the algorithms expect."""

    def labels(self, like: Tree) -> Tree:
        """Segment every picture; numbers of segments differ from one to the next."""
        if not isinstance(like, Tensor) or like.ndim != 4:
            shapes = [tuple(t.shape) for t in tree.leaves(like)]
            raise InputError(
                f"superpixels of input {shapes}", "one tensor [B, channels, H, W]", "use Labels or Squares"
            )
        find = _segmentation()
        pictures = like.detach().double().cpu()
        low, high = pictures.amin((1, 2, 3), keepdim=True), pictures.amax((1, 2, 3), keepdim=True)
        wide = torch.where(high > low, high - low, torch.ones_like(high))
        scaled = ((pictures - low) / wide).permute(0, 2, 3, 1).numpy()
        out = [np.unique(self._segments(find, np.ascontiguousarray(p)), return_inverse=True)[1] for p in scaled]
        found = torch.from_numpy(np.stack(out).reshape(len(like), 1, *like.shape[2:]).astype(np.int64))
        return found.to(like.device)

    @abstractmethod
    def _segments(self, find: Any, picture: np.ndarray) -> np.ndarray:
        """Segment one picture [H, W, C]."""


@dataclass(frozen=True)
class Superpixels(_Segments):
    """Compact segments of like colours: SLIC (Achanta et al. 2012), in Lab colours for three channels.

    Attributes:
        count: how many to aim at; pictures get about as many.
        compactness: how much place counts beside colour.
        sigma: blur before, in pixels.

    Raises:
        ConfigError: scikit-image is not installed.

    >>> labels = Superpixels(4).labels(torch.rand(2, 3, 8, 8))
    >>> labels.shape, int(labels.min())
    (torch.Size([2, 1, 8, 8]), 0)
    """

    _positive = ("count", "compactness")
    _not_negative = ("sigma",)

    count: int = 50
    compactness: float = 10.0
    sigma: float = 0.0

    def _segments(self, find: Any, picture: np.ndarray) -> np.ndarray:
        return find.slic(
            picture,
            n_segments=self.count,
            compactness=self.compactness,
            sigma=self.sigma,
            start_label=0,
            convert2lab=picture.shape[-1] == 3,
            channel_axis=-1,
        )


@dataclass(frozen=True)
class Felzenszwalb(_Segments):
    """Segments of a graph of neighbouring pixels (Felzenszwalb and Huttenlocher 2004); sizes vary with the content.

    Attributes:
        scale: higher gives larger segments.
        sigma: blur before, in pixels.
        smallest: the fewest pixels of a segment.

    Raises:
        ConfigError: as for `Superpixels`.

    >>> int(Felzenszwalb().labels(torch.zeros(1, 3, 8, 8)).max())
    0
    """

    _positive = ("scale", "smallest")
    _not_negative = ("sigma",)

    scale: float = 100.0
    sigma: float = 0.5
    smallest: int = 20

    def _segments(self, find: Any, picture: np.ndarray) -> np.ndarray:
        return find.felzenszwalb(picture, scale=self.scale, sigma=self.sigma, min_size=self.smallest, channel_axis=-1)


@dataclass(frozen=True)
class QuickShift(_Segments):
    """Segments around modes of colour and place (Vedaldi and Soatto 2008); defaults as in LIME's code for pictures.

    Attributes:
        kernel: width of the density's kernel, in pixels.
        farthest: the longest link between pixels of one segment.
        ratio: how much colour counts beside place, from 0 to 1.

    Raises:
        ConfigError: as for `Superpixels`.
        InputError: pictures without three channels, whose colours it needs.

    >>> QuickShift().labels(torch.rand(1, 3, 8, 8)).shape
    torch.Size([1, 1, 8, 8])
    """

    _positive = ("kernel", "farthest")

    kernel: float = 4.0
    farthest: float = 200.0
    ratio: float = 0.2

    def _segments(self, find: Any, picture: np.ndarray) -> np.ndarray:
        if picture.shape[-1] != 3:
            raise InputError(
                f"QuickShift on pictures of {picture.shape[-1]} channel(s)",
                "3 channels",
                "use Superpixels or Felzenszwalb",
            )
        return find.quickshift(
            picture, kernel_size=self.kernel, max_dist=self.farthest, ratio=self.ratio, rng=0, channel_axis=-1
        )
