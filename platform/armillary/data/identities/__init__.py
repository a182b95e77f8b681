"""Identities: procedural faces, each with the truth about itself.

::

    spec = IdentitiesSpec(identities=500, images_per_identity=30, difficulty=0.6)
    make_identities("faces500", spec)

Picture i is a function of (specification, i) alone, to the byte: not of batches, threads, or where generation starts.
"""

from armillary.data.identities.dataset import (
    COLUMNS,
    EMBEDDED,
    Rendered,
    embedded,
    embedded_small,
    embedded_video,
    make_identities,
    records,
    render_identity_frames,
)
from armillary.data.identities.labels import NOISE, images_per_identity, similarity_graph
from armillary.data.identities.outline import render_with_outlines
from armillary.data.identities.spec import IdentitiesSpec, NoiseSpec

__all__ = [
    "COLUMNS",
    "EMBEDDED",
    "NOISE",
    "IdentitiesSpec",
    "NoiseSpec",
    "Rendered",
    "embedded",
    "embedded_small",
    "embedded_video",
    "images_per_identity",
    "make_identities",
    "records",
    "render_identity_frames",
    "render_with_outlines",
    "similarity_graph",
]
