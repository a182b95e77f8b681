"""The table of kinds: what each is, what it can be told, and what reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armillary.data.importers import embedded as ships
from armillary.data.importers import options as o
from armillary.data.importers.contents import Contents, Progress
from armillary.data.importers.edges import read_edges
from armillary.data.importers.face_bins import read_face_bin
from armillary.data.importers.folder import read_folder, read_lfw
from armillary.data.importers.graphs import read_ego, read_tu
from armillary.data.importers.idx import read_idx
from armillary.data.importers.ijb import read_ijb
from armillary.data.importers.npz import read_npz
from armillary.data.importers.parquet import read_parquet
from armillary.data.importers.pyg import read_pyg
from armillary.data.importers.recordio import read_recordio
from armillary.data.importers.tables import read_captions_csv, read_pairs_csv
from armillary.data.importers.webdataset import read_webdataset
from armillary.data.store import Dataset
from armillary.data.tastes import tastes


@dataclass(frozen=True)
class Importer:
    """One kind of source.

    ``embedded`` ones need no source and import by themselves on first use, under their own name: ``make`` does it. The
    others are read by ``read``, which is given a :class:`~armillary.data.importers.source.Source` and ``options``.
    """

    summary: str
    options: type[o.Options] = o.Options
    # Any: each reader takes its own options.
    read: Callable[[Any, Any], Contents] | None = None
    make: Callable[[str, Path | None, Progress], Dataset] | None = None

    @property
    def embedded(self) -> bool:
        """Whether it needs no source."""
        return self.make is not None


IMPORTERS: dict[str, Importer] = {
    "orl": Importer("40 people x 10 grey photographs, 112 x 92 px (AT&T Laboratories Cambridge)", make=ships.orl),
    "digits": Importer("1,797 handwritten digits, 8 x 8 px (shipped with scikit-learn)", make=ships.digits),
    "fashion-mnist": Importer(
        "70,000 pictures of clothes, 28 x 28 px (Debian's dataset-fashion-mnist)", make=ships.fashion_mnist
    ),
    "identities": Importer(
        "4,000 procedural faces of 200 people, 64 x 64 px, with pose, quality, masks, captions", make=ships.identities
    ),
    "identities_small": Importer("768 of them of 64 people, 32 x 32 px", make=ships.identities_small),
    "identities_video": Importer("192 videos of 64 people, 8 frames each, 32 x 32 px", make=ships.identities_video),
    "motifs": Importer("600 small graphs of six classes, as pictures of their matrices", make=ships.motifs),
    "tastes": Importer("8,000 choices of 400 users among 300 items, made by taste and popularity", make=tastes),
    "folder": Importer("a folder of images with one subfolder a class", o.ImageOptions, read_folder),
    "recordio": Importer("InsightFace's .rec and .idx: MS1MV3, Glint360K", o.ImageOptions, read_recordio),
    "bin": Importer("InsightFace's verification .bin: LFW, AgeDB-30, CFP-FP", o.ImageOptions, read_face_bin),
    "lfw": Importer("people's folders with pairs.txt or pairsDevTest.txt", o.LfwOptions, read_lfw),
    "ijb": Importer("IJB-B or IJB-C: crops, templates and comparisons", o.IjbOptions, read_ijb),
    "webdataset": Importer("tar shards: .jpg with .cls, .json or .txt", o.WebDatasetOptions, read_webdataset),
    "parquet": Importer("any Parquet with a column of images", o.ParquetOptions, read_parquet),
    "idx": Importer("MNIST's IDX files, plain or gzipped", o.IdxOptions, read_idx),
    "pairs-csv": Importer("a CSV of image pairs: first, second, same", o.PairsCsvOptions, read_pairs_csv),
    "captions-csv": Importer("a CSV of images and captions", o.CaptionsCsvOptions, read_captions_csv),
    "edges": Importer("an edge list: user, item; MovieLens, Gowalla and their like", o.EdgesOptions, read_edges),
    "ego": Importer("an edge list of one graph: each node's neighbourhood is a graph", o.EgoOptions, read_ego),
    "tu": Importer("many graphs in the TU Dortmund format: MUTAG, PROTEINS, IMDB-BINARY", o.TUOptions, read_tu),
    "pyg": Importer("a .pt file of PyTorch Geometric's graphs, one or a list", o.PygOptions, read_pyg),
    "npz": Importer("a NumPy archive of images and labels", o.NpzOptions, read_npz),
}
