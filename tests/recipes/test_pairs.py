"""Pairs of images: every way in which a .bin file was ever written is read, and none of what it names is run."""

import io
import os
import pickle
import pickletools
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from cosface_recipes.data.image_datasets import CorruptSampleError
from cosface_recipes.data.pairs import open_bin, open_pairs, read_bin, read_pairs, write_bin
from cosface_recipes.data.plain_pickle import PickleError, read_pickle
from cosface_recipes.data.transforms import evaluation_transform

IMAGES = [b"\xff\xd8one", b"", bytes(range(256)), b"four" * 100]
SAME = [True, False]


def plain(images) -> list[bytes]:
    return [bytes(image) for image in images]


def python2() -> bytes:
    """As Python 2 wrote it with protocol 2: byte strings are its strings."""
    strings = b"".join(
        b"U" + bytes([len(image)]) + image if len(image) < 256 else b"T" + struct.pack("<i", len(image)) + image
        for image in IMAGES
    )
    return b"\x80\x02]q\x00(" + strings + b"e]q\x01(\x88\x89e\x86q\x02."


def python2_text(images: list[bytes]) -> bytes:
    """With protocol 0, the default of Python 2: byte strings are their repr, True is 01."""
    strings = b"".join(b"S%s\np%d\na" % (repr(image)[1:].encode(), i + 2) for i, image in enumerate(images))
    return b"((lp1\n" + strings + b"(lp0\nI01\naI00\nat."


