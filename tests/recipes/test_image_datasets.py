"""Data sets of identities: every source gives the same samples, and corrupt ones are named, from workers too."""

import io
import logging
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from cosface_recipes.data.image_datasets import (
    CorruptSampleError,
    ImageFolder,
    RecordDataset,
    decode,
    open_dataset,
)
from cosface_recipes.data.recordio import RecordWriter
from cosface_recipes.data.transforms import (
    ColorJitter,
    Compose,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    evaluation_transform,
    training_transform,
)

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
IDENTITIES = [0, 0, 1, 1, 1]


def png(colour: tuple[int, int, int], size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(params=["folder", "records"])
def source(request, tmp_path):
    """Five images, the third of which is cut short."""
    images = [png(colour) for colour in COLOURS]
    images[2] = images[2][:50]
    if request.param == "records":
        with RecordWriter(tmp_path, (8, 8)) as writer:
            for image, label in zip(images, IDENTITIES, strict=True):
                writer.write(image, label)
        return tmp_path, [f"train.rec:{key}" for key in range(1, 6)]
    keys = [f"id{label}/{i}.png" for i, label in enumerate(IDENTITIES)]
    for key, image in zip(keys, images, strict=True):
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(image)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("not an identity")
    return tmp_path, keys


def test_both_sources_give_the_same_samples(source):
    path, keys = source
    dataset = open_dataset(path)
    assert len(dataset) == 5
    assert list(dataset.keys) == keys
    assert dataset.labels.tolist() == IDENTITIES
    assert dataset.labels.dtype == torch.int64
    assert dataset.num_classes == 2
    for i in (0, 1, 3, 4):
        image, label = dataset[i]
        assert (image.getpixel((3, 4)), label) == (COLOURS[i], IDENTITIES[i])
    image, _ = open_dataset(path, Normalize(), color="gray")[0]
    assert image.shape == (1, 8, 8)
    with pytest.raises(CorruptSampleError, match=rf"The sample {keys[2]} cannot be read: .*truncated"):
        dataset[2]
    assert dataset.corrupt == []
    with pytest.raises(IndexError):
        dataset[5]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_skip_and_the_main_process_knows(source, start, caplog):
    path, keys = source
    dataset = open_dataset(path, evaluation_transform(8), on_corrupt="skip")
    assert dataset.corrupt == []
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=start)
    images, labels = map(torch.cat, zip(*loader, strict=True))
    assert dataset.corrupt == [keys[2]]
    colours = [(image.mean((1, 2)) > 0).tolist() for image in images]
    expected = [0, 1, 3, 3, 4]  # the fourth stands in for the third
    assert colours == [[channel > 0 for channel in COLOURS[i]] for i in expected]
    assert labels.tolist() == [IDENTITIES[i] for i in expected]


def test_what_is_skipped_is_logged_once_with_its_key(source, caplog):
    path, keys = source
    dataset = open_dataset(path, on_corrupt="skip")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            dataset[2]
    messages = [
        record.getMessage() for record in caplog.records if record.name == "cosface_recipes.data.image_datasets"
    ]
    assert [message.partition(" cannot")[0] for message in messages] == [f"The sample {keys[2]}"]
    assert dataset.corrupt == [keys[2]]


def test_nothing_but_corrupt_samples_is_an_error(tmp_path):
    (tmp_path / "id").mkdir()
    for name in "abc":
        (tmp_path / "id" / f"{name}.jpg").write_bytes(b"no image")
    with pytest.raises(CorruptSampleError, match=r"3 samples in a row cannot be read\. The sample id/a\.jpg"):
        open_dataset(tmp_path, on_corrupt="skip")[1]


def test_a_corrupt_record_is_skipped_too(tmp_path):
    with RecordWriter(tmp_path, (8, 8)) as writer:
        for label in range(3):
            writer.write(png(COLOURS[label]), label)
    data = bytearray((tmp_path / "train.rec").read_bytes())
    data[40] ^= 1  # the magic of the first image
    (tmp_path / "train.rec").write_bytes(data)
    dataset = RecordDataset(tmp_path, on_corrupt="skip")
    assert dataset[0][1] == 1
    assert dataset.corrupt == ["train.rec:1"]
    with pytest.raises(
        CorruptSampleError, match=r"key 1 in .*train\.rec is corrupt: at byte 40 there is 0xced7230b"
    ):
        RecordDataset(tmp_path)[0]


def test_a_pickled_data_set_reads_the_same(source):
    dataset = open_dataset(source[0], evaluation_transform(8))
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[4][0], dataset[4][0])
    assert list(copy.keys) == list(dataset.keys)


