# SPDX-License-Identifier: Apache-2.0
"""The build backend that pyproject.toml names: setuptools', with what pyproject.toml can't say.

That is the two cffi modules, and that this file belongs into a source distribution, which could not be
built without it.  pip calls the functions of PEP 517 and PEP 660 at the end, in the repository's root;

    python tools/packaging/backend.py build_ext --inplace

run there builds the C modules alone, as tools/sluice does.  Nothing of this folder is installed.
"""

from __future__ import annotations

import sys

from setuptools import setup
from setuptools.build_meta import _BuildMetaBackend
from setuptools.command.sdist import sdist

# Relative to the repository's root, like all that setuptools is told.
THIS_FILE = "tools/packaging/backend.py"
CFFI_MODULES = ("xdp/_libbpf_build.py:ffi", "userspace/native/build.py:ffi")


class SourceDistribution(sdist):
    """The packages' files and what they are built with."""

    def make_distribution(self) -> None:
        """Called once the files are collected, which egg_info does: its list knows no build backend."""
        self.filelist.append(THIS_FILE)
        super().make_distribution()


def build() -> None:
    """Run the command in ``sys.argv``, as a setup.py would."""
    # Elsewhere modules in Python stand in for them (xdp/elsewhere.py).
    modules = CFFI_MODULES if sys.platform == "linux" else ()
    setup(cffi_modules=[*modules], cmdclass={"sdist": SourceDistribution})


class Backend(_BuildMetaBackend):
    """setuptools' own backend without a setup.py to run."""

    def run_setup(self, setup_script: str = "setup.py") -> None:
        """Called by each hook, with the command in ``sys.argv``."""
        del setup_script
        build()


_backend = Backend()
get_requires_for_build_wheel = _backend.get_requires_for_build_wheel
get_requires_for_build_sdist = _backend.get_requires_for_build_sdist
get_requires_for_build_editable = _backend.get_requires_for_build_editable
prepare_metadata_for_build_wheel = _backend.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = _backend.prepare_metadata_for_build_editable
build_wheel = _backend.build_wheel
build_sdist = _backend.build_sdist
build_editable = _backend.build_editable

if __name__ == "__main__":
    build()
