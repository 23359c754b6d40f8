"""Measures: how well test samples are answered, and what a run costs."""

from clstream.measures.by_name import MAIN as MAIN
from clstream.measures.by_name import MEASURES as MEASURES
from clstream.measures.by_name import chosen as chosen
from clstream.measures.by_name import main_names as main_names
from clstream.measures.by_name import measure_named as measure_named
from clstream.measures.cost import Cost as Cost
from clstream.measures.cost import pareto_front as pareto_front
from clstream.measures.flops import same_flops as same_flops
from clstream.measures.measure import SCORES as SCORES
from clstream.measures.measure import Answers as Answers
from clstream.measures.measure import Measure as Measure
