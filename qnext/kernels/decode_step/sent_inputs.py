"""What the host sends to a captured round: all inputs at its start, new pages later on."""

import numpy as np
import torch

from qnext.kernels.decode_step.reference import Rounds


class SentInputs:
    """What the host sends before the first round, in one copy.

    Attributes:
        words: last tokens and seeds. [2, N], int64
        ints: rows of a window (0 is padding), contexts, slots, pending rows, top_k, positions of
            the next tokens, whether a sequence is there. [7, N], int32
        floats: temperature, top_p, min_p; penalties of repetition, presence and frequency. [6, N],
            fp32
        pages: [N, P], int32
    """

    def __init__(self, num_seqs: int, max_pages: int, device: torch.device) -> None:
        sizes = (16 * num_seqs, 28 * num_seqs, 24 * num_seqs, 4 * num_seqs * max_pages)
        # On the host pinned, so that the copy needs no other.
        self.host = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.device = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        self.words, self.ints, self.floats, self.pages = self._parts(self.device, sizes, num_seqs)
        parts = self._parts(self.host, sizes, num_seqs)
        self.host_words, self.host_ints, self.host_floats, self.host_pages = (
            part.numpy() for part in parts
        )
        self._copied: torch.cuda.Event | None = None

    @staticmethod
    def _parts(
        memory: torch.Tensor, sizes: tuple[int, ...], num_seqs: int
    ) -> tuple[torch.Tensor, ...]:
        words, ints, floats, pages = memory.split(sizes)
        return (
            words.view(torch.int64).view(2, num_seqs),
            ints.view(torch.int32).view(7, num_seqs),
            floats.view(torch.float32).view(6, num_seqs),
            pages.view(torch.int32).view(num_seqs, -1),
        )

    def send(self, rounds: Rounds, window: int, num_pending: list[int]) -> None:
        """Write the inputs of the first round; waits where the copy before still runs."""
        if self._copied is not None:
            self._copied.synchronize()
        rows, n = rounds.rows, len(rounds.cuts)
        contexts = np.array(rows.context_lens, dtype=np.int32)
        self.host_ints[0] = self.host_ints[6] = 0
        self.host_ints[0, :n], self.host_ints[6, :n] = window, 1
        self.host_ints[1, :n], self.host_ints[5, :n] = contexts, contexts + 1
        self.host_ints[2, :n], self.host_ints[3, :n] = rows.state_slots, num_pending
        self.host_ints[4, :n] = [0 if cuts is None else cuts.top_k for cuts in rounds.cuts]
        self.host_floats[:3, :n] = [
            [0.0 if cuts is None else cuts.temperature for cuts in rounds.cuts],
            [1.0 if cuts is None else cuts.top_p for cuts in rounds.cuts],
            [0.0 if cuts is None else cuts.min_p for cuts in rounds.cuts],
        ]
        self.host_floats[3], self.host_floats[4:] = 1.0, 0.0
        for i, penalty in enumerate(rounds.penalties):
            if penalty is not None:
                own = (penalty.repetition, penalty.presence, penalty.frequency)
                self.host_floats[3:, i] = own
        self.host_words[0, :n] = rows.token_ids
        # Seeds are 64 bits without a sign, torch's integers have one.
        self.host_words[1, :n] = np.array(rounds.seeds, dtype=np.uint64).view(np.int64)
        for row, pages in zip(self.host_pages, rows.pages, strict=False):
            row[: len(pages)] = pages
        self.device.copy_(self.host, non_blocking=True)
        if self.device.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()


class GrownPages:
    """Pages that sequences got since the whole table was sent.

    Args:
        table: on the device. [N, P], int32
        capacity: pages that a call normally brings at most.
    """

    def __init__(self, table: torch.Tensor, capacity: int) -> None:
        self.table = table
        self._make_room(capacity)

    def _make_room(self, capacity: int) -> None:
        device = self.table.device
        # Two calls may be on their way, so each other one writes to the same half.
        self.host = torch.zeros(
            2, 2 * capacity, dtype=torch.int64, pin_memory=device.type == "cuda"
        )
        self.host_words = self.host.numpy()
        self.device = torch.zeros(2 * capacity, dtype=torch.int64, device=device)

    def send(self, half: int, grown: list[tuple[int, int]]) -> None:
        """Add pages to the table.

        Args:
            half: 0 or 1; the call that used it last has been read.
            grown: places in the flattened table, and the pages that go there.
        """
        if not grown:
            return
        count = 2 * len(grown)
        if count > self.host.shape[1]:
            self._make_room(count)
        self.host_words[half, :count] = [place for place, _ in grown] + [page for _, page in grown]
        sent = self.device[:count]
        sent.copy_(self.host[half, :count], non_blocking=True)
        places, pages = sent.view(2, -1)
        self.table.view(-1).index_copy_(0, places, pages.to(self.table.dtype))
