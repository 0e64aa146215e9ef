"""Ranks are processes of their own: each test says itself which backend they use."""

import pytest


@pytest.fixture(autouse=True)
def backend() -> str:
    """Not one test for each backend, as elsewhere: what is sent does not depend on it."""
    return "auto"
