"""Weights from pytorch-metric-learning, insightface and checkpoints, to one tensor in a file."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import safetensors.torch
import torch
from support import run_python
from torch import nn

from cosface_kernels import FusedArcFaceLoss, FusedCosFaceLoss, checkpoint, convert, cosface_loss


def _partial_fc_weights(classes: int, dim: int, world: int) -> list[torch.Tensor]:
    """Shares as partial_fc_v2.py makes them: num_classes // world_size, and one more on the first ranks."""
    weight = torch.randn(classes, dim)
    return list(weight.split([classes // world + (rank < classes % world) for rank in range(world)]))


@pytest.mark.parametrize("world", [1, 3, 12])
@pytest.mark.parametrize("generation", ["train_v2", "partial_fc"])
def test_insightface(tmp_path, generation, world):
    shards = _partial_fc_weights(31, 8, world)
    for rank, shard in enumerate(shards):
        if generation == "train_v2":
            content = {
                "epoch": 3,
                "global_step": 70,
                "state_dict_softmax_fc": {"weight": nn.Parameter(shard.clone())},
            }
            torch.save(content, tmp_path / f"checkpoint_gpu_{rank}.pt")
        else:
            torch.save(shard.clone(), tmp_path / f"rank_{rank}_softmax_weight.pt")
            torch.save(torch.zeros_like(shard), tmp_path / f"rank_{rank}_softmax_weight_mom.pt")
    assert convert.main(["insightface", str(tmp_path), str(tmp_path / "weight.safetensors")]) == 0
    got = safetensors.torch.load_file(tmp_path / "weight.safetensors")
    assert list(got) == ["weight"]
    assert torch.equal(got["weight"], torch.cat(shards))


def test_insightface_with_a_rank_missing(tmp_path, capsys):
    for rank in (0, 2):
        torch.save(torch.ones(2, 2), tmp_path / f"rank_{rank}_softmax_weight.pt")
    assert convert.main(["insightface", str(tmp_path), str(tmp_path / "weight.safetensors")]) == 1
    message = capsys.readouterr().err
    assert "should have files of ranks 0, 1" in message
    assert "got rank_0_softmax_weight.pt, rank_2_softmax_weight.pt" in message
    torch.save(torch.ones(2, 3), tmp_path / "rank_1_softmax_weight.pt")
    with pytest.raises(ValueError, match=r"\(2, 2\) in rank_0_softmax_weight.pt, \(2, 3\) in rank_1"):
        convert.from_insightface(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="got none"):
        convert.from_insightface(tmp_path / "empty")


class Dangerous:
    def __reduce__(self):
        return print, ("this ran",)


def test_insightface_runs_no_code_of_a_file(tmp_path, capsys):
    torch.save({"state_dict_softmax_fc": {"weight": Dangerous()}}, tmp_path / "checkpoint_gpu_0.pt")
    with pytest.raises(ValueError, match="holds more than tensors and numbers"):
        convert.from_insightface(tmp_path)
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize("entry", ["W", "weight"])
def test_pytorch_metric_learning(tmp_path, capsys, entry):
    """The converted weight gives their loss, and goes back."""
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = pml.CosFaceLoss(num_classes=30, embedding_size=8, margin=0.35, scale=64)
    state = theirs.state_dict()
    if entry not in state:  # that of the other version
        state = {entry: next(iter(state.values())).T}
    torch.save(state, tmp_path / "loss.pt")
    assert convert.main(["pml", str(tmp_path / "loss.pt"), str(tmp_path / "weight.safetensors")]) == 0
    said = {
        "W": "W of pytorch-metric-learning 2.x, (D, C)",
        "weight": "weight of pytorch-metric-learning 3.x, (C, D)",
    }
    assert f"loss.pt: {said[entry]}\n" in capsys.readouterr().out
    head = FusedCosFaceLoss(30, 8)
    convert.load_weight_(head.weight, tmp_path / "weight.safetensors")
    x, labels = torch.randn(5, 8), torch.randint(30, (5,))
    torch.testing.assert_close(head(x, labels), theirs(x, labels))
    arguments = ["to-pml", str(tmp_path / "weight.safetensors"), str(tmp_path / "back.pt"), "--entry", entry]
    assert convert.main(arguments) == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert list(back) == [entry]
    assert torch.equal(back[entry], state[entry])
    assert back[entry].is_contiguous()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("entry", ["W", "weight"])
@pytest.mark.parametrize("prefix", ["", "loss."])
@pytest.mark.parametrize("assign", [False, True])
def test_their_state_loads_into_a_head(entry, prefix, assign):
    given = FusedArcFaceLoss(30, 8)
    state = convert.to_pytorch_metric_learning(given.weight, entry)
    state = {prefix + name: tensor for name, tensor in state.items()}
    assert torch.equal(convert.from_pytorch_metric_learning(state, 30), given.weight)
    head = FusedArcFaceLoss(30, 8)
    outer = nn.ModuleDict({"loss": head}) if prefix else head
    outer.load_state_dict(state, assign=assign)
    assert torch.equal(head.weight, given.weight)
    assert head.weight.is_contiguous()
    assert list(state) == [prefix + entry]


def test_their_state_of_other_classes_is_refused():
    state = {"W": torch.ones(8, 90)}  # three centres a class
    with pytest.raises(RuntimeError, match="weight is of 90 classes in the state and of 30 in the head"):
        FusedCosFaceLoss(30, 8).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        FusedCosFaceLoss(30, 8).load_state_dict({"W": torch.ones(9, 30)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*W"):
        FusedCosFaceLoss(30, 8).load_state_dict({"weight": torch.ones(30, 8), "W": torch.ones(8, 30)})


@pytest.mark.parametrize(
    ("names", "got"),
    [(("bias",), "bias"), (("a.W", "b.W", "weight"), "a.W, b.W, weight"), (("a.weight", "weight"), "a.w")],
)
def test_a_state_with_no_weight_of_theirs_or_several_is_refused(names, got):
    with pytest.raises(KeyError, match=f"should have one entry named W or weight, got {got}"):
        convert.from_pytorch_metric_learning(dict.fromkeys(names, torch.ones(2, 3)))


def test_what_is_written_for_them_is_checked():
    with pytest.raises(ValueError, match="entry must be 'W' or 'weight', got 'w'"):
        convert.to_pytorch_metric_learning(torch.ones(3, 2), "w")
    with pytest.raises(ValueError, match=r"weight should be a tensor with two dimensions, got shape \(3,\)"):
        convert.to_pytorch_metric_learning(torch.ones(3))


def test_checkpoint(tmp_path, capsys):
    head = FusedCosFaceLoss(30, 8, dtype=torch.bfloat16)
    output = tmp_path / "weight.safetensors"
    arguments = ["checkpoint", str(tmp_path / "run"), str(output)]
    assert convert.main(arguments) == 1
    assert "holds no complete checkpoint" in capsys.readouterr().err
    checkpoint.save(tmp_path / "run", 4, head=head)
    assert convert.main([*arguments, "--name", "head/W"]) == 1
    assert "has no tensor head/W; it has head/weight." in capsys.readouterr().err
    assert convert.main(arguments) == 0
    assert torch.equal(safetensors.torch.load_file(output)["weight"], head.weight)


def _through_a_file(rank, group, folder, want):
    head = FusedCosFaceLoss(*want.shape, process_group=group)
    convert.load_weight_(head.weight, f"{folder}/given.safetensors")
    convert.save_weight(head.weight, f"{folder}/written.safetensors")
    x, labels = torch.ones(2, want.shape[1]), torch.tensor([0, len(want) - 1])
    return head(x, labels).item(), cosface_loss(
        torch.cat([x] * group.size()), want, labels.repeat(group.size())
    ).item()


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("world", [1, 3])
def test_sharded_weight(ranks, tmp_path, world, classes):
    want = torch.randn(classes, 5)
    convert.save_weight(want, tmp_path / "given.safetensors")
    for got, right in ranks.results(world, _through_a_file, str(tmp_path), want):
        assert got == pytest.approx(right, rel=1e-5)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "written.safetensors")["weight"], want)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match=rf"has a weight of shape \({classes}, 5\), not \(3, 5\)"):
        convert.load_weight_(torch.empty(3, 5), tmp_path / "given.safetensors")


def _where_it_cannot_be_written(rank, group, path, full=-1, exponent=None):
    """On one rank the disk is full, or the second is given exponents."""
    head = FusedCosFaceLoss(2000, 8, process_group=group)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        convert.save_weight(head.weight, path, exponent if rank == 1 else None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (("file/weight",), OSError, "(Not a directory|File exists): '.*file"),
        (("folder",), IsADirectoryError, "folder is a folder, not the name of a file to write"),
        (("weight", 0), OSError, "writing .*weight failed on rank 0: .*File too large"),
        (("weight", 1), OSError, "writing .*weight failed on rank 1: .*File too large"),
        (("weight", -1, torch.ones(2000)), ValueError, "weight_exponent must be"),
    ],
    ids=["under a file", "a folder", "full on the first", "full on the second", "other arguments"],
)
def test_every_rank_is_told_why_a_weight_is_not_written(ranks, tmp_path, arguments, error, sentence):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    name, *others = arguments
    for result in ranks.run(2, _where_it_cannot_be_written, tmp_path / name, *others):
        with pytest.raises(error, match=sentence):
            raise result


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize(
    "content", [nn.Linear(2, 3), {"W": torch.ones(2, 3), "lr": np.float64(0.1)}], ids=["module", "numpy"]
)
def test_a_file_of_more_than_tensors_is_refused_with_a_sentence(tmp_path, capsys, content, archive):
    torch.save(content, tmp_path / "loss.pt", _use_new_zipfile_serialization=archive)
    assert convert.main(["pml", str(tmp_path / "loss.pt"), str(tmp_path / "weight.safetensors")]) == 1
    message = capsys.readouterr().err
    assert "loss.pt holds more than tensors and numbers" in message
    assert "Traceback" not in message
    assert "Weights only" not in message


def _save(content, name):
    def make(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save(content, folder / name)

    return make


def _shorten(folder):
    _save({"W": torch.ones(2, 3)}, "loss.pt")(folder)
    (folder / "loss.pt").write_bytes((folder / "loss.pt").read_bytes()[:200])


def _checkpoint(shorten):
    def make(folder):
        path = checkpoint.save(folder / "run", 1, head=nn.Linear(2, 3))
        for file in path.iterdir() if shorten else ():
            file.write_bytes(file.read_bytes()[:40])

    return make


LOSS, HEAD = "loss.pt", "run/checkpoint_gpu_0.pt"
UNFIT = {
    "no folder": (
        _save({"W": torch.ones(2, 3)}, LOSS),
        ("pml", LOSS, "absent/out"),
        "absent/out could not be written: ",
    ),
    "a folder": (
        _save({"W": torch.ones(2, 3)}, LOSS),
        ("pml", LOSS, "."),
        ". is a folder, not the name of a file to write.",
    ),
    "W of no tensor": (
        _save({"W": 3}, LOSS),
        ("pml", LOSS, "out"),
        "W should be a tensor with two dimensions, got int.",
    ),
    "short": (_shorten, ("pml", LOSS, "out"), "loss.pt is damaged, or no file of torch.save: "),
    "empty": (
        lambda folder: (folder / LOSS).touch(),
        ("pml", LOSS, "out"),
        "loss.pt is damaged, or no file of torch.s",
    ),
    "text": (
        lambda folder: (folder / LOSS).write_text("hello"),
        ("pml", LOSS, "out"),
        "loss.pt is damaged, or no file",
    ),
    "text that pickle begins to read": (
        lambda folder: (folder / LOSS).write_text("# hello"),
        ("pml", LOSS, "out"),
        "loss.pt is damaged, or no file of torch.save.",
    ),
    "of a folder": (
        lambda folder: (folder / LOSS).mkdir(),
        ("pml", LOSS, "out"),
        "loss.pt is a folder, not a file of torch.save.",
    ),
    "no head": (
        _save({"epoch": 1}, HEAD),
        ("insightface", "run", "out"),
        "should have an entry named state_dict_softm",
    ),
    "head of none": (
        _save({"state_dict_softmax_fc": None}, HEAD),
        ("insightface", "run", "out"),
        "should have an entry named weight, got NoneType.",
    ),
    "to-pml, no folder": (
        lambda folder: convert.save_weight(torch.ones(3, 2), folder / "weight"),
        ("to-pml", "weight", "absent/out"),
        "absent/out could not be written: ",
    ),
    "to-pml, a folder": (
        lambda folder: convert.save_weight(torch.ones(3, 2), folder / "weight"),
        ("to-pml", "weight", "."),
        ". is a folder, not the name of a file to write.",
    ),
    "to-pml, no safetensors": (
        _save({"W": torch.ones(2, 3)}, LOSS),
        ("to-pml", LOSS, "out"),
        "loss.pt is no safetensors file with a weight: ",
    ),
    "to-pml, of a folder": (
        lambda folder: (folder / "weight").mkdir(),
        ("to-pml", "weight", "out"),
        "weight is a folder, not a file of save_weight.",
    ),
    "insightface, no folder": (
        lambda folder: None,
        ("insightface", "run", "out"),
        "run is no folder that is there.",
    ),
    "over the input": (
        _save({"W": torch.ones(2, 3)}, LOSS),
        ("pml", LOSS, LOSS),
        "loss.pt is the input, which would be lost; name another file to write.",
    ),
    "insightface, other classes": (
        _save({"state_dict_softmax_fc": {"weight": torch.ones(3, 2)}}, HEAD),
        ("insightface", "run", "out", "--classes", "2"),
        "run has 3 classes, not the 2 of --classes.",
    ),
    "to-pml, other classes": (
        lambda folder: convert.save_weight(torch.ones(3, 2), folder / "weight"),
        ("to-pml", "weight", "out", "--classes", "2"),
        "weight has 3 classes, not the 2 of --classes.",
    ),
    "checkpoint, other classes": (
        _checkpoint(shorten=False),
        ("checkpoint", "run", "out", "--name", "head/weight", "--classes", "2"),
        "run has 3 classes, not the 2 of --classes.",
    ),
    "vector": (
        _checkpoint(shorten=False),
        ("checkpoint", "run", "out", "--name", "head/bias"),
        "head/bias should be a tensor with two dimensions, got shape (3,).",
    ),
    "short checkpoint": (
        _checkpoint(shorten=True),
        ("checkpoint", "run", "out"),
        "step-000000000001-000001 failed: ",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_converted_is_said_in_a_line(tmp_path, monkeypatch, capsys, name):
    make, arguments, sentence = UNFIT[name]
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    assert convert.main(arguments) == 1
    *hints, line = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert all("--classes was not given" in hint for hint in hints)
    assert not (tmp_path / "out").exists()


def test_what_is_no_weight_is_not_loaded(tmp_path):
    (tmp_path / "text").write_text("hello world")
    safetensors.torch.save_file({"W": torch.ones(3, 2)}, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match=f"{name} is no safetensors file with a weight: "):
            convert.load_weight_(torch.empty(3, 2), tmp_path / name)
    with pytest.raises(IsADirectoryError, match=r" is a folder, not a file of save_weight\."):
        convert.load_weight_(torch.empty(3, 2), tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        convert.load_weight_(torch.empty(3, 2), tmp_path / "absent")
    with pytest.raises(
        TypeError, match=r"weight must be a torch.Tensor, such as head.weight, got FusedCosFaceLoss\."
    ):
        convert.load_weight_(FusedCosFaceLoss(3, 2), tmp_path / "other")


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (
            FusedCosFaceLoss(3, 2),
            TypeError,
            r"weight must be a torch.Tensor, such as head.weight, got FusedCos",
        ),
        (3, TypeError, r"weight must be a torch.Tensor, such as head.weight, got int\."),
        (torch.ones(3), ValueError, r"weight should be a tensor with two dimensions, got shape \(3,\)"),
        (torch.ones(()), ValueError, r"weight should be a tensor with two dimensions, got shape \(\)"),
        (torch.ones(3, 2).long(), ValueError, r"weight must be in a dtype that a head can have, got torch.int64"),
        (
            torch.ones(3, 2) + 1j,
            ValueError,
            r"weight must be in a dtype that a head can have, got torch.complex",
        ),
    ],
    ids=["head", "number", "vector", "scalar", "integers", "complex"],
)
def test_what_is_no_weight_is_neither_saved_nor_filled(tmp_path, weight, error, message):
    safetensors.torch.save_file({"weight": torch.ones(3, 2)}, tmp_path / "good")
    for call, path in ((convert.save_weight, tmp_path / "new"), (convert.load_weight_, tmp_path / "good")):
        with pytest.raises(error, match=message):
            call(weight, path)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("entry", ["W", "weight"])
@pytest.mark.parametrize(
    ("value", "got"),
    [
        (3, "3"),
        ("text", "'text'"),
        (torch.tensor(2.0), r"torch\.float32 of shape \(\)"),
        (torch.ones(8), r".*\(8,\)"),
    ],
    ids=["number", "text", "scalar", "vector"],
)
def test_a_state_without_a_matrix_is_refused(entry, value, got, dtype, assign):
    head = FusedCosFaceLoss(8, 8, dtype=dtype)
    before = {name: each.clone() for name, each in head.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"weight must be a tensor with two dimensions, got {got} in the state"):
        head.load_state_dict({entry: value}, assign=assign)
    torch.testing.assert_close(head.state_dict(), before, rtol=0, atol=0)


def test_several_centres_a_class_are_seen_by_their_number(tmp_path, capsys):
    """SubCenterArcFaceLoss has a W of (D, 3 C) by default."""
    torch.save({"W": torch.randn(8, 30)}, tmp_path / "loss.pt")
    arguments = ["pml", str(tmp_path / "loss.pt"), str(tmp_path / "weight.safetensors")]
    assert convert.main([*arguments, "--classes", "10"]) == 1
    assert "each of 10 classes, got 30 centres" in capsys.readouterr().err
    assert convert.main(arguments) == 0
    assert "--classes was not given" in capsys.readouterr().err
    assert convert.main([*arguments, "--classes", "30"]) == 0
    assert capsys.readouterr().err == ""
    torch.save([1], tmp_path / "loss.pt")
    assert convert.main(arguments) == 1
    assert "should hold a state_dict, got list" in capsys.readouterr().err


def test_says_what_to_install_without_safetensors():
    done = run_python(
        "import importlib, importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'safetensors' else find(name, *rest)\n"
        "for module in 'convert', 'checkpoint':\n"
        "    try:\n"
        "        importlib.import_module(f'cosface_kernels.{module}')\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    said = done.stdout.count("need safetensors, which is not installed: pip install safetensors")
    assert said == 2, done.stdout + done.stderr
