# SPDX-License-Identifier: Apache-2.0
"""In place of the C module of this name (_libbpf_build.py) where there is no Linux.

Where both are, Python takes the C module.
"""

from __future__ import annotations

from xdp._libbpf_build import ABI_HEADER, FIXED_WIDTH_TYPES, abi_declarations
from xdp.elsewhere import Library, declare, refuse_on_linux

refuse_on_linux("xdp._libbpf", "xdp/_libbpf_build.py")

ffi = declare(FIXED_WIDTH_TYPES, abi_declarations(ABI_HEADER.read_text(encoding="utf-8")))
lib = Library(ffi, {})
