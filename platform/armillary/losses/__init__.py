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

from armillary.losses.adaptive_scale import AdaCos, L2Softmax, P2SGrad, SigmoidWeightedArcFace
from armillary.losses.circle import Circle, CircleHead
from armillary.losses.class_centers import CenterLoss, PairVerification, RingLoss
from armillary.losses.class_head import ClassHeadLoss, HeadTerms, LinearHeadLoss, Samples, softmax_head_loss
from armillary.losses.cluster_contrast import SwappedPrediction
from armillary.losses.coding_rate import CodingRate
from armillary.losses.conditional_contrast import ConditionalContrastive
from armillary.losses.contrastive import NTXent, SupCon
from armillary.losses.cross_resolution import CenterCalibrator, ManifoldAlignment, ThresholdPairs, TransferableTriplet
from armillary.losses.cross_view import CrossVersionTriplet
from armillary.losses.decorrelation import AlignWithBase, BarlowTwins, VICReg
from armillary.losses.decoupled import DecoupledContrastive
from armillary.losses.embedding_dropout import SampleGuidedContrast
from armillary.losses.future_contrast import FutureContrast
from armillary.losses.graph_constraint import GraphConstraint, SampleGraphConstraint
from armillary.losses.hard_classes import CurricularFace, DirectedArcFace, MVSoftmax, SubcenterArcFace
from armillary.losses.hard_negatives import HardNegativeNCE, MixedNegatives
from armillary.losses.hybrid_memory import HybridMemoryLoss
from armillary.losses.info_nce import InfoNCE, SymmetricInfoNCE
from armillary.losses.information_bottleneck import InformationLowerBound, StochasticHead, VariationalBottleneck
from armillary.losses.instances import InvariantSpread, NoiseContrastive, NonParametricSoftmax, SampledInstances
from armillary.losses.k_positives import KPositives
from armillary.losses.key_contrast import BatchKeyContrast, KeyContrast, QueuedNTXent
from armillary.losses.lifted import LiftedStructure
from armillary.losses.logistic_pairs import LogisticPairs
from armillary.losses.margin_softmax import ArcFace, CombinedMargin, CosFace, NormFace, Softmax
from armillary.losses.masked import MaskedPatches
from armillary.losses.multi_similarity import MultiSimilarity
from armillary.losses.multiplied_angles import LSoftmax, SphereFace
from armillary.losses.mutual_information import AcrossScales, InformationBound, PriorMatching
from armillary.losses.n_pair import NPair
from armillary.losses.noise_contrast import NCE
from armillary.losses.pairs import Contrastive, ContrastivePairs
from armillary.losses.patch_contrast import ConceptContrast, PatchContrast
from armillary.losses.pose_margins import PoseCurriculum, PoseWeightedArcFace
from armillary.losses.pretext import WhichWasApplied
from armillary.losses.queued import BroadFace, QGFace, QueuedCenters
from armillary.losses.range_loss import RangeLoss
from armillary.losses.recommendation import BPR
from armillary.losses.sample_margins import AdaFace, ClassMargins, MagFace, ProbabilityArcFace, QualityArcFace
from armillary.losses.self_distillation import (
    BYOL,
    CrossViewEntropy,
    Distillation,
    GramAnchor,
    KoLeo,
    MaskedPatchEntropy,
    SimSiam,
)
from armillary.losses.skip_gram import NegativeSampling
from armillary.losses.subclusters import SubclusterLoss
from armillary.losses.support_set import SupportSet
from armillary.losses.transport import InverseTransport, TokenTransport, TransportCLIP
from armillary.losses.triplet import Triplet
from armillary.losses.tuples import TupleLoss
from armillary.losses.uniformity import AlignUniform, Uniformity
from armillary.losses.von_mises_fisher import SphericalConfidence

__all__ = [
    "BPR",
    "BYOL",
    "NCE",
    "AcrossScales",
    "AdaCos",
    "AdaFace",
    "AlignUniform",
    "AlignWithBase",
    "ArcFace",
    "BarlowTwins",
    "BatchKeyContrast",
    "BroadFace",
    "CenterCalibrator",
    "CenterLoss",
    "Circle",
    "CircleHead",
    "ClassHeadLoss",
    "ClassMargins",
    "CodingRate",
    "CombinedMargin",
    "ConceptContrast",
    "ConditionalContrastive",
    "Contrastive",
    "ContrastivePairs",
    "CosFace",
    "CrossVersionTriplet",
    "CrossViewEntropy",
    "CurricularFace",
    "DecoupledContrastive",
    "DirectedArcFace",
    "Distillation",
    "FutureContrast",
    "GramAnchor",
    "GraphConstraint",
    "HardNegativeNCE",
    "HeadTerms",
    "HybridMemoryLoss",
    "InfoNCE",
    "InformationBound",
    "InformationLowerBound",
    "InvariantSpread",
    "InverseTransport",
    "KPositives",
    "KeyContrast",
    "KoLeo",
    "L2Softmax",
    "LSoftmax",
    "LiftedStructure",
    "LinearHeadLoss",
    "LogisticPairs",
    "MVSoftmax",
    "MagFace",
    "ManifoldAlignment",
    "MaskedPatchEntropy",
    "MaskedPatches",
    "MixedNegatives",
    "MultiSimilarity",
    "NPair",
    "NTXent",
    "NegativeSampling",
    "NoiseContrastive",
    "NonParametricSoftmax",
    "NormFace",
    "P2SGrad",
    "PairVerification",
    "PatchContrast",
    "PoseCurriculum",
    "PoseWeightedArcFace",
    "PriorMatching",
    "ProbabilityArcFace",
    "QGFace",
    "QualityArcFace",
    "QueuedCenters",
    "QueuedNTXent",
    "RangeLoss",
    "RingLoss",
    "SampleGraphConstraint",
    "SampleGuidedContrast",
    "SampledInstances",
    "Samples",
    "SigmoidWeightedArcFace",
    "SimSiam",
    "Softmax",
    "SphereFace",
    "SphericalConfidence",
    "StochasticHead",
    "SubcenterArcFace",
    "SubclusterLoss",
    "SupCon",
    "SupportSet",
    "SwappedPrediction",
    "SymmetricInfoNCE",
    "ThresholdPairs",
    "TokenTransport",
    "TransferableTriplet",
    "TransportCLIP",
    "Triplet",
    "TupleLoss",
    "Uniformity",
    "VICReg",
    "VariationalBottleneck",
    "WhichWasApplied",
    "softmax_head_loss",
]
