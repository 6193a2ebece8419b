"""Bytes and text → typed values: safetensors, config.json, tokenizer, chat template. Knows nothing of `engine`."""
