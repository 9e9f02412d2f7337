# SPDX-License-Identifier: Apache-2.0
"""Python as an ordinary user, also where the checkout lies below a directory that such a user can't enter.

A clone below /root, say.  The process gets a mount namespace of its own, in which the checkout (and the
virtual environment in it) is bound to a place that everybody can reach; nothing is copied, and nothing stays
mounted.
"""

from __future__ import annotations

import atexit
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 65534

# $1 is the checkout, $2 where it shall be.
_BIND = 'mount --bind "$1" "$2"; export PYTHONPATH="$2:$2/tools"; shift 2; exec "$@"'


@cache
def readable_root() -> Path:
    """Where the checkout is for processes that `readable_python` started."""
    place = Path(tempfile.mkdtemp(prefix="sluice-readable-"))
    place.chmod(0o755)
    atexit.register(place.rmdir)
    return place


def readable_python(*arguments: str, prefix: tuple[str, ...] = ()) -> list[str]:
    """A command line that runs this Python as root, for programs that become somebody else on their way.

    ``prefix`` is put before the interpreter, in the namespace.  Needs root.
    """
    place = readable_root()
    python = Path(sys.executable)
    if python.is_relative_to(ROOT):
        python = place / python.relative_to(ROOT)
    bind = ["unshare", "--mount", "sh", "-ec", _BIND, "sh", str(ROOT), str(place)]
    # -P: the current directory may be the checkout by its other name.
    return [*bind, *prefix, str(python), "-P", *arguments]


def nobodys_python(*arguments: str) -> list[str]:
    """A command line that runs this Python as nobody, without any capability."""
    drop = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    return readable_python(*arguments, prefix=(*drop, "--bounding-set=-all", "--inh-caps=-all"))
