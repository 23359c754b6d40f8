"""Measures: what is measured of a run beside its accuracy."""

from clstream.measures.cost import Cost as Cost
