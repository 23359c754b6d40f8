"""Avalanche's strategies as strategies."""

from clstream.strategies.avalanche.by_name import __getattr__ as __getattr__
from clstream.strategies.avalanche.by_name import known as known
from clstream.strategies.avalanche.by_name import named as named
from clstream.strategies.avalanche.strategy import AvalancheStrategy as AvalancheStrategy
