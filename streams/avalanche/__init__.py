"""Avalanche's benchmarks as streams."""

from clstream.streams.avalanche.by_name import __getattr__ as __getattr__
from clstream.streams.avalanche.by_name import known_names as known_names
from clstream.streams.avalanche.by_name import stream_function as stream_function
from clstream.streams.avalanche.streams import from_avalanche as from_avalanche
