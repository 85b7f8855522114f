"""Bits per byte of texts, and how often the first draft agrees with the model, teacher-forced."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qnext.data.sources import RecordFormat, read_documents
from qnext.kernels import dispatch
from qnext.model.batch import ForwardBatch
from qnext.model.qwen3_next import Qwen3Next
from qnext.tokenizer.tokenizer import Tokenizer

Windows = Literal["first", "all"]
IGNORED = -100
# Rows whose logits are held at once while drafts are compared: 2^25 logits, 128 MiB in fp32.
ARGMAX_LOGITS = 1 << 25


@dataclass(frozen=True)
class LossReport:
    """Sums over documents.

    Attributes:
        nats: negative log-probability of the scored tokens.
        num_tokens: scored tokens.
        num_bytes: UTF-8 bytes of the scored tokens.
        num_documents: documents with at least one scored token.
        num_drafts: positions where a draft and the model predict the same token; 0 when the model
            has no MTP head or drafts were not asked for.
        num_agreeing: those where both choose the same token.
    """

    nats: float
    num_tokens: int
    num_bytes: int
    num_documents: int
    num_drafts: int = 0
    num_agreeing: int = 0

    @property
    def bits_per_byte(self) -> float:
        """Bits of the scored tokens over their bytes; NaN when nothing was scored."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    @property
    def mtp_agreement(self) -> float | None:
        """Share of positions where the first draft is the model's choice; None if unmeasured."""
        return self.num_agreeing / self.num_drafts if self.num_drafts else None


