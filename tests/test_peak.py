"""What a device can reach: by its data sheet, or as measured."""

import pytest
import torch

from raygpt.peak import Peak, peak_flops_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12, 494.7e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H200", 989.5e12, 494.7e12),
        ("NVIDIA H200 NVL", 835.5e12, 417.5e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA A10G", 70e12, 35e12),
        ("Tesla T4", None, 8.1e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12),
        ("Tesla V100-PCIE-16GB", None, 14e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA L40", None, None),
        ("something new", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(
    name: str, bf16: float | None, fp32: float | None
) -> None:
    assert peak_flops_of(name, torch.bfloat16) == bf16
    assert peak_flops_of(name, torch.float32) == fp32


def test_the_peak_of_a_cpu_is_measured() -> None:
    peak = Peak(CPU, torch.float32)
    assert peak.flops is not None and 1e8 < peak.flops < 1e14


def test_the_best_of_the_products_counts_and_they_become_rare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = iter([0, 8] * 4 + [0, 9, 0, 4, 0, 5, 0, 2])  # at the start, after steps 1, 2, 4, 8
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    peak, product = Peak(CPU, torch.float32), 2 * 768**3
    seen = [peak.flops]
    for _ in range(15):
        peak.count_step()
        seen.append(peak.flops)
    assert seen == [product / n for n in [8] * 2 + [4] * 6 + [2] * 8]
    assert next(ticks, None) is None
