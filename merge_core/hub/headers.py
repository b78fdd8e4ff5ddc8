"""Checkpoints on the hub of which only the headers are read, by range requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from merge_core.checkpoints.checkpoint import Checkpoint
from merge_core.checkpoints.dtypes import SAFETENSORS_DTYPES
from merge_core.checkpoints.header_checks import check_tensors, read_index
from merge_core.checkpoints.shards import PlainShard, TensorInfo, owners_by_index
from merge_core.errors import HubError
from merge_core.hub.client import MEGABYTE, api, cache_folder, fetch_file
from merge_core.hub.errors import explain_hub_errors
from merge_core.hub.files import HubId
from merge_core.hub.models import HubModel, missing_message, path_beside
from merge_core.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

HEADERS_AT_ONCE = 8
NO_HEADER = (AttributeError, TypeError, ValueError, RecursionError)  # JSON that is none, or no JSON


class _HeaderShard(PlainShard):
    """What the header of one file says; its tensors are refused, since they are not here."""

    def __init__(self, infos: dict[str, TensorInfo], asked: HubId) -> None:
        self.infos = infos
        self._asked = asked

    def tensor(self, name: str) -> Tensor:  # noqa: ARG002
        raise HubError(missing_message(str(self._asked)))


class HubHeaders(Checkpoint):
    """A checkpoint on the hub of which only the headers were read; its tensors stay there.

    Args:
        model: what it consists of.
        owners: the header that holds each tensor, by its stored name.
        notes: what is to be said of them, in sentences.

    Attributes:
        model: what it consists of.

    Raises:
        CheckpointError: it holds no tensors, or none that are weights by themselves.
    """

    def __init__(
        self, model: HubModel, owners: dict[str, _HeaderShard], notes: tuple[str, ...] = ()
    ) -> None:
        if not owners:
            raise HubError(f"{model.asked} holds no tensors. Name the file with its weights.")
        self.model = model
        self.path = Path(model.entry)
        self.files = ()
        self.metadata = {}
        self.notes = notes
        self._stamps = {}
        self._name = str(model.asked)
        self._own(owners, self._name)

    def __repr__(self) -> str:
        return f"HubHeaders({self._name!r}, {len(self)} tensors)"

    @cached_property
    def digest(self) -> str:
        """Refused, since nothing was downloaded.

        Raises:
            HubError: always.
        """
        raise HubError(missing_message(self._name))


def read_headers(model: HubModel, progress: Progress | None = None) -> HubHeaders:
    """Read the headers of a model's weights by range requests; no tensor is transferred.

    Args:
        model: what :func:`merge_core.hub.models.describe` found.
        progress: reports each file; cancels between two.

    Raises:
        HubError: an adapter or pickled weights, which open only whole; a damaged header; no
            access, no network.
        Cancelled: `progress` was cancelled.
    """
    if model.is_adapter:
        whole = "an adapter, whose base decides what it changes"
    elif not all(name.endswith(".safetensors") for name in model.weights):
        whole = "pickled weights, whose shapes stand at no known place"
    else:
        whole = ""
    if whole:
        raise HubError(
            f"{model.asked} holds {whole}. Download it ({model.nbytes / MEGABYTE:,.1f} MB) with: "
            f"mergescope download {model.asked}"
        )
    shards: dict[str, _HeaderShard] = {}
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        read = pool.map(lambda name: _HeaderShard(_header(model, name), model.asked), model.weights)
        for done, (name, shard) in enumerate(zip(model.weights, read, strict=True)):
            (progress or Progress()).step(done + 1, len(model.weights), name)
            shards[name] = shard
    if not model.entry.endswith(".index.json"):
        return HubHeaders(model, dict.fromkeys(shards[model.entry].infos, shards[model.entry]))
    index = read_index(fetch_file(model.id, model.entry))
    beside = {file: shards[path_beside(model.entry, file)] for file in index.values()}
    return HubHeaders(model, *owners_by_index(Path(model.entry), index, beside))


def _header(model: HubModel, name: str) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes in the header of one safetensors file."""
    from huggingface_hub.errors import SafetensorsParsingError

    damaged = HubError(
        f"{model.asked}: the header of {name} is damaged. Ask its authors to upload it again."
    )
    with explain_hub_errors(model.asked, cache_folder()):
        try:
            read = api().parse_safetensors_file_metadata(
                model.id.repo, name, revision=model.id.revision
            )
        except (SafetensorsParsingError, *NO_HEADER) as error:
            raise damaged from error
    infos = {}
    for tensor, info in read.tensors.items():
        dtype = SAFETENSORS_DTYPES.get(info.dtype)
        if dtype is None:
            raise HubError(
                f"{model.asked}: tensor {tensor!r} has dtype {info.dtype!r:.40}, which is not "
                "supported. Take weights in float32, float16 or bfloat16."
            )
        shape = info.shape
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise damaged
        infos[tensor] = TensorInfo(tuple(shape), dtype)
    check_tensors(Path(name), ((tensor, info.shape) for tensor, info in infos.items()))
    return infos
