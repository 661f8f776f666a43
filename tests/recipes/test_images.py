"""Image files as folders of photos hold them: which are read, how they are turned, what is said of the others."""

import io
import logging

import numpy as np
import pytest
from PIL import Image

from cosface_recipes.data.image_datasets import CorruptSampleError, ImageFolder, open_dataset
from cosface_recipes.data.images import SUFFIXES, decode, identity_files, image_files

LEFT, RIGHT = (200, 10, 10), (10, 10, 200)
# From the image as it is to be seen to the one that is stored under an orientation: the inverse of each turn.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture
def photo() -> Image.Image:
    """24 x 16 pixels, no two quarters alike."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :12], pixels[:8, 12:], pixels[8:, :12] = LEFT, RIGHT, (10, 200, 10)
    return Image.fromarray(pixels)


def write(path, image=None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (8, 8))).save(path, **options)


@pytest.mark.parametrize("number", STORED)
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_a_photo_is_turned_upright(photo, number, suffix):
    stored = photo if STORED[number] is None else photo.transpose(STORED[number])
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = number
    stored.save(file, suffix, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(np.asarray(decode(file.getvalue())), np.asarray(photo))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01"]
)
def test_a_damaged_orientation_is_none(photo, exif):
    file = io.BytesIO()
    photo.save(file, "PNG", exif=exif)
    assert decode(file.getvalue()).size == photo.size


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("color", ["gray", "rgb"])
def test_the_upper_byte_of_16_bits_counts(suffix, color):
    bytes_ = np.arange(256, dtype=np.uint8).reshape(16, 16)
    file = io.BytesIO()
    Image.fromarray(bytes_.astype(np.uint16) * 256 + 77).save(file, suffix)
    decoded = np.asarray(decode(file.getvalue(), color)).reshape(16, 16, -1)
    np.testing.assert_array_equal(decoded, np.repeat(bytes_[..., None], 1 if color == "gray" else 3, 2))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "La", "CMYK", "YCbCr", "LAB"])
@pytest.mark.parametrize("color", ["gray", "rgb"])
def test_every_mode_becomes_the_one_that_is_asked_for(photo, mode, color):
    stored, file = photo.convert("LA" if mode == "La" else mode), io.BytesIO()
    stored.save(file, "TIFF")
    source = stored.convert("RGB") if mode == "LAB" else stored
    data = file.getvalue()
    if mode == "La":  # Pillow reads it, and does not write it: gray that is multiplied by its opacity of 1
        data = data.replace(b"\x52\x01\3\0\1\0\0\0\2", b"\x52\x01\3\0\1\0\0\0\1")
        with Image.open(io.BytesIO(data)) as image:
            assert image.mode == "La"
    np.testing.assert_array_equal(
        np.asarray(decode(data, color)), np.asarray(source.convert({"gray": "L", "rgb": "RGB"}[color]))
    )


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Image.new("F", (8, 8), 0.5), r"its pixels are floating-point numbers"),
        (b"no image", r"it is none of JPEG, PNG, WEBP, BMP, PPM, TIFF$"),
    ],
    ids=["floats", "text"],
)
def test_what_is_no_image_of_known_white_says_so(tmp_path, content, message, in_memory):
    file = tmp_path / "x.tiff"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        content.save(file)
    with pytest.raises((OSError, ValueError), match=f"^{message}"):
        decode(file.read_bytes() if in_memory else file)


def test_links_are_followed_and_those_that_lead_nowhere_are_said(tmp_path, caplog):
    elsewhere = tmp_path / "elsewhere"
    for i in range(3):
        write(elsewhere / "deep" / f"{i}.png")
    folder = tmp_path / "faces"
    write(folder / "ann" / "1.png")
    (folder / "ann" / "more").symlink_to(elsewhere)
    (folder / "ann" / "again").symlink_to(elsewhere / "deep")
    (folder / "ann" / "up").symlink_to(folder)
    (folder / "bo").symlink_to(elsewhere)
    write(folder / "dee" / "1.png")
    (folder / "cem").symlink_to(tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        files = identity_files(folder)
    assert [path.relative_to(folder).as_posix() for path in files["ann"]] == [
        "ann/1.png",
        *(f"ann/again/{i}.png" for i in range(3)),
    ]
    assert len(files["bo"]) == 3
    assert f"1 links in {folder} lead nowhere, 'cem' first." in caplog.messages
    (folder / "ann" / "0.png").symlink_to(elsewhere / "gone.png")
    with pytest.raises(CorruptSampleError, match=r"ann/0\.png cannot be read: .*No such file"):
        ImageFolder(folder)[0]


def test_hidden_files_and_folders_are_no_images_and_no_identities(tmp_path):
    folder = tmp_path / ".cache"  # that the folder itself is hidden is the user's affair
    for name in ("José Muñoz/a b.PNG", "李 明/deep/1.jpg"):
        write(folder / name)
    (folder / "José Muñoz" / "._a b.PNG").write_bytes(b"\0\5\26\7")
    (folder / ".DS_Store").write_bytes(b"Bud1")
    write(folder / ".thumbnails" / "1.png")
    write(folder / "José Muñoz" / ".trash" / "1.png")
    files = identity_files(folder)
    assert {name: [path.name for path in paths] for name, paths in files.items()} == {
        "José Muñoz": ["a b.PNG"],
        "李 明": ["1.jpg"],
    }
    assert len(image_files(folder)) == 2
    assert len(ImageFolder(folder)) == 2


def test_what_is_left_out_is_said_once(tmp_path, caplog):
    write(tmp_path / "ann" / "1.png")
    for name in ("ann/2.HEIC", "bo/1.heic", "bo/2.gif", "ann/README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "cem").mkdir()
    with caplog.at_level(logging.WARNING):
        assert [*identity_files(tmp_path)] == [*identity_files(tmp_path)] == ["ann"]
    kinds, empty = [record.getMessage() for record in caplog.records]
    assert kinds.startswith(f"Files in {tmp_path} that are left out: .gif (1), .heic (2), README (1).")
    assert all(suffix in kinds for suffix in SUFFIXES)
    assert empty == f"2 of the 3 sub-folders of {tmp_path} have no images, 'bo' first."


def test_messages_say_what_to_do(tmp_path):
    write(tmp_path / "1.jpg")
    with pytest.raises(
        ValueError, match=r"has no sub-folder with images: it takes one per identity, such as .*alice"
    ):
        ImageFolder(tmp_path)
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(CorruptSampleError, match=r"ann/1\.jpg cannot be read.*--on-corrupt skip"):
        open_dataset(tmp_path)[0]
