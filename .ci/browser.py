"""Look at runs in the MLflow UI with headless Chromium: are the forgetting curves there, and do they go down?

`python .ci/browser.py [--keep FOLDER]` plays digits into a store of its own: fine-tuning, interrupted in the third task and
resumed; then, as a newcomer does, `clstream compare` with fine-tuning and replay, two seeds each, `clstream report` and
`clstream ui`. It asserts the points of the curves that the run's page draws, and those of the page that `clstream ui` tells to
open: a line for each strategy, which is the mean over its seeds, on one scale, and the pictures above. Of the report it asserts
that every plot is drawn with nothing on the console and nothing asked of a network, from its file and among MLflow's artifacts.
The screenshots go to FOLDER (by default screenshots/, which git ignores).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clstream.strategies import Finetune
from clstream.streams import split_digits
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from clstream import BatchLearned, Stream, on, run
from clstream.checkpoint import Checkpointer, newest
from clstream.cli import main as cli
from clstream.models import Mlp
from clstream.seeds import isolated
from clstream.tracking import MlflowTracker

TASKS = 5


def strategy(stream: Stream) -> Finetune:
    """Return fine-tuning, the same each time."""
    with isolated(0, "model"):
        return Finetune(Mlp(stream.input_shape, stream.classes, (100, 100)))


class PowerCut:
    """Interrupts the run in the middle of the third task."""

    @on(BatchLearned)
    def cut(self, event: BatchLearned) -> None:
        """Raise KeyboardInterrupt."""
        if event.batch.task is not None and event.batch.task.id == 2 and event.batch.epoch == 5:
            raise KeyboardInterrupt


def browser(profile: Path) -> webdriver.Chrome:
    """Start headless Chromium, or end with a sentence."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        sys.exit("the browser check needs Chromium and its driver (on Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}",
        "--window-size=1700,1900",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, Service(driver))


CHARTS = """
return [...document.querySelectorAll('.js-plotly-plot')]
    .filter(plot => plot.data && plot.data.length && plot.data[0].y)
    .map(plot => [plot.data[0].metricKey || plot.data[0].name || '', plot.layout.yaxis.range,
                  plot.data.map(line => [line.name || '', [...(line.y || [])]])]);
"""

PICTURES = """
return [...document.querySelectorAll('.rc-image img')].filter(picture => picture.complete && picture.naturalWidth > 0).length;
"""

PLOTS = """
return [document.querySelectorAll('[data-figure]').length,
        [...document.querySelectorAll('[data-drawn]')].filter(place => place.querySelector('.main-svg :is(.trace, .hm)')).length];
"""

Drawn = dict[str, tuple[list[float], dict[str, list[float]]]]
"""By the name of a chart, its vertical range, and the points of its lines by their names."""


def charts(page: webdriver.Chrome, wanted: set[str], seconds: float = 90) -> Drawn:
    """Return the charts that the page has drawn, once it has drawn these."""
    end = time.monotonic() + seconds
    drawn: Drawn = {}
    while time.monotonic() < end:
        for name, scale, lines in page.execute_script(CHARTS):
            if any(points for _, points in lines):
                drawn[name] = scale, dict(lines)
        if wanted <= set(drawn):
            return drawn
        time.sleep(0.5)
    sys.exit(f"the page did not draw the charts {sorted(wanted - set(drawn))}, only {sorted(drawn)}")


def check_run(page: webdriver.Chrome, url: str, tracker: MlflowTracker, keep: Path) -> None:
    """Assert that the page of a run draws each task's curve, from its own session on, and that it falls."""
    page.get("about:blank")  # else charts of the page before are taken for those of the run, as long as they are there
    page.get(f"{url}/#/experiments/{tracker.experiment_id}/runs/{tracker.run_id}/model-metrics")
    tasks = [f"accuracy/task_{task:02d}" for task in range(TASKS)]
    drawn = charts(page, set(tasks))
    page.save_screenshot(str(keep / "run.png"))
    for task, name in enumerate(tasks):
        (curve,) = drawn[name][1].values()
        assert len(curve) == TASKS - task, f"the curve drawn for task {task} has the points {curve}"
        assert curve[0] > 0.9, f"the curve drawn for task {task} does not start high: {curve}"
        assert max(curve[1:], default=0) < 0.2, f"the curve drawn for task {task} does not fall: {curve}"


