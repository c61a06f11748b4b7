"""Sampling text from a model.  What it gives up: speed; nothing is cached between tokens."""

import torch
from torch import Tensor

from raygpt.data.tokenizer import Tokenizer
from raygpt.errors import UserError
from raygpt.model import GPT


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    max_length: int,
    *,
    top_k: int | None = 50,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each sequence, token by token, until it has ``max_length`` tokens.

    The model is left in eval mode.  Padding of the vocabulary is never sampled.

    Args:
        idx: prompts, (B, T0) int64, T0 at least 1.
        max_length: tokens of the result, prompt included; more than ``block_size`` is
            allowed: the model then sees the last ``block_size`` tokens.
        top_k: sample among the k most likely tokens; None: among all.
        temperature: divides the logits; 0 takes the most likely token.
        generator: source of randomness; tokens are drawn on its device.

    Returns:
        Tokens, (B, max_length) int64; ``idx`` itself if that is as long already.
    """
    model.eval()
    while idx.shape[1] < max_length:
        last = model.transformer(idx[:, -model.config.block_size :])[:, -1]
        logits = model.head(last).float()  # -inf where padded
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            values, tokens = logits.topk(min(top_k or model.n_vocab, model.n_vocab), dim=-1)
            # Less the largest first: a tiny temperature must not overflow.
            values = (values - values[:, :1]) / temperature
            probabilities = torch.softmax(values, dim=-1)
            if generator is not None:
                probabilities = probabilities.to(generator.device)
            chosen = torch.multinomial(probabilities, 1, generator=generator)
            token = tokens.gather(-1, chosen.to(tokens.device))
        idx = torch.cat([idx, token], dim=1)
    return idx


def sample_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_return_sequences: int = 5,
    max_length: int = 30,
    top_k: int = 50,
    temperature: float = 1.0,
    seed: int = 42,
) -> list[str]:
    """Continuations of ``prompt``, each beginning with it.

    A function of its arguments: all sequences are drawn from one generator on the CPU, so
    another ``num_return_sequences`` gives other texts.

    Args:
        max_length: tokens of a sequence, prompt included.

    Raises:
        UserError: the prompt is empty, not text, or longer than ``max_length``, or a number is
            out of range.
    """
    for name, value in {
        "num-return-sequences": num_return_sequences,
        "max-length": max_length,
        "top-k": top_k,
    }.items():
        if value <= 0:
            raise UserError(f"--{name} must be above 0, got {value}")
    if not temperature >= 0:
        raise UserError(f"--temperature must not be negative, got {temperature}")
    if not 0 <= seed < 2**64:
        raise UserError(f"--seed must lie in [0, 2**64), got {seed}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--prompt is not valid UTF-8 at character {error.start}; check the terminal's encoding"
        ) from error
    tokens = tokenizer.encode(prompt).tolist()
    if not tokens:
        raise UserError("--prompt is empty; give at least one character")
    if len(tokens) > max_length:
        raise UserError(
            f"--prompt has {len(tokens)} tokens, more than --max-length {max_length}, which "
            "counts the prompt, too; raise it or shorten the prompt"
        )
    idx = torch.tensor([tokens] * num_return_sequences, device=model.lm_head.weight.device)
    generator = torch.Generator().manual_seed(seed)
    result = generate(
        model, idx, max_length, top_k=top_k, temperature=temperature, generator=generator
    )
    return [tokenizer.decode(sequence) for sequence in result.tolist()]
