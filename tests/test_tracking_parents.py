"""Pictures in MLflow, and the runs above those of several seeds."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from clstream.strategies import Finetune, Replay
from matplotlib.figure import Figure
from mlflow.entities import RunData
from mlflow.tracking import MlflowClient
from torch import Tensor
from tracked_runs import Stops, curve

from clstream import Evaluated, SessionStarted, on, run
from clstream.checks import example_model, example_stream
from clstream.figures import forgetting_curves
from clstream.tracking import MlflowTracker, parent_run
from clstream.tracking.mlflow_store import charts_page
from clstream.tracking.parent_runs import track_comparison
from clstream.tracking.runs import PICTURE

pytestmark = pytest.mark.slow


def pictures(client: MlflowClient, run_id: str) -> list[str]:
    """Return the pictures that the UI shows among a run's charts, full size, by name and step."""
    shown = client.get_run(run_id).data.tags.get("mlflow.loggedImages") is not None
    files = [file.path for file in client.list_artifacts(run_id, "images")] if shown else []
    return [re.split(r"[+%]timestamp", file)[0] for file in files if file.endswith(".png")]


class Clock:
    """What stands for `time` in the tracker: each session takes a time of its own."""

    def __init__(self, seconds: list[float]) -> None:
        self.now, self.seconds = 0.0, iter(seconds)

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    def monotonic(self) -> float:
        return self.now

    @on(SessionStarted)
    def pass_by(self, event: SessionStarted) -> None:
        self.now += next(self.seconds)


