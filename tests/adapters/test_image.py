"""Every kind of picture file, made on the fly: read right, or refused with what to do."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apportion.adapters.image import LARGEST, CenterCrop, Picture, read, read_all
from apportion.core.errors import ConfigError, InputError

PIL = pytest.importorskip("PIL")
from PIL import Image  # noqa: E402 - after the check that it is there

RED, WHITE = (1.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def at(picture: Picture, row: int, column: int) -> tuple[float, ...]:
    return tuple(round(v, 3) for v in picture.pixels[:, row, column].tolist())


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png", **options: Any) -> Picture:
    image.save(tmp_path / name, **options)
    return read(tmp_path / name)


# -- readable kinds -------------------------------------------------------------------------------


def test_rgb(tmp_path: Path) -> None:
    one = saved(tmp_path, Image.new("RGB", (5, 3), (255, 0, 51)))
    assert one.name == "a.png"
    assert one.pixels.shape == (3, 3, 5)
    assert one.pixels.dtype == torch.float32
    assert at(one, 0, 0) == (1.0, 0.0, 0.2)


@pytest.mark.parametrize(("mode", "color"), [("L", 102), ("1", 1), ("P", 0)])
def test_grey_black_and_white_palette(tmp_path: Path, mode: str, color: int) -> None:
    image = Image.new(mode, (4, 4), color)
    if mode == "P":
        image.putpalette([255, 0, 0] + [0] * 765)
    wanted = {"L": (0.4, 0.4, 0.4), "1": WHITE, "P": RED}[mode]
    assert at(saved(tmp_path, image), 1, 2) == wanted


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
def test_palette_with_transparency_lies_on_white(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([0, 0, 255, 255, 0, 0] + [0] * 762)
    image.putpixel((1, 0), 1)
    one = saved(tmp_path, image, transparency=transparency)
    assert at(one, 0, 0) == WHITE
    assert at(one, 0, 1) == RED


@pytest.mark.parametrize(
    ("mode", "clear", "half"),
    [("RGBA", (9, 9, 9, 0), (255, 0, 0, 51)), ("LA", (9, 0), (0, 51))],
)
def test_alpha_lies_on_white(tmp_path: Path, mode: str, clear: tuple[int, ...], half: tuple[int, ...]) -> None:
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), half)
    one = saved(tmp_path, image)
    assert at(one, 0, 0) == WHITE
    assert at(one, 0, 1) == ((1.0, 0.8, 0.8) if mode == "RGBA" else (0.8, 0.8, 0.8))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit(tmp_path: Path, name: str) -> None:
    levels = np.array([[0, 65535], [13107, 32768]], dtype=np.uint16)
    one = saved(tmp_path, Image.fromarray(levels), name)
    assert torch.allclose(one.pixels, torch.from_numpy(levels / 65535).float().expand(3, 2, 2), atol=1e-6)


def test_floats_keep_their_range(tmp_path: Path) -> None:
    one = saved(tmp_path, Image.fromarray(np.full((2, 2), 0.25, dtype=np.float32)), "a.tif")
    assert at(one, 0, 0) == (0.25, 0.25, 0.25)
    with pytest.raises(InputError, match="pixels from 7"):
        saved(tmp_path, Image.fromarray(np.full((2, 2), 7, dtype=np.float32)), "b.tif")


def test_cmyk(tmp_path: Path) -> None:
    red, green, blue = at(saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg"), 3, 3)
    assert red > 0.95
    assert max(green, blue) < 0.05


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((2, 3, 3), dtype=np.uint8)
    upright[0, 0] = 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, 3),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    one = saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert one.pixels.shape == (3, 2, 3)
    assert at(one, 0, 0) == WHITE
    assert float(one.pixels.sum()) == 3


def test_one_pixel(tmp_path: Path) -> None:
    one = saved(tmp_path, Image.new("RGB", (1, 1), (255, 0, 0)))
    seen = CenterCrop(8)(one)
    assert seen.shape == (3, 8, 8)
    assert torch.equal(seen, torch.tensor(RED)[:, None, None].expand(3, 8, 8))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif", "ppm"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    one = saved(tmp_path, Image.new("RGB", (16, 16), (255, 0, 0)), f"a.{suffix}")
    assert torch.allclose(one.pixels.mean((1, 2)), torch.tensor(RED), atol=0.02)


# -- what is refused ------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A PNG that is little more than the promise of so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _truncated() -> bytes:
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, "JPEG")
    return whole.getvalue()[:700]


BAD = {
    "empty": (b"", "is empty"),
    "text": (b"not a picture at all", "is no picture"),
    "truncated": (_truncated(), "cannot be read as a picture"),
    "no pixels": (png(4, 4), "cannot be read as a picture"),
    "large": (png(12_000, 12_000), "12000 x 12000 pixels"),
    "bomb": (png(60_000, 60_000), "3600000000 pixels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused(tmp_path: Path, kind: str) -> None:
    data, message = BAD[kind]
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(path) in caught.value.given
    assert caught.value.expected
    assert caught.value.do


def test_limit_is_what_it_says() -> None:
    assert 12_000**2 > LARGEST >= 9_000**2


def test_absent_and_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        read(tmp_path / "absent.png")
    with pytest.raises(InputError, match="is a directory"):
        read(tmp_path)


def test_directory_with_other_files(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", ".hidden.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name, "PNG")
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in read_all([tmp_path])] == ["a.JPG", "b.png"]
    assert [p.name for p in read_all([tmp_path / "b.png", tmp_path])] == ["b.png", "a.JPG", "b.png"]


def test_directory_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(InputError, match="no pictures in the directory"):
        list(read_all([tmp_path]))


# -- arrays, tensors, Pillow images ---------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        np.full((4, 5), 255, dtype=np.uint8),
        np.full((4, 5, 1), 65535, dtype=np.uint16),
        np.ones((4, 5, 3)),
        np.zeros((4, 5, 4), dtype=np.float32),  # transparent
        np.ones((4, 5), dtype=bool),
        torch.ones(4, 5),
        torch.ones(1, 4, 5, dtype=torch.bfloat16),
        torch.ones(3, 4, 5, requires_grad=True),
        torch.full((1, 3, 4, 5), 255, dtype=torch.uint8),
        Image.new("L", (5, 4), 255),
        Image.new("RGBA", (5, 4), (0, 0, 0, 0)),
    ],
    ids=lambda s: f"{type(s).__name__}{getattr(s, 'shape', '')}",
)
def test_white_in_many_forms(source: object) -> None:
    one = read(source, "white")
    assert one.name == "white"
    assert torch.equal(one.pixels, torch.ones(3, 4, 5))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((2, 2, 2)), "shape"),
        (np.zeros((0, 2)), "shape"),
        (np.full((2, 2), 1.5), "pixels from 1.5"),
        (np.full((2, 2), np.nan), "pixels from nan"),
        (np.zeros((2, 2), dtype=np.int64), "range is not known"),
        (np.zeros((2, 2), dtype=complex), "range is not known"),
        (torch.zeros(2, 3, 4, 4), "shape"),
        ([[0, 1]], "a list as picture"),
    ],
)
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_bad_arrays(source: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(source)


# -- the crop -------------------------------------------------------------------------------------


def test_crop_box() -> None:
    assert CenterCrop(224, 224 / 256).box(256, 512) == (144, 16, 368, 240)
    assert CenterCrop(224, 1.0).box(300, 200) == (0, 50, 200, 250)
    assert CenterCrop(4).box(1, 1) == (0, 0, 1, 1)


def test_crop_is_the_box() -> None:
    pixels = torch.zeros(3, 40, 60)
    left, top, right, bottom = CenterCrop(20, 0.5).box(40, 60)
    pixels[:, top:bottom, left:right] = 1
    assert torch.equal(CenterCrop(20, 0.5)(Picture("a", pixels)), torch.ones(3, 20, 20))


def test_crop_stays_in_range() -> None:
    edges = Picture("a", torch.rand(3, 50, 50).round())
    seen = CenterCrop(64)(edges)
    assert 0 <= float(seen.min()) <= float(seen.max()) <= 1


@pytest.mark.parametrize(("size", "share"), [(0, 0.5), (8, 0.0), (8, 1.1)])
def test_impossible_crops(size: int, share: float) -> None:
    with pytest.raises(ConfigError, match="CenterCrop"):
        CenterCrop(size, share)


def test_directories_are_searched_for_all_that_pillow_reads(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    for name in ("a.tga", "b.ico", "c.jfif"):
        picture.save(tmp_path / name, format="JPEG" if name == "c.jfif" else None)
    (tmp_path / "d.h5").write_bytes(b"no picture")
    assert [one.name for one in read_all([tmp_path])] == ["a.tga", "b.ico", "c.jfif"]
