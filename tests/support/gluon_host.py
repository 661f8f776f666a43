"""A host's stand-in for the few functions of Gluon that the Hopper kernels use, on which their source runs.

Partitions are threads of which one runs at a time. They switch at every operation on a barrier, in an order that
a seed draws, with priorities that range from even to nearly strict. What is asynchronous is as late as it can be:
a product reads its operands when it is waited for, and a copy arrives when the schedule says so, or when nothing
else can run.

Whatever a GPU would make undefined is an error: a load into a tile that is on its way or that a pending product
may still read, a product of a tile that has not arrived, an arrival that no phase expects, addresses outside a
tensor, and partitions that wait for each other for ever.
"""

import ast
import functools
import inspect
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

FOLDER = Path(__file__).parents[2] / "cosface_kernels" / "backends" / "triton" / "kernels"
SHARED = ("EPS", "G_LIFT", "LOG2_E", "TINY", "_factor", "_finite", "_is_active", "_shrink")  # of common.py
BFLOAT16 = "bfloat16"  # its numbers are kept in float32


class HazardError(AssertionError):
    """What may not happen."""


class Stopped(BaseException):
    """Ends the other partitions after one has failed."""


class Array(np.ndarray):
    def permute(self, order):
        return self.transpose(order)

    def split(self):
        return self[..., 0], self[..., 1]

    def to(self, dtype):
        if dtype == BFLOAT16:  # to the nearest, ties to even
            bits = np.ascontiguousarray(self, np.float32).view(np.uint32)
            kept = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
            return np.where(np.isnan(self), self, kept.view(np.float32)).view(Array)
        return self.astype(dtype)


def array(values, dtype=None) -> Array:
    return np.asarray(values, dtype).view(Array)


class Pointer:
    def __init__(self, memory, element, offsets=0):
        self.memory, self.element, self.offsets = memory.reshape(-1), element, offsets
        self.dtype = SimpleNamespace(element_ty=element)

    def __add__(self, offsets):
        return Pointer(self.memory, self.element, self.offsets + offsets)

    def at(self, mask):
        places, mask = np.broadcast_arrays(np.asarray(self.offsets), True if mask is None else mask)
        if np.any(mask & ((places < 0) | (places >= self.memory.size))):
            raise HazardError(f"an address is outside of {self.memory.size} numbers.")
        return np.where(mask, places, 0), mask


class Descriptor:
    """Of a matrix whose numbers a 16-bit type can hold."""

    def __init__(self, matrix, block_shape, dtype=np.float32):
        self.matrix, self.layout, self.dtype = matrix, None, dtype
        self.block_type = SimpleNamespace(shape=list(block_shape), nbytes=2 * int(np.prod(block_shape)))

    def block(self, row, column):
        """With zeros outside."""
        rows, columns = self.block_type.shape
        found = np.zeros((rows, columns), np.float32)
        inside = self.matrix[row : row + rows, column : column + columns]
        found[: inside.shape[0], : inside.shape[1]] = inside
        return found

    def put(self, row, column, values):
        """But for what is outside."""
        inside = self.matrix[row : row + values.shape[0], column : column + values.shape[1]]
        inside[:] = values[: inside.shape[0], : inside.shape[1]]


class Slot:
    """A tile in shared memory."""

    def __init__(self):
        self.values, self.is_on_its_way, self.readers = None, False, 0

    def permute(self, order):
        assert order == (1, 0)
        return Transposed(self)


class Transposed:
    def __init__(self, slot):
        self.slot = slot


class Buffer:
    """Shared memory that one partition writes, or the program before it is divided."""

    def __init__(self, dtype, shape):
        self.values, self.owner, self.is_fenced, self.copies = None, threading.current_thread(), False, 0
        self.dtype, self.shape = dtype, tuple(shape)

    def index(self, i):
        return self.rows[i]

    @functools.cached_property
    def rows(self):
        return [Buffer(self.dtype, self.shape[1:]) for _ in range(self.shape[0])]

    def store(self, values):
        if self.copies:
            raise HazardError("a tile is written while it is copied.")
        assert values.shape == self.shape
        self.values, self.is_fenced = values, False

    def load(self, layout):
        return self.values


class Barrier:
    def __init__(self):
        self.count = None

    def init(self, count):
        self.count = self.missing = count
        self.bytes = self.phases = 0

    def advance(self, arrivals=0, bytes=0):
        self.missing, self.bytes = self.missing - arrivals, self.bytes + bytes
        if self.missing < 0 or self.bytes < 0:
            raise HazardError("a barrier is arrived at more often than its phase expects.")
        if self.missing == self.bytes == 0:
            self.missing, self.phases = self.count, self.phases + 1


class Shared:
    def __init__(self, shape, make):
        self.type, self.items = SimpleNamespace(shape=shape), [make() for _ in range(shape[0])]

    def index(self, i):
        return self.items[int(i)]


class Sums:
    """Of products that may be pending."""

    def __init__(self, values):
        self.values, self.pending = values, 0


