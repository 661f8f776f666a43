"""The readers and writers of insightface's files: every layout by hand, and nothing but clear errors on damage."""

import io
import pickle
import struct
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosface_recipes.data import recordio
from cosface_recipes.data.recordio import (
    MAGIC_BYTES,
    Record,
    RecordError,
    RecordFile,
    RecordWriter,
    read_payload,
    write_payload,
)


def scalar(label: float, image: bytes, key: int = 0) -> bytes:
    return struct.pack("<IfQQ", 0, label, key, 0) + image


def array(labels: list[float], image: bytes = b"") -> bytes:
    return struct.pack(f"<IfQQ{len(labels)}f", len(labels), 0, 0, 0, *labels) + image


def write_by_hand(folder: Path, payloads: dict[int, bytes], name: str = "train") -> Path:
    """A .rec and .idx of whole records, from the format's description alone."""
    body, lines = b"", []
    for key, payload in payloads.items():
        lines.append(f"{key}\t{len(body)}\n")
        body += bytes.fromhex("0a23d7ce") + struct.pack("<I", len(payload)) + payload + bytes(-len(payload) % 4)
    path = folder / f"{name}.rec"
    path.write_bytes(body)
    path.with_suffix(".idx").write_text("".join(lines))
    return path


INSIGHTFACE = {
    0: array([4, 6]),
    1: scalar(0, b"first"),
    2: array([0, 0.25, 17], b"second"),  # an array: the first entry is the label
    3: array([1], b"third"),
    4: array([1, 3]),
    5: array([3, 4]),
}


def test_insightface_layout_by_hand(tmp_path):
    path = write_by_hand(tmp_path, INSIGHTFACE)
    (tmp_path / "property").write_text("2,112,96\n3\nshuffled\n")
    for source in (path, tmp_path, str(tmp_path)):
        file = RecordFile(source)
        assert [file[i] for i in range(len(file))] == [(b"first", 0), (b"second", 0), (b"third", 1)]
        assert file.keys.tolist() == [1, 2, 3]
        assert file.labels.tolist() == [0, 0, 1]
        assert file.labels.dtype == np.int64
        assert file.identities.tolist() == [[4, 1, 3], [5, 3, 4]]
        assert (file.num_classes, file.image_size) == (2, (112, 96))
    assert file.record(2).labels.tolist() == [0, 0.25, 17]
    with pytest.raises(KeyError, match=r"train\.rec has no record of key 6"):
        file.record(6)


def test_flat_layout_by_hand(tmp_path):
    payloads = {7: scalar(2, b"a"), 0: scalar(0, b"b"), 3: array([1, 5], b"c")}
    file = RecordFile(write_by_hand(tmp_path, payloads, name="val"))
    assert [file[i] for i in range(3)] == [(b"a", 2), (b"b", 0), (b"c", 1)]  # in the order of the index
    assert file.keys.tolist() == [7, 0, 3]
    assert file.identities.shape == (0, 3)
    assert (file.num_classes, file.image_size) == (3, None)


@pytest.mark.parametrize("image_0", [array([2], b"a"), array([4, 6, 1], b"a"), scalar(2, b"a")])
def test_a_record_0_with_an_image_is_an_image(tmp_path, image_0):
    """im2rec counts from 0, and with --pack-label every label is an array."""
    file = RecordFile(write_by_hand(tmp_path, {0: image_0, 1: array([5], b"b")}))
    assert [file[i] for i in range(len(file))] == [(b"a", file.labels[0]), (b"b", 5)]
    assert file.labels.tolist() == [int(file.record(0).labels[0]), 5]
    assert file.identities.shape == (0, 3)


@pytest.mark.parametrize("separator", ["\t", " ", "   ", " \t "])
@pytest.mark.parametrize("end", ["\n", "\r\n", " \n", "\n\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", " "])
def test_an_index_may_have_spaces_and_line_ends_of_windows(tmp_path, separator, end, start):
    path = write_by_hand(tmp_path, INSIGHTFACE)
    lines = [line.split("\t") for line in path.with_suffix(".idx").read_text().splitlines()]
    text = start + "".join(f"{separator.join(line)}{end}" for line in lines)
    path.with_suffix(".idx").write_bytes(text.encode())
    assert [image for image, _ in RecordFile(path)] == [b"first", b"second", b"third"]


