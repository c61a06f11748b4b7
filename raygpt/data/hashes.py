"""Hashes of what a step was trained on; with them anyone can prove it.

They depend on the tokens of a batch only: not on the number of workers, nor on how its windows
were read.
"""

import hashlib
from collections.abc import Iterable

import numpy as np


def lane_hash(windows: np.ndarray) -> str:
    """64 bits of BLAKE2b over a lane's windows of a step, as 32-bit little-endian tokens.

    Args:
        windows: (g, T + 1) tokens.

    Returns:
        16 hex digits.
    """
    return hashlib.blake2b(windows.astype("<u4").tobytes(), digest_size=8).hexdigest()


def batch_hash(lane_hashes: Iterable[str]) -> str:
    """Hash of a global batch from its lanes' hashes, in lane order: 16 hex digits."""
    data = b"".join(map(bytes.fromhex, lane_hashes))
    return hashlib.blake2b(data, digest_size=8).hexdigest()
