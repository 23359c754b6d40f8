"""Avalanche's benchmarks as streams."""

from clstream.streams.avalanche.streams import __getattr__ as __getattr__
from clstream.streams.avalanche.streams import from_avalanche as from_avalanche
from clstream.streams.avalanche.streams import known_names as known_names
from clstream.streams.avalanche.streams import stream_function as stream_function
