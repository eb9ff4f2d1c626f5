"""Code that no experiment changes, one topic a module ("room").

A room imports only rooms listed above it in tests/test_layout.py.
"""

import os
import sys


def hook(kind: type[BaseException], error: BaseException, traceback: object) -> None:
    """Print one line for a Ctrl-C while PyTorch is imported, before `run` handles signals."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{os.path.basename(sys.argv[0])}: ended by SIGINT", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = hook
