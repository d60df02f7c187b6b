"""Between text and token ids: tokenizer, chat template, streaming, sampling, perplexity."""
