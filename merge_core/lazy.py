"""Values that are computed when first asked for, in several threads at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Value = TypeVar("Value")


class lazy(Generic[Value]):  # noqa: N801 - a decorator
    """A property that is computed once for each object.

    Python 3.11's ``functools.cached_property`` holds one lock for all objects of a class while it
    computes, so that threads at work on different parameters wait for each other (removed in
    Python 3.12). Two threads that ask one object at the same time may both compute.
    """

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self._compute = compute
        self._name = compute.__name__
        self.__doc__ = compute.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> lazy[Value]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> Value: ...

    def __get__(self, instance: object | None, owner: type) -> lazy[Value] | Value:
        """The value; it lies in the object's ``__dict__`` from then on, where it can be deleted."""
        if instance is None:
            return self
        value = self._compute(instance)
        instance.__dict__[self._name] = value
        return value
