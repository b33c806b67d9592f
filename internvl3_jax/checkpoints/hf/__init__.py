"""Readers of released formats: safetensors, config.json, PEFT adapters."""