def held_lock() -> threading.Lock:
    """Handed on from thread to thread, several times as fast as a Semaphore."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Partition(threading.Thread):
    def __init__(self, machine, body):
        super().__init__(daemon=True)
        self.machine, self.body, self.go = machine, body, held_lock()
        self.may_run, self.is_done, self.error, self.products = (lambda: True), False, None, []
        self.stores = []

    def run(self):
        self.go.acquire()
        try:
            if not self.machine.has_stopped:
                self.body()
                if self.products or self.stores:
                    raise HazardError("a partition ends before its products or its stores.")
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.is_done = True
        if not self.machine.has_stopped:
            self.machine.back.release()

    def switch(self, may_run=lambda: True):
        self.may_run = may_run
        self.machine.back.release()
        self.go.acquire()
        if self.machine.has_stopped:
            raise Stopped


class Machine:
    """One program's partitions and copies, and which of them goes on."""

    def __init__(self, rng):
        self.rng, self.back, self.copies, self.partitions = rng, held_lock(), [], []
        self.has_stopped = False

    def run(self, bodies):
        self.partitions = [Partition(self, body) for body in bodies]
        for partition in self.partitions:
            partition.start()
        weights = self.rng.random(len(bodies) + 1) ** self.rng.integers(1, 30)  # the last: of a copy's arrival
        try:
            while ready := [i for i, p in enumerate(self.partitions) if not p.is_done and p.may_run()] + (
                [len(bodies)] if self.copies else []
            ):
                chances = weights[ready] + 1e-30
                self._step(self.rng.choice(ready, p=chances / chances.sum()))
            if not all(p.is_done for p in self.partitions):
                raise HazardError("the partitions wait for each other.")
        finally:
            self.has_stopped = True
            for partition in self.partitions:
                if not partition.is_done:
                    partition.go.release()

    def _step(self, chosen):
        if chosen == len(self.partitions):
            self.copies.pop(self.rng.integers(len(self.copies)))()
            return
        partition = self.partitions[chosen]
        partition.go.release()
        self.back.acquire()
        if partition.error:
            raise partition.error


