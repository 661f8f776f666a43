"""The training recipe in miniature: it learns, stops, goes on, and says what is wrong."""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import patience, run_python
from support.evaluation import colour_of, encoded, write_images
from support.ranks import LARGEST_WORLD
from support.recipe import FONTS, as_arguments, assert_same_training, launch, launch_several, losses, some_glyphs

import glyphs_to_records
import identify_faces
import train
import verify_faces
from cosface_kernels import checkpoint
from cosface_recipes import batches, export, recognition, training
from cosface_recipes.data import glyphs
from cosface_recipes.data.image_datasets import open_dataset
from cosface_recipes.data.pairs import write_bin
from cosface_recipes.initial import whose_images


def test_each_epoch_is_an_order_of_its_own_and_the_processes_share_each_batch():
    whole = list(batches.Batches(23, 4, seed=0, start=0, stop=15))
    epochs = [[index for batch in whole[i : i + 5] for index, _ in batch] for i in (0, 5, 10)]
    for epoch in epochs:
        assert len(set(epoch)) == 20
        assert set(epoch) <= set(range(23))
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({seed for batch in whole for _, seed in batch}) == 60
    assert list(batches.Batches(23, 4, seed=0, start=7, stop=15)) == whole[7:]
    assert list(batches.Batches(23, 4, seed=1, start=0, stop=15)) != whole
    halves = [list(batches.Batches(23, 4, 0, 0, 15, rank, world=2)) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert sorted(batch) == sorted(parts[0] + parts[1])
        assert [len(part) for part in parts] == [2, 2]


def test_the_glyphs_of_the_repository_become_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(glyphs_to_records, "load_glyphs", lambda split, _: some_glyphs(split, fonts=3))
    glyphs_to_records.main([str(tmp_path)])
    assert f"{tmp_path / 'test'}: 36 images of 12 identities" in capsys.readouterr().out
    images, records = some_glyphs("train", fonts=3), open_dataset(tmp_path / "train", color="gray")
    assert records.labels.tolist() == images.labels.sort(stable=True).values.tolist()
    for i, row in enumerate(images.labels.argsort(stable=True).tolist()):
        assert np.array_equal(np.asarray(records[i][0]), images.pixels[row, 0].numpy())


def test_training_learns_and_leaves_a_model_that_decides(settings, data, capsys):
    train.main(as_arguments(settings))
    curve = losses(settings.output)
    assert [step for step, _ in curve] == list(range(1, 21))
    assert curve[-1][1] < 0.9 * curve[0][1]
    printed = capsys.readouterr()
    assert "loss=" in printed.err
    assert "images/s" in printed.err
    assert re.search(r"data=\d+%, head=\d+%", printed.err)
    assert "72 images of 12 identities, steps 0 to 20, 4 an epoch, on cpu" in printed.out
    assert len(re.findall(r"^test +48 +\d", printed.out, re.MULTILINE)) == 5  # an evaluation per epoch
    assert "model.safetensors reproduces the embeddings" in printed.out

    # verify_faces.py and identify_faces.py, on images of the test set
    records = open_dataset(data / "test", color="gray")
    gallery = Path(settings.output) / "gallery"
    paths = {}
    for i, label in enumerate(records.labels.tolist()):
        path = gallery / f"syllable{label:02}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        records[i][0].save(path)
        paths.setdefault(label, []).append(path)
    cosines = {}
    for model in ("", "model.onnx", "model.safetensors"):
        for a, b in (
            (paths[0][0], paths[0][0]),
            (paths[0][0], paths[1][0]),
            (gallery / "syllable00", gallery / "syllable01"),
        ):
            verify_faces.main([str(Path(settings.output) / model), str(a), str(b)])
            first, second = capsys.readouterr().out.splitlines()
            cosine = float(first.removeprefix("cosine "))
            cosines.setdefault((a, b), set()).add(cosine)
            threshold = float(
                re.search(r"threshold (\S+) \(FAR 0\.05 of 1,056 impostor pairs of test\)", second)[1]
            )
            assert second.startswith("same identity" if cosine > threshold else "different identities")
    assert cosines[paths[0][0], paths[0][0]] == {1.0}
    for values in cosines.values():
        assert max(values) - min(values) <= 2e-4  # printed with four digits
    probe = paths[3][2]
    identify_faces.main([settings.output, str(gallery), str(probe), "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(probe)
    assert len(lines) == 4
    embedder = recognition.Recognizer(Path(settings.output))
    expected = {
        name: float(embedder.identity(gallery / name) @ embedder.identity(probe)) for name in os.listdir(gallery)
    }
    best = max(expected, key=expected.get)
    assert lines[1].split()[-2:] == [f"{expected[best]:.4f}", best]


def test_records_and_folders_and_worker_processes_train_alike(settings, data, tmp_path, without_export):
    train.main(as_arguments(settings))
    other = dataclasses.replace(
        settings, train=str(data / "folders"), workers=2, output=str(tmp_path / "other"), evaluate_every=0
    )
    train.main(as_arguments(other))
    assert_same_training(settings.output, other.output)


@pytest.mark.parametrize("amp", ["no", "fp16"])
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(
    settings, tmp_path, monkeypatch, capsys, without_export, amp
):
    settings = dataclasses.replace(settings, amp=amp, clip=1.0, steps=6, batch_size=4)  # fp16 is slow on a CPU
    train.main(as_arguments(settings))
    stopped = dataclasses.replace(settings, output=str(tmp_path / "stopped"), resume=True)
    learn = training.Training.learn

    def learn_and_terminate(self, *batch):
        if self.step == 1:  # in the middle of an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(self, *batch)

    monkeypatch.setattr(training.Training, "learn", learn_and_terminate)
    train.main(as_arguments(stopped))
    assert "SIGTERM: saved step 2 in " in capsys.readouterr().out
    monkeypatch.setattr(training.Training, "learn", learn)
    train.main(as_arguments(stopped))
    assert_same_training(settings.output, stopped.output)


@pytest.mark.parametrize("method", ["learn", "evaluate"])
def test_an_evaluation_that_did_not_come_to_its_end_is_made_on_resume(
    settings, monkeypatch, capsys, without_export, method
):
    """A SIGTERM in the last step of an epoch leaves it out; a crash in it comes behind the checkpoint."""
    settings = dataclasses.replace(settings, epochs=2, resume=True)
    whole = getattr(training.Training, method)

    def end(self, *batch):
        if method == "evaluate":
            raise OSError("it ends here")
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, method, end)
        with contextlib.suppress(SystemExit):
            train.main(as_arguments(settings))
    assert "step 4\n" not in capsys.readouterr().out
    train.main(as_arguments(settings))
    assert re.findall(r"^step \d+$", capsys.readouterr().out, re.MULTILINE) == ["step 4", "step 8"]


def test_sigterm_saves_and_exits_with_0(settings):
    settings = dataclasses.replace(settings, steps=100_000, checkpoint_every=3, evaluate_every=0, workers=1)
    process = launch(settings)
    folder = Path(settings.output) / training.CHECKPOINTS
    end = time.monotonic() + patience(120)
    while checkpoint.latest(folder) is None and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does, the loader's workers with it
    out, err = process.communicate(timeout=patience(120))
    assert process.returncode == 0, err
    step = int(re.search(r"SIGTERM: saved step (\S+) in ", out)[1].replace(",", ""))
    assert checkpoint.latest(folder).name.startswith(f"step-{step:012}-")
    assert not (Path(settings.output) / export.ONNX).exists()


def _stops(rank, group, told):
    world = SimpleNamespace(world=LARGEST_WORLD, device=torch.device("cpu"))
    return bool(training.Training.any_process(world, torch.tensor(rank == told)))


@pytest.mark.parametrize("told", [0, LARGEST_WORLD - 1, None])
def test_all_processes_stop_where_one_is_told_to(ranks, told):
    assert ranks.results(LARGEST_WORLD, _stops, told) == [told is not None] * LARGEST_WORLD


@pytest.mark.parametrize("processes", [2, 3])  # of three or more, sums depend on their order
def test_several_processes_train_as_one_program(settings, tmp_path, processes):
    """And go on from a checkpoint as if they had not stopped, bit for bit."""
    settings = dataclasses.replace(settings, epochs=3)
    out = launch_several(settings, processes)
    assert out.count("72 images of 12 identities") == 1
    assert [step for step, _ in losses(settings.output)] == list(range(1, 13))
    assert losses(settings.output)[-1][1] < losses(settings.output)[0][1]
    assert export.load(Path(settings.output))[1].threshold is not None
    stopped = dataclasses.replace(settings, output=str(tmp_path / "stopped"), resume=True)
    shutil.copytree(settings.output, stopped.output)
    shutil.rmtree(checkpoint.latest(tmp_path / "stopped" / training.CHECKPOINTS))
    assert "steps 8 to 12" in launch_several(stopped, processes)
    assert_same_training(settings.output, stopped.output)


def test_a_loss_that_is_not_finite_stops_with_the_keys_of_its_batch(settings):
    settings = dataclasses.replace(settings, learning_rate=1e30, warm_up=0)
    with pytest.raises(SystemExit, match=r"The loss became (nan|inf) at step \d+ of 20") as stop:
        train.main(as_arguments(settings))
    keys = re.findall(r"train\.rec:\d+", str(stop.value))
    assert len(set(keys)) == 18
    assert "below 1e+30" in str(stop.value)


def test_an_error_ends_the_workers_too(settings):
    process = launch(dataclasses.replace(settings, learning_rate=1e30, warm_up=0, workers=2))
    _, err = process.communicate(timeout=patience(120))
    assert process.returncode == 1
    assert "The loss became" in err


def test_a_checkpoint_is_neither_overwritten_nor_taken_for_another_training(settings, without_export):
    settings = dataclasses.replace(settings, epochs=1, test=())
    train.main(as_arguments(settings))
    with pytest.raises(SystemExit, match=r"checkpoints exists: --resume goes on from it"):
        train.main(as_arguments(settings))
    changed = dataclasses.replace(settings, resume=True, margin=(0.2,), workers=1)
    with pytest.raises(SystemExit, match=r"of another training: margin was 0\.1 and is 0\.2\.$"):
        train.main(as_arguments(changed))


CHANGES_OF_DATA = {
    "a renamed identity": (lambda folder: (folder / "00").rename(folder / "99"), "72 images of 12"),
    "an image less": (lambda folder: (folder / "03" / "003.png").unlink(), "71 images of 12"),
    "another's": (lambda folder: (folder / "03" / "003.png").rename(folder / "04" / "0.png"), "72 images of 12"),
    "an identity less": (lambda folder: shutil.rmtree(folder / "05"), "66 images of 11"),
}


@pytest.mark.parametrize("batch_size", [18, 72])  # the second is reduced to what is left
def test_a_training_goes_on_with_the_images_and_identities_that_it_had(
    settings, data, tmp_path, without_export, batch_size
):
    """Else its labels and its order are others, and rows of the head belong to other people."""
    people = tmp_path / "people"
    shutil.copytree(data / "folders", people)
    settings = dataclasses.replace(
        settings, train=str(people), batch_size=batch_size, epochs=1, test=(), resume=True
    )
    train.main(as_arguments(settings))
    labels = r"identities \(labels \w{16}\)"
    for change, now in CHANGES_OF_DATA.values():
        change(people)
        message = rf"of a training on 72 images of 12 {labels}, and {people} has {now} {labels}: the head's rows"
        with pytest.raises(SystemExit, match=message):
            train.main(as_arguments(settings))
        shutil.rmtree(people)
        shutil.copytree(data / "folders", people)
    (Path(settings.output) / training.DATA).unlink()  # as of a training from before this was kept
    for epochs in (2, 3):
        train.main(as_arguments(dataclasses.replace(settings, epochs=epochs)))


def test_records_are_of_other_data_if_a_label_is_another(settings, data, tmp_path):
    images = some_glyphs("train", FONTS)
    images.labels[0] = 1
    glyphs.write_records(images, tmp_path / "others")
    texts = [whose_images(open_dataset(folder)) for folder in (data / "train", tmp_path / "others")]
    assert [text.partition(" (")[0] for text in texts] == ["72 images of 12 identities"] * 2
    assert texts[0] != texts[1]
    assert texts[0] == whose_images(open_dataset(data / "train" / "train.rec", color="gray"))


def test_a_model_without_test_data_has_no_threshold(settings, data, capsys):
    settings = dataclasses.replace(settings, epochs=1, test=())
    train.main(as_arguments(settings))
    images = sorted((data / "folders").glob("*/*.png"))[:2]
    capsys.readouterr()
    verify_faces.main([settings.output, *map(str, images)])
    assert "no decision: the model was exported without a threshold" in capsys.readouterr().out
    verify_faces.main([settings.output, *map(str, images), "--threshold", "-1"])
    assert "same identity: threshold -1.0000 (as given)" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_skipped_and_counted_or_stops_the_training(
    settings, tmp_path, capsys, without_export, workers
):
    images = some_glyphs("train", FONTS)
    images.pixels[0] = 0
    folder = tmp_path / "broken"
    glyphs.write_records(images, folder)
    records = bytearray((folder / "train.rec").read_bytes())
    blank = records.index(glyphs.png(images.pixels[0, 0].numpy()))
    records[blank : blank + 20] = bytes(20)
    (folder / "train.rec").write_bytes(records)
    settings = dataclasses.replace(settings, train=str(folder), epochs=1.5, test=(), workers=workers)
    train.main(as_arguments(dataclasses.replace(settings, on_corrupt="skip")))
    assert "1 images could not be read and were skipped: train.rec:1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^The sample train\.rec:1 cannot be read: .* leaves it out\.$"):
        train.main(as_arguments(dataclasses.replace(settings, output=str(tmp_path / "stops"))))


@pytest.mark.parametrize("processes", [1, 2])
def test_every_skipped_image_of_every_process_is_listed_whatever_its_name(
    settings, data, tmp_path, monkeypatch, processes
):
    """And a name that is no UTF-8, which stdout refuses under most locales, does not end what was trained."""
    shutil.copytree(data / "folders", tmp_path / "folders")
    for label in range(0, 12, 2):
        (tmp_path / "folders" / f"{label:02}" / os.fsdecode(b"z\xfc.png")).write_bytes(b"")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    changes = {"train": str(tmp_path / "folders"), "test": (), "epochs": 1, "batch_size": 26, "on_corrupt": "skip"}
    out = launch_several(dataclasses.replace(settings, **changes), processes)
    names = ", ".join(f"{label:02}/z\\udcfc.png" for label in range(0, 12, 2))
    assert f"6 images could not be read and were skipped: {names}\n" in out
    assert (Path(settings.output) / export.WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ""}, "train must name the training data"),
        ({"train": "/no/such"}, "/no/such"),
        ({"model": "vgg"}, "model must be one of"),
        ({"test": ("/no/such",)}, "There is no test data /no/such"),
        ({"device": "gpu"}, "device must be one of PyTorch's, such as cpu or cuda, got 'gpu'"),
        ({"device": "meta"}, "PyTorch cannot compute on device 'meta' here: .* meta tensors"),
        ({"device": "hpu"}, "PyTorch cannot compute on device 'hpu' here: "),
        ({"device": "vulkan"}, r"PyTorch cannot compute on device 'vulkan' here: [^.]*'aten::\w+\.[^.]*\.$"),
        ({"device": "cuda:99"}, r"PyTorch sees \d+ GPUs, and device is 'cuda:99'"),
    ],
    ids=str,
)
def test_a_training_that_cannot_start_says_why(settings, change, message):
    with pytest.raises(SystemExit, match=message):
        train.main(as_arguments(dataclasses.replace(settings, **change)))


