"""Recordings: a stream in a file, and its replay."""

from clstream.recording.header import FORMAT as FORMAT
from clstream.recording.read import Recording as Recording
from clstream.recording.read import read as read
from clstream.recording.write import RecordedStream as RecordedStream
from clstream.recording.write import record as record
