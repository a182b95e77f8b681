"""Losses as plain ``nn.Module``s: torch only, usable in any training loop.

Three call shapes:

* class-head losses own one weight row per class: ``ArcFace(num_classes, embedding_dim)(embeddings, labels)``;
* label losses: ``SupCon(temperature=0.1)(embeddings, labels)``;
* view losses: ``NTXent(temperature=0.5)(view1, view2)``.

Each returns a scalar, or per-sample values with ``reduction="none"``. Under an initialised process group the returned
values are such that their *mean over workers* is the loss of one process on the whole batch, and averaged gradients are
its gradients; ``gather=False`` keeps a batch-coupled loss to its own worker's samples. The mathematics runs in float32
under autocast and for half-precision inputs; float64 stays float64. A dict passed as ``metrics`` receives detached
scalars whose mean over workers is the global batch's value.
"""

from armillary.losses.adaptive_scale import AdaCos, L2Softmax, P2SGrad
from armillary.losses.circle import Circle, CircleHead
from armillary.losses.class_centers import CenterLoss, PairVerification, RingLoss
from armillary.losses.class_head import ClassHeadLoss, HeadTerms, LinearHeadLoss, Samples, softmax_head_loss
from armillary.losses.contrastive import NTXent, SupCon
from armillary.losses.cross_view import CrossVersionTriplet
from armillary.losses.hard_classes import CurricularFace, MVSoftmax, SubcenterArcFace
from armillary.losses.lifted import LiftedStructure
from armillary.losses.margin_softmax import ArcFace, CosFace, NormFace, Softmax
from armillary.losses.multi_similarity import MultiSimilarity
from armillary.losses.multiplied_angles import LSoftmax, SphereFace
from armillary.losses.n_pair import NPair
from armillary.losses.pairs import Contrastive, ContrastivePairs
from armillary.losses.range_loss import RangeLoss
from armillary.losses.triplet import Triplet

__all__ = [
    "AdaCos",
    "ArcFace",
    "CenterLoss",
    "Circle",
    "CircleHead",
    "ClassHeadLoss",
    "Contrastive",
    "ContrastivePairs",
    "CosFace",
    "CrossVersionTriplet",
    "CurricularFace",
    "HeadTerms",
    "L2Softmax",
    "LSoftmax",
    "LiftedStructure",
    "LinearHeadLoss",
    "MVSoftmax",
    "MultiSimilarity",
    "NPair",
    "NTXent",
    "NormFace",
    "P2SGrad",
    "PairVerification",
    "RangeLoss",
    "RingLoss",
    "Samples",
    "Softmax",
    "SphereFace",
    "SubcenterArcFace",
    "SupCon",
    "Triplet",
    "softmax_head_loss",
]
