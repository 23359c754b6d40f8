"""Adapters: few weights, put into any network from outside, that learn in place of the network's own: see `adapt`."""

from clstream.adapters.adapter import Adapter as Adapter
from clstream.adapters.adapter import AdapterLayer as AdapterLayer
from clstream.adapters.adapter import ModuleAdapter as ModuleAdapter
from clstream.adapters.adapter import adapt as adapt
from clstream.adapters.adapter import adapter_params as adapter_params
from clstream.adapters.adapter import adapters_of as adapters_of
from clstream.adapters.adapter import without_adapters as without_adapters
from clstream.adapters.bottleneck import Bottleneck as Bottleneck
from clstream.adapters.input_prompts import InputPrompts as InputPrompts
from clstream.adapters.lora import LoRA as LoRA
from clstream.adapters.peft import Peft as Peft
from clstream.adapters.prefix import Prefix as Prefix
from clstream.adapters.scale_shift import ScaleShift as ScaleShift

__all__ = ["Bottleneck", "InputPrompts", "LoRA", "Peft", "Prefix", "ScaleShift"]
