"""From a dataset's text column to token ids: a tokenizer of the training part, ids of both parts, their frequencies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from armillary.components.counter import integers, key, sample_keys
from armillary.data.ids import IdRows
from armillary.data.splits import ImageSet, PreparedData
from armillary.spec.errors import UserError, unknown_name

PAD, UNKNOWN = "[PAD]", "[UNK]"
VOCABULARY = 8192
# Longer sentences are cut; the longest of the training part decides below that.
MAX_LENGTH = 128
# Sentences of other classes of which the one with most words in common is the hard negative.
CANDIDATES = 8
_POSITIVE, _NEGATIVE = 71, 72


def train_tokenizer(sentences: Iterable[str], vocabulary: int = VOCABULARY) -> str:
    """A byte-pair tokenizer in lower case, as the JSON of the ``tokenizers`` library.

    Frequent words become one token each, rare ones several. Padding is token 0, letters never seen are token 1.

    Args:
        sentences: of the training part only.
        vocabulary: most tokens there may be.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[PAD, UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    return str(tokenizer.to_str())


def encode(tokenizer: str, sentences: Iterable[str], length: int | None = None) -> tuple[Tensor, int]:
    """Sentences as token ids, and the tokenizer's vocabulary.

    Args:
        tokenizer: JSON of the ``tokenizers`` library.
        sentences: N of them.
        length: tokens that are kept; ``None``: as many as the longest has, at most :data:`MAX_LENGTH`.

    Returns:
        ``(N, length)`` int64, 0 behind a sentence's end; and how many tokens the tokenizer knows.
    """
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_str(tokenizer)
    found = [encoding.ids for encoding in loaded.encode_batch(list(sentences))]
    if length is None:
        length = min(MAX_LENGTH, max((len(ids) for ids in found), default=1) or 1)
    ids = torch.zeros(len(found), length, dtype=torch.int64)
    for row, sentence in zip(ids, found, strict=True):
        kept = sentence[:length]
        row[: len(kept)] = torch.tensor(kept, dtype=torch.int64)
    return ids, loaded.get_vocab_size()


def with_text(data: PreparedData, column: str, modality: str, tokenizer: str = "") -> PreparedData:
    """Prepared data whose text column has become token ids.

    Args:
        data: a fold of a dataset.
        column: a column of strings.
        modality: ``text``: ids take the images' place. ``image_text``: they become the field ``caption``.
        tokenizer: a run's own; by default one is trained on the training part.

    Returns:
        The data, with ``tokenizer`` and ``inputs["token_counts"] (vocabulary,)``, how often each token stands in the
        training part.

    Raises:
        UserError: the dataset has no such column.
    """
    if column not in data.train.texts:
        if not data.train.texts:
            raise UserError(f"{data.name} has no text", key="data.name", allowed="a dataset with a column of strings")
        raise unknown_name("text column", column, sorted(data.train.texts), key="data.text")
    sentences = [str(text) for text in data.train.texts[column]]
    tokenizer = tokenizer or train_tokenizer(sentences)
    train_ids, vocabulary = encode(tokenizer, sentences)
    test_ids, _ = encode(tokenizer, map(str, data.evaluation.texts[column]), train_ids.shape[1])
    # Results on sentences are not those on the same rows' images.
    fingerprint = hashlib.sha256(f"{data.fingerprint}-{modality}-{column}".encode()).hexdigest()
    counts = torch.bincount(train_ids.flatten(), minlength=vocabulary)
    counts[0] = 0
    return replace(
        data,
        train=_carrying(data.train, train_ids, vocabulary, modality),
        evaluation=_carrying(data.evaluation, test_ids, vocabulary, modality),
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        inputs={**data.inputs, "token_counts": counts, "caption_length": torch.tensor(train_ids.shape[1])},
    )


def _carrying(part: ImageSet, ids: Tensor, vocabulary: int, modality: str) -> ImageSet:
    if modality == "text":
        return replace(part, images=IdRows(ids, vocabulary, (1, ids.shape[1])))
    return replace(part, fields={**part.fields, "caption": ids})


class Partners:
    """To each sentence one of the same class, and one of another class that is easily mistaken for it.

    Both are functions of (seed, epoch, sample).

    Args:
        ids: ``(N, L)`` the sentences.
        label: ``(N,)`` their classes.
        index: ``(N,)`` the samples' positions in the dataset.
    """

    def __init__(self, ids: Tensor, label: Tensor, index: Tensor) -> None:
        self.ids, self.label, self.index = ids, label, index
        self._order = torch.argsort(label, stable=True)
        _, self._class, self._count = torch.unique(label, return_inverse=True, return_counts=True)
        self._start = self._count.cumsum(0) - self._count
        self._place = torch.empty_like(self._order)
        self._place[self._order] = torch.arange(len(label))

    def positives(self, rows: Tensor, seed: int, epoch: int) -> Tensor:
        """For each of ``rows (b,)`` another row of its class; itself where there is none."""
        others = self._count[self._class[rows]] - 1
        keys = sample_keys(key(_POSITIVE, seed, epoch), self.index[rows])
        step = 1 + integers(keys, 1, 1 << 24)[:, 0] % others.clamp_min(1)
        start, count = self._start[self._class[rows]], others + 1
        return self._order[start + (self._place[rows] - start + step) % count]

    def negatives(self, rows: Tensor, seed: int, epoch: int) -> Tensor:
        """Of eight random rows of other classes the one with most words in common; of its own where there is one."""
        keys = sample_keys(key(_NEGATIVE, seed, epoch), self.index[rows])
        start, count = self._start[self._class[rows]], self._count[self._class[rows]]
        outside = (len(self.label) - count).clamp_min(1)
        drawn = integers(keys, CANDIDATES, 1 << 24) % outside[:, None]
        # Rows in order of classes, the own class left out.
        place = (start + count)[:, None] + drawn
        candidates = self._order[place % len(self.label)]
        common = (self.ids[candidates][..., None] == self.ids[rows][:, None, None, :]) & (self.ids[rows] > 0)[
            :, None, None
        ]
        return candidates.gather(1, common.any(dim=2).sum(dim=2).argmax(dim=1, keepdim=True))[:, 0]
