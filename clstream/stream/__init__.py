"""Streams: samples, tasks, sessions, batches, and the schedules over them."""

from clstream.stream.arriving import Arrival as Arrival
from clstream.stream.arriving import ArrivingStream as ArrivingStream
from clstream.stream.arriving import NothingYetError as NothingYetError
from clstream.stream.arriving import Refusal as Refusal
from clstream.stream.episodes import Draw as Draw
from clstream.stream.episodes import Episodes as Episodes
from clstream.stream.history import History as History
from clstream.stream.pools import PoolSchedule as PoolSchedule
from clstream.stream.samples import TARGETS as TARGETS
from clstream.stream.samples import Samples as Samples
from clstream.stream.samples import Subset as Subset
from clstream.stream.samples import content_hash as content_hash
from clstream.stream.samples import own_storage as own_storage
from clstream.stream.samples import sent as sent
from clstream.stream.sessions import Batch as Batch
from clstream.stream.sessions import DataSource as DataSource
from clstream.stream.sessions import Delivery as Delivery
from clstream.stream.sessions import Epoch as Epoch
from clstream.stream.sessions import HiddenTaskError as HiddenTaskError
from clstream.stream.sessions import MixedSchedule as MixedSchedule
from clstream.stream.sessions import Session as Session
from clstream.stream.sessions import Task as Task
from clstream.stream.sessions import TestSet as TestSet
from clstream.stream.stream import SCENARIOS as SCENARIOS
from clstream.stream.stream import Stream as Stream
from clstream.stream.stream import StreamView as StreamView
