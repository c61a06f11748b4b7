"""What a device can reach, for the utilisation in the metrics."""

import time

import torch

from raygpt.products import product

PEAK_TFLOPS: dict[str, dict[torch.dtype, float]] = {
    # Dense peaks from NVIDIA's data sheets; fp32 through TF32 where there is TF32.  The first
    # entry whose words are all in the GPU's name is taken, so special names come first.
    "B200": {torch.bfloat16: 2250.0, torch.float32: 1125.0},
    "H200 NVL": {torch.bfloat16: 835.5, torch.float32: 417.5},
    "H200": {torch.bfloat16: 989.5, torch.float32: 494.7},
    "H100 PCIe": {torch.bfloat16: 756.0, torch.float32: 378.0},
    "H100 NVL": {torch.bfloat16: 835.5, torch.float32: 417.5},
    "H100": {torch.bfloat16: 989.5, torch.float32: 494.7},
    "A100": {torch.bfloat16: 312.0, torch.float32: 156.0},
    "A40": {torch.bfloat16: 149.7, torch.float32: 74.8},
    "A10G": {torch.bfloat16: 70.0, torch.float32: 35.0},
    "A10": {torch.bfloat16: 125.0, torch.float32: 62.5},
    "L40S": {torch.bfloat16: 362.0, torch.float32: 183.0},
    "L4": {torch.bfloat16: 121.0, torch.float32: 60.0},
    "V100 PCIE": {torch.float32: 14.0},
    "V100": {torch.float32: 15.7},
    "T4": {torch.float32: 8.1},
    "RTX 4090": {torch.bfloat16: 165.2, torch.float32: 82.6},
    "RTX 3090": {torch.bfloat16: 71.0, torch.float32: 35.6},
}
_LESSER = {"MIG", "LAPTOP", "MAX", "D"}
_SIZE, _FIRST = 768, 4
"""Of the matrix product that shows what a CPU reaches."""


class Peak:
    """Dense peak FLOP/s of this process's device, for MFU.

    Of a GPU by its data sheet, None where that is not known.  Of a CPU the best that matrix
    products have reached on this process's threads: a few at first, when other processes still
    start beside it, and one at steps 1, 2, 4, 8, ... of this process.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.flops: float | None = None
        self._steps = 0
        self._on_cpu = device.type == "cpu"
        if not self._on_cpu:
            self.flops = peak_flops_of(torch.cuda.get_device_name(device), dtype)
            return
        self._factors = [torch.ones(_SIZE, _SIZE, dtype=dtype) for _ in range(2)]
        for _ in range(_FIRST):
            self._measure()

    def count_step(self) -> None:
        """A step has ended; measures again in about a hundredth of a second, if it is time."""
        self._steps += 1
        if self._on_cpu and self._steps.bit_count() == 1:
            self._measure()

    def _measure(self) -> None:
        began = time.perf_counter()
        product(*self._factors)
        flops = 2 * _SIZE**3 / (time.perf_counter() - began)
        self.flops = max(flops, self.flops or 0.0)


def peak_flops_of(name: str, dtype: torch.dtype) -> float | None:
    """Dense peak FLOP/s of the GPU called ``name``, as torch spells it; None if not known, as of a
    slice of one, or of a lesser one of that name."""
    words = name.upper().replace("-", " ").split()
    if not _LESSER.isdisjoint(words):
        return None
    for kind, peaks in PEAK_TFLOPS.items():
        if all(word in words for word in kind.upper().split()):
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None