def test_more_processes_than_gpus_are_told_so(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="PyTorch sees 1 GPUs here, too few for process 1 of torchrun"):
        training.device_of(dataclasses.replace(settings, device="cuda"))


CODE = """
import sys, weakref
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from cosface_kernels import FusedCosFaceLoss
from cosface_kernels.optim import FusedSGD
from cosface_recipes import config, training
def train():
    backbone = DistributedDataParallel(torch.nn.Linear(3, 4))
    head = FusedCosFaceLoss(5, 4, process_group=dist.group.WORLD)
    optimizer = FusedSGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    head(backbone(torch.ones(2, 3)), torch.tensor([0, 4])).backward()
    optimizer.step()
    if sys.argv[1] == "fails":
        raise ValueError("it cannot go on")
try:
    with training.process_group(config.Config(device="cpu")):
        held = weakref.ref(dist.group.WORLD)
        train()
except ValueError:
    pass
assert held() is None
"""


@pytest.mark.parametrize("end", ["is done", "fails"])
def test_nothing_holds_the_process_group_of_a_training_that_ends(end):
    """Whose threads would go on, and abort Python's end now and then."""
    of_torchrun = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "1"}
    done = run_python(CODE, end, MASTER_ADDR="127.0.0.1", MASTER_PORT="0", **of_torchrun)
    assert done.returncode == 0, done.stderr


