"""`clstream episodes`: one MLflow run with curves over the episodes, and going on in it; features computed once."""

import json
import shlex

import pytest
from mlflow import MlflowClient

from clstream import on
from clstream.cli import main
from clstream.episodes import EpisodeEnded
from clstream.episodes.progress import EpisodesProgress

GIVEN = "--stream.data digits --stream.ways 2 --stream.sets 4 --stream.sets_per_group 2 --stream.count 6 --model Mlp --threads 1 "


def episodes(options, out):
    return main(["episodes", *shlex.split(GIVEN + options), "--out", str(out)])


def rows(folder):
    return [json.loads(line) | {"seconds": 0} for line in (folder / "episodes.jsonl").read_text().splitlines()]


class StopAfter(EpisodesProgress):
    @on(EpisodeEnded)
    def stop(self, event):
        if len(self.accuracies) == 3:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_in_the_same_mlflow_run(store, tmp_path, capsys, monkeypatch):
    options = f"--strategy Finetune --stream.steps 3 --stream.noise [0.2] --tracking_uri {store}"
    with monkeypatch.context() as patch:
        patch.setattr("clstream.episodes.progress.EpisodesProgress", StopAfter)
        assert episodes(options, tmp_path / "cut") == 130
    assert "to go on, give the same command and --resume" in capsys.readouterr().err
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("clstream").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "KILLED" and run.data.params["strategy"] == "Finetune"
    assert run.data.params["episodes.ways"] == "2" and "accuracy/mean" not in run.data.metrics
    assert episodes(options, tmp_path / "cut") == 1
    assert "has episodes already" in capsys.readouterr().err

    assert episodes(f"{options} --resume", tmp_path / "cut") == 0
    text = capsys.readouterr().out
    assert "Finetune, 6 of Episodes('digits episodes'" in text and "1-NN on inputs" in text and "chance" in text
    run = next(own for own in client.search_runs([experiment]) if own.info.run_id == run.info.run_id)
    assert run.info.status == "FINISHED"
    for name in ("accuracy", "corrupted/noise_0.2", "nearest/accuracy", "nearest/noise_0.2"):
        assert [point.step for point in client.get_metric_history(run.info.run_id, name)] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "by_set/accuracy")] == [1, 2, 3, 4]
    assert {"episodes.png", "episodes.jsonl", "results.txt"} <= {file.path for file in client.list_artifacts(run.info.run_id)}

    assert episodes(options.partition(" --tracking")[0] + " --track false", tmp_path / "whole") == 0
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    accuracies = [point.value for point in client.get_metric_history(run.info.run_id, "accuracy")]
    assert accuracies == [row["accuracy"] for row in rows(tmp_path / "whole")[1:]]


def test_features_are_those_of_the_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, options in (("plain", ""), ("frozen", "--features")):
        assert episodes(f"--track false {options}", tmp_path / name) == 0
    plain, frozen = ([row["accuracy"] for row in rows(tmp_path / name)[1:]] for name in ("plain", "frozen"))
    assert plain == pytest.approx(frozen)


@pytest.mark.parametrize(
    ("status", "options", "sentence"),
    [
        (2, "--stream.wais 3", "'wais'"),
        (2, "--stream.index 3", "clstream episodes has no option --stream.index"),
        (2, "--evaluate_every 3", "clstream episodes has no option --evaluate_every"),
        (2, "--stream.sets 5", "sets must be a multiple of sets_per_group, 2, not 5"),
        (2, "--stream.noise [1.5]", "noise must be a finite number from 0 to 1, not 1.5"),
        (1, "--features --stream.noise [0.5]", "corrupts its targets, which must be done before they become other inputs"),
        (1, "--weights nowhere.pt", "the weights nowhere.pt can't be read"),
    ],
)
def test_what_is_refused_in_a_sentence(status, options, sentence, tmp_path, capsys):
    words = GIVEN.split()
    for word in options.split():
        if word in words:
            place = words.index(word)
            del words[place : place + 2]
    assert main(["episodes", *words, *options.split(), "--track", "false", "--out", str(tmp_path / "out")]) == status
    out, err = capsys.readouterr()
    assert sentence in err and len(err.strip().splitlines()) == 1 and not out


@pytest.mark.slow
def test_episodes_that_are_killed_end_as_if_they_had_not_been(tmp_path, capsys):
    options = "--stream.data digits --stream.ways 2 --stream.count 20 --model Mlp --strategy Finetune --track false --threads 1"
    assert main(["prove-resume", "episodes", "--kills", "1", "--out", str(tmp_path / "proof"), *options.split()]) == 0
    out = capsys.readouterr().out
    assert "1 kills; compared: 20 episodes" in out and "0 bits differ" in out
    assert main(["prove-resume", "episodes", "--resume", "--stream.data", "digits"]) == 2
    assert "clstream episodes has no option --resume" in capsys.readouterr().err