def test_shuffling_is_by_index_and_seeded(source):
    dataset = open_dataset(source[0], evaluation_transform(8), on_corrupt="skip")
    orders = []
    for seed in (1, 1, 2):
        loader = DataLoader(dataset, 5, shuffle=True, generator=torch.Generator().manual_seed(seed))
        orders.append(next(iter(loader))[0])
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_bad_options_are_refused_with_their_value(tmp_path):
    with pytest.raises(ValueError, match=r"has no sub-folder with images"):
        ImageFolder(tmp_path)
    (tmp_path / "id").mkdir()
    (tmp_path / "id" / "0.png").write_bytes(png(COLOURS[0]))
    with pytest.raises(ValueError, match=r'on_corrupt must be "raise" or "skip", got \'ignore\''):
        ImageFolder(tmp_path, on_corrupt="ignore")
    with pytest.raises(ValueError, match=r"color must be one of gray, rgb, got 'bgr'"):
        ImageFolder(tmp_path, color="bgr")
    with pytest.raises(FileNotFoundError, match=r"The image folder .*none does not exist"):
        open_dataset(tmp_path / "none")


JPEG = io.BytesIO()
Image.effect_mandelbrot((24, 24), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(JPEG, "JPEG")
ENCODED = {"jpeg": JPEG.getvalue(), "png": png((1, 2, 3), 24)}


@given(st.sampled_from(sorted(ENCODED)), st.lists(st.integers(0, 10**6), max_size=6), st.integers(0, 2000))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_images_are_read_or_named(tmp_path_factory, kind, bits, length):
    damaged = bytearray(ENCODED[kind][:length])
    for bit in bits:
        if damaged:
            damaged[bit // 8 % len(damaged)] ^= 1 << bit % 8
    folder = tmp_path_factory.mktemp("images")
    (folder / "id").mkdir()
    (folder / "id" / f"0.{kind}").write_bytes(damaged)
    try:
        image, label = ImageFolder(folder)[0]
    except CorruptSampleError as error:
        assert f"The sample id/0.{kind} cannot be read" in str(error)  # noqa: PT017 - either is fine
    else:
        assert image.mode == "RGB"
        assert label == 0


def test_formats_that_call_other_programs_are_refused():
    with pytest.raises(OSError, match="it is none of JPEG, PNG, WEBP, BMP, PPM, TIFF"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")


# Transforms


@pytest.fixture
def gradient() -> Image.Image:
    """12 x 8 pixels; red grows to the right, green downwards, blue is 100."""
    red, green = np.meshgrid(np.arange(12) * 20, np.arange(8) * 30)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 100)], -1).astype(np.uint8))


def test_normalised_by_hand():
    image = Image.fromarray(np.uint8([[[0, 51, 255], [127, 128, 204]]]))
    expected = torch.tensor([[-1.0, -0.5 / 127.5], [-0.6, 0.5 / 127.5], [1.0, 0.6]])[:, None]
    torch.testing.assert_close(Normalize()(image), expected)
    assert Normalize()(image.convert("L")).shape == (1, 1, 2)


def test_a_flip_mirrors_columns_with_its_probability(gradient):
    flipped = RandomHorizontalFlip(1.0)(gradient)
    np.testing.assert_array_equal(np.asarray(flipped), np.asarray(gradient)[:, ::-1])
    assert RandomHorizontalFlip(0.0)(gradient) is gradient
    flips = sum(RandomHorizontalFlip(0.25)(gradient) is not gradient for _ in range(1000))
    assert 190 < flips < 310  # four standard deviations of 13.7


def test_a_crop_is_inside_and_of_its_area(gradient):
    for _ in range(50):
        pixels = np.asarray(RandomResizedCrop(6, scale=(0.5, 0.5), ratio=(1.5, 1.5))(gradient)).astype(float)
        width, height = np.sqrt(48 * 1.5), np.sqrt(48 / 1.5)
        # Bilinear sampling keeps a linear ramp away from the border, up to its rounding.
        assert pixels[2, 4, 0] - pixels[2, 1, 0] == pytest.approx(3 * 20 * width / 6, abs=3)
        assert pixels[4, 2, 1] - pixels[1, 2, 1] == pytest.approx(3 * 30 * height / 6, abs=3)
        assert (pixels[..., 2] == 100).all()
    assert RandomResizedCrop(6)(gradient).size == (6, 6)


def test_colours_change_as_told(gradient):
    assert np.array_equal(np.asarray(ColorJitter()(gradient)), np.asarray(gradient))
    brighter = np.asarray(ColorJitter(brightness=0.5)(gradient)).astype(float)
    factor = brighter[0, 0, 2] / 100
    assert 0.5 <= factor <= 1.5
    assert factor != 1
    np.testing.assert_allclose(brighter, (np.asarray(gradient) * factor).clip(max=255), atol=3.5)
    grey = np.asarray(ColorJitter(saturation=0.5)(Image.new("RGB", (2, 2), (80, 80, 80))))
    assert (grey == 80).all()


def test_training_is_seeded_and_evaluation_is_fixed(gradient):
    augment, plain = training_transform(8, flip=0.5, crop=0.3, color=0.3), evaluation_transform(8)
    samples = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        samples.append(augment(gradient))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    assert samples[0].shape == plain(gradient).shape == (3, 8, 8)
    assert torch.equal(plain(gradient), Normalize()(Resize(8)(gradient)))
    assert torch.equal(training_transform(8, flip=0)(gradient), plain(gradient))
    assert pickle.loads(pickle.dumps(augment)) == augment
    assert isinstance(augment, Compose)