def bad_test_data(kind: str, folder: Path) -> Path:
    people = {"one image each": [0, 1, 2, 3], "one identity": [0, 0, 0, 0]}.get(kind, [0, 0, 1, 1])
    if kind.startswith("pairs"):
        same = [True] * 20 if kind == "pairs of one kind" else [True, False] * 10
        images = [b"no image" if (i, kind) == (3, "pairs of no image") else encoded((i, 0, 0)) for i in range(40)]
        write_bin(folder / "test.bin", images, same)
        return folder / "test.bin"
    names = [f"{label}/{i}.png" for i, label in enumerate(people)]
    write_images(folder / "test", names, [colour_of(i, 0) for i in range(4)])
    if kind == "no image":
        (folder / "test" / names[2]).write_bytes(b"no image")
    return folder / "test" / "0" if kind == "no identity" else folder / "test"


BAD_TEST_DATA = {
    "no identity": r"has no sub-folder with images",
    "one image each": r"4 test images of 4 identities make 0 genuine and 6 impostor pairs",
    "one identity": r"4 test images of 1 identities make 6 genuine and 0 impostor pairs",
    "no image": r"The sample 1/2\.png cannot be read",
    "pairs of one kind": r"Fold 0, or the others together, lack genuine or impostor pairs",
    "pairs of no image": r"The sample test\.bin:3 cannot be read: .* an image of a pair cannot be left out\.$",
}


