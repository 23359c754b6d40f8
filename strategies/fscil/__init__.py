"""FSCIL: a frozen encoder and class means for few-shot class-incremental learning, with tricks as switches."""

from clstream.strategies.fscil.fscil import FSCIL as FSCIL
