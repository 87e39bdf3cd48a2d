"""Batches of rendered documents: padded a document a row, or packed many to a row.

Between `documents`, which renders them, and the objective of training. Packing changes where ids
stand, nothing that is learned: a document neither sees what shares its row nor counts its positions
on from it.
"""

from bisect import bisect_left, insort
from collections import abc
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.language.documents import IGNORED, KINDS, Sequence
from ddt_llama.language.vocabulary import Vocabulary


class Batch(NamedTuple):
    """Rows of ids for a causal LM of transformers, padded on the right.

    `labels` stand at the place of their own id (the model shifts them) and are -100 where there is
    no loss; `kinds`, where they are told, are places in `KINDS`, 0 on padding.
    A document a row, `positions` is None: under a causal mask no real id sees the padding behind
    it, so `attention_mask` may be left out in training, which lets attention run on its fast causal
    path. Several in a row, `positions` begin at 0 with each (and are 0 on padding): transformers,
    given these and no mask, lets no document see another one, by SDPA, eager or flex attention
    alike (its `masking_utils`).
    `contrast`, where some documents come twice, is 1 on those whose text is their own, -1 on the
    same pictures under the text of another, 0 on all else.
    """

    ids: Int[Tensor, "b l"]
    labels: Int[Tensor, "b l"]
    attention_mask: Int[Tensor, "b l"]
    kinds: Int[Tensor, "b l"] | None = None
    positions: Int[Tensor, "b l"] | None = None
    contrast: Int[Tensor, "b l"] | None = None


def collate(sequences: abc.Sequence[Sequence], pad: int, length: int | None = None) -> Batch:
    """Pad documents on the right to one length: the longest, or `length` (for fixed shapes).

    Raises UserError for an empty batch and for a document longer than `length`.
    """
    counts = np.array([len(sequence.ids) for sequence in sequences])
    longest = int(counts.max(initial=0))
    if not longest or (length is not None and longest > length):
        raise UserError(
            f"batch of {len(sequences)} documents, the longest of {longest} tokens: allowed are "
            f"1 to {length or 'any number of'} tokens; raise the length or cut the texts"
        )
    real = np.arange(length or longest) < counts[:, None]
    ids = np.full(real.shape, pad, dtype=np.int64)
    labels = np.full(real.shape, IGNORED, dtype=np.int64)
    ids[real] = np.concatenate([sequence.ids for sequence in sequences])
    supervised = np.concatenate([sequence.supervised for sequence in sequences])
    labels[real] = np.where(supervised, ids[real], IGNORED)
    kinds = real * np.array([KINDS.index(sequence.kind) for sequence in sequences])[:, None]
    return Batch(*map(torch.from_numpy, (ids, labels, real.astype(np.int64), kinds)))


def with_codes(
    batch: Batch, codes: Int[Tensor, "n k"], edits: Int[Tensor, " e"], vocabulary: Vocabulary
) -> Batch:
    """Put the codes of all images of a batch, in their order, in place of those that stand there.

    `edits` are the places in `codes` of the answers of edits, each right behind its source: `same`
    stands where both agree. The result is that of `render` and `collate` with these codes, at a
    fraction of the time; so layouts need not wait for an image tokenizer.
    """
    rows = vocabulary.to_ids(codes)
    rows[edits] = rows[edits].masked_fill(codes[edits] == codes[edits - 1], vocabulary.same)
    places = vocabulary.in_image(batch.ids)
    assert int(places.sum()) == rows.numel()
    ids = batch.ids.masked_scatter(places, rows)
    return batch._replace(ids=ids, labels=ids.where(batch.labels != IGNORED, IGNORED))


def pack(batch: Batch, pad: int, length: int, multiple: int = 1) -> Batch:
    """Put the documents of a batch into few rows of about `length` ids, none of them cut.

    Where a document is longer than `length`, rows are as long as that. Of the lengths that need as
    few rows the least is taken, rounded up to a `multiple`.
    """
    counts = batch.attention_mask.sum(1).numpy()
    rows = _fewest_rows(counts, max(length, int(counts.max())))
    fills = np.array([counts[row].sum() for row in rows])
    order = np.concatenate(rows)
    # Where each id stands, document behind document, and where it goes.
    inside = np.arange(batch.ids.shape[1]) < counts[order, None]
    document, position = (torch.from_numpy(one) for one in np.nonzero(inside))
    taken = torch.from_numpy(order)[document], position
    width = -(-int(fills.max()) // multiple) * multiple
    target = torch.from_numpy(np.arange(width) < fills[:, None])

    def placed(values: Tensor, filler: int) -> Tensor:
        return values.new_full(target.shape, filler).masked_scatter(target, values)

    return Batch(
        placed(batch.ids[taken], pad),
        placed(batch.labels[taken], IGNORED),
        target.long(),
        None if batch.kinds is None else placed(batch.kinds[taken], 0),
        placed(position, 0),
        None if batch.contrast is None else placed(batch.contrast[taken], 0),
    )


def _fewest_rows(counts: Int[np.ndarray, " b"], most: int) -> list[list[int]]:
    """Divide documents over rows of at most `most` ids, as evenly as that few rows allow.

    The longest first, each where it leaves the least room; then the same with the least `most` that
    needs no more rows, found by halving. Source: MULTIFIT (Coffman, Garey and Johnson, 1978).
    """
    order = np.argsort(-counts, kind="stable").tolist()
    sizes = counts.tolist()
    best = _best_fit(sizes, order, most)
    low, high = max(max(sizes), -(-sum(sizes) // len(best))), most
    while low < high:
        middle = (low + high) // 2
        tried = _best_fit(sizes, order, middle)
        if len(tried) <= len(best):
            best, high = tried, middle
        else:
            low = middle + 1
    return best


def _best_fit(sizes: abc.Sequence[int], order: abc.Sequence[int], most: int) -> list[list[int]]:
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what each row has left, and which row it is, sorted
    for document in order:
        place = bisect_left(rooms, (sizes[document], -1))
        if place < len(rooms):
            left, row = rooms.pop(place)
        else:
            left, row = most, len(rows)
            rows.append([])
        rows[row].append(document)
        insort(rooms, (left - sizes[document], row))
    return rows