def python2_text_arrays() -> bytes:
    r"""pickle.dumps(([numpy.frombuffer(image, "u1"), ...], [True, False])), protocol 0, without its puts."""
    images = b"".join(
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I%d\ntcnumpy\ndtype\n(S'u1'\n"
        b"I0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS%s\ntba" % (len(image), repr(image)[1:].encode())
        for image in IMAGES
    )
    return b"((l" + images + b"(lI01\naI00\nat."


def python2_array(data: bytes, kind: bytes) -> bytes:
    text = lambda value: b"T" + struct.pack("<i", len(value)) + value  # noqa: E731
    length = b"J" + struct.pack("<i", len(data)) + b"\x85"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = (
        b"cnumpy\ndtype\n"
        + text(kind)
        + b"K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    return array + b"(K\x01" + length + dtype + b"\x89" + text(data) + b"tb"


def python2_arrays() -> bytes:
    images = b"".join(python2_array(image, b"u1") for image in IMAGES)
    return b"\x80\x02](" + images + b"e" + python2_array(b"\1\0", b"b1") + b"\x86."


WRITTEN = {
    "Python 2": python2(),
    "arrays of Python 2": python2_arrays(),
    "Python 2, protocol 0": python2_text(IMAGES),
    "arrays of Python 2, protocol 0": python2_text_arrays(),
    **{f"protocol {n}": pickle.dumps((IMAGES, SAME), protocol=n) for n in range(6)},
    **{
        f"arrays, protocol {n}": pickle.dumps(
            ([np.frombuffer(image, np.uint8) for image in IMAGES], np.array(SAME)), protocol=n
        )
        for n in range(6)
    },
    "a list of two, numpy booleans": pickle.dumps([IMAGES, [np.True_, np.False_]]),
    "a numpy boolean, protocol 2": pickle.dumps([IMAGES, [np.True_, np.False_]], protocol=2),
    "optimised": pickletools.optimize(pickle.dumps((IMAGES, SAME))),
}  # fmt: skip


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_every_way_of_writing_is_read(tmp_path, written):
    (tmp_path / "x.bin").write_bytes(written)
    images, same = read_bin(tmp_path / "x.bin")
    assert plain(images) == IMAGES
    assert same.tolist() == SAME
    assert same.dtype == np.bool_


@given(st.lists(st.binary(), max_size=6))
def test_strings_of_python_2_are_any_bytes(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("bin") / "x.bin"
    path.write_bytes(python2_text(images))
    assert read_pickle(path) == (images, [True, False])
    assert pickle.loads(path.read_bytes(), encoding="bytes") == (images, [True, False])


def test_what_is_written_is_read_by_pickle_too(tmp_path):
    write_bin(tmp_path / "x.bin", IMAGES, SAME)
    assert pickle.loads((tmp_path / "x.bin").read_bytes()) == (IMAGES, SAME)
    images, same = read_bin(tmp_path / "x.bin")
    assert (images, same.tolist()) == (IMAGES, SAME)
    with pytest.raises(ValueError, match="2 pairs take 4 images, got 3"):
        write_bin(tmp_path / "x.bin", IMAGES[:3], SAME)


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def malicious(target: Path) -> dict[str, bytes]:
    command = f"touch {target}"
    pickles = {
        f"{function.__module__}.{function.__qualname__}, protocol {protocol}": pickle.dumps(
            ([Runs(function, *arguments)], SAME), protocol=protocol
        )
        for protocol in range(6)
        for function, arguments in (
            (os.system, (command,)),
            (eval, (f"__import__('os').system('{command}')",)),
            (open, (str(target), "w")),
            (__import__, ("os",)),
            (np.load, (str(target),)),
            (np.ndarray, ((2**40,),)),
            (bytearray, (2**40,)),
        )
    }
    line = command.encode()
    return pickles | {
        "INST": b"(S'" + line + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + line + b"'\no.",
        "NEWOBJ": b"\x80\x02cos\nsystem\nU" + bytes([len(line)]) + line + b"\x85\x81.",
        "a function's state": b"\x80\x02c_codecs\nencode\n}b.",
        "EXT1": b"\x80\x02\x82\x01.",
        "PERSID": b"Pname\n.",
        "an encoding that runs": b"\x80\x02c_codecs\nencode\nX\x01\0\0\0xX\x05\0\0\0rot13\x86R.",
        "objects in an array": pickle.dumps((np.array([b"x"], object), SAME)),
        "a call of data": b"\x80\x02K\x01)R.",
    }


@pytest.mark.parametrize("name", malicious(Path("x")))
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, name):
    target = tmp_path / "was-run"
    (tmp_path / "x.bin").write_bytes(malicious(target)[name])
    with pytest.raises(PickleError, match=r"x\.bin has .*; only lists of bytes, uint8 and bool arrays are read"):
        read_bin(tmp_path / "x.bin")
    assert not target.exists()


def test_the_malicious_pickle_would_run(tmp_path):
    target = tmp_path / "was-run"
    pickle.loads(malicious(target)["posix.system, protocol 4"])
    assert target.exists()


HOSTILE = {
    "a string longer than the file": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x",
    "a bytearray longer than the file": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x",
    "a memo index of 2^32": b"\x80\x02]r\xff\xff\xff\xff.",
    "a frame longer than the file": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"].",
    "a shape that repeats a tuple": (
        b"\x80\x05cnumpy._core.numeric\n_frombuffer\n(C\x01xcnumpy\ndtype\nX\x02\0\0\0u1\x85R"
        b"(J\xff\xff\xff\x7f)tX\x01\0\0\0CtR."
    ),
    "a shape of ten thousand lengths": (
        b"\x80\x05J\xff\xff\xff\x7fq\0cnumpy._core.numeric\n_frombuffer\n(C\x01xcnumpy\ndtype\nX\x02\0\0\0u1\x85R("
        + b"h\0" * 10_000
        + b"tX\x01\0\0\0CtR."
    ),
    "a dict of a tuple of tuples": b"\x80\x02})" + b"q\0h\0\x86" * 60 + b"Ns.",
    "a tuple of tuples of tuples": b"\x80\x02)" + b"q\0h\0\x86" * 60 + b"cnumpy\ndtype\n)R.",
    "its own text, again and again": (
        b"\x80\x02X\xe8\x03\0\0"
        + b"x" * 1000
        + b"q\0"
        + b"c_codecs\nencode\nh\0X\x06\0\0\0latin1\x86R" * 10
        + b"."
    ),
    "no stop": b"\x80\x02]",
    "nothing": b"",
    "two results": b"]].",
    "no result": b".",
}


@pytest.mark.parametrize("written", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pickle_takes_no_memory(tmp_path, written):
    (tmp_path / "x.bin").write_bytes(written)
    tracemalloc.start()
    with pytest.raises(PickleError, match=r"x\.bin "):
        read_bin(tmp_path / "x.bin")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@given(st.sampled_from(sorted(WRITTEN)), st.lists(st.integers(0, 10**6), min_size=1, max_size=5), st.data())
def test_a_damaged_pickle_is_read_or_refused(tmp_path_factory, name, bits, data):
    damaged = bytearray(WRITTEN[name])
    for bit in bits:
        damaged[bit // 8 % len(damaged)] ^= 1 << bit % 8
    length = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    check_damaged(tmp_path_factory.mktemp("bin"), bytes(damaged[:length]))


@given(
    st.lists(st.sampled_from([op.code.encode("latin-1") for op in pickletools.opcodes]) | st.binary(max_size=5))
)
def test_random_opcodes_are_read_or_refused(tmp_path_factory, pieces):
    check_damaged(tmp_path_factory.mktemp("bin"), b"".join(pieces) + b".")


def check_damaged(folder: Path, content: bytes) -> None:
    (folder / "x.bin").write_bytes(content)
    try:
        images, same = read_bin(folder / "x.bin")
    except PickleError as error:
        assert "x.bin" in str(error)  # noqa: PT017 - no error is fine too
    else:
        assert len(images) == 2 * len(same)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"bytes", r"should hold a pair, of images and of booleans, and holds a bytes"),
        ((IMAGES, SAME, SAME), r"should hold a pair"),
        ((IMAGES, b"\1\0"), r"The second half of .* should be a list of booleans"),
        ((IMAGES, [1, 0]), r"The second half of .* should be a list of booleans"),
        ((IMAGES, [True]), r"x\.bin has 4 images for 1 pairs"),
        ((b"1234", SAME), r"x\.bin has no list of images for 2 pairs"),
        (([*IMAGES[:3], True], SAME), r"Image 3 of .*x\.bin is neither bytes nor an array of uint8"),
        (([*IMAGES[:3], np.array([True])], SAME), r"Image 3 of .*x\.bin is neither"),
    ],
)
def test_what_is_not_a_set_of_pairs_is_refused(tmp_path, content, message):
    (tmp_path / "x.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(PickleError, match=message):
        read_bin(tmp_path / "x.bin")


def test_plain_values_are_read(tmp_path):
    value = [1, 2**40, -(2**80), None, True, "text", (), (b"x", [b"y"]), 3]
    for protocol in range(6):
        (tmp_path / "x").write_bytes(pickle.dumps(value, protocol=protocol))
        assert read_pickle(tmp_path / "x") == value


# Pairs as data sets


def encoded(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (grey, grey, grey)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", [bytes, lambda data: np.frombuffer(data, np.uint8)], ids=["bytes", "arrays"])
def test_a_bin_file_as_data_set(tmp_path, kind):
    greys = [0, 51, 102, 255]
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(([kind(encoded(grey)) for grey in greys], SAME)))
    dataset = open_bin(tmp_path / "lfw.bin", evaluation_transform(4))
    images, indices = next(iter(DataLoader(dataset, 4, num_workers=1)))
    assert ((images.mean((1, 2, 3)) + 1) * 127.5).tolist() == pytest.approx(greys, abs=1e-3)
    assert indices.tolist() == [0, 1, 2, 3]
    assert dataset.pairs.tolist() == [[0, 1], [2, 3]]
    assert dataset.same.tolist() == SAME
    write_bin(tmp_path / "lfw.bin", IMAGES, SAME)
    with pytest.raises(CorruptSampleError, match=r"The sample lfw\.bin:2 cannot be read"):
        open_bin(tmp_path / "lfw.bin")[2]
    write_bin(tmp_path / "lfw.bin", [], [])
    with pytest.raises(ValueError, match=r"lfw\.bin has no pairs\."):
        open_bin(tmp_path / "lfw.bin")


LFW = "2\t1\nAnn Lee\t1\t12\nBo\t2\t3\nAnn Lee\t1\tBo\t3\nBo\t2\tAnn Lee\t12\n"


def test_pairs_of_lfw(tmp_path):
    (tmp_path / "pairs.txt").write_text(LFW)
    assert read_pairs(tmp_path / "pairs.txt") == [
        ("Ann Lee/Ann Lee_0001", "Ann Lee/Ann Lee_0012", True),
        ("Bo/Bo_0002", "Bo/Bo_0003", True),
        ("Ann Lee/Ann Lee_0001", "Bo/Bo_0003", False),
        ("Bo/Bo_0002", "Ann Lee/Ann Lee_0012", False),
    ]
    for name in ("Ann Lee/Ann Lee_0001.jpg", "Ann Lee/Ann Lee_0012.png", "Bo/Bo_0002.jpg", "Bo/Bo_0003.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(int(name[-6:-4])))
    dataset = open_pairs(tmp_path, tmp_path / "pairs.txt", color="gray")
    assert [dataset[i][0].getpixel((0, 0)) for i in range(4)] == [1, 12, 2, 3]
    assert dataset.pairs.tolist() == [[0, 1], [2, 3], [0, 3], [2, 1]]
    assert torch.equal(dataset.same, torch.tensor([True, True, False, False]))
    (tmp_path / "Bo" / "Bo_0003.jpg").rename(tmp_path / "Bo" / "Bo_0003.PNG")
    assert open_pairs(tmp_path, tmp_path / "pairs.txt").sources[3] == tmp_path / "Bo" / "Bo_0003.PNG"
    (tmp_path / "Bo" / "Bo_0003.PNG").unlink()
    with pytest.raises(FileNotFoundError, match=r"There is no image Bo/Bo_0003 in .*, with any suffix of"):
        open_pairs(tmp_path, tmp_path / "pairs.txt")


def test_pairs_of_lfw_with_spaces(tmp_path):
    (tmp_path / "pairs.txt").write_text("1\nAnn 1 12\nAnn 1 Bo 3\n")
    assert read_pairs(tmp_path / "pairs.txt") == [
        ("Ann/Ann_0001", "Ann/Ann_0012", True),
        ("Ann/Ann_0001", "Bo/Bo_0003", False),
    ]


def test_pairs_of_rfw(tmp_path):
    (tmp_path / "pairs.txt").write_text("m.01\t1\t3\nm.02\t1\t2\nm.01\t1\tm.02\t3\n")
    assert read_pairs(tmp_path / "pairs.txt") == [
        ("m.01/m.01_0001", "m.01/m.01_0003", True),
        ("m.02/m.02_0001", "m.02/m.02_0002", True),
        ("m.01/m.01_0001", "m.02/m.02_0003", False),
    ]
    (tmp_path / "pairs.txt").write_text("m.01\t1\t1\nm.02\t1\t2\n")
    assert read_pairs(tmp_path / "pairs.txt") == [
        ("m.01/m.01_0001", "m.01/m.01_0001", True),
        ("m.02/m.02_0001", "m.02/m.02_0002", True),
    ]


@pytest.mark.parametrize("genuine", [lambda i: 1, lambda i: 1 + i // 2], ids=["CPLFW", "CALFW"])
def test_pairs_of_two_lines_are_put_in_the_order_of_their_folds(tmp_path, genuine):
    """Twenty genuine pairs, then twenty impostors: two of each make a fold."""
    lines = [f"{name}_{i}.jpg {genuine(i)}\n" for i in range(20) for name in "ab"]
    lines += [f"{name}_{i}.jpg 0\n" for i in range(20) for name in "cd"]
    (tmp_path / "pairs.txt").write_text("".join(lines))
    pairs = read_pairs(tmp_path / "pairs.txt")
    assert pairs[:5] == [
        ("a_0.jpg", "b_0.jpg", True),
        ("a_1.jpg", "b_1.jpg", True),
        ("c_0.jpg", "d_0.jpg", False),
        ("c_1.jpg", "d_1.jpg", False),
        ("a_2.jpg", "b_2.jpg", True),
    ]
    assert sorted(pairs) == sorted(set(pairs))
    assert [same for *_, same in pairs] == [True, True, False, False] * 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 1\nb.jpg 1\nc.jpg 0\n", r"pairs\.txt has two lines for each pair, but 3 lines"),
        ("a.jpg 1\nb.jpg 0\n", r"The lines of a\.jpg and b\.jpg in .*pairs\.txt make a pair, but say 1 and 0"),
        ("a.jpg 1\nb.jpg\n", r"The line 'b\.jpg' of .*pairs\.txt is no image with a number"),
        (LFW.removesuffix("Bo\t2\tAnn Lee\t12\n"), r"pairs\.txt begins with 2 1, for 4 pairs, but 3 lines follow"),
        (LFW + "Bo\t1\t2\n", r"pairs\.txt begins with 2 1, for 4 pairs, but 5 lines follow"),
        ("2\nA 1 2\nA 1 B 3\n", r"pairs\.txt begins with 2, for 4 pairs, but 2 lines follow"),
        ("10\t300\n", r"pairs\.txt begins with 10 300, for 6,000 pairs, but 0 lines follow"),
        ("0\n", r"pairs\.txt has no pairs"),
        ("", r"pairs\.txt has no pairs"),
        ("\n \n", r"pairs\.txt has no pairs"),
    ],
)
def test_lines_that_make_no_pairs_are_refused(tmp_path, text, message):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / "pairs.txt")


FORMATS = {
    "LFW": LFW,
    "RFW": "m.01\t1\t3\nm.01\t1\tm.02\t3\n",
    "CPLFW": "a.jpg 1\nb.jpg 1\n",
    "YTF": "1, A/0, A/1, 1\n",
    "plain": "a/1.jpg a/2.jpg 1\n",
}


@pytest.mark.parametrize("text", FORMATS.values(), ids=FORMATS)
def test_the_mark_and_the_line_ends_of_windows_change_nothing(tmp_path, text):
    (tmp_path / "plain.txt").write_bytes(text.encode())
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_pairs(tmp_path / "windows.txt") == read_pairs(tmp_path / "plain.txt") != []


def test_pairs_of_ytf_are_put_in_the_order_of_their_splits(tmp_path):
    titles = "split number, first name, second name, is same pair, more"
    splits = [2, 1, *range(10, 2, -1)]
    pairs = [line for k in splits for line in (f"{k}, B{k}/1, C{k}/0, 0, 0", f"{k}, C{k}/0, C{k}/2, 1, 0")]
    (tmp_path / "splits.txt").write_text("\n".join([titles, *pairs]))
    found = read_pairs(tmp_path / "splits.txt")
    assert found == [
        pair for k in range(1, 11) for pair in ((f"B{k}/1", f"C{k}/0", False), (f"C{k}/0", f"C{k}/2", True))
    ]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([20] * 2 + [14] + [20] * 7, "14 pairs in split 3, 20 pairs in split 4"),
        ([20] * 5, "20 pairs in split 5.$"),
    ],
)
def test_splits_of_ytf_that_folds_would_share_are_refused(tmp_path, sizes, message):
    lines = [f"{k}, A/{i}, B/{i}, {i % 2}" for k, size in enumerate(sizes, 1) for i in range(size)]
    (tmp_path / "splits.txt").write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match=rf"should have 10 splits of as many pairs each, or one split; .*{message}"
    ):
        read_pairs(tmp_path / "splits.txt")


