"""Training of the bundled model: tokenizer, samples, recipe and evaluation."""