@pytest.mark.parametrize("kind", BAD_TEST_DATA)
def test_test_data_that_cannot_be_measured_end_a_training_before_its_first_step(settings, data, tmp_path, kind):
    bad = bad_test_data(kind, tmp_path)
    settings = dataclasses.replace(settings, test=(str(data / "test"), str(bad)), evaluate_every=0)
    with pytest.raises(
        SystemExit, match=rf"The test data {re.escape(str(bad))} cannot be used: .*{BAD_TEST_DATA[kind]}"
    ):
        train.main(as_arguments(settings))
    assert not Path(settings.output).exists()


def test_what_ends_the_first_process_ends_the_others_with_its_sentence(settings, tmp_path):
    bad = bad_test_data("one identity", tmp_path)
    process = launch(
        dataclasses.replace(settings, test=(str(bad),)),
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    )
    _, err = process.communicate(timeout=patience(240))
    sentence = f"The test data {bad} cannot be used"
    assert (err.count(sentence), err.count(f"rank 0 refused: {sentence}")) == (2, 1), err
    assert f'{Path(train.__file__).name}", line' not in err


def test_half_precision_trains(settings, without_export):
    train.main(as_arguments(dataclasses.replace(settings, amp="bf16", epochs=3)))
    curve = losses(settings.output)
    assert curve[-1][1] < curve[0][1]


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(settings, capsys, without_export):
    settings = dataclasses.replace(settings, epochs=2, test=(), resume=True)
    train.main(as_arguments(settings))
    newest = checkpoint.latest(Path(settings.output) / training.CHECKPOINTS)
    for file in newest.glob("*.safetensors"):
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(
        SystemExit, match=rf"cannot be loaded: .*{newest.name}.* --resume goes on from the one before"
    ):
        train.main(as_arguments(settings))
    shutil.rmtree(newest)
    train.main(as_arguments(settings))
    assert "steps 4 to 8" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", "epochs", "batch_siz"], ids=repr)
def test_damaged_settings_of_a_training_are_named_with_what_to_do(settings, content, without_export):
    settings = dataclasses.replace(settings, epochs=1, test=(), resume=True)
    train.main(as_arguments(settings))
    file = Path(settings.output) / training.SETTINGS
    whole = file.read_text()
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit, match=rf"cannot be read: .* --resume goes on when they are in {file} again"):
        train.main(as_arguments(settings))
    file.write_text(whole)
    train.main(as_arguments(settings))


def test_each_process_needs_two_images(settings):
    settings = dataclasses.replace(settings, batch_size=2)
    assert training.fit_batch(settings, images=72, world=1) == (settings, "")
    assert training.fit_batch(settings, images=2, world=1) == (settings, "")
    with pytest.raises(ValueError, match="batch_size must be two images for each of 2 processes, got 2"):
        training.fit_batch(settings, images=72, world=2)