def test_a_record_in_parts_is_joined_by_the_magic(tmp_path):
    magic = bytes.fromhex("0a23d7ce")
    part = lambda kind, data: magic + struct.pack("<I", kind << 29 | len(data)) + data  # noqa: E731
    payload = scalar(5, b"ABCD" + magic + magic + b"EF")
    stored = part(1, payload[:28]) + part(2, b"") + part(3, b"EF") + b"\0\0"
    assert read_payload(stored, 0) == payload
    written = io.BytesIO()
    write_payload(written, payload)
    assert written.getvalue() == stored


def test_the_magic_at_an_odd_place_is_data():
    payload = b"x" + MAGIC_BYTES + b"yz" + MAGIC_BYTES
    stored = io.BytesIO()
    write_payload(stored, payload)
    assert len(stored.getvalue()) == 8 + 12
    assert read_payload(stored.getvalue(), 0) == payload


def test_the_writer_writes_the_layout_byte_for_byte(tmp_path):
    with RecordWriter(tmp_path / "new" / "folder", image_size=(112, 96)) as writer:
        keys = [writer.write(b"first", 0), writer.write(b"second", 0, [0.25, 17]), writer.write(b"third", 1)]
    assert keys == [1, 2, 3]
    folder = tmp_path / "new" / "folder"
    assert (folder / "property").read_text() == "2,112,96\n"
    file = RecordFile(folder)
    assert [file.record(key).labels.tolist() for key in range(6)] == [
        [4, 6], [0], [0, 0.25, 17], [1], [1, 3], [3, 4]
    ]  # fmt: skip
    assert [file[i] for i in range(3)] == [(b"first", 0), (b"second", 0), (b"third", 1)]
    assert file.identities.tolist() == [[4, 1, 3], [5, 3, 4]]
    first = (folder / "train.rec").read_bytes()[:40]
    assert first == bytes.fromhex("0a23d7ce 20000000 02000000") + bytes(20) + struct.pack("<ff", 4, 6)


def write_labels(folder: Path, labels: list[int]) -> None:
    with RecordWriter(folder, (8, 8)) as writer:
        for label in labels:
            writer.write(b"image", label)


def test_images_of_an_identity_must_follow_one_another(tmp_path):
    message = r"Image 3 has label 5 after an image of label 2, .* of 5 began with image 1"
    with pytest.raises(ValueError, match=message):
        write_labels(tmp_path, [5, 2, 5])
    with pytest.raises(FileNotFoundError, match=r"index .*train\.idx is missing"):
        RecordFile(tmp_path)


def test_labels_beyond_float32(tmp_path):
    labels = [2**24 - 1, 2**24, 2**24 + 1, 2**31 + 1]
    write_labels(tmp_path, labels)
    file = RecordFile(tmp_path)
    assert [file[i][1] for i in range(4)] == labels == file.labels.tolist()
    assert file.num_classes == 2**31 + 2
    side_car = tmp_path / "train.labels.npy"
    np.save(side_car, np.int64([*labels[:3], 12]))
    with pytest.raises(RecordError, match=r"key 4 in .* its label is 2\.14748e\+09, and .*labels\.npy has 12"):
        RecordFile(tmp_path)[3]
    np.save(side_car, np.int64(labels[:3]))
    with pytest.raises(RecordError, match=r"has 3 labels, and .* 4 images"):
        RecordFile(tmp_path)
    np.save(side_car, np.float64(labels))
    with pytest.raises(RecordError, match=r"should hold int64 labels in one dimension, not float64 \(4,\)"):
        RecordFile(tmp_path)
    side_car.unlink()
    assert RecordFile(tmp_path)[0] == (b"image", 2**24 - 1)
    with pytest.raises(RecordError, match=r"key 2 .* its label is 1\.67772e\+07; float32 holds .* 0 to 16777215"):
        RecordFile(tmp_path)[1]
    with pytest.raises(
        RecordError, match=r"key 4 .* its label is 2\.14748e\+09; .* needed in .*train\.labels\.npy"
    ):
        RecordFile(tmp_path)[3]


@pytest.mark.parametrize("exact", [17, 18, 19, 20, 21, 22, 23])
def test_more_images_than_float32_can_count(tmp_path, monkeypatch, exact):
    """As beyond 2^24, where the end of the images in record 0 is rounded, here to a multiple of 4."""
    monkeypatch.setattr(recordio, "EXACT", 8)
    monkeypatch.setattr(recordio.np, "spacing", lambda _: 4)
    rounded = 4 * round(exact / 4)
    images = {key: scalar(0, b"image") for key in range(1, exact)}
    identities = {key: array([1, 2]) for key in range(exact, exact + 9)}
    file = RecordFile(write_by_hand(tmp_path, {0: array([rounded, 0]), **images, **identities}))
    assert len(file) == exact - 1


