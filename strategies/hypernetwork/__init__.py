"""Hypernetworks."""

from clstream.strategies.hypernetwork.hypernetwork import Hypernetwork as Hypernetwork
