"""A search: trials one after the other or side by side, kept in a file of Optuna's, so that it goes on where it was stopped."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clstream.params import check_integer, check_positive
from clstream.seeds import derive
from clstream.sweep.workers import JobError, run_jobs
from clstream.tuning.space import Choice, Range, Space
from clstream.tuning.trial import Outcome

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

FILE = "study.db"

RANDOM_TRIALS = 5
"""Trials with random values, before Optuna's sampler learns from what came of them."""

MOST_TRIALS = 100_000
"""Of a search whose budget is time."""


@dataclass(frozen=True)
class Job:
    """A trial to be run.

    Args:
        number: from 0 up.
        values: what each option is.
        earlier: Optuna's trials that are over, for `run_trial`.

    """

    number: int
    values: Mapping[str, Any]
    earlier: Sequence[FrozenTrial]


class Search:
    """A search for the values of some options by Optuna's TPE sampler, with a seed: the same search gives the same trials.

    Each trial's values are a pure function of the seed, its number and what came of the trials before. So a search that was stopped
    ends as it would have without the break.

    Args:
        folder: where its file is, study.db (SQLite); a search that is there goes on.
        space: for each option what it may be: see `parse_space`.
        seed: of what is chosen at random.
        start: the values of the first trial, if they are in the space: what the options are without a search.
        about: what is searched, in plain values: a search that is there must be about the same.

    Raises:
        ImportError: if Optuna is not installed.
        ValueError: if the folder has a search of something else, or a file that is none.

    """

    def __init__(
        self,
        folder: str | Path,
        space: Space,
        seed: int = 0,
        start: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        check_integer(0, seed=seed)
        check_installed()
        self.space, self.seed = dict(space), seed
        self.distributions = {option: _distribution(values) for option, values in self.space.items()}
        self.file = Path(folder) / FILE
        self.study, is_new = _open(self.file)
        described = json.dumps(
            {"space": {name: repr(values) for name, values in self.space.items()}, "seed": seed, **(about or {})}
        )
        if is_new:
            self.study.set_user_attr("about", described)
            first = {option: start[option] for option in self.space if start and option in start}
            if len(first) == len(self.space) and all(value in self.space[option] for option, value in first.items()):
                self.study.enqueue_trial({name: _label(self.space[name], value) for name, value in first.items()})
        elif (before := self.study.user_attrs.get("about")) != described:
            raise ValueError(f"{self.file} is a search of something else ({_difference(before, described)}): name another folder")

    @property
    def over(self) -> list[FrozenTrial]:
        """Optuna's trials that are over, by number."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]

    @property
    def seconds(self) -> float:
        """How long the search took so far, over all calls."""
        return float(self.study.user_attrs.get("seconds", 0.0))

    @property
    def best(self) -> FrozenTrial | None:
        """The trial with the highest value; None if none came to its end with one."""
        complete = [trial for trial in self.over if trial.state.name == "COMPLETE" and math.isfinite(trial.value or 0.0)]
        return max(complete, key=lambda trial: float(trial.value or 0.0), default=None)  # the first one of equals

    def values(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return what each option was in a trial."""
        return {option: values.value(trial.params[option]) for option, values in self.space.items()}

    def run(
        self,
        play: Callable[[Job | None], Outcome | None],
        trials: int | None = None,
        seconds: float | None = None,
        watch: Callable[[FrozenTrial, Outcome], object] | None = None,
        **workers: Any,
    ) -> None:
        """Run trials until the budget is spent. What was spent by earlier calls counts.

        With one worker, a trial's values are chosen when the one before is over, and so they are the same each time.

        Args:
            play: runs a trial. Of None it returns None. With several workers it must be one that they can import.
            trials: how many there will be. None: any number.
            seconds: after which none begins any more; those under way come to their end. None: any time.
            watch: is called with each trial that is over.
            **workers: options of `clstream.sweep.workers.run_jobs`: workers (by default 1), engine, address, threads.

        Raises:
            ValueError: if neither budget is given, or one is no positive number.

        """
        check_integer(1, none=True, trials=trials)
        check_positive(none=True, seconds=seconds)
        if trials is None and seconds is None:
            raise ValueError("a search needs a budget: a number of trials, or of seconds")
        before, began = self.seconds, time.monotonic()
        left = MOST_TRIALS if trials is None else trials - len(self.over)
        jobs = _Jobs(self._next, left, began + math.inf if seconds is None else began + seconds - before)
        ended_jobs = cast(
            "Generator[tuple[Job | None, Outcome | JobError | None]]", run_jobs(play, jobs, **{"workers": 1, **workers})
        )
        with closing(ended_jobs) as ended:
            for job, outcome in ended:
                if job is not None:
                    if isinstance(outcome, JobError):
                        outcome = Outcome("failed", math.nan, note=" ".join(str(outcome).split()))
                    assert outcome is not None
                    jobs.under_way -= 1
                    trial = self._tell(job.number, outcome)
                    self.study.set_user_attr("seconds", before + time.monotonic() - began)
                    if watch is not None:
                        watch(trial, outcome)
                if jobs.late and not jobs.under_way:
                    return

    def _next(self, under_way: Sequence[int]) -> Job:
        """Return the next trial: first one that began and did not end, when the search was stopped."""
        import optuna

        trials = self.study.get_trials(deepcopy=False)
        stopped = [trial for trial in trials if trial.state.name == "RUNNING" and trial.number not in under_way]
        if stopped:
            return Job(stopped[0].number, self.values(stopped[0]), self.over)
        number = sum(trial.state.name != "WAITING" for trial in trials)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Optuna calls experimental
            seed = derive(self.seed, "trial", number) % 2**32
            self.study.sampler = optuna.samplers.TPESampler(n_startup_trials=RANDOM_TRIALS, seed=seed)
            asked = self.study.ask(self.distributions)
        return Job(asked.number, self.values(self.study.get_trials(deepcopy=False)[asked.number]), self.over)

    def _tell(self, number: int, outcome: Outcome) -> FrozenTrial:
        """Keep what came of a trial, and return it."""
        import optuna

        states = optuna.trial.TrialState
        before = self.study.get_trials(deepcopy=False)[number]
        trial = optuna.trial.Trial(self.study, before._trial_id)
        for step, value in enumerate(outcome.curve, 1):
            if math.isfinite(value) and step not in before.intermediate_values:  # a call may have been stopped here
                trial.report(value, step)
        trial.set_user_attr("outcome", {"state": outcome.state, "seconds": outcome.seconds, "note": outcome.note})
        if outcome.state in ("complete", "diverged"):
            return self.study.tell(number, outcome.value)
        return self.study.tell(number, state=states.PRUNED if outcome.state == "pruned" else states.FAIL)


class _Jobs(Sequence["Job | None"]):
    """Trials whose values are chosen when a worker asks for them; when it is late, None in place of more of them.

    Args:
        choose: returns the next trial, told which ones are under way.
        most: how many there are at most.
        end: when it is late, by `time.monotonic`.

    """

    def __init__(self, choose: Callable[[Sequence[int]], Job], most: int, end: float) -> None:
        self.choose, self.most, self.end = choose, max(0, most), end
        self.chosen: list[Job | None] = []
        self.under_way = 0

    @property
    def late(self) -> bool:
        """Whether no more trials are to begin."""
        return time.monotonic() >= self.end

    def __len__(self) -> int:
        return self.most

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < self.most:
            raise IndexError(place)
        while len(self.chosen) <= place:
            job = None if self.late else self.choose([job.number for job in self.chosen if job is not None])
            self.under_way += job is not None
            self.chosen.append(job)
        return self.chosen[place]


def check_installed() -> None:
    """Raise ImportError, in a sentence, if Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ImportError("a search needs Optuna, which is not installed: pip install 'clstream[tune]'") from None


def _distribution(values: Range | Choice) -> BaseDistribution:
    """Return Optuna's distribution of what an option may be."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, Choice):
        return CategoricalDistribution(values.labels)
    if values.integer:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _label(values: Range | Choice, value: Any) -> Any:
    """Return what Optuna calls a value."""
    return values.labels[[repr(choice) for choice in values.values].index(repr(value))] if isinstance(values, Choice) else value


def _open(file: Path) -> tuple[Study, bool]:
    """Return the study in a file, and whether it is new."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    is_new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{file.absolute()}")
        study = optuna.create_study(storage=storage, study_name="clstream", direction="maximize", load_if_exists=True)
    except (SQLAlchemyError, RuntimeError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} can't be read as the file of a search ({first}): name another folder, or remove it") from None
    return study, is_new or "about" not in study.user_attrs


def _difference(before: object, now: str) -> str:
    """Return what differs between two searches, as text."""
    try:
        old, new = json.loads(str(before)), json.loads(now)
        names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
        return "; ".join(f"{name} was {old.get(name)}, now it is {new.get(name)}"[:300] for name in names[:2])
    except (ValueError, AttributeError):
        return "it doesn't say of what"
