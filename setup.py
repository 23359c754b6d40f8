"""The shim that old tools ask for; everything is in setup.cfg."""

from setuptools import setup

setup()
