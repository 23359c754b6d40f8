"""`clstream report`: one page that asks no network, runs nothing that its records say, and tells two sweeps apart."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from clstream.cli import main as cli
from clstream.comparison.changes import changes_between
from clstream.comparison.methods import panels_of, rank_methods
from clstream.comparison.origins import Origin, link_to, read_source
from clstream.comparison.plots import changes_plot, plots_of, ranks_of
from clstream.comparison.records import Record, RowOfMatrix, append_record

pytest.importorskip("plotly")

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def record(label: str, seed: int, last: tuple[float, ...], stream: str = "split_digits", **other: Any) -> Record:
    """Return the record of a run that ended with these accuracies."""
    tasks = len(last)
    rows = [[0.9 if task == row else None if task > row else last[task] for task in range(tasks)] for row in range(tasks)]
    rows[-1] = list(last)
    average = sum(last) / tasks
    values: dict[str, Any] = {
        "metrics": {"average_accuracy": average, "forgetting": 0.9 - average}, "fingerprint": "data", "code": "abc",
        "higher_is_better": {"average_accuracy": True, "forgetting": False}, "params": {"strategy.capacity": "200"},
        "cost": {"memory_bytes": 1000.0 * seed, "learning_flops": 1e9, "consolidating_flops": 0.0, "flops": 2e9},
    }  # fmt: skip
    marks = [RowOfMatrix(row + 1, 10 * row + 10, [row]) for row in range(tasks)]
    return Record(label.partition(",")[0], label, stream, "class", seed, matrix=rows, rows=marks, seconds=2.0, **values | other)


RECORDS = [
    record(label, seed, (low + 0.01 * seed, 0.9)) for label, low in (("Finetune", 0.1), ("Replay", 0.7)) for seed in range(3)
]


class Tags(HTMLParser):
    """The tags of a page, and what its scripts say."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.scripts, self.inside = list[tuple[str, dict[str, str | None]]](), list[str](), ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def write(folder: Path, records: list[Record], grid: str = "") -> Path:
    folder.mkdir()
    for item in records:
        append_record(folder / "records.jsonl", item)
    if grid:
        (folder / "grid.yaml").write_text(grid, encoding="utf-8")
    return folder


