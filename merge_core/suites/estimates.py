"""What a merge will take in memory, on disk and in time, told from headers.

Memory and disk follow from shapes. Time follows from a count of bytes and floating-point operations
and from how fast this machine turned out to be at four short pieces of work.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from merge_core.files import factors_limit
from merge_core.work_sizes import AHEAD, HASHED_AT_ONCE, LEADING_SHARES, SAMPLE, SMALL

FLOAT = 4

# Memory, as the engine is (see its modules).
ENTRYWISE_COPIES = 2  # of a parameter, beside what is read and what is written
SAMPLE_COPIES = 4
TALL = 2  # of m x n while a matrix is decomposed or merged
SIDES = 7  # of r x r while it is decomposed: Gram matrix, eigenvectors, LAPACK's own, …
# Measured: Python, torch and MergeScope before the first weight is read.
IMPORTS_BYTES = 320 << 20
# Measured: memory that blocks which come and go take, where glibc keeps some of what is freed; what
# is larger than the limit goes back to the system at once.
KEPT = 2.5
KEPT_BELOW = 32 << 20

# Time, as shares of the rates that are measured.
DISK_RATE = 1.5e9  # bytes a second, of a file that is not in memory: an assumption
DOUBLE = 2.0  # float64 against float32
READ = 1.3  # passes of a fresh copy that reading, checking and combining a member takes
WRITTEN = 2.0  # the same of writing a file
GRAM = 0.6  # speed of a Gram matrix against a plain product
CUBIC = 0.64  # share of the eigensolver's time at CALIBRATED that grows with r³, the rest with r²
TALL_PASSES = 4.0  # passes of a fresh copy over the task vector: for the Gram matrix, the cut
SIDE_PASSES = 4.0  # over the r x r vectors: sorted, written, read back
EACH = 0.002  # seconds of a parameter, and of a decomposition, whatever their size
LEADING = 0.85  # of that time where only leading vectors are made
RANK = 0.08  # CART's usual share of directions


CALIBRATED = 512
DIGESTED_BYTES = 8 << 20
COPIED_BYTES = 32 << 20
REPEATS = 3

TIME_NOTE = "nothing stored yet, files on a disk of 1.5 GB/s, start-up not counted"


@dataclass(frozen=True)
class Part:
    """One merged parameter.

    Attributes:
        entries: how many it has.
        computed: bytes of an entry while merging, 4 or 8.
        sides: m and n of the matrix that is decomposed; None for what is averaged.
        copied: whether what is read becomes a copy in memory (another dtype, an adapter), rather
            than pages of the file.
        thin: the summed ranks of all adapters' updates; None where experts are no adapters.
    """

    entries: int
    computed: int
    sides: tuple[int, int] | None = None
    copied: bool = False
    thin: int | None = None

    @property
    def nbytes(self) -> int:
        """Of one member while merging."""
        return self.entries * self.computed


@dataclass(frozen=True)
class Job:
    """The sizes of a merge that determine its cost.

    Attributes:
        parts: the merged parameters, in the order in which they are merged.
        tasks: number of experts.
        read_bytes: of all members' files.
        written_bytes: of the merged one.
        workers: threads that merge.
    """

    parts: tuple[Part, ...] = ()
    tasks: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    workers: int = 1

    @property
    def entrywise_bytes(self) -> int:
        """Peak anonymous memory of methods that are entrywise or need only inner products.

        Converted copies of what a worker reads, the base included, two temporaries of the
        parameter (its average, and magnitudes where whole tensors are ranked), the results that
        wait, and the sample that thresholds over the model are looked for in.

        Estimated and measured, MB, by `mergescope merge`: 8 ViT-B/32 in float32, average on one
        thread 431 and 340, on two 466 and 360, TIES 466 and 414; 3 bfloat16 decoders of 61 M
        parameters, average on one thread 623 and 480, on two 843 and 588, Task Arithmetic 843 and
        715; 8 float32 experts of 5.9 M parameters, 5.1 M of them in one tensor, on one thread 467
        and 328 to 356 (Karcher mean 352), TIES 389, PCB 424, on two 474 and 328 to 366, TIES 420,
        PCB 509 to 531.
        """
        entries = sum(part.entries for part in self.parts)
        sample = SAMPLE_COPIES * FLOAT * self.tasks * min(SAMPLE, entries)
        work = [ENTRYWISE_COPIES * p.nbytes + _copied_bytes(p, self.tasks + 1) for p in self.parts]
        return self._peak(work, sample)

    @property
    def spectral_bytes(self) -> int:
        """Peak anonymous memory of CART and other methods that use factors of single task vectors.

        A matrix is decomposed in float32 by the Gram matrix of its short side r, while the origin
        and the tasks' factors are held; the memory allocator keeps some of what is freed. Methods
        that stack the task vectors of a matrix in float64 (KnOTS, WUDI) take several times
        8 T m n bytes more for each worker.

        Estimated and measured as above: CART of 8 ViT-B/32 on one thread 523 and 598, on two 717
        and 664 to 797; of the 61 M decoders 594 and 577, on two threads 895 and 709, TSV-M 895 and
        965; of 3 bfloat16 decoders of 1.1 G parameters on two threads 2,646 and 2,460.
        """
        return self._peak(
            [
                _copied_bytes(p, self.tasks) + sum(map(_kept_bytes, self._blocks(p)))
                for p in self.parts
            ]
        )

    @property
    def factor_bytes(self) -> int:
        """What a spectral method stores in the cache, at most as much as the store may take.

        For each decomposed matrix and task, float32: singular values, error bounds and the short
        side, r x r; of a large matrix its leading eighth, until more is asked for. Nothing of
        adapters, whose factors are made anew.
        """
        short = [min(part.sides) for part in self.parts if part.sides and part.thin is None]
        return min(factors_limit(), self.tasks * sum(map(_factor_bytes, short)))

    def _peak(self, work: Sequence[int], more: int = 0) -> int:
        """Imports, results that wait, and the largest pieces that can be at work side by side."""
        if not self.parts:
            return 0
        # One worker merges while the result before is written.
        window = 2 if self.workers == 1 else AHEAD * self.workers + 1
        most = 0
        for start in range(max(1, len(work) - window + 1)):
            part = slice(start, start + window)
            waiting = sum(each.nbytes for each in self.parts[part])
            most = max(most, waiting + sum(sorted(work[part])[-self.workers :]))
        return IMPORTS_BYTES + most + more

    def _blocks(self, part: Part) -> list[int]:
        """What a worker holds for a matrix, beside what is read and the result."""
        if part.sides is None:
            return []
        r = min(part.sides)
        long = part.computed * sum(part.sides) * max(1, int(RANK * r))
        side = part.computed * r * r
        held = [part.nbytes, *[side, long] * self.tasks]  # the origin, and factors of each task
        return [*held, *[part.nbytes] * TALL, *[side] * SIDES]


def _factor_bytes(r: int) -> int:
    """Bytes of one matrix's factors."""
    q = r if r < SMALL else r // LEADING_SHARES[0]
    return FLOAT * q * (r + 2)


