"""Counted arithmetic and memory traffic of a layer's stages, and the time they need at least."""
