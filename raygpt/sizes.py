"""What follows from a model's settings alone, without torch: parameters and FLOPs."""

from raygpt.config import ModelConfig


def num_params(config: ModelConfig) -> int:
    """Parameters of a model that need not exist, tied weights counted once."""
    C = config.n_embd
    norm = C if config.norm == "rms" or not config.bias else 2 * C
    block = 12 * C * C + 2 * norm  # c_attn 3C², c_proj C², MLP 8C²
    if config.bias:
        block += 9 * C  # 3C, C, 5C
    positions = config.block_size * C if config.positions == "learned" else 0
    return config.vocab_size * C + positions + config.n_layer * block + norm


def flops_per_token(config: ModelConfig) -> int:
    """FLOPs of forward and backward for one token of a full context, for MFU.

    ``6 N + 12 L H Q T`` (Chowdhery et al. 2022, PaLM, appendix B), Q the size of a head.
    N leaves out the position embeddings, which are looked up, not multiplied; the token
    embedding counts, since it is the head's matrix.  Attention counts in full, not only
    its causal half.
    """
    n = num_params(config)
    if config.positions == "learned":
        n -= config.block_size * config.n_embd
    return 6 * n + 12 * config.n_layer * config.n_embd * config.block_size
