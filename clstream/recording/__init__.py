"""Recordings: a stream in a file, and its replay."""

from clstream.recording.header import FORMAT as FORMAT
from clstream.recording.reader import Recording as Recording
from clstream.recording.reader import read as read
from clstream.recording.streams import RecordedStream as RecordedStream
from clstream.recording.writer import record as record