def read_texts(path: str | Path, max_documents: int | None = None) -> list[str]:
    """Read the documents of a jsonl(.zst), parquet or text file.

    Args:
        path: the file.
        max_documents: read no more than this; None reads all.

    Raises:
        ValueError: the file is missing, damaged, or has no document.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    texts: list[str] = []
    for document in read_documents(path, RecordFormat()):
        if max_documents is not None and len(texts) >= max_documents:
            break
        texts.append(document.text or "")
    if not texts:
        raise ValueError(f"{path} has no documents")
    return texts


def cut_windows(
    documents: Iterable[Sequence[int]], context: int, windows: Windows
) -> Iterator[list[int]]:
    """Yield the pieces of documents that are scored; the first token of each is only context.

    Args:
        documents: token ids.
        context: longest piece, in tokens.
        windows: "first": one piece per document, its first `context` tokens. "all": the whole
            document in pieces that share one token, so that each of its tokens but the first is
            scored once.
    """
    for ids in documents:
        stop = len(ids) if windows == "all" else min(len(ids), context)
        for start in range(0, max(stop - 1, 0), context - 1):
            yield list(ids[start : min(start + context, stop)])


@torch.no_grad()
def score_windows(
    model: Qwen3Next,
    windows: Iterable[Sequence[int]],
    bytes_of_id: Tensor,
    *,
    max_batch_tokens: int,
    with_mtp: bool,
) -> LossReport:
    """Score packed pieces of text; see `score_texts`.

    Args:
        model: in the dtype to compute in.
        windows: token ids, at least two each.
        bytes_of_id: UTF-8 bytes of each token. [W], int64
        max_batch_tokens: tokens of one forward pass; a longer piece goes alone.
        with_mtp: also compare drafts.
    """
    device = model.embed_tokens.device
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # nats, drafts, agreeing
    num_tokens = num_bytes = num_windows = 0
    for pieces in _batches(windows, max_batch_tokens):
        lengths = tuple(len(piece) for piece in pieces)
        flat = torch.tensor([token for piece in pieces for token in piece])
        ends = torch.tensor(lengths).cumsum(0) - 1
        targets = flat.roll(-1)
        targets[ends] = IGNORED
        scored = targets[targets != IGNORED]
        num_tokens += scored.numel()
        num_bytes += int(bytes_of_id[scored].sum())
        num_windows += len(pieces)
        batch = ForwardBatch.packed(flat.to(device), lengths)
        hidden = model(batch)
        head = model.embed_tokens if model.lm_head is None else model.lm_head
        _, nats, _ = dispatch.linear_cross_entropy(hidden, head, targets.to(device))
        totals[0] += nats
        if with_mtp and model.mtp is not None:
            is_draft = torch.ones_like(flat, dtype=torch.bool)
            is_draft[ends] = is_draft[ends - 1] = False
            totals[1:] += _count_agreement(model, hidden, batch, is_draft.to(device))
    nats, drafts, agreeing = totals.tolist()
    return LossReport(nats, num_tokens, num_bytes, num_windows, int(drafts), int(agreeing))


def score_texts(
    model: Qwen3Next,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    context: int = 2048,
    windows: Windows = "first",
    max_batch_tokens: int | None = None,
    with_mtp: bool = False,
) -> LossReport:
    """Measure bits per byte: each document from its start, tokens 2 to n over their bytes.

    Args:
        model: in evaluation it is run in the dtype it computes in.
        tokenizer: the model's.
        texts: one document each; special tokens written in them are read as plain text.
        context: longest piece, in tokens.
        windows: "first" scores the first `context` tokens of each document; "all" the whole of it.
        max_batch_tokens: tokens packed into one forward pass; None: 65,536 on a GPU, 4,096 else.
        with_mtp: also count how often the first draft for a position, made from the tokens up to
            two before it, is the token that the model itself finds most probable there.

    Raises:
        ValueError: context is below 2, or drafts are asked of a model without an MTP head.
    """
    if context < 2:
        raise ValueError(f"context = {context}: must be at least 2, one token to predict from one")
    if with_mtp and model.mtp is None:
        raise ValueError("with_mtp: the model has no MTP head (no mtp.* tensors)")
    if max_batch_tokens is None:
        max_batch_tokens = 65536 if model.embed_tokens.is_cuda else 4096
    bytes_of_id = torch.tensor([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    documents = _encode_starts(tokenizer, texts, context if windows == "first" else None)
    report = score_windows(
        model,
        cut_windows(documents, context, windows),
        bytes_of_id,
        max_batch_tokens=max_batch_tokens,
        with_mtp=with_mtp,
    )
    num_documents = sum(len(ids) > 1 for ids in documents)
    return LossReport(**{**vars(report), "num_documents": num_documents})


def _encode_starts(
    tokenizer: Tokenizer, texts: Sequence[str], num_tokens: int | None
) -> list[list[int]]:
    """Tokenise texts; where only the start counts, a cut well past it gives the same ids."""
    if num_tokens is None:
        return tokenizer.encode_batch(texts, use_special_tokens=False)
    # Pieces never join across a space, so ids long before the cut do not depend on it.
    starts = tokenizer.encode_batch(
        [text[: 16 * num_tokens] for text in texts], use_special_tokens=False
    )
    return [
        ids
        if len(text) <= 16 * num_tokens or len(ids) > 2 * num_tokens
        else tokenizer.encode_batch([text], use_special_tokens=False)[0]
        for text, ids in zip(texts, starts, strict=True)
    ]


def _batches(windows: Iterable[Sequence[int]], max_tokens: int) -> Iterator[list[Sequence[int]]]:
    pieces: list[Sequence[int]] = []
    size = 0
    for window in windows:
        if pieces and size + len(window) > max_tokens:
            yield pieces
            pieces, size = [], 0
        pieces.append(window)
        size += len(window)
    if pieces:
        yield pieces


def _count_agreement(
    model: Qwen3Next, hidden: Tensor, batch: ForwardBatch, is_draft: Tensor
) -> Tensor:
    """Count drafts and agreeing ones. Row t's draft and row t + 1's choice are for t + 2. [2]"""
    drafted = model.mtp_hidden(hidden, batch, num_steps=1)[0]
    rows = max(1, ARGMAX_LOGITS // model.config.vocab_size)

    def choices(states: Tensor) -> Tensor:
        return torch.cat([model.compute_logits(part).argmax(-1) for part in states.split(rows)])

    agrees = (choices(drafted) == choices(hidden).roll(-1)) & is_draft
    return torch.stack((is_draft.sum(), agrees.sum())).double()