def check_comparison(page: webdriver.Chrome, address: str, store: str, keep: Path) -> None:
    """Assert that the page of `clstream ui` has the pictures, and a line for each strategy: the mean over its seeds."""
    page.get(address)
    names = {"accuracy/mean", "accuracy/task_00"}
    drawn = charts(page, names)
    end = time.monotonic() + 60
    while page.execute_script(PICTURES) < 3 and time.monotonic() < end:
        time.sleep(0.5)
    page.save_screenshot(str(keep / "charts.png"))
    shown = page.execute_script(PICTURES)
    assert shown >= 3, f"the page shows {shown} pictures, not those of two strategies and of their comparison"
    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("compared").experiment_id])
    for name in sorted(names):
        scale, lines = drawn[name]
        points = [[round(value, 9) for value in line] for line in lines.values() if line]
        assert len(points) == 2, f"{name} has {len(points)} lines, not one for each strategy: {lines}"
        assert min(scale) <= 0 < 1 <= max(scale), f"{name} is drawn from {scale}, not from 0 to 1"
        for parent in [item for item in runs if item.data.params.get("seeds")]:
            seeds = [item for item in runs if item.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
            curves = [[point.value for point in client.get_metric_history(seed.info.run_id, name)] for seed in seeds]
            mean = [round(sum(values) / len(values), 9) for values in zip(*curves, strict=True)]
            assert [len(curve) for curve in curves] == [TASKS] * 2, f"{parent.info.run_name}: {curves}"
            assert mean in points, f"{parent.info.run_name}: {name} draws {points}, not the mean over its seeds, {mean}"


def wait_for_plots(page: webdriver.Chrome, seconds: float = 60) -> int:
    """Return how many plots a report has, once all are drawn."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        places, drawn = page.execute_script(PLOTS)
        if places and places == drawn:
            return int(places)
        time.sleep(0.2)
    sys.exit(f"the report drew {drawn} of its {places} plots")


def check_report(page: webdriver.Chrome, report: Path, keep: Path) -> None:
    """Assert that a report draws all plots by itself: nothing is said on the console, nothing asked of a network."""
    page.get("about:blank")
    page.get_log("performance"), page.get_log("browser")  # of the pages before
    page.get(report.as_uri())
    assert wait_for_plots(page) == 5, "the report has other plots than it should"
    page.save_screenshot(str(keep / "report.png"))
    assert not page.get_log("browser"), "the report has something on the console"
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    assert [address for address in asked if not address.startswith("data:")] == [report.as_uri()], f"the report asked for {asked}"


def check_artifact(page: webdriver.Chrome, url: str, parent: Run, keep: Path) -> None:
    """Assert that MLflow shows the report among the artifacts of a run, with all plots."""
    page.get(f"{url}/#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}/artifacts/report.html")
    end = time.monotonic() + 60
    while not (frames := page.find_elements("css selector", "iframe")) and time.monotonic() < end:
        time.sleep(0.5)
    assert frames, "MLflow does not show the report"
    page.switch_to.frame(frames[0])
    wait_for_plots(page)
    page.switch_to.default_content()
    page.save_screenshot(str(keep / "artifact.png"))


def wait_for_address(ui: subprocess.Popen[str]) -> str:
    """Return the address that `clstream ui` tells to open, which it does when it is ready."""
    assert ui.stdout is not None
    for line in ui.stdout:
        if line.startswith("http"):
            return line.strip()
    sys.exit("clstream ui ended before it was ready")


def main() -> None:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, default=Path("screenshots"))
    keep = parser.parse_args().keep.absolute()
    keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        store = f"sqlite:///{folder}/mlflow.db"
        stream = split_digits()
        tracker = MlflowTracker(uri=store, folder=folder / "run")
        try:
            run(strategy(stream), stream, tracker, Checkpointer(folder / "run", every_batches=40), PowerCut())
        except KeyboardInterrupt:
            again = MlflowTracker(uri=store, folder=folder / "run", allow_offline=True)
            run(strategy(stream), stream, again, Checkpointer(folder / "run"), resume=newest(folder / "run"))
            assert again.run_id == tracker.run_id, "the resumed run is another one in MLflow"
        configs = []
        for name in ("Finetune", "Replay"):
            configs.append(f"{name}.yaml")
            Path(configs[-1]).write_text(
                f"strategy: {name}\nstream: {{class_path: split_digits, init_args: {{epochs: 3}}}}\n", encoding="utf-8"
            )
        assert not cli(["compare", *configs, "--seeds", "0,1", "--experiment", "compared", "--threads", "1"])
        client = MlflowClient(store)
        (finetune,) = Path("runs").glob("Finetune-*")
        assert not cli(["report", str(finetune)])
        compared = client.search_runs([client.get_experiment_by_name("compared").experiment_id])
        (parent,) = [item for item in compared if item.data.params.get("seeds") and item.data.params["strategy"] == "Finetune"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "clstream.cli", "ui", "--port", str(port)]
        ui = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            address = wait_for_address(ui)
            page = browser(folder / "profile")
            try:
                check_comparison(page, address, store, keep)
                check_run(page, address.partition("/#")[0], tracker, keep)
                check_report(page, folder / "report.html", keep)
                check_artifact(page, address.partition("/#")[0], parent, keep)
            finally:
                page.quit()
        finally:
            ui.terminate()
            ui.wait(30)
    print(
        "the forgetting curves are drawn as they were measured, of a run and of two strategies with two seeds, and so is a report, "
        f"from its file and in MLflow; see {keep}"
    )


if __name__ == "__main__":
    main()
