"""Code that no experiment changes, one topic a module ("room").

A room imports only rooms above it in CONTRIBUTING.md's table.
"""

import sys
from pathlib import Path


def print_interrupt(kind: type[BaseException], error: BaseException, traceback: object) -> None:
    """Print one line for a Ctrl-C while PyTorch is imported, before `run` handles signals."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{Path(sys.argv[0]).name}: ended by SIGINT", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]:  # not in a program that imports predict
    sys.excepthook = print_interrupt
