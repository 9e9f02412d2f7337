# SPDX-License-Identifier: Apache-2.0
"""C behind cffi (API mode): ``from userspace.native._native import ffi, lib``.

Built by ``python userspace/native/build.py``.  The headers here are the manual.
"""
