"""mergekit-pytorch on the benchmark's files; runs in a Python that has mergekit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from mergekit.scripts.merge_raw_pytorch import main  # type: ignore[import-not-found]


def merge(
    suite: str, method: str, parameters: dict[str, Any], output: str, base: str, config: str
) -> None:
    """Merge as mergekit's command line does, imports apart.

    Args:
        suite: the suite.yaml whose experts are merged.
        method: MergeScope's name of it, which is not needed here.
        parameters: merge_method, and each model's parameters.
        output: folder to write.
        base: the base's file.
        config: where to write mergekit's configuration.
    """
    del method
    document = yaml.safe_load(Path(suite).read_text())
    own = {name: value for name, value in parameters.items() if name != "merge_method"}
    models = [
        {"model": str(Path(suite).parent / expert["weights"]), "parameters": own}
        for expert in document["experts"].values()
    ]
    asked: dict[str, Any] = {"merge_method": parameters["merge_method"], "models": models}
    if parameters["merge_method"] != "linear":
        asked["base_model"] = base
    Path(config).write_text(yaml.safe_dump(asked))
    main([config, output], standalone_mode=False)
