"""Entry point of setuptools; everything declarative lives in pyproject.toml."""

from setuptools import setup

setup()
