# SPDX-License-Identifier: Apache-2.0
"""The part of the packaging that pyproject.toml can't say: the two cffi modules."""

from setuptools import setup

setup(
    cffi_modules=[
        "xdp/_libbpf_build.py:ffi",
        "userspace/native/build.py:ffi",
    ]
)
