"""Many small pieces of torch work side by side, one torch thread each.

Small models gain little from torch's own threads; two of them side by side gain nearly twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results in the order of the items, as many computed at once as torch has threads.

    Work that was begun is finished when the consumer stops early; what waited is dropped.

    Args:
        function: of one item; it must not depend on the others.
        items: taken up a few ahead of the results.

    Raises:
        Exception: whatever `function` raises, in its item's place.
    """
    workers = torch.get_num_threads()
    if workers == 1:
        yield from map(function, items)
        return
    # Torch's number of threads belongs to the thread that sets it.
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        rest = iter(items)
        waiting: deque[Future[Result]] = deque(
            pool.submit(function, item) for item in islice(rest, 2 * workers)
        )
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
        finally:
            for future in waiting:
                future.cancel()
