"""What the sampling kernels read and write on the device, as named records."""

from dataclasses import dataclass

import torch

CHUNK = 4096  # logits of one program; part of the result's definition, so never tuned per batch
SUB = 128  # logits that share one bound
MAX_CANDIDATES = 8192  # of a row; more are searched in the row itself
MAX_VOCAB_SIZE = 2**18  # a row's mass stays below 2^62


@dataclass(frozen=True)
class SamplingFields:
    """How the tokens of N sequences are chosen. Every field is a device tensor [N]."""

    temperature: torch.Tensor  # fp32; below 1e-5 takes the largest logit
    top_k: torch.Tensor  # int32; 0 or less: off
    top_p: torch.Tensor  # fp32 in (0, 1]; 1: off
    min_p: torch.Tensor  # fp32 in [0, 1]; 0: off
    seed: torch.Tensor  # int64, the bits of an unsigned number
    position: torch.Tensor  # int32, of the token that the sequence's first row decides


@dataclass(frozen=True)
class SampledRows:
    """Tokens drawn from T rows, and the distributions they were drawn from.

    A row's cut is four int64: the bits of the largest logit (fp32); the order key of the least
    logit kept; the last id kept among logits equal to it; the mass kept, in units of 2^-43.
    Together with the logits and the temperature it is the whole distribution.
    """

    tokens: torch.Tensor  # [T], int64
    logprobs: torch.Tensor  # [T], fp32: of the token, under the transformed distribution
    cuts: torch.Tensor  # [T, 4], int64; rows may be strided

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> "SampledRows":
        """Room for the rows, not written yet."""
        return cls(
            torch.empty(num_rows, dtype=torch.int64, device=device),
            torch.empty(num_rows, dtype=torch.float32, device=device),
            torch.empty(num_rows, 4, dtype=torch.int64, device=device),
        )


@dataclass(frozen=True)
class SampleWorkspace:
    """Scratch memory of up to num_rows rows; one stream at a time may use it.

    The counters are zero between calls: the last program of a row sets them back.
    """

    chunk_max: torch.Tensor  # [T, chunks], fp32
    chunk_id: torch.Tensor  # [T, chunks], int32: lowest id of the chunk's maximum
    chunk_mass: torch.Tensor  # [T, chunks], int64
    sub_max: torch.Tensor  # [T, chunks * CHUNK / SUB], fp32
    sub_mass: torch.Tensor  # [T, chunks * CHUNK / SUB], fp32
    plan: torch.Tensor  # [T, 2], int64: order key that every kept logit reaches; mass of the row
    counters: torch.Tensor  # [2, T], int32: programs done, candidates
    candidate_x: torch.Tensor  # [T, MAX_CANDIDATES], fp32
    candidate_id: torch.Tensor  # [T, MAX_CANDIDATES], int32

    @classmethod
    def allocate(cls, num_rows: int, vocab_size: int, device: torch.device) -> "SampleWorkspace":
        """Room for calls with up to num_rows rows of this vocabulary."""
        num_chunks = -(-vocab_size // CHUNK)
        num_subs = num_chunks * (CHUNK // SUB)

        def room(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(num_rows, width, dtype=dtype, device=device)

        return cls(
            chunk_max=room(num_chunks, torch.float32),
            chunk_id=room(num_chunks, torch.int32),
            chunk_mass=room(num_chunks, torch.int64),
            sub_max=room(num_subs, torch.float32),
            sub_mass=room(num_subs, torch.float32),
            plan=room(2, torch.int64),
            counters=torch.zeros(2, num_rows, dtype=torch.int32, device=device),
            candidate_x=room(MAX_CANDIDATES, torch.float32),
            candidate_id=room(MAX_CANDIDATES, torch.int32),
        )


@dataclass(frozen=True)
class Window:
    """Drafts of N sequences, each up to Q - 1, to be verified in one step."""

    tokens: torch.Tensor  # [N, Q - 1], int64
    query_lens: torch.Tensor  # [N], int32: drafts + 1; 0 for a sequence that is not there
    logits: torch.Tensor | None = None  # [N, Q - 1, W], fp32; None: the drafts are certain guesses
    cuts: torch.Tensor | None = None  # [N, Q - 1, 4], int64, as `SampledRows.cuts`


@dataclass(frozen=True)
class PenaltyFields:
    """Penalties of N sequences. Every field is fp32 [N]."""

    repetition: torch.Tensor  # 1: off
    presence: torch.Tensor  # 0: off
    frequency: torch.Tensor  # 0: off


@dataclass(frozen=True)
class TokenCounts:
    """Which tokens each slot has seen: a count that is looked up, and a list that is walked."""

    packed: torch.Tensor  # [slots, W], int32: 2 * times in the answer + whether in the prompt
    ids: torch.Tensor  # [slots, W], int32: each seen token once, in no order
    num_ids: torch.Tensor  # [slots], int32

    @classmethod
    def allocate(cls, num_slots: int, vocab_size: int, device: torch.device) -> "TokenCounts":
        """Counts of empty slots."""
        return cls(
            torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device),
            torch.empty(num_slots, vocab_size, dtype=torch.int32, device=device),
            torch.zeros(num_slots, dtype=torch.int32, device=device),
        )
