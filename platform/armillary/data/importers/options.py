"""What each kind of source can be told, as typed models; the command line and programs share them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from armillary.data.layout import Form


class Options(BaseModel):
    """A kind without options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageOptions(Options):
    """Sources that hold image files."""

    form: Form = Field("encoded", description="keep the files' own bytes, or decoded pixels")


class LfwOptions(ImageOptions):
    """People's folders and lists of pairs."""

    pairs: str = Field("pairs.txt", description="the list of pairs, a path inside SOURCE")


class IjbOptions(ImageOptions):
    """IJB-B and IJB-C: crops, template lists and comparisons, all inside SOURCE."""

    images: str = Field("loose_crop", description="the folder of images")
    templates: str = Field("meta/*_face_tid_mid.txt", description="lines of: image, template, media")
    matches: str = Field("meta/*_template_pair_label.txt", description="lines of: template, template, 1 or 0")


class WebDatasetOptions(ImageOptions):
    """Tar shards."""

    label_key: str = Field("label", description="the key of the label in .json members, where there is no .cls")


class ParquetOptions(ImageOptions):
    """Parquet files with a column of images."""

    image_column: str = Field("image", description="bytes, a struct with a field 'bytes', or nested lists of uint8")
    label_column: str = Field("label", description="integers or text; without it, all images are of one class")
    columns: tuple[str, ...] = Field((), description="more columns to keep, NAME or NAME=NEW_NAME")


class IdxOptions(Options):
    """MNIST's files."""

    part: Literal["all", "train", "t10k"] = Field("all", description="which part to import")


class PairsCsvOptions(ImageOptions):
    """A CSV of image pairs."""

    first_column: str = Field("first", description="path of the first image")
    second_column: str = Field("second", description="path of the second image")
    same_column: str = Field("same", description="1, true or same; 0, false or different")
    fold_column: str = Field("fold", description="the fold of a pair; may be missing")
    images: str = Field("", description="the folder of the images, a path inside that of SOURCE")


class CaptionsCsvOptions(ImageOptions):
    """A CSV of images and captions."""

    image_column: str = Field("image", description="path of the image")
    caption_column: str = Field("caption", description="the text")
    label_column: str = Field("label", description="the class; may be missing")
    images: str = Field("", description="the folder of the images, a path inside that of SOURCE")


class EdgesOptions(Options):
    """A text file of edges."""

    separator: Literal["auto", "comma", "tab", "semicolon", "space"] = Field(
        "auto", description="what stands between cells"
    )
    header: Literal["auto", "yes", "no"] = Field(
        "auto", description="whether the first line names columns; auto: if it holds words where the second has numbers"
    )


class TUOptions(Options):
    """A folder in the TU Dortmund format."""

    max_nodes: int = Field(128, ge=2, le=2048, description="graphs with more nodes are left out")


class EgoOptions(EdgesOptions):
    """An edge list, each of whose nodes becomes a sample."""

    nodes: str = Field("", description="a CSV beside SOURCE with a header: node, label, features")
    label_column: str = Field("label", description="the class, in the CSV of nodes; may be missing")
    hops: int = Field(1, ge=1, le=4, description="how far a node's neighbourhood reaches")
    max_nodes: int = Field(32, ge=2, le=2048, description="of a neighbourhood: the nearest ones")


class PygOptions(Options):
    """Graphs of PyTorch Geometric."""

    hops: int = Field(1, ge=1, le=4, description="of a single graph: how far a node's neighbourhood reaches")
    max_nodes: int = Field(128, ge=2, le=2048, description="larger graphs are left out, neighbourhoods cut")


class NpzOptions(Options):
    """NumPy archives."""

    images_key: str = Field("images", description="the array of images: uint8, or floats in [0, 1]")
    labels_key: str = Field("labels", description="integers or text, one an image")
    columns: tuple[str, ...] = Field((), description="more arrays to keep, NAME or NAME=NEW_NAME")
    layout: Literal["auto", "NHWC", "NCHW"] = Field("auto", description="the order of the axes")
