"""Comparison: records of finished runs, and statistics, tables and pictures of them."""

from clstream.comparison.comparisons import Comparison as Comparison
from clstream.comparison.comparisons import Difference as Difference
from clstream.comparison.comparisons import compare as compare
from clstream.comparison.records import Record as Record
from clstream.comparison.records import RowOfMatrix as RowOfMatrix
from clstream.comparison.records import append_record as append_record
from clstream.comparison.records import from_json as from_json
from clstream.comparison.records import read_file as read_file
from clstream.comparison.records import record_of as record_of
from clstream.comparison.records import to_json as to_json
from clstream.comparison.sources import read_records as read_records
from clstream.comparison.tables import differences_of as differences_of
from clstream.comparison.tables import differences_to_frame as differences_to_frame
from clstream.comparison.tables import numbers_of as numbers_of
from clstream.comparison.tables import print_comparison as print_comparison
from clstream.comparison.tables import to_csv as to_csv
from clstream.comparison.tables import to_frame as to_frame
from clstream.comparison.tables import to_latex as to_latex
from clstream.comparison.tables import to_markdown as to_markdown
