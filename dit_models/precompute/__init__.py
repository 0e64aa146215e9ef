"""Encode an image source once: latents, conditions and text features in sharded safetensors."""