@given(st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 3)), max_size=12), st.data())
def test_what_is_written_is_read(tmp_path_factory, samples, data):
    folder = tmp_path_factory.mktemp("records")
    samples.sort(key=lambda sample: sample[1])
    pieces = st.sampled_from([b"", MAGIC_BYTES, MAGIC_BYTES * 3, b"123" + MAGIC_BYTES])
    samples = [(data.draw(pieces) + image, label) for image, label in samples]
    with RecordWriter(folder, (1, 1)) as writer:
        for image, label in samples:
            writer.write(image, label)
    file = RecordFile(folder)
    assert [file[i] for i in range(len(file))] == samples
    copy = pickle.loads(pickle.dumps(file))
    assert [copy[i] for i in range(len(copy))] == samples
    assert file.labels.tolist() == [label for _, label in samples]
    for _, first, last in file.identities.tolist():
        assert len(set(file.labels[first - 1 : last - 1].tolist())) == 1


GOOD = b"".join(
    struct.pack("<II", 0xCED7230A, len(payload)) + payload + bytes(-len(payload) % 4)
    for payload in INSIGHTFACE.values()
)


@contextmanager
def only_record_errors(text: str):
    try:
        yield
    except RecordError as error:
        assert text in str(error)  # noqa: PT017 - no error is fine too


def read_everything(folder: Path, record_bytes: bytes, index: str) -> None:
    """Read all there is; nothing but RecordError may come out, and no more data than the file has."""
    (folder / "train.rec").write_bytes(record_bytes)
    (folder / "train.idx").write_text(index)
    try:
        file = RecordFile(folder)
    except RecordError:
        return
    assert len(file) <= len(index)
    for i, key in enumerate(file.keys.tolist()):
        with only_record_errors(f"key {key} in"):
            image, label = file[i]
            assert len(image) <= len(record_bytes)
            assert 0 <= label < 2**24
    for attribute in ("identities", "labels", "num_classes"):
        with only_record_errors("key "):
            getattr(file, attribute)


FLOATS = struct.unpack("<4I", struct.pack("<4f", float("inf"), 1e30, 2**24, 3e7))
INDEX = "0\t0\n1\t40\n2\t80\n3\t132\n4\t176\n5\t216\n"


def test_the_damaged_file_is_sound_before_it_is_damaged(tmp_path):
    (tmp_path / "train.rec").write_bytes(GOOD)
    (tmp_path / "train.idx").write_text(INDEX)
    assert [image for image, _ in RecordFile(tmp_path)] == [b"first", b"second", b"third"]


@given(st.integers(0, len(GOOD)))
def test_a_truncated_file(tmp_path_factory, length):
    read_everything(tmp_path_factory.mktemp("records"), GOOD[:length], INDEX)


@given(st.lists(st.integers(0, 8 * len(GOOD) - 1), min_size=1, max_size=4))
def test_flipped_bits(tmp_path_factory, bits):
    damaged = bytearray(GOOD)
    for bit in bits:
        damaged[bit // 8] ^= 1 << bit % 8
    read_everything(tmp_path_factory.mktemp("records"), bytes(damaged), INDEX)


@given(st.sampled_from(range(0, len(GOOD), 4)), st.sampled_from([2**29 - 1, 2**31, 2**32 - 1, 2**24, *FLOATS]))
def test_oversized_numbers(tmp_path_factory, position, number):
    damaged = bytearray(GOOD)
    damaged[position : position + 4] = struct.pack("<I", number)
    tracemalloc.start()
    read_everything(tmp_path_factory.mktemp("records"), bytes(damaged), INDEX)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@given(
    st.text("0123456789\t\n -.x", max_size=40)
    | st.lists(st.integers(-(2**70), 2**70)).map(lambda n: "\t".join(map(str, n)))
)
def test_a_damaged_index(tmp_path_factory, index):
    read_everything(tmp_path_factory.mktemp("records"), GOOD, index)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"short", r"key 1 in .*train\.rec is corrupt: it has 5 bytes, and the header alone takes 24"),
        (scalar(float("nan"), b""), r"its label is nan; float32 holds labels from 0 to 16777215"),
        (scalar(0.5, b""), r"its label is 0\.5;"),
        (scalar(-1, b""), r"its label is -1;"),
        (
            struct.pack("<IfQQ", 2**31, 0, 0, 0),
            r"it has 24 bytes, and its 2147483648 labels end at byte 8589934616",
        ),
    ],
)
def test_a_corrupt_record_is_named(tmp_path, payload, message):
    file = RecordFile(write_by_hand(tmp_path, {1: payload}))
    with pytest.raises(RecordError, match=message):
        file[0]


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"1234567", r"its header at byte 0 lies beyond the file's 7 bytes"),
        (b"12345678", r"at byte 0 there is 0x34333231 instead of the magic 0xced7230a"),
        (
            MAGIC_BYTES + struct.pack("<I", 2**29 - 1),
            r"its 536870911 bytes from byte 8 on end beyond the file's 8",
        ),
        (MAGIC_BYTES + struct.pack("<I", 3 << 29), r"the part at byte 0 is of kind 3, after 0 parts"),
        ((MAGIC_BYTES + struct.pack("<I", 1 << 29)) * 2, r"the part at byte 8 is of kind 1, after 1 parts"),
        (MAGIC_BYTES + struct.pack("<I", 1 << 29), r"its header at byte 8 lies beyond the file's 8 bytes"),
    ],
)
def test_what_is_wrong_with_a_part_is_said(stored, message):
    with pytest.raises(RecordError, match=message):
        read_payload(stored, 0)


