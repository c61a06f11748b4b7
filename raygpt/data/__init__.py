"""Text to tokens to batches: tokenizer, sources, prepare, corpus, order, stream."""
