"""A pool: models of one architecture on one task, for soups and ensembles.

A pool is a file, ``pool.yaml``, whose paths are relative to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.errors import CheckpointError, PoolError, explain_validation
from merge_core.files import digest_of, file_digest, path_below, read_yaml
from merge_core.input_files import expand_path
from merge_core.strict_model import StrictModel
from merge_core.suites.data_spec import Positive
from merge_core.suites.suite_spec import ArchitectureSpec

BUNDLED_POOLS = Path(__file__).resolve().parents[2] / "data" / "pools"

Regime = Literal["shared", "shared_random", "independent"]
REGIMES: dict[Regime, str] = {
    "shared": "shared start",
    "shared_random": "shared random start",
    "independent": "independent starts",
}
# Pool names stand in links.
PoolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+-]+$", max_length=80)]
Constants = Annotated[tuple[float, ...], Field(min_length=1, max_length=3)]
Scales = Annotated[tuple[Positive, ...], Field(min_length=1, max_length=3)]


class PoolDataSpec(StrictModel):
    """Images of the task: a numpy archive and the normalisation constants of that dataset."""

    file: str
    mean: Constants
    std: Scales


class SnapshotSpec(StrictModel):
    """A member as it was after a number of epochs."""

    epoch: float = Field(ge=0)
    weights: str


class MemberSpec(StrictModel):
    """One model: weights, how it was trained, and snapshots along its training."""

    weights: str
    seed: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    epochs: float | None = None
    trajectory: tuple[SnapshotSpec, ...] = ()


class PoolSpec(StrictModel):
    """The content of ``pool.yaml``."""

    name: PoolName
    title: str = ""
    description: str = ""
    task: str = Field(min_length=1)
    family: str = Field(min_length=1)
    regime: Regime
    architecture: ArchitectureSpec
    data: PoolDataSpec
    start: str | None = None
    members: tuple[MemberSpec, ...] = Field(min_length=1)


class Pool:
    """A loaded pool; checkpoints open on first use and are read lazily.

    Args:
        spec: the validated content of ``pool.yaml``.
        path: where that file lies.
    """

    def __init__(self, spec: PoolSpec, path: Path) -> None:
        self.spec = spec
        self.path = path
        self.root = path.parent
        self._opened: dict[str, Checkpoint] = {}

    def __repr__(self) -> str:
        return f"Pool({self.spec.name!r}, {len(self)} members)"

    def __len__(self) -> int:
        return len(self.spec.members)

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.spec.name

    @property
    def title(self) -> str:
        """The pool's title for people, such as ``Digits, VGG, independent starts``."""
        return self.spec.title or (
            f"{self.spec.task}, {self.spec.family}, {REGIMES[self.spec.regime]}"
        )

    def select(self, members: Sequence[int] | None) -> tuple[int, ...]:
        """Member numbers (from 0) in the pool's order; all when None.

        Raises:
            PoolError: an unknown member, or none at all.
        """
        if members is None:
            return tuple(range(len(self)))
        unknown = [i for i in members if not 0 <= i < len(self)]
        if unknown:
            raise PoolError(
                f"The pool {self.name!r} has no member {unknown[0]}. "
                f"Its members: 0 to {len(self) - 1}."
            )
        if not members:
            raise PoolError("Choose at least one member.")
        return tuple(i for i in range(len(self)) if i in members)

    def member(self, number: int) -> Checkpoint:
        """A member's checkpoint, by its number from 0.

        Raises:
            CheckpointError: its file is missing or unreadable.
        """
        return self._open(self.spec.members[number].weights, f"member {number}")

    def snapshot(self, number: int, index: int) -> Checkpoint:
        """A member's checkpoint along its training, by its place in the trajectory.

        Raises:
            CheckpointError: its file is missing or unreadable.
        """
        weights = self.spec.members[number].trajectory[index].weights
        return self._open(weights, f"member {number}")

    @cached_property
    def start(self) -> Checkpoint | None:
        """The common start's checkpoint, or None where the pool names none."""
        return None if self.spec.start is None else self._open(self.spec.start, "start")

    def file(self, relative: str) -> Path:
        """A path of the pool file, made absolute.

        Raises:
            PoolError: what is written cannot be a path.
        """
        return path_below(self.root, relative, PoolError)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that the pool names."""
        names = [self.spec.data.file, *filter(None, [self.spec.start])]
        for member in self.spec.members:
            names += [member.weights, *(snapshot.weights for snapshot in member.trajectory)]
        return tuple(self.file(name) for name in names)

    @cached_property
    def data_digest(self) -> str:
        """Digest (hex) of the data, its normalisation and the architecture.

        Raises:
            PoolError: the data file is missing or cannot be read.
        """
        data = self.spec.data
        path = self.file(data.file)
        if not path.is_file():
            raise PoolError(f"{path} (data of {self.path}) does not exist. Correct the path.")
        architecture = self.spec.architecture.identity
        try:
            content = file_digest(path)
        except OSError as error:
            raise PoolError(f"{path} (data of {self.path}): {error.strerror}.") from error
        return digest_of(repr(data.mean), repr(data.std), architecture, content)

    def _open(self, relative: str, what: str) -> Checkpoint:
        if relative not in self._opened:
            try:
                self._opened[relative] = Checkpoint(self.file(relative))
            except CheckpointError as error:
                raise CheckpointError(f"Pool {self.name!r}, {what}: {error}") from error
        return self._opened[relative]


def bundled_pools() -> dict[str, Path]:
    """Name to path of the bundled pools, sorted by name.

    Example:
        >>> list(bundled_pools())[0]
        'digits-linear'
    """
    return {path.parent.name: path for path in sorted(BUNDLED_POOLS.glob("*/pool.yaml"))}


def describes_pool(reference: str | Path) -> bool:
    """Whether a path or name is a pool's rather than a suite's (False for what is neither).

    Example:
        >>> describes_pool("digits-linear"), describes_pool("vision")
        (True, False)
    """
    if str(reference) in bundled_pools():
        return True
    path = expand_path(reference, PoolError)
    if path.is_dir():
        return (path / "pool.yaml").is_file() and not (path / "suite.yaml").is_file()
    try:
        document, _ = read_yaml(path, "pool.yaml", PoolError, "")
    except PoolError:
        return False
    return "members" in document


def load_pool(reference: str | Path) -> Pool:
    """Read a ``pool.yaml``; nothing of the checkpoints is opened yet.

    Args:
        reference: path of the file or of its folder, or the name of a bundled pool.

    Raises:
        PoolError: missing file, not YAML, unknown or missing fields.

    Example:
        >>> load_pool("digits-linear")
        Pool('digits-linear', 12 members)
    """
    known = bundled_pools()
    path = known.get(str(reference)) or Path(reference)
    document, path = read_yaml(
        path, "pool.yaml", PoolError, f"a bundled pool ({', '.join(known) or 'none is bundled'})"
    )
    try:
        spec = PoolSpec.model_validate(document)
    except ValidationError as error:
        raise PoolError(f"{path}: {explain_validation(error)}") from error
    return Pool(spec, path.resolve())
