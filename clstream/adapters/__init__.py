"""Adapters: few weights, put into any network from outside, that learn in place of the network's own: see `adapt`."""

from clstream.adapters.adapter import Adapter as Adapter
from clstream.adapters.adapter import AdapterLayer as AdapterLayer
from clstream.adapters.adapter import adapt as adapt
from clstream.adapters.adapter import adapters_of as adapters_of
from clstream.adapters.lora import LoRA as LoRA

__all__ = ["LoRA"]
