"""What tests of the tracker read from an MLflow store."""

from __future__ import annotations

from mlflow.tracking import MlflowClient

from clstream import TaskEnded, on


def curve(client: MlflowClient, run_id: str, name: str) -> dict[int, float]:
    points = client.get_metric_history(run_id, name)
    assert len({point.step for point in points}) == len(points), f"{name} has a step twice"
    return {point.step: point.value for point in points}


class Stops:
    """Raises in the second session."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.tasks = error, 0

    @on(TaskEnded)
    def end(self, event: TaskEnded) -> None:
        self.tasks += 1
        if self.tasks == 2:
            raise self.error
