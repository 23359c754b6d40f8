"""Clients that learn apart, and a server that merges their uploads: payloads, events, accuracies, and Flower's engine."""

from clstream.federated.accuracy import FederatedAccuracy as FederatedAccuracy
from clstream.federated.accuracy import FederatedMeasured as FederatedMeasured
from clstream.federated.client import Mission as Mission
from clstream.federated.client import Upload as Upload
from clstream.federated.client import learn_mission as learn_mission
from clstream.federated.client import missions_of as missions_of
from clstream.federated.events import ClientDispatched as ClientDispatched
from clstream.federated.events import ClientLost as ClientLost
from clstream.federated.events import ClientTrained as ClientTrained
from clstream.federated.events import Merged as Merged
from clstream.federated.events import Uploaded as Uploaded
from clstream.federated.flower import run_on_flower as run_on_flower
from clstream.federated.payloads import compact as compact
from clstream.federated.payloads import expand as expand
from clstream.federated.payloads import payload_bytes as payload_bytes
from clstream.federated.payloads import shifted_as_published as shifted_as_published
