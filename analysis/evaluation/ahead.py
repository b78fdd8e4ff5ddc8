"""The weights of the next merge, made while an accelerator runs the last one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context

from torch import Tensor

Weights = dict[str, Tensor]
Make = Callable[[], Weights]


class Ahead:
    """Makes at most one set of weights ahead, on a thread of its own.

    Merges of one session are made one after another, whichever thread makes them.
    """

    def __init__(self) -> None:
        self._next: tuple[str, Make] | None = None
        self._made: tuple[str, Future[Weights]] | None = None
        self._merging = threading.Lock()

    def expect(self, key: str, make: Make) -> None:
        """Say what will be asked for after the weights that are asked for next.

        Args:
            key: what they are determined by.
            make: gives them.
        """
        self._next = (key, make)

    def take(self, key: str, make: Make) -> Weights:
        """Weights made ahead, else made now; those expected after them are begun.

        Raises:
            Exception: whatever `make` raises.
        """
        made, self._made = self._made, None
        if made is not None and made[0] == key:
            weights = made[1].result()
        else:
            with self._merging:
                weights = make()
        following, self._next = self._next, None
        if following is not None and following[0] != key:
            self._begin(*following)
        return weights

    def _begin(self, key: str, make: Make) -> None:
        future: Future[Weights] = Future()
        self._made = (key, future)
        context = copy_context()

        def work() -> None:
            try:
                with self._merging:
                    future.set_result(context.run(make))
            except BaseException as error:  # whoever takes the weights meets it
                future.set_exception(error)

        threading.Thread(target=work, name="mergescope-ahead", daemon=True).start()