def _copied_bytes(part: Part, members: int) -> int:
    """Bytes of what is read of a parameter, where that is not the pages of the files."""
    return members * part.nbytes if part.copied else 0


def _kept_bytes(block: int) -> int:
    """Memory that a temporary block takes, with what the allocator keeps of it."""
    return max(block, int(KEPT * min(block, KEPT_BELOW)))


@dataclass(frozen=True)
class Rates:
    """How fast one thread of this machine is.

    Attributes:
        eigen: seconds of a symmetric eigenproblem of :data:`CALIBRATED` rows, float32.
        product: floating-point operations a second of a matrix product, float32.
        digest: bytes a second of a file's digest.
        copy: bytes a second of a copy into fresh memory.
    """

    eigen: float
    product: float
    digest: float
    copy: float


@dataclass(frozen=True)
class Seconds:
    """Estimated seconds of a merge whose files are not in memory and nothing is stored yet.

    Attributes:
        entrywise: by averaging.
        spectral: by CART at its usual rank.
    """

    entrywise: float
    spectral: float


@cache
def rates() -> Rates:
    """Measured once in a process, in about 0.15 s, on one thread.

    The processor's time counts, so that other programs change little: it is what a quiet machine
    would take.
    """
    import torch
    from blake3 import blake3

    from merge_core.executors.base import one_thread

    def best(work: Callable[[], object]) -> float:
        work()  # libraries set themselves up at the first call
        taken = []
        for _ in range(REPEATS):
            start = time.thread_time()
            work()
            taken.append(time.thread_time() - start)
        return max(min(taken), 1e-9)

    n = CALIBRATED
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    G, long, data = A @ A.T, torch.ones(COPIED_BYTES // FLOAT), bytes(DIGESTED_BYTES)
    with one_thread():
        return Rates(
            eigen=best(lambda: torch.linalg.eigh(G)),
            product=2 * n**3 / best(lambda: A @ A),
            digest=DIGESTED_BYTES / best(lambda: blake3(data).digest()),
            copy=COPIED_BYTES / best(long.clone),
        )


def seconds(job: Job, speed: Rates | None = None) -> Seconds:
    """How long a merge takes, start-up apart: files are read once from a disk of 1.5 GB/s.

    Args:
        job: what is merged.
        speed: of the machine; measured when None.

    Estimated and measured in seconds, two quiet cores: 8 ViT-B/32 averaged 3.3 and 2.7 to 3.2, by
    CART 17 and 16 to 18; 3 bfloat16 decoders of 1.1 G parameters averaged 14 and 18, by CART 150
    and 177; 8 ViT of 1.1 M, on a busy machine, averaged 0.1 and 0.1, by CART 0.4 and 0.4.

    Example:
        >>> job = Job((Part(1000, 4, (10, 100)),), tasks=8, read_bytes=32_000, written_bytes=4_000)
        >>> taken = seconds(job, Rates(eigen=0.01, product=1e10, digest=1e9, copy=1e9))
        >>> taken.entrywise < taken.spectral < 1
        True
    """
    speed = speed or rates()
    at_once = min(HASHED_AT_ONCE, job.workers)
    files = job.read_bytes * max(1 / DISK_RATE, 1 / (speed.digest * at_once))
    files += EACH * len(job.parts)
    writing = WRITTEN * job.written_bytes / speed.copy
    averaging = job.tasks * sum((READ + p.copied) * p.nbytes for p in job.parts) / speed.copy
    decomposing = job.tasks * sum(_decomposition_seconds(p, speed) for p in job.parts)

    def together(work: float) -> float:
        return files + max(writing, (work + writing) / job.workers)

    return Seconds(together(averaging), together(averaging + decomposing))


def time_in_words(taken: float) -> str:
    """A time in words, to one digit: an estimate knows no more.

    Args:
        taken: in seconds.

    Example:
        >>> time_in_words(0.2), time_in_words(47.0), time_in_words(400.0)
        ('under 1 s', 'about 50 s', 'about 7 min')
    """
    if taken < 1:
        return "under 1 s"
    for unit, size in (("s", 1), ("min", 60), ("h", 3600)):
        value = taken / size
        if value < 90 or unit == "h":
            break
    return f"about {round(value, -math.floor(math.log10(value))):.0f} {unit}"


def usual_workers() -> int:
    """Threads that a merge takes: as many as torch has; without importing it, processor cores."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    with suppress(KeyError, ValueError):
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decomposition_seconds(part: Part, speed: Rates) -> float:
    """Seconds of one thread for one task's share of a parameter."""
    if part.sides is None:
        return 0.0
    short, long = sorted(part.sides)
    if part.thin is not None:
        k, found = part.thin, 4 * DOUBLE * (short + long) * part.thin**2 / speed.product
    else:
        k, single = max(1, int(RANK * short)), _eigen_seconds(short, long, speed, LEADING)
        # In float64 where that is cheap; a larger matrix in float32 is never taken for cheaper.
        cheap = short if part.computed > FLOAT else min(short, SMALL)
        found = max(single, DOUBLE * _eigen_seconds(cheap, long, speed))
        found += (TALL_PASSES * long + SIDE_PASSES * short) * short * FLOAT / speed.copy
    # The long side, and its part in the sum of truncations.
    return EACH + found + 4 * long * short * k / speed.product


def _eigen_seconds(short: int, long: int, speed: Rates, share: float = 1.0) -> float:
    """Seconds of a Gram matrix and its eigenvectors in float32."""
    x = short / CALIBRATED
    eigen = speed.eigen * (CUBIC * x**3 + (1 - CUBIC) * x**2)
    return share * eigen + long * short**2 / (GRAM * speed.product)
