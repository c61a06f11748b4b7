"""Choice of device, precision and kernels.  GPUs are played by what torch would say of them."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray.train.torch
import torch

from raygpt import device as devices
from raygpt.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Put back what set_up changes, for the tests that follow in this process."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    workspace = os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if workspace is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


def _set_capabilities(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))


def test_a_worker_without_gpus_runs_on_the_cpu() -> None:
    assert devices.worker_device(0) == CPU
    assert devices.backend(CPU) == "gloo"
    assert devices.backend(GPU) == "nccl"


def test_a_gpu_that_torch_does_not_see_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"set --scale.gpus_per_worker 0"):
        devices.worker_device(1)
    assert devices.local_device() == CPU


def test_a_worker_takes_the_gpu_that_ray_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: GPU)
    assert devices.worker_device(1) == GPU
    assert current == [GPU]


@pytest.mark.usefixtures("torch_settings")
def test_cpus_are_always_deterministic() -> None:
    devices.set_up(CPU, threads=1, exact=False)
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("torch_settings")
@pytest.mark.parametrize("exact", [True, False])
def test_gpus_are_deterministic_if_asked(exact: bool) -> None:
    devices.set_up(GPU, threads=1, exact=exact)
    assert torch.are_deterministic_algorithms_enabled() is exact
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is exact
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize(
    ("capability", "auto"),
    [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", torch.float32)],
)
def test_cpus_take_bf16_only_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, capability: str, auto: torch.dtype
) -> None:
    _set_capabilities(monkeypatch, capability)
    said: list[str] = []
    assert devices.resolve_precision("auto", CPU, said.append) == auto
    assert devices.resolve_precision("fp32", CPU, said.append) == torch.float32
    assert not said
    assert devices.resolve_precision("bf16", CPU, said.append) == torch.bfloat16
    assert ["emulates" in text for text in said] == [True] * (auto == torch.float32)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_gpus_take_bf16_where_they_have_it(monkeypatch: pytest.MonkeyPatch, has_bf16: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    wanted = torch.bfloat16 if has_bf16 else torch.float32
    assert devices.resolve_precision("auto", GPU, print) == wanted
    assert devices.resolve_precision("fp32", GPU, print) == torch.float32
    if has_bf16:
        assert devices.resolve_precision("bf16", GPU, print) == torch.bfloat16
    else:
        with pytest.raises(UserError, match=r"Tesla T4 has no bf16; set --train.precision fp32"):
            devices.resolve_precision("bf16", GPU, print)


def test_autocast_multiplies_in_its_dtype() -> None:
    x = torch.ones(2, 2)
    for dtype in (torch.bfloat16, torch.float32):
        with devices.autocast(CPU, dtype):
            assert (x @ x).dtype == dtype


def test_a_timer_measures_what_lies_between() -> None:
    timer = devices.Timer(CPU)
    timer.start()
    time.sleep(0.02)
    timer.stop()
    measured = timer.ms()
    assert measured >= 20
    time.sleep(0.02)
    assert timer.ms() == measured


def test_a_cpu_has_memory() -> None:
    assert 2**28 < devices.memory_bytes(CPU) < 2**50


@pytest.mark.parametrize(
    ("vendor", "widest", "capabilities", "kind"),
    [
        ("AuthenticAMD", "AVX2", [], "amd-avx2"),
        ("AuthenticAMD", "AVX512", ["avx512_bf16"], "amd-avx512_bf16"),
        ("GenuineIntel", "AVX512", ["avx512_bf16", "amx_bf16"], "intel-amx_bf16"),
        ("GenuineIntel", "AVX512", [], "intel-avx512"),
        # ATEN_CPU_CAPABILITY can hold torch back from what the CPU has.
        ("GenuineIntel", "AVX2", ["avx512_bf16"], "intel-avx2"),
        ("", "SVE256", [], "aarch64-sve256"),
    ],
)
def test_kind_of_cpu(
    monkeypatch: pytest.MonkeyPatch, vendor: str, widest: str, capabilities: list[str], kind: str
) -> None:
    _set_capabilities(monkeypatch, *capabilities)
    monkeypatch.setattr(devices, "_cpu_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: widest)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert devices.cpu_kind() == kind
    assert devices.describe(CPU) == kind


def test_own_kernels_run_from_ampere_on_where_triton_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for here in (True, False):
        monkeypatch.setattr(devices, "_TRITON", here)
        assert not devices.has_triton(CPU)
        for capability, made_for in {(7, 5): False, (8, 0): True, (9, 0): True}.items():
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
            assert devices.has_triton(GPU) == (here and made_for)


def test_a_gpu_without_a_c_compiler_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "has_triton", lambda device: device == GPU)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for compiled in (True, False):
        with pytest.raises(UserError, match=r"install gcc there$"):
            devices.check_compilers(GPU, compiled)
    devices.check_compilers(CPU, False)
    (tmp_path / "gcc").touch(0o755)
    devices.check_compilers(GPU, True)


def test_what_is_compiled_for_exact_runs_on_a_gpu_is_not_found_by_measuring() -> None:
    assert devices.compile_options(GPU, True) == {"options": {"deterministic": True}}
    assert devices.compile_options(GPU, False) == devices.compile_options(CPU, True) == {}
    torch.compile(torch.neg, **devices.compile_options(GPU, True))  # torch knows the option
