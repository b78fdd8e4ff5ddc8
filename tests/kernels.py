"""The numerical tests under several kernels of OpenBLAS and MKL: ``python tests/kernels.py``.

Results must not depend on whose processor they are computed on. Scipy's and numpy's OpenBLAS take
another processor's kernels where they are told to, torch's MKL and its own loops a narrower set of
instructions; a kernel that this processor cannot run is said and passed over.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    "tests/merge_core/factors",
    "tests/merge_core/methods/test_spectral_methods.py",
    "tests/analysis/spectral/test_interference.py",
)
# What a kernel of OpenBLAS needs, as Linux names it.
KERNELS = {"Haswell": "avx2", "SkylakeX": "avx512f", "Zen": "avx2"}
NARROW = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def flags() -> set[str]:
    """Instructions of this processor; all that are asked for where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set(KERNELS.values())
    return {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()}


def run(kernel: str, narrow: bool) -> bool:
    """Whether the tests pass under one kernel."""
    environment = {**os.environ, "OPENBLAS_CORETYPE": kernel, **(NARROW if narrow else {})}
    command = [sys.executable, "-m", "pytest", "--no-cov", "-q", "-q", *FILES]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    passed = done.returncode == 0
    where = f"OpenBLAS {kernel}, torch {'limited to AVX2' if narrow else 'as it is'}"
    sys.stdout.write(f"{where}: {'passed' if passed else 'FAILED'}\n")
    if not passed:
        sys.stdout.write(done.stdout[-4000:] + done.stderr[-2000:])
    sys.stdout.flush()
    return passed


def main() -> int:
    """Run all; 1 if a kernel fails."""
    known, good = flags(), True
    for kernel, needed in KERNELS.items():
        if needed not in known:
            sys.stdout.write(f"OpenBLAS {kernel}: not on this processor, which lacks {needed}\n")
            continue
        for narrow in (False, True):
            good = run(kernel, narrow) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
