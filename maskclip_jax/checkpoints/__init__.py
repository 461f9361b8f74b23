"""Checkpoint files -> model, weights, tokenizer and preprocessing: `load.load_clip`."""
