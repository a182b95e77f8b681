"""Linear classifiers on frozen embeddings, trained on all training labels or on a few of them."""

from __future__ import annotations

import warnings

import numpy as np

from armillary.evaluation.neighbors import training_part
from armillary.evaluation.result import EvaluationSet, Floats, Ints, ProtocolResult
from armillary.spec.errors import UserError

SHARES = {"1pct": 0.01, "10pct": 0.1}
DRAWS = 5
MAX_ITERATIONS = 1000


def stratified_share(labels: Ints, share: float, rng: np.random.Generator) -> Ints:
    """Indices of a random ``share`` of each class, rounded to the nearest count and at least one image a class."""
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen.append(rng.permutation(members)[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(chosen))


def standardize(train: Floats, test: Floats) -> tuple[Floats, Floats]:
    """Both, with each dimension's training mean and standard deviation taken out; a constant dimension becomes 0."""
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    # Below this a dimension is constant up to the rounding of its own mean, and dividing would blow that rounding up.
    constant = deviation <= 1e-12 * np.maximum(1.0, np.abs(mean))
    scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, deviation))
    return (train - mean) * scale, (test - mean) * scale


def linear_accuracy(train: Floats, train_labels: Ints, test: Floats, test_labels: Ints) -> float:
    """Top-1 accuracy of multinomial logistic regression (L2 penalty with C = 1, L-BFGS)."""
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # One image a class is what few labels may mean, not a sign of a regression problem.
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%")
        classifier = LogisticRegression(C=1.0, max_iter=MAX_ITERATIONS).fit(train, train_labels)
    return float((classifier.predict(test) == test_labels).mean())


def _prepared(data: EvaluationSet, protocol: str) -> tuple[Floats, Ints, Floats]:
    train, train_labels = training_part(data, protocol)
    if len(np.unique(train_labels)) < 2:
        raise UserError(f"{protocol} needs two training classes or more; all training images are of one class")
    train, test = standardize(train, data.embeddings)
    return train, train_labels, test


def probe(data: EvaluationSet) -> ProtocolResult:
    """Linear probe: ``top1`` is the accuracy of logistic regression on all training embeddings.

    ``linear_probe`` of the catalog in its deterministic form: cached features, standardised, solved by L-BFGS.

    Embeddings are standardised per dimension with the training set's statistics; the penalty is scikit-learn's default
    (C = 1) and is not tuned, so that no evaluated label is ever used. A query of an untrained class counts as wrong.

    Source: Zhang, Isola, Efros, Colorful Image Colorization, ECCV 2016; logistic regression by L-BFGS on frozen
    features as in Radford et al., Learning Transferable Visual Models, ICML 2021, appendix A.3 (who tune C).

    Raises:
        UserError: no training part, one training class, or no training class is evaluated.
    """
    train, train_labels, test = _prepared(data, "probe")
    return ProtocolResult({"probe/top1": linear_accuracy(train, train_labels, test, data.labels)})


def few_label(data: EvaluationSet) -> ProtocolResult:
    """Few labels: ``top1_1pct`` and ``top1_10pct`` are the probe's accuracy from 1% and 10% of the training labels.

    The share is drawn per class, at least one image each, and the accuracy is the mean over five draws made from
    ``seed``. The standardisation uses all training embeddings, which costs no label. Curves: ``top1_1pct`` and
    ``top1_10pct`` hold the draws.

    The encoder stays as it is. What the field calls fine-tuning on 1% or 10% of the labels trains all of it: that is a
    job of its own, ``train.init_from: RUN`` with ``data.labeled_share: 0.1`` (``jobs/recipes/finetune.yaml``; from the
    middle of the projector with ``backbone.tail``), judged by :func:`probe` or by neighbours like any other.

    Source: the 1% and 10% label protocol of Chen et al., A Simple Framework for Contrastive Learning (SimCLR), ICML
    2020, section 6; here on frozen embeddings, without fine-tuning the encoder.

    Raises:
        UserError: as for :func:`probe`.
    """
    train, train_labels, test = _prepared(data, "few_label")
    metrics, curves = {}, {}
    for name, share in SHARES.items():
        draws = []
        for draw in range(DRAWS):
            chosen = stratified_share(train_labels, share, np.random.default_rng((data.seed, draw)))
            draws.append(linear_accuracy(train[chosen], train_labels[chosen], test, data.labels))
        metrics[f"few_label/top1_{name}"] = float(np.mean(draws))
        curves[f"top1_{name}"] = np.array(draws)
    return ProtocolResult(metrics, curves)
