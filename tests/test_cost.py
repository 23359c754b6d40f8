"""What runs cost: FLOPs against a count of every operation, memory, seconds, and runs that are resumed."""

import pytest
from conftest import STRATEGIES, make

from clstream import run
from clstream.checks import example_model, example_stream
from clstream.engine import check_fits
from clstream.measures.flops import FlopMode
from clstream.seeds import isolated


def example(name):
    return make(name)(example_model(head="fixed") if name in ("TAME", "Hypernetwork", "SHARP") else example_model())


def counted(call):
    """Return the FLOPs of all operations in a call, and what it returns."""
    everything = FlopMode(lambda: False)
    with everything:
        result = call()
    return everything.flops, result


@pytest.mark.parametrize(("batch_size", "epochs"), [(8, 1), (2, 2)])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_flops_of_a_run_are_those_of_every_step(name, batch_size, epochs):
    with isolated(0, "strategy"):
        strategy = example(name)
    stream = example_stream(batch_size=batch_size, epochs=epochs)
    before, _ = counted(lambda: check_fits(strategy, stream))
    everything, result = counted(lambda: run(strategy, stream))
    assert result.cost.total["flops"] == everything - before
