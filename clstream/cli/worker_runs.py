"""Seeds that run in worker processes: what a worker does, and who waits for them all."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from clstream.checkpoint import Stopped
from clstream.cli import run_folders
from clstream.cli.errors import printable
from clstream.cli.parser import as_yaml, parse_run
from clstream.cli.seed_jobs import SeedJob, stream_of_job
from clstream.cli.seed_runs import Experiment
from clstream.cli.seeds_together import run_together
from clstream.cli.yaml_files import parse_yaml
from clstream.results import Result
from clstream.sweep.progress import Progress, sentence_of
from clstream.sweep.workers import JobError, TerminatedError, run_jobs
from clstream.tracking.run_metrics import tasks_by_row

if TYPE_CHECKING:
    from clstream.tracking import ParentRun


def run_in_workers(experiment: Experiment, seeds: Sequence[int], workers: int, parent: ParentRun | None) -> list[Result]:
    """Run seeds in several processes, each by itself, or a part of them together in each.

    Raises Failure if seeds failed, when the others have ended, and Stopped when a signal came.
    """
    folder = experiment.folder
    assert folder is not None
    groups = [seeds[place::workers] for place in range(workers)] if experiment.together else [[seed] for seed in seeds]
    jobs = [
        SeedJob(
            as_yaml(experiment.parser, experiment.options), group[0], folder.absolute(), Path.cwd(),
            None if parent is None else parent.run_id, tuple(experiment.options.trust), experiment.options.accept_changed_code,
            tuple(group[1:]),
        )
        for group in groups
    ]  # fmt: skip
    say = Console(stderr=True, highlight=False, soft_wrap=True)
    progress, results, errors = Progress([experiment.title] * len(seeds), workers), dict[int, Result](), dict[int, str]()
    try:
        for job, value in run_jobs(run_seeds_job, jobs, workers=workers, threads=experiment.options.threads or 1):
            for seed in (job.seed, *job.others):
                result: Result | str = sentence_of(value) if isinstance(value, JobError) else value[seed]
                if isinstance(result, str):
                    errors[seed] = result
                    line = f"{progress.ended(experiment.title)} seed {seed} failed: {result}"
                else:
                    results[seed] = result
                    line = f"{progress.ended(experiment.title, result.seconds)} {result.headline}"
                    if parent is not None:
                        parent.read_journal(seed, folder / f"seed_{seed}")
                        parent.update(seed, result, tasks_by_row(experiment.stream.reseeded(seed), result.sessions))
                say.print(printable(line + progress.left), markup=False)
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, TerminatedError) else signal.SIGINT
        raise Stopped(number, jobs[0].of_seed, f"stopped by {number.name}; what the seeds had learned is in {folder}") from None
    experiment.check_ended(errors)
    return [results[seed] for seed in seeds]


def run_seed_job(job: SeedJob) -> Result:
    """Run one seed, from its newest checkpoint if it has one; what it prints goes to output.txt in its folder.

    Raises what `Experiment.run_seed` does, and Failure if the working folder is not on this machine.
    """
    with job.begun():
        return _experiment_of(job).run_seed(job.seed, job.parent)


def run_seeds_job(job: SeedJob) -> dict[int, Result | str]:
    """Run the seeds of a job, together if there are several; return the result of each, or how it failed."""
    if not job.others:
        return {job.seed: run_seed_job(job)}
    with job.begun():
        ended = run_together(_experiment_of(job), (job.seed, *job.others), job.parent)
        return {seed: value if isinstance(value, Result) else str(value) for seed, value in ended.items()}


def _experiment_of(job: SeedJob) -> Experiment:
    flags = [*([f"--trust={','.join(job.trust)}"] if job.trust else []), *["--accept_changed_code"] * job.accept_changed_code]
    config = parse_yaml(job.config.encode(), "the config")
    stream = stream_of_job(config, job.trust)
    # after that: the parser that was made last says what may be imported
    parser, options = parse_run(["--config", run_folders.CONFIG, *flags], {run_folders.CONFIG: config})
    options.seed, options.seeds, options.together = job.seed, None, None
    strategy = options.strategy.class_path.rpartition(".")[2]
    return Experiment(parser, options, stream, f"{strategy} on {stream.name}", job.folder, resumed=True)
