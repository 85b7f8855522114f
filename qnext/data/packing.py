"""Rows of exactly one context length, filled with documents; no padding.

A row starts with a border. A document that does not fit is cut at the row's end, and each part
is a sequence of its own: state, attention and positions start afresh in it.
"""

from __future__ import annotations

from qnext.data.mixture import Mixture, Taken


def pack_row(mixture: Mixture, context: int) -> list[Taken]:
    """Fill the next row of a mixture.

    A row comes from one stream. One that starts with a whole long piece is filled up from the
    other streams.

    Returns:
        Pieces whose lengths sum to context.
    """
    stream = mixture.next_stream(can_be_whole=True)
    pieces = [stream.take(context)]
    free = context - pieces[0].segment.length
    if free and stream.is_whole:
        stream = mixture.next_stream(can_be_whole=False)
    while free:
        pieces.append(stream.take(free))
        free -= pieces[-1].segment.length
    return pieces
