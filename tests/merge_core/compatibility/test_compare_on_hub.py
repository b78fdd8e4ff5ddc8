"""Members that are on the hub alone: their small files are compared, no weight is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from merge_core.compatibility import companions
from merge_core.compatibility.compare import compare_companions
from merge_core.compatibility.kinship import measure_kinship
from merge_core.errors import HubError
from merge_core.hub.models import describe, find_cached
from merge_core.opening.download import download, missing_members, with_headers_only
from merge_core.suites.suite import Suite, load_suite
from tests.hub_client import files_of, hub, weights
from tests.hub_server import Hub

__all__ = ["hub"]


def by_headers(root: Path, *names: str) -> Suite:
    experts = {name: {"weights": f"hf://org/{name}"} for name in names}
    (root / "suite.yaml").write_text(yaml.safe_dump({"name": "s", "experts": experts}))
    suite = load_suite(root)
    return with_headers_only(suite, [describe(name) for name in missing_members(suite)])


def test_only_what_differs_is_fetched(hub: Hub, tmp_path: Path) -> None:
    config = {"model_type": "llama", "rope_theta": 10000.0}
    words = json.dumps({"a": 0, "b": 1}).encode()
    for name, theta in (("one", 1e4), ("two", 1e4), ("odd", 1e6)):
        own = json.dumps(config | {"rope_theta": theta}).encode()
        more = {"config.json": own, "vocab.json": words}
        hub.repository(f"org/{name}", files_of(weights()) | more)
    suite = by_headers(tmp_path, "one", "two")
    hub.requests.clear()
    assert compare_companions(suite) == ()
    assert hub.requests == []
    suite = by_headers(tmp_path, "one", "two", "odd")
    hub.requests.clear()
    (found,) = compare_companions(suite)
    assert (found.level, found.field) == ("refused", "rope_theta")
    assert found.values == "10000.0 in one, two; 1000000.0 in odd"
    assert {request.rpartition("/")[2] for request in hub.requests} == {"config.json"}
    assert measure_kinship(suite) is None
    assert find_cached("hf://org/one") is None
    hub.requests.clear()
    assert compare_companions(suite) == (found,)
    assert hub.requests == []
    # In the cache, files are links to where the weights' links lead too.
    suite = load_suite(tmp_path)
    download(suite)
    assert compare_companions(suite) == (found,)
    assert measure_kinship(suite) is not None


def test_a_hub_that_is_gone_is_said_and_stops_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        own = json.dumps({"hidden_act": name}).encode()
        hub.repository(f"org/{name}", files_of(weights()) | {"config.json": own})
    suite = by_headers(tmp_path, "one", "two")

    def refuse(*_: object) -> Path:
        raise HubError("The hub cannot be reached.")

    monkeypatch.setattr(companions, "fetch_file", refuse)
    (found,) = compare_companions(suite)
    assert (found.level, found.values) == ("warned", "cannot be read in one, two")
