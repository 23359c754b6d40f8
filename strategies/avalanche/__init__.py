"""Avalanche's strategies as strategies."""

from clstream.strategies.avalanche.by_name import __getattr__ as __getattr__
from clstream.strategies.avalanche.by_name import known_names as known_names
from clstream.strategies.avalanche.by_name import strategy_class as strategy_class
from clstream.strategies.avalanche.strategy import AvalancheStrategy as AvalancheStrategy
