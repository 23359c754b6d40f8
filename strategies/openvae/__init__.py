"""OpenVAE: a variational classifier with open-set recognition, its outlier model, and what it draws to replay."""

from clstream.strategies.openvae.events import ReplayGenerated as ReplayGenerated
from clstream.strategies.openvae.openvae import OpenVAE as OpenVAE
