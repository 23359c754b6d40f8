"""The contract that every strategy and stream must pass."""

from clstream.checks.check import Check as Check
from clstream.checks.examples import example_model as example_model
from clstream.checks.examples import example_stream as example_stream
from clstream.checks.examples import normed_model as normed_model
from clstream.checks.strategy_checks import check_alike as check_alike
from clstream.checks.strategy_checks import check_strategy as check_strategy
from clstream.checks.stream_checks import check_stream as check_stream
