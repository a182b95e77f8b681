"""From the fold of a dataset to what an objective of another modality than images is given."""

from __future__ import annotations

from armillary.data.interactions import with_interactions
from armillary.data.relations import with_graph
from armillary.data.splits import PreparedData
from armillary.data.text import with_text
from armillary.objectives.base import Needs
from armillary.spec.jobs import DataSpec


def as_inputs(data: PreparedData, needs: Needs, spec: DataSpec, tokenizer: str = "") -> PreparedData:
    """The data in the form that ``needs.modality`` asks for.

    Args:
        data: a fold of a dataset.
        needs: the objective's.
        spec: the job's ``data`` section.
        tokenizer: that of a finished run, which is judged again.

    Raises:
        UserError: the dataset lacks what the modality is made of, or a graph.
    """
    if needs.graph:
        data = with_graph(data, spec.name)
    if needs.modality in ("text", "image_text"):
        return with_text(data, spec.text, needs.modality, tokenizer)
    if needs.modality == "interactions":
        return with_interactions(data)
    return data
