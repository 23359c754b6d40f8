"""The detector of shifts against its formulas, and the measures of detection against cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clstream.bus import Bus, on
from clstream.drift_detection import ShiftDetected, ShiftDetector
from clstream.online_metrics import Detection, delays, mean_delay, precision, recall

LN2 = math.log(2)


class Ear:
    def __init__(self) -> None:
        self.heard: list[ShiftDetected] = []

    @on(ShiftDetected)
    def hear(self, event: ShiftDetected) -> None:
        self.heard.append(event)


def detector(start: float = LN2, **options: float) -> tuple[ShiftDetector, Ear]:
    tested, ear = ShiftDetector(**options), Ear()
    tested.bus = Bus(ear)
    tested.reset(start)
    return tested, ear


def test_a_known_switch_is_told_at_its_batch_with_the_numbers_of_the_formulas() -> None:
    before = [0.69, 0.6, 0.5, 0.45, 0.4, 0.38, *[0.37] * 12, 0.36, 0.35, 0.35, 0.36, 0.35]
    losses = [*before, 0.9, 0.8]
    tested, ear = detector(window=12)
    alarms = [tested.detect(loss) for loss in losses]
    (event,) = ear.heard
    assert alarms.index(True) == event.step == len(before)
    window = np.array(before[-12:])  # not smoothed, and without the batch of the shift
    smoothed = losses[0]
    for loss in losses[1 : event.step + 1]:
        smoothed = 0.2 * loss + 0.8 * smoothed
    assert event.smoothed == pytest.approx(smoothed)
    assert event.threshold == pytest.approx(window.mean() + 3 * max(window.std(), 0.005))


def test_the_batch_is_checked_before_it_counts() -> None:
    tested, _ = detector(start=0.5, window=1, alpha=1.0)
    assert tested.detect(0.516)  # with 0.516 in the window, the threshold would be 0.531
    tested, _ = detector(start=0.5, window=1, alpha=1.0)
    assert not tested.detect(0.514)


def test_the_window_starts_with_the_loss_of_a_guess_and_its_spread_is_that_of_a_population() -> None:
    tested, _ = detector(start=LN2)
    tested.detect(0.5)
    assert tested.losses.threshold == pytest.approx(LN2 + 3 * 0.005)
    tested.detect(0.5)
    assert tested.losses.threshold == pytest.approx(np.mean([LN2, 0.5]) + 3 * np.std([LN2, 0.5]))


def test_a_drop_is_no_shift_and_one_high_loss_is_smoothed_away() -> None:
    tested, ear = detector(window=20)
    for loss in [*np.linspace(0.69, 0.35, 60), *[0.01] * 10]:
        tested.detect(float(loss))
    assert not ear.heard
    tested, ear = detector(start=0.4, window=20)
    for loss in [0.4, 0.42, 0.38] * 10 + [0.52] + [0.4, 0.38, 0.42] * 10:
        tested.detect(loss)
    assert not ear.heard


def test_it_starts_anew_after_a_shift_and_waits_for_its_warmup() -> None:
    rising = [0.7, 0.8, 0.9]
    tested, ear = detector()
    for loss in rising:
        tested.detect(loss)
    assert ear.heard[0].step == 1  # two nearly equal values: the floor is all there is
    tested, ear = detector(warmup=len(rising))
    for loss in rising:
        tested.detect(loss)
    assert not ear.heard
    tested, ear = detector(start=0.4, window=10)
    alarms = [tested.detect(loss) for loss in [0.4] * 20 + [1.0] * 20]
    assert alarms.count(True) == 1 and alarms[20]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("warmup", [0, 12])
def test_alarms_and_thresholds_are_those_of_the_formulas_through_many_shifts(seed: int, warmup: int) -> None:
    draw = np.random.default_rng(seed)
    losses = [float(0.3 + 0.6 * math.exp(-t / 9) + 0.02 * draw.random()) for _ in range(8) for t in range(draw.integers(8, 60))]
    tested, ear = detector(start=LN2, window=15, warmup=warmup)
    expected, window, smoothed, taken = [], [LN2], None, 0
    for step, loss in enumerate(losses):
        smoothed = loss if smoothed is None else 0.2 * loss + 0.8 * smoothed
        threshold = np.mean(window) + 3 * max(np.std(window), 0.005)
        if taken >= warmup and smoothed > threshold:
            expected.append((step, smoothed, threshold))
            window, smoothed, taken = [LN2], loss, 0
        window, taken = [*window, loss][-15:], taken + 1
        tested.detect(loss)
    assert len(expected) >= 3 and [event.step for event in ear.heard] == [step for step, _, _ in expected]
    for event, (_, smoothed, threshold) in zip(ear.heard, expected, strict=True):
        assert (event.smoothed, event.threshold) == (pytest.approx(smoothed), pytest.approx(threshold))


def test_a_loss_right_at_the_threshold_is_no_shift() -> None:
    tested, ear = detector(start=0.5, window=5, alpha=1.0, deviations=0.0, floor=0.0)
    assert not tested.detect(0.5) and not ear.heard


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha is the weight"),
        ({"alpha": 1.5}, "alpha must be a finite number from 0 to 1"),
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"deviations": -1.0}, "deviations must be a finite number of at least 0"),
        ({"floor": math.nan}, "floor must be a finite number of at least 0"),
        ({"warmup": -1}, "warmup must be a whole number of at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShiftDetector(**options)


def test_measures_of_detection_by_hand() -> None:
    alarms, boundaries = [5, 104, 110, 350], [100, 200, 300]
    assert delays(alarms, boundaries) == [4, None, 50]
    assert precision(alarms, boundaries) == 2 / 4
    assert recall(alarms, boundaries) == 2 / 3
    assert mean_delay(alarms, boundaries) == 27
    assert delays(alarms, boundaries, within=49) == [4, None, None]
    assert delays(alarms, boundaries, within=50) == [4, None, 50]
    observer = Detection(within=49)
    observer.alarms, observer.boundaries = alarms, boundaries
    assert observer.delays == [4, None, None]
    assert (observer.measured.precision, observer.measured.recall, observer.measured.delay) == (1 / 4, 1 / 3, 4)
    assert observer.measured.false_alarms == 3
    with pytest.raises(ValueError, match="within must be a whole number of at least 0"):
        Detection(within=-1)
    assert delays([100, 199, 200], [100, 200]) == [0, 0]
    assert math.isnan(precision([], [3])) and math.isnan(recall([3], [])) and math.isnan(mean_delay([1], [2]))


@given(st.lists(st.integers(0, 60)), st.sets(st.integers(0, 60)), st.none() | st.integers(0, 20))
def test_each_alarm_detects_one_boundary_at_most(alarms: list[int], boundaries: set[int], within: int | None) -> None:
    steps = delays(alarms, sorted(boundaries), within)
    hits = [boundary + delay for boundary, delay in zip(sorted(boundaries), steps, strict=True) if delay is not None]
    assert len(set(hits)) == len(hits) and set(hits) <= set(alarms)
    if alarms and boundaries:
        assert precision(alarms, sorted(boundaries), within) * len(alarms) == pytest.approx(len(hits))
        assert recall(alarms, sorted(boundaries), within) * len(boundaries) == pytest.approx(len(hits))
