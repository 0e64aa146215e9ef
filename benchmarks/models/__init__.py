"""Whole models: sampling beside the published loop, and sparse models beside their dense twins."""
