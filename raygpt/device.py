"""The one place that chooses devices, precision and kernels.

NVIDIA GPUs and CPUs; what it gives up: other accelerators, and several GPUs for one worker.
"""

import contextlib
import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

from raygpt.config import Precision
from raygpt.errors import UserError

_TRITON = importlib.util.find_spec("triton") is not None


def worker_device(gpus_per_worker: int) -> torch.device:
    """The device of this Ray Train worker, made torch's current one.

    Workers of one node see all GPUs of that node's workers; Ray knows which is whose.

    Raises:
        UserError: a GPU was asked for, but torch sees none.
    """
    if not gpus_per_worker:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "scale.gpus_per_worker is 1, but torch finds no GPU on this node; install a CUDA "
            "build of torch there, or set --scale.gpus_per_worker 0"
        )
    import ray.train.torch  # here, so that jobs without Ray start fast

    device = ray.train.torch.get_device()
    torch.cuda.set_device(device)
    return device


def local_device() -> torch.device:
    """The device of a job without workers: the first GPU, if there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def backend(device: torch.device) -> Literal["nccl", "gloo"]:
    """The torch.distributed backend."""
    return "nccl" if device.type == "cuda" else "gloo"


def set_up(device: torch.device, threads: int, exact: bool) -> None:
    """Threads, TF32 and determinism of this process; call before the first kernel.

    Args:
        threads: CPU threads of kernels; part of the numbers, since it changes sums.
        exact: deterministic kernels on a GPU, at some cost; on a CPU they always are, since
            there they cost nothing that could be measured.
    """
    torch.set_num_threads(threads)
    deterministic = exact or device.type == "cpu"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32; GPUs without it ignore this
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)
    # Else torch fills every new tensor with NaN first, to make reads of it repeatable.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def resolve_precision(
    precision: Precision, device: torch.device, say: Callable[[str], None]
) -> torch.dtype:
    """The dtype of matrix products.

    ``auto`` is bf16 on GPUs that have it, and on CPUs with AMX or AVX512-BF16; elsewhere bf16
    is emulated and many times slower than fp32, which ``say`` is told.

    Raises:
        UserError: bf16 was asked for on a GPU that lacks it.
    """
    if precision == "fp32":
        return torch.float32
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = _cpu_bf16() is not None
    if precision == "bf16" and not has_bf16:
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            raise UserError(f"{name} has no bf16; set --train.precision fp32")
        say(f"{cpu_kind()} has no bf16 and emulates it; --train.precision fp32 is faster")
        return torch.bfloat16
    return torch.bfloat16 if has_bf16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Matrix products in ``dtype``; nothing for fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def has_triton(device: torch.device) -> bool:
    """Whether our own kernels run: on NVIDIA's GPUs from Ampere on, wherever torch is for CUDA."""
    if device.type != "cuda" or not _TRITON:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def check_compilers(device: torch.device, compile: bool) -> None:
    """See that this machine has the compilers that it needs.

    Args:
        compile: layers are to be compiled.

    Raises:
        UserError: it has no C compiler, which Triton needs for a GPU's kernels, or no C++
            compiler, which torch.compile needs for a CPU.
    """
    if device.type == "cuda":
        c_compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        if (compile or has_triton(device)) and not c_compiler:
            raise UserError(
                "a GPU's kernels are built with a C compiler, and this machine has none; "
                "install gcc there"
            )
        return
    if not compile:
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # here, since it takes a second
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "train.compile needs a C++ compiler for a CPU, and this machine has none that works; "
            "install g++ there, or leave train.compile out"
        ) from error


def compile_options(device: torch.device, exact: bool) -> dict[str, Any]:
    """For torch.compile.  A GPU's kernels come in sizes, and the fastest is found by measuring,
    each time anew; with ``exact``, no size is measured that changes a sum."""
    return {"options": {"deterministic": True}} if exact and device.type == "cuda" else {}


def memory_bytes(device: torch.device) -> int:
    """Memory of the GPU, or of the machine as far as this container may use it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as file:
        memory = min(memory, int(file.read()))  # "max" is no number: there is no limit
    return memory


class Timer:
    """Milliseconds that a device takes for what it is given between two moments; waits for nothing.

    On a CPU, that is the time in between.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._times = [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def _mark(self, moment: int) -> None:
        if self._events:
            self._events[moment].record()
        else:
            self._times[moment] = time.perf_counter()

    def ms(self) -> float:
        """Between the last two moments; the device must be done with what it was given."""
        if self._events:
            return self._events[0].elapsed_time(self._events[1])
        return 1000 * (self._times[1] - self._times[0])


def put(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device; nothing is waited for.

    A plain copy to a GPU would wait until the GPU had done all that it was given before.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def wait(device: torch.device) -> None:
    """Until a device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Copier:
    """Copies from a device to the CPU beside what it computes; a context manager.

    On a GPU the copies run on a stream of their own, after the work that :meth:`mark` saw, and
    are done when the context ends; so they do not wait for a collective that hangs.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._marked: torch.cuda.Event | None = None
        self._inside: contextlib.AbstractContextManager[object] = contextlib.nullcontext()

    def mark(self) -> None:
        """What is to be copied is complete, once the device has done what it was given so far."""
        if self._stream is not None:
            self._marked = torch.cuda.current_stream(self._stream.device).record_event()

    def __enter__(self) -> None:
        if self._stream is not None:
            if self._marked is not None:
                self._stream.wait_event(self._marked)
            self._inside = torch.cuda.stream(self._stream)
            self._inside.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._inside.__exit__(None, None, None)
            self._stream.synchronize()


def describe(device: torch.device) -> str:
    """The device in a few words: the GPU's name, or the kind of CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_kind()


def cpu_kind() -> str:
    """Vendor and widest instruction set in use, such as ``amd-avx512_bf16`` or ``amd-avx2``.

    What the last bits of CPU sums depend on; names recorded losses.
    """
    vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(_cpu_vendor())
    capability = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "_")
    if capability == "avx512":
        capability = _cpu_bf16() or capability
    return f"{vendor or platform.machine().lower()}-{capability}"


def mkl_lacks_avx512() -> bool:
    """Whether this CPU has AVX-512, but no use of it in MKL, as it is not Intel's."""
    capability = torch.backends.cpu.get_cpu_capability()
    return capability == "AVX512" and _cpu_vendor() != "GenuineIntel"


def _cpu_bf16() -> str | None:
    """The instruction set that multiplies bf16 matrices, if this CPU has one."""
    capabilities = torch.cpu.get_capabilities()
    return next((c for c in ("amx_bf16", "avx512_bf16") if capabilities.get(c)), None)


def _cpu_vendor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "vendor_id":
                return value.strip()
    return ""
