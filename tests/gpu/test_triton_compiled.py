"""What the kernels of backend `triton` compile to: its report, and loads into what a product still reads."""

import json
import os
import re

import pytest
from support import run_python

from bench.hazards import pipeline

COMPILE = """
import dataclasses, json, sys
import torch
from bench.kernels import Case, examine
from cosface_kernels.backends.triton.tiles import Tile
n, c, d, warps = map(int, sys.argv[3:])
bf16 = torch.bfloat16
case = Case(sys.argv[1], "sm_90", Tile(n, c, d, warps, 3), bf16, bf16, False, 512, sys.argv[2])
print(json.dumps(examine(case)))
"""


def _examine(kernel: str, tile: tuple[int, ...], variant: str = "plain"):
    done = run_python(COMPILE, kernel, variant, *map(str, tile), TRITON_INTERPRET="0", PYTHONPATH=".")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_report_of_a_kernel_that_is_fit():
    row, complaints = _examine("class_statistics", (128, 128, 64, 8))
    assert complaints == []
    assert {"kernel", "arch", "config", "dtype", "registers", "spill_bytes", "shared_bytes"} <= set(row)
    assert row["tensor_core_ops"] > 0
    assert "wgmma" in row["ptx_features"]


def test_report_complains_of_spills_and_of_shared_memory():
    assert any("spills" in text for text in _examine("logit_gradients", (128, 128, 64, 4))[1])
    assert any("shared memory" in text for text in _examine("weight_gradients", (256, 256, 256, 8))[1])


def test_report_of_a_weight_off_16_bytes():
    """Each number is a load of its own, as is so of what no block here is made for."""
    aligned, unaligned = (
        _examine("class_statistics", (32, 64, 32, 8), each)[0] for each in ("plain", "unaligned")
    )
    assert aligned["narrow"] == 0 < unaligned["narrow"]


def test_roots_of_an_optimizer_keep_what_is_subnormal():
    """As 0, the step without an eps would be infinite."""
    row, complaints = _examine("adamw_rows", (0, 4, 512, 4))
    assert "sqrt.rn.f32" in row["ptx_features"]
    assert complaints == []


RACE = """
import sys
import torch, triton
from bench import launches
from bench.hazards import pipeline
from bench.kernels import StandIn
from support.racing_kernel import product_and_squares
triton.runtime.driver.set_active(StandIn("sm_90"))
b, f = torch.bfloat16, torch.float32
blocks = {"D": 512, "BLOCK": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
compiled = product_and_squares.warmup(b, b, f, f, grid=(1,), **blocks)
print(*pipeline(compiled.asm["ttgir"]).hazards, sep="\\n")
"""


def test_a_load_into_what_a_pending_product_reads_is_found():
    done = run_python(RACE, TRITON_INTERPRET="0", PYTHONPATH=os.pathsep.join([".", "tests"]))
    assert re.fullmatch(r"a load overwrites %w_tile\w* while a product still reads it\.\n", done.stdout), (
        done.stdout + done.stderr
    )


RING = """
tt.func public @kernel() {{
  %c0_i32 = arith.constant 0 : i32
  %c1_i32 = arith.constant 1 : i32
  %c2_i32 = arith.constant 2 : i32
  %c3_i32 = arith.constant 3 : i32
  %slots = arith.constant {slots} : i32
  %ring = ttg.local_alloc : () -> !ttg.memdesc<{slots}x64x64xbf16, #shared, #smem, mutable>
  %end:2 = scf.for %i = %c0_i32 to %many step %c1_i32 iter_args(%r = %c0_i32, %w = %c{ahead}_i32) -> (i32) {{
    %tile = ttg.memdesc_index %ring[%r] : !ttg.memdesc<64x64xbf16>
    %dot = ttng.warp_group_dot %tile, %tile, %zero {{isAsync = true}} : !ttg.memdesc<64x64xbf16> -> tensor<64xf32>
    %done = ttng.warp_group_dot_wait %dot {{pendings = {pending} : i32}} : tensor<64x64xf32>
    %place = ttg.memdesc_index %ring[%w] : !ttg.memdesc<64x64xbf16>
    %token = ttg.async_copy_global_to_local %pointers, %place : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>
    %r1 = arith.addi %r, %c1_i32 : i32
    %r2 = arith.remsi %r1, %slots : i32
    %w1 = arith.addi %w, %c1_i32 : i32
    %w2 = arith.remsi %w1, %slots : i32
    scf.yield %r2, %w2 : i32, i32
  }}
  %next = ttg.memdesc_index %ring[%end#0] : !ttg.memdesc<64x64xbf16>
  {after}
}}
"""
COPY = "%t = ttg.async_copy_global_to_local %pointers, %next : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>"


@pytest.mark.parametrize(
    ("slots", "ahead", "pending", "racing"),
    [
        *[(1, 0, 0, False), (1, 0, 1, True), (2, 1, 0, False), (2, 1, 1, False), (2, 0, 1, True)],
        *[(3, 1, 1, False), (3, 2, 1, False), (3, 2, 2, True), (4, 3, 1, False), (4, 3, 2, True)],
    ],
)
def test_a_ring_has_a_slot_for_each_tile_on_its_way_and_each_pending_product(slots, ahead, pending, racing):
    found = pipeline(RING.format(slots=slots, ahead=ahead, pending=pending, after=""))
    assert bool(found.hazards) == racing, found
    assert (found.slots, found.pending) == (slots, pending)


def hazards_of(text):
    return pipeline(text).hazards


def test_the_first_loads_of_a_next_loop_wait_for_the_last_products():
    assert hazards_of(RING.format(slots=3, ahead=2, pending=1, after="")) == []
    last = RING.format(slots=1, ahead=0, pending=0, after=COPY)
    assert hazards_of(last) == []
    assert hazards_of(RING.format(slots=3, ahead=2, pending=1, after=COPY.replace("%next", "%tile"))) != []
    waited = "%w = ttng.warp_group_dot_wait %done {pendings = 0 : i32} : tensor<64x64xf32>\n  "
    assert (
        hazards_of(RING.format(slots=3, ahead=2, pending=1, after=waited + COPY.replace("%next", "%tile"))) == []
    )


def test_a_product_that_cannot_be_followed_is_a_complaint():
    text = RING.format(slots=3, ahead=2, pending=1, after="")
    assert hazards_of(text.replace("dot %tile, %tile", "dot %tile, %lost")) == [
        "an operand of a product cannot be followed to its slot."
    ]
    assert hazards_of(text.replace("to %many", "to %c0_i32")) == ["no product was reached."]
