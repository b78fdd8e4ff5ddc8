"""What is known already, for views that must not start to compute."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from analysis.evaluation.evaluator import Evaluator
from analysis.outputs.inputs import Split
from analysis.outputs.prediction_store import CLASSES
from analysis.outputs.suite_outputs import Images, Measurements
from merge_core.errors import MergeScopeError
from merge_core.progress import Progress


class NotStored(MergeScopeError):  # noqa: N818 - a state rather than a fault
    """Something has never been evaluated, and nothing may be evaluated now."""


class StoredEvaluator(Evaluator):
    """Gives what is stored, and refuses to run the model.

    Args:
        evaluator: whose suite and store it looks into.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__(evaluator.suite, evaluator.predictions)

    def measure(
        self,
        digest: str,
        weights: Callable[[], Mapping[str, Tensor]],
        images: Images,
        split: Split = "val",
        measures: Collection[str] = (CLASSES,),
        progress: Progress | None = None,
    ) -> Measurements:
        """What is stored (see :meth:`analysis.outputs.suite_outputs.ModelOutputs.measure`).

        Raises:
            NotStored: something of it is not.
        """
        del weights  # they would be merged first

        def refuse() -> Mapping[str, Tensor]:
            raise NotStored("This has not been evaluated yet.")

        return super().measure(digest, refuse, images, split, measures, progress)
