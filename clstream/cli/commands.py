"""The command `clstream`, and all the commands that it has."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from clstream import __version__
from clstream.cli.command_parser import print_error
from clstream.cli.compare import compare_command
from clstream.cli.doctor import doctor_command
from clstream.cli.episodes import episodes_command
from clstream.cli.errors import Failure, UsageError, nearest
from clstream.cli.logs import list_command, log_command, sync_command
from clstream.cli.pretrain import pretrain_command
from clstream.cli.profile import profile_command
from clstream.cli.report import report_command
from clstream.cli.run import continue_command, resume_command, run_command
from clstream.cli.streams import record_command, show_command
from clstream.cli.sweep import sweep_command
from clstream.cli.tune import tune_command
from clstream.cli.ui import ui_command
from clstream.cli.verify import parity_command, prove_command, verify_command
from clstream.cli.watch import watch_command

USAGE = """\
usage: clstream COMMAND [options]

  run           play a stream to a strategy:  clstream run --stream split_digits --strategy Replay --strategy.capacity 200
  resume        go on with a run:             clstream resume runs/NAME
  continue      go on with more data:         clstream continue runs/NAME --stream my_file.february
  watch         learn what a folder gets:     clstream watch inbox --strategy Replay --stream.classes 10
  sweep         every combination of a grid:  clstream sweep grid.yaml --workers 4
  compare       several runs in one table:    clstream compare finetune.yaml replay.yaml --seeds 0,1,2
  report        all of it in a page of HTML:  clstream report sweeps/NAME --out report.html
  tune          search for options, without test samples:  clstream tune --stream split_mnist --strategy EWC
  verify        rerun a known result:         clstream verify er-split-mnist
  prove-resume  kill a run again and again:   clstream prove-resume --strategy my_file.MyStrategy --kills 20
  parity        hold our methods against Avalanche's:  clstream parity --methods EWC,Replay --seeds 0,1,2,3,4
  pretrain      train a model to start from:  clstream pretrain --stream split_mnist --model VitTiny --out vit.pt
  episodes      many few-shot episodes:       clstream episodes --weights conv4.pt --stream.sets 4 --out protonet
  profile       say where the time of a run goes: clstream profile --strategy my_file.MyStrategy --max_sessions 1
  show          draw a stream before running:  clstream show fuzzy_tasks --stream.width 0.8
  record        write what a stream is:       clstream record --stream split_digits --out digits.clstream
  log           read what happened in a run:  clstream log runs/NAME
  sync          send what a tracking server did not take while it was away
  list          strategies, streams, models, adapters and anchors, or one kind:  clstream list strategies
  doctor        what is installed, what data is there, and whether runs can be tracked
  ui            open the MLflow UI on what was run

clstream COMMAND --help says more.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 for what failed, 2 for what was asked wrongly, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own strategy lies in the folder where the command is given
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": run_command, "resume": resume_command, "continue": continue_command, "watch": watch_command,
        "prove-resume": prove_command, "compare": compare_command,
        "sweep": sweep_command, "report": report_command, "tune": tune_command, "doctor": doctor_command,
        "verify": verify_command, "parity": parity_command, "pretrain": pretrain_command,
        "profile": profile_command, "episodes": episodes_command,
        "show": show_command,
        "record": record_command, "log": log_command, "sync": sync_command, "list": list_command, "ui": ui_command,
    }  # fmt: skip
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0] == "--version":
        print(f"clstream {__version__}")
        return 0
    try:
        if given[0] not in commands:
            raise UsageError(
                f"there is no command {given[0]!r}{nearest(given[0], list(commands)) or ': clstream --help lists them'}"
            )
        return commands[given[0]](given[1:])
    except UsageError as error:
        print_error(error)
        return 2
    except Failure as error:
        print_error(error)
        return 1
    except SystemExit as end:  # after a help text
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        try:
            sys.stdout.flush()
        except OSError:  # so that the end of the process doesn't try it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print_error(f"{error.filename or 'what is printed'} can't be written, for no space is left: make room, or write elsewhere")
        return 1
    except KeyboardInterrupt as stop:
        from clstream.checkpoint import Stopped

        if isinstance(stop, Stopped):
            with suppress(OSError):  # whoever read it may be gone by the same signal
                trust = f" --trust {','.join(stop.trust)}" if stop.trust else ""
                print(f"\nclstream: {stop}\nclstream: to go on: clstream resume {stop.folder.parent}{trust}", file=sys.stderr)
            return 128 + stop.signal
        print(
            "\nclstream: stopped, with no checkpoint to go on with; what was tracked is kept in MLflow, marked KILLED",
            file=sys.stderr,
        )
        return 130
