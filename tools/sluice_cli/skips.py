# SPDX-License-Identifier: Apache-2.0
"""The only two reasons for which a test on the real kernel may be skipped.

A skipped test proves nothing, so ``sluice test`` counts it as failed, unless it says one of these and that is
true: the runner looks for itself and does not take a test's word for it.
"""

from __future__ import annotations

import os
from pathlib import Path

from xdp.probe import Finding, probe_host

# How the reasons of such skips begin; what follows is a topic of `sluice doctor`, or a folder.
FEATURE = "this kernel lacks: "
VECTORS = "no test vectors in "

# Topics that are the kernel's; what is not installed or not allowed is to be mended, not skipped.
KERNEL_TOPICS = frozenset(
    {"kernel", "kernel BTF", "map types", "XDP helpers", "sk_reuseport", "bpf_link for XDP", "AF_XDP sockets"}
)


def vectors_folder(root: Path) -> Path:
    """Where real captures are: SLUICE_VECTORS, or shared/vectors beside the checkout."""
    return Path(os.environ.get("SLUICE_VECTORS") or root.parent / "shared" / "vectors")


def lacking(findings: list[Finding]) -> frozenset[str]:
    """The topics in which this kernel can't do everything; what could not be asked is none."""
    return frozenset(
        one.topic
        for one in findings
        if one.topic in KERNEL_TOPICS and one.state != "ok" and not one.detail.startswith("can't be")
    )


def unexcused(reasons: list[str], root: Path) -> list[str]:
    """Those of these skips that count as failures: other reasons, and reasons that are not true here.

    Vectors that somebody named by SLUICE_VECTORS have to be there.
    """
    lacks: frozenset[str] = frozenset()
    if any(reason.startswith(FEATURE) for reason in reasons):
        lacks = lacking(probe_host())
    no_vectors = not os.environ.get("SLUICE_VECTORS") and not vectors_folder(root).is_dir()

    def excused(reason: str) -> bool:
        if reason.startswith(VECTORS):
            return no_vectors
        return reason.startswith(FEATURE) and reason.removeprefix(FEATURE) in lacks

    return [reason for reason in reasons if not excused(reason)]
