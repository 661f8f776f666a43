"""The model of a step on a GPU: its bounds, and that it ranks what it can."""

import argparse
import json
from dataclasses import replace

import pytest

from bench import model
from bench.model import DEVICES, Kernel, Library
from cosface_kernels.backends.triton.tiles import GEMM_KERNELS

H100 = DEVICES[1]


def row(kernel="logit_gradients", registers=128, shared=40 << 10, **config):
    config = {"n": 128, "c": 128, "d": 64, "warps": 8, "stages": 3} | config
    common = {"arch": "sm_90", "variant": "plain", "dtype": "bf16 x bf16", "dim": 512, "spill_bytes": 0}
    found = {"registers": registers, "shared_bytes": shared, "slots": 3, "pending": 1}
    return {**common, **found, "kernel": kernel, "config": config}


def kernel(*arguments, N=1024, chunk=67584, **options):
    return Kernel(row(*arguments, **options), H100, N, 10**6, 512, chunk)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "resident"),
    [(128, 1 << 10, 8, 2), (129, 1 << 10, 8, 1), (32, 100 << 10, 8, 2), (32, 1 << 10, 4, 16), (255, 1, 16, 1)],
)
def test_blocks_of_a_multiprocessor_share_registers_memory_and_threads(registers, shared, warps, resident):
    assert kernel(registers=registers, shared=shared, warps=warps).resident == resident


def test_no_kernel_is_faster_than_its_products():
    floor = 2 * 1024 * 10**6 * 512 / (model.SUSTAINED * H100.tflops * 1e12)
    for name in GEMM_KERNELS:
        for n in (16, 64, 128):
            some = kernel(name, n=n)
            assert some.seconds() >= floor
            assert some.parts()["products"] >= floor
    assert Library(row("embedding_gradients"), H100, 1024, 10**6, 512, 67584).seconds() == pytest.approx(floor)


def test_whole_waves_leave_nothing_idle():
    """8 row blocks for each 128 classes on 132 multiprocessors, two on each."""
    whole, broken = kernel(chunk=128 * 33), kernel(chunk=128 * 34)
    assert (whole.waves, broken.waves) == (1, 34 / 33)
    assert broken.parts()["products"] == pytest.approx(whole.parts()["products"] * 2 * 33 / 34)


def test_larger_blocks_read_less():
    assert kernel(n=128, c=256).parts()["L2"] == pytest.approx(0.75 * kernel().parts()["L2"])
    assert kernel(n=16).parts()["L2"] > 4 * kernel().parts()["L2"]


def test_a_specialised_kernel_hides_its_epilogue_and_reads_x_once():
    one = model._kernel(row(warps=12, registers=168, specialized=True), H100, 1024, 10**6, 512)
    parts, plain = one.parts(), kernel().parts()
    assert one.seconds() == max(parts.values())
    assert 0 < parts["epilogue"] < parts["products"]
    assert parts["L2"] == pytest.approx(plain["L2"] / 2)
    assert one.waves == 128 / 132, "16 programs for each of 8 row blocks"


def test_a_faster_device_takes_less_time():
    rows = [row(name) for name in GEMM_KERNELS]
    h100, _ = model.step(rows, H100, 1024, 10**6, 512)
    h200, launches = model.step(rows, replace(H100, memory_tb=4.8), 1024, 10**6, 512)
    assert [k.row["kernel"] for k in h200] == list(GEMM_KERNELS)
    assert sum(k.seconds() for k in h200) <= sum(k.seconds() for k in h100)
    assert launches == 5 + 3 * 15  # chunks in the workspace


def test_table_of_all_devices(tmp_path, capsys):
    rows = [{**row(name), "arch": arch} for name in GEMM_KERNELS for arch in ("sm_80", "sm_90", "sm_100")]
    rows += [{**row(GEMM_KERNELS[0], n=256), "spill_bytes": 24}]  # which is not taken
    rows += [row(GEMM_KERNELS[0], n=512, specialized=True)]  # nor is this, unless asked for
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps(rows))
    args = argparse.Namespace(
        kernels=file, batch=[256, 1024], dim=512, classes=10**6, kernels_too=True, specialized=False
    )
    assert model.run(args) == 0
    lines = capsys.readouterr().out.splitlines()
    steps, tiles = lines[: lines.index("")], lines[lines.index("") + 1 :]
    assert sum(line.startswith("|") for line in steps) == 2 + 2 * len(DEVICES)
    assert len(steps) == 2 + 2 * len(DEVICES) * (1 + len(GEMM_KERNELS))
    assert len(tiles) == 2 + len(DEVICES) * len(GEMM_KERNELS)
    assert not any(f"{n} x 128" in line for line in lines for n in (256, 512))


def test_every_tile_is_listed_with_its_waves_and_its_time(tmp_path, capsys):
    rows = [row(name, **config) for name in GEMM_KERNELS for config in ({"n": 16}, {"registers": 255})]
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps(rows))
    args = argparse.Namespace(
        kernels=file, batch=[64, 1024], dim=512, classes=10**6, kernels_too=True, specialized=False
    )
    assert model.run(args) == 0
    output = capsys.readouterr().out
    assert not any(device.name in output for device in DEVICES if device.arch != "sm_90")
    small, large = (line for line in output.splitlines() if line.startswith("| H100 | logit_gradients"))
    assert ("16 x 128" in small, "128 x 128" in large) == (True, True)
    want = kernel(registers=255, chunk=model.step([rows[3], *rows], H100, 1024, 10**6, 512)[0][1].chunk)
    assert large.endswith(f"| 255 | 40960 | 3 | 1 | 1 |  | {want.waves:.2f}, {1e3 * want.seconds():.2f} |")