def test_what_records_say_runs_nowhere_and_the_page_asks_no_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = [replace(item, label=ATTACK, stream=ATTACK, code=ATTACK, tuned=ATTACK, params={ATTACK: ATTACK}) for item in RECORDS[:3]]
    failed = replace(RECORDS[0], seed=9, error=ATTACK, metrics={}, matrix=[], rows=[])
    write(tmp_path / "sweep", [*RECORDS, *odd, failed], grid=ATTACK)
    out = tmp_path / "page.html"
    assert cli(["report", str(tmp_path / "sweep"), "--out", str(out)]) == 0
    assert re.search(r"page.html: 10 runs, \d\.\d MB, in \d", capsys.readouterr().out)
    page = out.read_text(encoding="utf-8")
    parsed = Tags(page)
    names = [tag for tag, _ in parsed.tags]
    assert names.count("script") == 3 and "img" not in names and len(parsed.scripts) == 3
    assert not [attributes for _, attributes in parsed.tags if {"src", "onerror", "onclick"} & attributes.keys()]
    links = [attributes["href"] or "" for tag, attributes in parsed.tags if tag == "a"]
    assert not links
    policy = next(attributes["content"] or "" for tag, attributes in parsed.tags if attributes.get("http-equiv"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in parsed.scripts[1:]]
    assert policy.startswith("default-src 'none'; script-src " + " ".join(f"'sha256-{text}'" for text in hashes))
    figures = json.loads(parsed.scripts[0])
    assert len(figures) == names.count("div") - page.count("<div class=wide>") == 5 * 2
    assert "&lt;script&gt;" in json.dumps(figures) and "<script" not in json.dumps(figures)


def test_tables_hold_means_runs_errors_and_configs(tmp_path: Path) -> None:
    failed = replace(RECORDS[0], seed=9, error="the loss is not finite", metrics={}, matrix=[], rows=[])
    write(tmp_path / "sweep", [*RECORDS, failed], grid="sweep: {seed: 0-2}")
    assert cli(["report", str(tmp_path / "sweep"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8").partition('id="figures"')[0]
    text = re.sub(r"<[^>]*>", " ", page)
    for part in (
        "Report: sweep", "0.805 ± 0.012", "0.505 ± 0.012", "the loss is not finite", "sweep: {seed: 0-2}", "strategy.capacity: 200",
        "7 runs",
    ):  # fmt: skip
        assert part in text
    assert re.search(r"<b>0\.805 ± 0\.012</b>", page) and not re.search(r"<b>0\.505", page)


def test_two_sweeps_tell_what_is_new_gone_better_and_why(tmp_path: Path) -> None:
    after = [
        *(record("Replay", seed, (0.8 + 0.011 * seed, 0.9), params={"strategy.capacity": "500"}, code="def") for seed in range(3)),
        *(record("EWC", seed, (0.2, 0.9)) for seed in range(2)),
        *(record("Finetune", seed, (0.1 + 0.01 * seed, 0.9), "other") for seed in range(3)),
    ]
    changes = changes_between(RECORDS, after)
    assert [(change.method, change.stream.partition(",")[0], change.verdict) for change in changes] == [
        ("Replay", "split_digits", "higher"), ("EWC", "split_digits", "new"), ("Finetune", "other", "new"),
        ("Finetune", "split_digits", "gone"),
    ]  # fmt: skip
    replay = changes[0]
    assert replay.difference is not None and replay.difference.mean == pytest.approx(0.0505) and replay.difference.pairs == 3
    assert replay.options == ("strategy.capacity: 200, now 500",) and (replay.code_before, replay.code_after) == ("abc", "def")
    assert [change.verdict for change in changes_between(RECORDS, RECORDS)] == ["the same numbers"] * 2
    other_seeds = [replace(item, seed=item.seed + 10) for item in RECORDS]
    assert [change.verdict for change in changes_between(RECORDS, other_seeds)] == ["not tested"] * 2
    noisy = [replace(item, metrics={"average_accuracy": 0.5 + 0.1 * (-1) ** item.seed}) for item in RECORDS[:3]]
    assert [change.verdict for change in changes_between(RECORDS[:3], noisy)] == ["no difference shown"]
    sources = [str(write(tmp_path / name, records)) for name, records in (("old", RECORDS), ("new", after))]
    assert cli(["report", *sources, "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8").partition('id="figures"')[0]
    assert "What changed" in page and "strategy.capacity: 200, now 500" in page and "abc → def" in page


def test_plots_are_what_plotly_takes_and_have_the_numbers(tmp_path: Path) -> None:
    from plotly.graph_objects import Figure

    records = [*RECORDS, *(replace(item, stream="other") for item in RECORDS), record("One seed", 0, (0.3, 0.9))]
    panels = panels_of(records)
    plots = plots_of(panels[0])
    assert [*plots] == [
        "Final accuracy", "Mean of the tasks seen", "Forgetting curves", "Matrices of accuracy", "Accuracy against cost",
    ]  # fmt: skip
    ranks = rank_methods(panels)
    assert ranks is not None
    for plot in (*plots.values(), ranks_of(*ranks), changes_plot(changes_between(RECORDS, records), ("old", "new"))):
        Figure(plot)  # it refuses names and values that Plotly doesn't know
        json.dumps(plot, allow_nan=False)
    best = plots["Final accuracy"]["data"][-1]
    assert (
        best["name"] == "Replay"
        and best["x"] == [pytest.approx(0.805)]
        and best["error_x"]["array"] == [pytest.approx(0.01242, abs=1e-4)]
    )
    matrix = plots["Matrices of accuracy"]["data"][0]
    assert matrix["z"] == [[pytest.approx(0.9), None], [pytest.approx(0.71), pytest.approx(0.9)]]


def test_a_run_is_linked_where_it_is_kept(tmp_path: Path) -> None:
    seed = tmp_path / "sweep" / "runs" / "Replay #1" / "seed_0"
    seed.mkdir(parents=True)
    (seed.parent / "config.yaml").write_text("strategy: Replay\n", encoding="utf-8")
    lines = [
        {"clstream": "tracking", "format": 1, "uri": "http://host:5000", "experiment": "one", "key": "k"},
        {
            "item": 1,
            "do": "create",
            "name": "r",
            "at": 1,
            "tags": {"mlflow.parentRunId": "above", "torch": "2.9", "host": "secret"},
        },
        {"sent": 1, "run_id": "0123456789"},
    ]
    (seed / "tracking.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for number, place in enumerate(("was/elsewhere/sweep/runs/Replay #1", str(seed), "nowhere", "")):
        append_record(tmp_path / "sweep" / "records.jsonl", replace(RECORDS[0], source=place, identity=str(number)))
    source = read_source(str(tmp_path / "sweep"))
    origin, same, *unknown = source.origins
    assert same == replace(origin, folder=seed) and unknown == [Origin(), Origin()]
    assert origin == Origin(seed.parent, "strategy: Replay\n", "http://host:5000", "0123456789", "above", {"torch": "2.9"})
    assert origin.address == "http://host:5000/#/runs/0123456789" and source.parents == {("http://host:5000", "above")}
    assert replace(origin, uri="sqlite:///mlflow.db").address == ""
    assert link_to(seed.parent, tmp_path / "page.html") == "sweep/runs/Replay%20%231"
    (tmp_path / "javascript:alert(1)").mkdir()
    assert link_to(tmp_path / "javascript:alert(1)", tmp_path / "page.html").startswith("javascript%3A")


def test_a_config_is_no_other_file(tmp_path: Path) -> None:
    seed = tmp_path / "sweep" / "runs" / "one" / "seed_0"
    seed.mkdir(parents=True)
    (tmp_path / "private").write_text("a secret", encoding="utf-8")
    (seed.parent / "config.yaml").symlink_to(tmp_path / "private")
    append_record(tmp_path / "sweep" / "records.jsonl", replace(RECORDS[0], source="runs/one"))
    assert read_source(str(tmp_path / "sweep")).origins[0].config == ""


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli(["report", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("clstream: error: ") and error.count("\n") == 1
    return error


def test_what_cannot_be_is_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, out = str(write(tmp_path / "sweep", RECORDS)), ("--out", str(tmp_path / "page.html"))
    assert "of one source, or of two" in refusal(capsys, sweep, "b", "c", *out)
    assert "is given twice" in refusal(capsys, sweep, sweep, *out)
    assert "is a folder: name a file" in refusal(capsys, sweep, "--out", str(tmp_path))
    assert "is in no folder that there is" in refusal(capsys, sweep, "--out", str(tmp_path / "a" / "b.html"))
    assert "there is no " in refusal(capsys, str(tmp_path / "nothing"), *out)
    failed = write(tmp_path / "failed", [replace(RECORDS[0], error="it failed", metrics={})])
    assert "no run ended well" in refusal(capsys, str(failed), *out)
    assert "required: SOURCE" in refusal(capsys, *out)
    assert not (tmp_path / "page.html").exists()


def test_a_run_may_be_where_no_folder_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = [replace(item, source=source) for item, source in zip(RECORDS[:3], ("a" * 5000, "a\0b", "/proc/1/root/x"), strict=True)]
    assert cli(["report", str(write(tmp_path / "sweep", odd)), "--out", str(tmp_path / "page.html")]) == 0
    assert "page.html: 3 runs" in capsys.readouterr().out


def test_without_plotly_it_is_said_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = str(write(tmp_path / "sweep", RECORDS))
    monkeypatch.setattr("clstream.cli.report.find_spec", lambda name: None)
    assert "pip install 'clstream[report]'" in refusal(capsys, sweep, "--out", str(tmp_path / "page.html"))


@pytest.mark.slow
def test_the_page_is_an_artifact_of_the_mlflow_run_above_the_seeds(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow.tracking import MlflowClient

    options = [
        "--stream",
        "blobs",
        "--stream.train_per_class",
        "10",
        "--model.hidden",
        "[4]",
        "--threads",
        "1",
        "--max_sessions",
        "2",
    ]
    for strategy in ("Finetune", "Replay"):
        assert cli(["run", *options, "--strategy", strategy, "--seeds", "0,1"]) == 0
    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("clstream").experiment_id])
    parents = {run.data.params["strategy"]: run.info.run_id for run in runs if "seeds" in run.data.params}
    capsys.readouterr()
    (finetune,) = Path("runs").glob("Finetune-*")
    assert cli(["report", str(finetune)]) == 0
    assert f"it is an artifact of the MLflow run {parents['Finetune']} too, in {store}" in capsys.readouterr().out
    assert "report.html" in [item.path for item in client.list_artifacts(parents["Finetune"])]
    page = Path("report.html").read_text(encoding="utf-8").partition('id="figures"')[0]
    assert f'href="{finetune.as_posix()}/seed_1"' in page and "class_path: clstream.strategies.Finetune" in page
    assert store in page and "torch" in page
    assert cli(["report", str(finetune), "--tracking_uri", "sqlite:///other.db", "--out", "other.html"]) == 0
    assert f"with --tracking-uri {store} the page is put among their artifacts" in capsys.readouterr().out
    assert not Path("other.db").exists() and "other.html" not in [item.path for item in client.list_artifacts(parents["Finetune"])]
    assert cli(["report", "runs"]) == 0
    assert "under 2 MLflow runs: the page is put among the artifacts of none" in capsys.readouterr().out
    assert cli(["report", "mlflow:clstream", "--out", "all.html"]) == 0
    page = Path("all.html").read_text(encoding="utf-8").partition('id="figures"')[0]
    assert "all.html: 4 runs" in capsys.readouterr().out and all(
        run.info.run_id[:8] in page for run in runs if "seed" in run.data.params
    )
    Path("mlflow.db").unlink()
    assert cli(["report", str(finetune)]) == 0
    assert "clstream: the page is not in MLflow: there is no tracking store" in capsys.readouterr().err
    assert not Path("mlflow.db").exists()
