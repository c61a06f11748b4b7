"""What follows from a model's settings alone, without torch: parameters and FLOPs."""

from raygpt.config import ModelConfig


def num_params(config: ModelConfig) -> int:
    """Parameters of a model that need not exist, tied weights counted once."""
    C = config.n_embd
    block = 12 * C * C + 13 * C  # c_attn 3C²+3C, c_proj C²+C, MLP 8C²+5C, two LayerNorms 4C
    return (config.vocab_size + config.block_size) * C + config.n_layer * block + 2 * C


def flops_per_token(config: ModelConfig) -> int:
    """FLOPs of forward and backward for one token of a full context, for MFU.

    ``6 N + 12 L H Q T`` (Chowdhery et al. 2022, PaLM, appendix B), Q the size of a head.
    N leaves out the position embeddings, which are looked up, not multiplied; the token
    embedding counts, since it is the head's matrix.  Attention counts in full, not only
    its causal half.
    """
    n = num_params(config) - config.block_size * config.n_embd
    return 6 * n + 12 * config.n_layer * config.n_embd * config.block_size
