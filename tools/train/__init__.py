"""Training recipe of the bundled demonstration model: data, tokenizer, model, training, export and model card."""
