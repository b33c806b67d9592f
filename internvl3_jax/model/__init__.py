"""The model: vision tower, projector, decoder, key-value cache and LoRA adapters."""