@pytest.mark.usefixtures("at_once")
def test_the_picture_is_renewed_every_thirty_seconds_at_most_and_at_the_end(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client, drawn = MlflowClient(store), []
    clock = Clock([29, 2, 29])
    monkeypatch.setattr("clstream.tracking.picture_timer.time", clock)

    class Looks:
        @on(Evaluated)
        def look(self, event: Evaluated) -> None:
            drawn.append(len(pictures(client, tracker.run_id)))

    tracker = MlflowTracker(uri=store)
    run(Finetune(example_model()), example_stream(), clock, tracker, Looks())
    assert drawn == [0, 1, 1]
    # all at step 0: of one name and step MLflow shows the newest, and what is at several steps shows none at first
    assert pictures(client, tracker.run_id) == ["images/a first look~forgetting curves+step+0"] * 2


def test_a_parent_has_the_picture_of_its_seeds_so_far_and_of_all_at_the_end(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client, titles = MlflowClient(store), []
    clock = Clock([40.0] * 6)
    monkeypatch.setattr("clstream.tracking.picture_timer.time", clock)

    def draw(accuracy: Tensor, taught: Tensor, title: str, *rest: Any) -> Figure:
        titles.append((title, tuple(accuracy.shape)))
        return forgetting_curves(accuracy, taught, title, *rest)

    monkeypatch.setattr("clstream.tracking.parent_runs.forgetting_curves", draw)
    with parent_run("two", [0, 1], uri=store) as parent:
        for seed in (0, 1):
            run(Finetune(example_model()), example_stream(), clock, MlflowTracker(uri=store, parent=parent), seed=seed)
    own = [(title, shape) for title, shape in titles if len(shape) == 3]
    assert own == [("two: 1 so far", (1, rows, 3)) for rows in (1, 2, 3)] + [("two", (2, 3, 3))]  # not again while it is the same
    assert len(pictures(client, parent.run_id)) == 4
    assert "forgetting_curves.png" in {file.path for file in client.list_artifacts(parent.run_id)}


def test_a_comparison_is_a_run_with_a_picture_and_no_params(store: str) -> None:
    """So nothing stands between its name and the picture, and it is no curve in the charts."""
    results = {
        method.__name__: [run(method(example_model()), example_stream(), seed=seed) for seed in (0, 1)]
        for method in (Finetune, Replay)
    }
    tracked = MlflowClient(store).get_run(track_comparison(results, "compared", store, began=1.5))
    assert tracked.info.start_time == 1500  # MLflow shows the pictures of earlier runs first
    assert tracked.info.run_name == "comparison of Finetune, Replay" and tracked.info.status == "FINISHED"
    assert not tracked.data.params and not tracked.data.metrics
    assert len(pictures(MlflowClient(store), tracked.info.run_id)) == 1
    names = {artifact.path for artifact in MlflowClient(store).list_artifacts(tracked.info.run_id)}
    assert names == {"images", "comparison.png", "accuracy_against_cost.png"}


def test_the_view_of_the_charts_begins_with_the_pictures_and_has_one_scale(store: str) -> None:
    tracker = MlflowTracker("viewed", store)
    run(Finetune(example_model()), example_stream(), tracker)
    page = charts_page(store, PICTURE)
    number = tracker.experiment_id
    assert page == f"#/experiments/{number}/runs?compareRunsMode=CHART&workflowType=machine_learning&viewStateShareKey=clstream"
    state = json.loads(MlflowClient(store).get_experiment(number).tags["mlflow.sharedViewState.clstream"])
    first, *lines = state["compareRunCharts"]
    assert first["type"] == "IMAGE" and first["imageKeys"] == [PICTURE] and not first["showRunParams"]
    places = ("accuracy", "task_il/accuracy")
    assert [section["name"] for section in state["compareRunSections"]] == [
        "a first look",
        *places,
        "Model metrics",
        "System metrics",
    ]
    assert [line["metricKey"] for line in lines] == [
        f"{place}/{name}" for place in places for name in ("mean", "seen", "task_00", "task_01", "task_02")
    ]
    assert {(line["range"]["yMin"], line["range"]["yMax"]) for line in lines} == {(-0.02, 1.02)}
    with pytest.raises(LookupError, match="there is no run in another"):
        charts_page(store, PICTURE, "another")


def curves_of(client: MlflowClient, run_id: str) -> dict[str, dict[int, float]]:
    return {name: curve(client, run_id, name) for name in client.get_run(run_id).data.metrics}


def test_parent_run_has_the_mean_of_its_seeds_under_their_names_and_steps(store: str) -> None:
    client, children = MlflowClient(store), []
    with parent_run("three", [0, 1, 5], uri=store) as parent:
        for seed in (5, 0, 1):
            assert not client.get_run(parent.run_id).data.metrics  # a step is written when the last seed has passed it
            tracker = MlflowTracker(uri=store, parent=parent, tags={"why": "a test"})
            run(Finetune(example_model()), example_stream(batch_size=10), tracker, seed=seed, evaluate_every=4)
            children.append(tracker.run_id)
    tracked = client.get_run(parent.run_id)
    assert tracked.info.status == "FINISHED"
    own, of_seeds = curves_of(client, parent.run_id), [curves_of(client, child) for child in children]
    names = set(of_seeds[0])
    assert {"accuracy/mean", "accuracy/task_02", "task_il/forgetting/mean", "loss", "anytime/task_00", "final/forgetting"} <= names
    assert set(own) == names | {f"std/{name}" for name in names}
    for name in names:
        assert list(own[name]) == list(of_seeds[0][name]) == list(own[f"std/{name}"])
        for step, value in own[name].items():
            values = torch.tensor([curve[name][step] for curve in of_seeds], dtype=torch.float64)
            assert value == pytest.approx(float(values.mean()), rel=1e-9, abs=1e-12)
            assert own[f"std/{name}"][step] == pytest.approx(float(values.std()), rel=1e-9, abs=1e-12)
    assert list(own["final/average_accuracy"]) == [0]  # MLflow draws bars of what is at step 0
    params = client.get_run(children[0]).data.params
    assert tracked.data.params == {key: value for key, value in params.items() if key != "seed"} | {"seeds": "0,1,5"}
    assert tracked.data.tags["why"] == "a test" and tracked.data.tags["data_fingerprint"] == example_stream().fingerprint
    below = client.search_runs([tracked.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.run_id}'")
    assert {run_below.info.run_id for run_below in below} == set(children)


def test_params_and_tags_of_a_parent_are_there_from_the_start(store: str) -> None:
    client = MlflowClient(store)

    class Looks:
        @on(SessionStarted)
        def look(self, event: SessionStarted) -> None:
            seen.append(client.get_run(parent.run_id).data)

    seen: list[RunData] = []
    with parent_run("one", [3], uri=store) as parent:
        run(Finetune(example_model()), example_stream(), MlflowTracker(uri=store, parent=parent), Looks(), seed=3)
    assert seen[0].params["strategy"] == "Finetune" and seen[0].params["seeds"] == "3" and "torch" in seen[0].tags
    own = curves_of(client, parent.run_id)
    assert len(own["accuracy/mean"]) == 3 and not [name for name in own if name.startswith("std/")]  # one seed has no spread


def test_a_parent_whose_seed_fails_has_the_steps_that_all_passed(store: str) -> None:
    warned = pytest.warns(RuntimeWarning, match="a mean needs all of 0,1, and 1 did not come as far")
    with warned, parent_run("both", [0, 1], uri=store) as parent:
        first = run(Finetune(example_model()), example_stream(), MlflowTracker(uri=store, parent=parent), seed=0)
        with pytest.raises(RuntimeError):
            run(Finetune(example_model()), example_stream(), MlflowTracker(uri=store, parent=parent), Stops(RuntimeError()), seed=1)
    own = curves_of(MlflowClient(store), parent.run_id)
    assert list(own["accuracy/mean"]) == [1] and "final/average_accuracy" not in own
    assert first.average_accuracy > 0


def test_a_parent_that_is_resumed_has_each_step_once_and_what_the_seeds_had_before(store: str, tmp_path: Path) -> None:
    """The first seed is over, the second one stops; both are in the journal, and only the second runs again."""
    client, folder = MlflowClient(store), tmp_path / "both"
    own = lambda: curves_of(client, parent.run_id)  # noqa: E731
    with pytest.raises(KeyboardInterrupt), parent_run("both", [0, 1], uri=store, folder=folder) as parent:  # noqa: PT012
        run(Finetune(example_model()), example_stream(), MlflowTracker(uri=store, parent=parent), seed=0)
        run(
            Finetune(example_model()), example_stream(), MlflowTracker(uri=store, parent=parent), Stops(KeyboardInterrupt()), seed=1
        )
    assert client.get_run(parent.run_id).info.status == "KILLED"
    before = own()
    assert list(before["accuracy/mean"]) == [1]
    with parent_run("both", [0, 1], uri=store, folder=folder, resumed=True) as again:
        assert again.run_id == parent.run_id
        tracker = MlflowTracker(uri=store, parent=again)
        run(Finetune(example_model()), example_stream(), tracker, seed=1)
    after = own()
    assert list(after["accuracy/mean"]) == [1, 2, 3] and after["seconds"][1] == before["seconds"][1]
    assert after["final/average_accuracy"][0] == pytest.approx(after["accuracy/mean"][3])
    tracked = client.get_run(parent.run_id)
    assert tracked.info.status == "FINISHED" and "error" not in tracked.data.tags


def test_a_parent_takes_its_own_seeds_only(store: str) -> None:
    for seeds in ([], [1, 1]):
        with pytest.raises(ValueError, match="a parent run needs its seeds, each once"), parent_run("none", seeds, uri=store):
            pass
    with parent_run("both", [0, 1], uri=store) as parent, pytest.raises(ValueError, match="is of the seeds 0,1, not of 2"):
        run(Finetune(example_model()), example_stream(), MlflowTracker(uri=store, parent=parent), seed=2)
    with pytest.raises(ValueError, match="is over"):
        run(Finetune(example_model()), example_stream(), MlflowTracker(uri=store, parent=parent), seed=1)
