"""Look at a run in the MLflow UI with headless Chromium: are the forgetting curves there, and do they go down?

`python .ci/browser.py [--keep FOLDER]` plays fine-tuning on digits into a store of its own, interrupted in the third task and
resumed, starts `mlflow ui` on loopback, opens the run's page, and asserts that it shows a chart for the accuracy on each task, and
that the curves behind the charts fall after their task. The screenshot goes to FOLDER (by default screenshots/, which git ignores).
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from clstream.strategies import Finetune
from clstream.streams import split_digits
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from clstream import BatchLearned, Stream, on, run
from clstream.checkpoint import Checkpointer, newest
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
    found, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if found is None or driver is None:
        sys.exit("the browser check needs Chromium and its driver (on Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}",
        "--window-size=1700,1300",
    ):  # fmt: skip
        options.add_argument(argument)
    return webdriver.Chrome(options, Service(driver))


CHARTS = """
return [...document.querySelectorAll('.js-plotly-plot')]
    .filter(plot => plot.data && plot.data.length && plot.data[0].y)
    .map(plot => [plot.data[0].metricKey || plot.data[0].name || '', [...plot.data[0].y]]);
"""


def charts(page: webdriver.Chrome, wanted: int, seconds: float = 90) -> list[tuple[str, list[float]]]:
    """Return the name and the points of each chart that the page has drawn, once it has drawn so many."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        drawn = page.execute_script(CHARTS)
        if len(drawn) >= wanted:
            return [(name, points) for name, points in drawn]
        time.sleep(0.5)
    sys.exit(f"the run's page drew {len(page.execute_script(CHARTS))} charts, not {wanted}")


def wait(url: str, server: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Wait until the UI answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            sys.exit("mlflow ui ended before it answered")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    sys.exit("mlflow ui did not answer")


def main() -> None:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, default=Path("screenshots"))
    keep = parser.parse_args().keep.absolute()
    keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        store = f"sqlite:///{folder}/mlflow.db"
        stream = split_digits()
        tracker = MlflowTracker(uri=store, folder=folder / "run")
        try:
            run(strategy(stream), stream, tracker, Checkpointer(folder / "run", every_batches=40), PowerCut())
        except KeyboardInterrupt:
            again = MlflowTracker(uri=store, folder=folder / "run", patient=True)
            run(strategy(stream), stream, again, Checkpointer(folder / "run"), resume=newest(folder / "run"))
            assert again.run_id == tracker.run_id, "the resumed run is another one in MLflow"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(
            [*command, "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            wait(url, server)
            page = browser(folder / "profile")
            try:
                page.get(f"{url}/#/experiments/{tracker.experiment_id}/runs/{tracker.run_id}/model-metrics")
                drawn = dict(charts(page, TASKS + 1))
                page.save_screenshot(str(keep / "run.png"))
            finally:
                page.quit()
            for task in range(TASKS):
                curve = drawn[f"accuracy/task_{task:02d}"]
                assert len(curve) == TASKS, f"the curve drawn for task {task} has the points {curve}"
                assert curve[task] > 0.9, f"the curve drawn for task {task} never rises: {curve}"
                assert max(curve[task + 1 :], default=0) < 0.2, f"the curve drawn for task {task} does not fall: {curve}"
        finally:
            os.killpg(server.pid, 15)
            server.wait(30)
    print(f"the run's page draws a chart for each of {TASKS} tasks, and the curves fall after their task; see {keep / 'run.png'}")


if __name__ == "__main__":
    main()
