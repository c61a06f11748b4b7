"""What the size of chunks costs in loss: a lane goes through one chunk after the other.

    python -m benchmarks.shuffle [--chunks 257 1025 8192 65536] [--steps 2600]

Trains the same small model on the first nine tenths of the embedded text, two lanes of six windows,
with the text cut into chunks of each size, and prints the loss on the last tenth, nats a byte.  A
training of 2,600 steps takes about three minutes on one core.
"""

import argparse
from importlib import resources

import numpy as np
import torch

from raygpt.config import ModelConfig, OptimConfig
from raygpt.data.order import DataOrder, windows_in
from raygpt.data.reader import cut
from raygpt.model import GPT
from raygpt.optim import build_optimizer, lr_at, set_lr

LANES, WINDOWS, SEED = 2, 6, 1337
MODEL = ModelConfig(n_layer=3, n_head=4, n_embd=128, block_size=64, vocab_size=320)


def val_loss(chunk_tokens: int, steps: int) -> float:
    """Validation loss after a training on chunks of this size."""
    text = (resources.files("raygpt") / "assets" / "tinyshakespeare.txt").read_bytes()
    tokens = np.frombuffer(text, np.uint8)
    train, val = np.split(tokens, [len(tokens) * 9 // 10])
    chunks = [train[i : i + chunk_tokens] for i in range(0, len(train), chunk_tokens)]
    T, per_step = MODEL.block_size, LANES * WINDOWS * MODEL.block_size
    order = DataOrder([windows_in(len(chunk), T) for chunk in chunks], LANES, SEED)
    torch.manual_seed(SEED)
    model = GPT(MODEL, 257)
    optimizer = build_optimizer(model, OptimConfig())
    for step in range(steps):
        lr = lr_at(
            step * per_step,
            per_step,
            max_lr=3e-3,
            min_lr=3e-4,
            warmup_tokens=100 * per_step,
            decay_tokens=steps * per_step,
        )
        set_lr(optimizer, lr)
        windows = [
            cut(chunks[chunk], indices, T)
            for lane in range(LANES)
            for chunk, indices in order.spans(lane, step * WINDOWS, (step + 1) * WINDOWS)
        ]
        batch = torch.from_numpy(np.concatenate(windows).astype(np.int64))
        model(batch[:, :-1], batch[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    held_out = torch.from_numpy(cut(val, np.arange(windows_in(len(val), T)), T).astype(np.int64))
    with torch.no_grad():
        losses = [
            model(part[:, :-1], part[:, 1:]).item() * len(part) for part in held_out.split(256)
        ]
    return sum(losses) / len(held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, nargs="+", default=[65, 257, 1025, 8192, 65_536])
    parser.add_argument("--steps", type=int, default=2600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for size in arguments.chunks:
        loss = val_loss(size, arguments.steps)
        print(f"chunks of {size:6,} bytes: {loss:.4f} nats a byte", flush=True)


if __name__ == "__main__":
    main()