class Host:
    """Names for the kernels' source, and the program that runs."""

    def __init__(self, seed=0):
        self.rng, self.machine, self.place = np.random.default_rng(seed), None, (0, 0)
        self.buffers = []

    def names(self):
        language = SimpleNamespace(
            constexpr=lambda value: value, static_range=range, int32=np.int32, int64=np.int64, float32=np.float32,
            float16=np.float16, PropagateNan=SimpleNamespace(ALL=1), NVMMADistributedLayout=lambda *_: None,
            SliceLayout=lambda *_: None, BlockedLayout=lambda *_: None, SwizzledSharedLayout=lambda *_: None,
            allocate_shared_memory=self.allocate, warp_specialize=self.specialize,
            program_id=lambda axis: array(self.place[axis]), load=self.load, store=self.store,
            arange=lambda first, last, layout: array(np.arange(first, last)),
            full=lambda shape, value, dtype, layout: array(np.full(shape, value, dtype)),
            where=lambda *args: np.where(*args).view(Array), cdiv=lambda a, b: -(-a // b),
            maximum=lambda a, b: np.fmax(a, b).view(Array),
            minimum=lambda a, b, propagate_nan=0: (np.minimum if propagate_nan else np.fmin)(a, b).view(Array),
            max=lambda values, axis: np.fmax.reduce(values, axis), sum=lambda values, axis: values.sum(axis),
            exp2=np.exp2, convert_layout=lambda values, layout: values,
        )  # fmt: skip
        barriers = SimpleNamespace(
            MBarrierLayout=lambda: None, init=lambda barrier, count: barrier.init(count), expect=self.expect,
            arrive=self.arrive, wait=self.wait,
        )  # fmt: skip
        return {
            "gl": language, "tl": language, "mbarrier": barriers, "fence_async_shared": self.fence,
            "tma": SimpleNamespace(
                async_load=self.copy, async_store=self.copy_back, store_wait=self.wait_for_stores
            ),
            "gluon": SimpleNamespace(jit=_jit), "triton": SimpleNamespace(jit=_jit),
            "warpgroup_mma": self.multiply, "warpgroup_mma_wait": self.wait_for_products,
        }  # fmt: skip

    def allocate(self, dtype, shape, layout):
        if len(shape) == 3:
            return Shared(shape, Slot)
        if dtype is not np.int64:
            self.buffers.append(Buffer(dtype, shape))
            return self.buffers[-1]
        return Barrier() if shape == [1] else Shared(shape, Barrier)

    def specialize(self, functions, warps, registers):
        assert len(functions) == len(warps) + 1 == len(registers) + 1
        self.machine.run([lambda f=f, args=args: f(*args) for f, args in functions])

    @property
    def partition(self):
        return threading.current_thread()

    def load(self, pointer, mask=None, other=0):
        places, mask = pointer.at(mask)
        return np.where(mask, pointer.memory[places], np.asarray(other, pointer.memory.dtype)).view(Array)

    def store(self, pointer, values, mask=None):
        places, mask = pointer.at(mask)
        pointer.memory[places[mask]] = np.broadcast_to(values, mask.shape)[mask]

    def wait(self, barrier, phase):
        self.partition.switch(lambda: barrier.phases % 2 != phase)

    def arrive(self, barrier, count, pred=True):
        self.partition.switch()
        if pred:
            barrier.advance(arrivals=count)

    def expect(self, barrier, bytes):
        self.partition.switch()
        barrier.advance(arrivals=1, bytes=bytes)

    def copy(self, descriptor, place, barrier, slot):
        self.partition.switch()
        if slot.readers or slot.is_on_its_way:
            raise HazardError("a tile is loaded over one that is on its way or still read.")
        slot.is_on_its_way = True

        def arrive():
            slot.values, slot.is_on_its_way = descriptor.block(*map(int, place)), False
            barrier.advance(bytes=-descriptor.block_type.nbytes)

        self.machine.copies.append(arrive)

    def fence(self):
        for buffer in self.buffers:
            buffer.is_fenced |= buffer.owner is self.partition

    def copy_back(self, descriptor, place, buffer):
        """As late as it can be: when it is waited for."""
        self.partition.switch()
        if not buffer.is_fenced:
            raise HazardError("a tile is copied that no fence has made visible.")
        buffer.copies += 1
        self.partition.stores.append((descriptor, place, buffer))

    def wait_for_stores(self, pendings):
        self.partition.switch()
        while len(self.partition.stores) > pendings:
            descriptor, place, buffer = self.partition.stores.pop(0)
            descriptor.put(*map(int, place), buffer.values)
            buffer.copies -= 1

    def multiply(self, a, b, sums, use_acc, is_async):
        assert is_async
        for slot in (a, b.slot):
            if slot.values is None or slot.is_on_its_way:
                raise HazardError("a product reads a tile that has not arrived.")
            slot.readers += 1
        sums = sums if isinstance(sums, Sums) else Sums(sums)
        sums.pending += 1
        self.partition.products.append((a, b.slot, sums, bool(use_acc)))
        return sums

    def wait_for_products(self, num_outstanding, deps):
        self.partition.switch()
        products = self.partition.products
        while len(products) > num_outstanding:
            a, b, sums, use_acc = products.pop(0)
            product = a.values @ b.values.T
            sums.values = (sums.values + product if use_acc else product).view(Array)
            sums.pending -= 1
            a.readers, b.readers = a.readers - 1, b.readers - 1
        (sums,) = deps
        return sums if sums.pending else sums.values


def _jit(function=None, **_):
    return function if function else lambda function: function


class Kernels:
    """The kernels, launched as `kernels.name[grid](...)`; `change` mutates their source."""

    def __init__(self, seed=0, change=lambda source: source):
        self.host = Host(seed)
        names = self.host.names()
        _define(names, (FOLDER / "common.py").read_text(), SHARED)
        _define(names, change((FOLDER / "hopper.py").read_text()))
        self.names = names

    def __getattr__(self, name):
        return Launch(self.host, self.names[name])


class Launch:
    def __init__(self, host, kernel):
        self.host, self.kernel = host, kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            known = inspect.signature(self.kernel).parameters
            options = {name: value for name, value in options.items() if name in known}
            programs = list(np.ndindex(*grid))
            self.host.rng.shuffle(programs)
            with np.errstate(all="ignore"):
                for place in programs:
                    self.host.place, self.host.machine = tuple(place), Machine(self.host.rng)
                    self.kernel(*args, **options)

        return launch


def _define(names, source, wanted=None):
    """All that a module defines, or what is wanted of it, without its imports."""
    kept = []
    for node in ast.parse(source).body:
        defined = [node.name] if isinstance(node, ast.FunctionDef) else [
            target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)
        ]  # fmt: skip
        if isinstance(node, (ast.FunctionDef, ast.Assign)) and (wanted is None or set(defined) & set(wanted)):
            kept.append(node)
    exec(compile(ast.Module(kept, []), "kernels", "exec"), names)


class TorchDescriptor(Descriptor):
    """Of a tensor, whose numbers are those of the moment."""

    def __init__(self, matrix, rows, columns):
        super().__init__(matrix, (rows, columns), np.float16 if matrix.dtype == torch.float16 else BFLOAT16)

    def block(self, row, column):
        rows, columns = self.block_type.shape
        inside = self.matrix[row : row + rows, column : column + columns].float().numpy()
        return Descriptor(inside, (rows, columns)).block(0, 0)

    def put(self, row, column, values):
        inside = self.matrix[row : row + values.shape[0], column : column + values.shape[1]]
        inside.copy_(torch.from_numpy(np.asarray(values[: inside.shape[0], : inside.shape[1]])))


class TorchKernels(Kernels):
    """In the place of the module of the kernels, launched with tensors on the CPU."""

    describe = staticmethod(TorchDescriptor)
    GROUPS, PARTS = SimpleNamespace(value=2), SimpleNamespace(value=4)

    def __getattr__(self, name):
        launch = super().__getattr__(name)
        return _TorchLaunch(launch)


class _TorchLaunch:
    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launch[grid](*map(_pointer, args), **options)

        return launch


def _pointer(value):
    return Pointer(value.numpy(), value.numpy().dtype) if isinstance(value, torch.Tensor) else value
