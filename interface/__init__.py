"""What stands between the core and its users: command lines, run folders, files, terminals.

The scripts import this before anything else, so that from the start an error or Ctrl-C ends
them with one line. TRACEBACK=1 in the environment shows where it arose.
"""

from __future__ import annotations  # for old versions of Python, so that they get as far as below

import os
import sys
from types import TracebackType

SCRIPTS = ("train", "generate", "evaluate", "benchmark", "export", "app")


def _say(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if os.environ.get("TRACEBACK"):
        sys.__excepthook__(kind, error, where)
        return
    reason = " ".join((str(error) or kind.__name__).split())[:300]
    if issubclass(kind, KeyboardInterrupt):
        reason = "stopped"
    elif issubclass(kind, ImportError):
        reason += "; pip install -r requirement.txt"
    else:
        reason = f"{kind.__name__}: {reason}; a bug: report it with what TRACEBACK=1 shows"
    print(f"{os.path.basename(sys.argv[0])}: {reason}", file=sys.stderr)


ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if os.path.realpath(sys.argv[0]) in [os.path.join(ROOT, f"{name}.py") for name in SCRIPTS]:
    sys.excepthook = _say  # not in programs that only import this, such as by torch.hub
    if sys.version_info < (3, 11):  # noqa: UP036 (older ones would call every checkpoint damaged)
        print(f"Python {sys.version.split()[0]} is too old; install 3.11 or later", file=sys.stderr)
        sys.exit(2)
