"""Comparison: records of finished runs, and statistics, tables and pictures of them."""

from clstream.comparison.records import Record as Record
from clstream.comparison.records import RowOfMatrix as RowOfMatrix
from clstream.comparison.records import append_record as append_record
from clstream.comparison.records import from_json as from_json
from clstream.comparison.records import read_file as read_file
from clstream.comparison.records import read_records as read_records
from clstream.comparison.records import record_of as record_of
from clstream.comparison.records import to_json as to_json