@pytest.mark.parametrize(
    ("payloads", "message"),
    [
        ({0: array([9])}, r"key 0 .* its labels should be the two ends of the keys, and are \[9\.0\]"),
        ({0: array([float("inf"), 1])}, r"key 0 .* are \[inf, 1\.0\]"),
        ({0: array([3, 3]), 1: scalar(0, b"")}, r"should have the images 1 to 2, and its index has 1 of them"),
    ],
)
def test_a_corrupt_record_0_is_named(tmp_path, payloads, message):
    path = write_by_hand(tmp_path, payloads)
    with pytest.raises(RecordError, match=message):
        RecordFile(path)


@pytest.mark.parametrize("ends", [[0, 1], [2, 1], [1, 3], [1, float("inf")], [float("nan"), 1], [1]])
def test_a_corrupt_identity_is_named(tmp_path, ends):
    path = write_by_hand(tmp_path, {0: array([2, 3]), 1: scalar(0, b"image"), 2: array(ends)})
    assert RecordFile(path)[0] == (b"image", 0)
    with pytest.raises(RecordError, match=r"key 2 .* its labels should be two keys of images, and are \["):
        _ = RecordFile(path).identities


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.idx", b"0\t0\n0\t40\n", r"The key 0 occurs twice in the index of .*train\.rec"),
        ("train.idx", b"", r"The record file's index .*train\.idx is empty"),
        ("train.idx", b"0,0\n", r"train\.idx should have lines of a key and an offset"),
        ("train.idx", b"1\n2\n", r"train\.idx should have two columns of numbers from 0"),
        ("train.rec", b"", r"train\.rec is empty"),
        ("property", b"2,112", r"property should be classes,height,width, and is '2,112'"),
        ("train.labels.npy", b"\x93NUMPY", r"labels\.npy cannot be read"),
    ],
)
def test_a_corrupt_companion_file_is_named(tmp_path, name, content, message):
    write_by_hand(tmp_path, INSIGHTFACE)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=message):
        RecordFile(tmp_path)[0]


@pytest.mark.parametrize("with_side_car", [True, False])
def test_a_label_that_is_no_class_of_the_property_is_named_with_both(tmp_path, with_side_car):
    with RecordWriter(tmp_path, (8, 8), num_classes=2) as writer:
        for label in (0, 1, 2):
            writer.write(b"image", label)
    if not with_side_car:
        (tmp_path / "train.labels.npy").unlink()
    message = r"key 3 in .*train\.rec has the label 2, and the 2 classes of .*property are those below"
    with pytest.raises(RecordError, match=message):
        _ = RecordFile(tmp_path).labels
    (tmp_path / "property").write_text("3,8,8\n")
    assert RecordFile(tmp_path).labels.tolist() == [0, 1, 2]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no record file .*train\.rec\."):
        RecordFile(tmp_path)


def test_a_record_too_long_for_its_length_field_is_refused(monkeypatch):
    monkeypatch.setattr(recordio, "LENGTH_BITS", 3)
    with pytest.raises(RecordError, match=r"A record of 8 bytes is too long; 7 are possible"):
        write_payload(io.BytesIO(), bytes(8))


def test_a_record_is_packed_as_it_was_unpacked():
    for payload in (scalar(3, b"image", key=9), array([1, 2.5], b"image")):
        assert Record.unpack(payload).pack() == payload