def test_plain_pairs(tmp_path):
    (tmp_path / "pairs.txt").write_text("a/1.jpg a/2.jpg 1\n\na/1.jpg b/1.jpg 0\n")
    assert read_pairs(tmp_path / "pairs.txt") == [("a/1.jpg", "a/2.jpg", True), ("a/1.jpg", "b/1.jpg", False)]
    (tmp_path / "pairs.txt").write_text("Doe, J/1.jpg\tDoe, J/a 2.jpg\t1\nDoe, J/1.jpg\t2, 3/1 .jpg\t0\n")
    assert read_pairs(tmp_path / "pairs.txt") == [
        ("Doe, J/1.jpg", "Doe, J/a 2.jpg", True),
        ("Doe, J/1.jpg", "2, 3/1 .jpg", False),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "1\t1\nAnn\t1\t2\nAnn\tone\t2\n",
        "1\t1\nAnn\t1\t2\nAnn\n",
        "1\nA 1 2\nA 1 B 2 3\n",
        "split,\n1, a, b, same\n",
        "split, first\n1, a, b, 0\nl, a, c, 0\n",
        "split, first\n2, a, b, 0\n, a, c, 0\n",
        '1, a, b, 0\n"1, a, c, 1"\n',
        "1, a, b, 0\nl, a, c, 1\n",
        "split, first\n",
        "a/1.jpg,b/1.jpg,0\n",
        "a b\n",
        "a b 2\n",
    ],
)
def test_a_line_that_is_no_pair_is_shown(tmp_path, text):
    (tmp_path / "pairs.txt").write_text(text)
    line = text.splitlines()[-1]
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        read_pairs(tmp_path / "pairs.txt")
    assert str(error.value) == f"The line {line!r} of {tmp_path / 'pairs.txt'} is no pair."
