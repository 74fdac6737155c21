"""The command line. Commands are thin: they make a configuration and hand it to a stage's ``run``.

Nothing here imports torch before a stage runs: ``rlhfkit --help`` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback

from rlhfkit import words
from rlhfkit.cli import folders, inspect, serve_reward, stages  # noqa: F401 -- each registers its commands
from rlhfkit.cli.application import PANEL_OF, app
from rlhfkit.errors import CheckpointError, RewardError, RlhfkitError
from rlhfkit.runtime.launch import start_cpu_processes
from rlhfkit.words import told, tr

DEBUG = "RLHFKIT_DEBUG"  # environment variable: errors show where in the code they came up

# Help lists commands by what they are for, whatever the order of the imports.
app.registered_commands.sort(key=lambda command: list(PANEL_OF).index(str(command.name)))


def main() -> None:
    """Entry point: commands, and errors turned into exit text."""
    try:
        words.choose(words.wanted(sys.argv[1:]))
        start_cpu_processes()
        app()
    except RlhfkitError as error:
        _show_traceback()
        rank = os.environ.get("RANK", "0")
        # Most errors meet all processes, and one says so; these may have happened to another one alone.
        if rank == "0" or isinstance(error, (RewardError, CheckpointError)):
            label = tr("stopped: ") if error.exit_code == 130 else tr("error: ")
            print(label + told(error), file=sys.stderr)
        sys.exit(error.exit_code)
    except RuntimeError as error:  # torch's own, without importing it
        first = str(error).partition("\n")[0]
        if type(error).__name__ != "OutOfMemoryError" and "DefaultCPUAllocator: " not in first:
            raise
        _show_traceback()
        print(tr("error: ") + tr(f"memory is full: {first}"), file=sys.stderr)
        print(
            tr(
                "  → take less: --micro-batch-tokens, --gradient-checkpointing, --lora-rank, --quantize 4bit; --plan "
                "says beforehand what a run takes, and --resume goes on from its last checkpoint"
            ),
            file=sys.stderr,
        )
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        # A file or folder of the user's that cannot be made, read or written: theirs to mend, no fault of the code.
        _show_traceback()
        print(tr("error: ") + tr(f"{error.filename or 'the disk'}: {error.strerror}"), file=sys.stderr)
        if not os.environ.get(DEBUG):
            print(tr(f"  → where in the code it came up is shown with {DEBUG}=1 in the environment"), file=sys.stderr)
        sys.exit(1)


def _show_traceback() -> None:
    """Of the error in work, for those who look for its cause in the code."""
    if os.environ.get(DEBUG):
        traceback.print_exc()
