"""Random numbers that are a function of (seed, position, purpose) and of nothing else.

So a token's draw depends neither on what else is generated beside it nor on who draws: Python, a
CPU kernel and a GPU kernel get the same bits.

Source: Parallel random numbers: as easy as 1, 2, 3, https://doi.org/10.1145/2063384.2063405
"""

from enum import IntEnum

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


class Purpose(IntEnum):
    """What a random number decides; two purposes never share one."""

    TARGET = 0  # a token from the main model's distribution
    DRAFT = 1  # a token from the draft's distribution
    ACCEPT = 2  # whether a draft is accepted
    RESIDUAL = 3  # the token in a rejected draft's place
    REQUEST_SEED = 4  # the seed of a request that came without one


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10: four random 32-bit words named by a counter and a key of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        first, second = PHILOX_MULTIPLIERS[0] * c0, PHILOX_MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (second >> 32) ^ c1 ^ k0,
            second & _MASK,
            (first >> 32) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + PHILOX_KEY_STEPS[0]) & _MASK, (k1 + PHILOX_KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def random_bits(seed: int, position: int, purpose: Purpose | int) -> int:
    """64 random bits named by three numbers, the same on every machine.

    Args:
        seed: 0 to 2^64 - 1.
        position: place in the sequence of the token that is decided, 0 to 2^32 - 1.
    """
    # Other kinds of integers, NumPy's say, would overflow in silence.
    seed, position = int(seed), int(position)
    words = philox((position, int(purpose), 0, 0), (seed & _MASK, seed >> 32))
    return words[0] << 32 | words[1]


def uniform(seed: int, position: int, purpose: Purpose | int) -> float:
    """A number in [0, 1) with 53 random bits, named like `random_bits`."""
    return (random_bits(seed, position, purpose) >> 11) * 2.0**-53


def request_seed(engine_seed: int, request_idx: int) -> int:
    """Seed of the request_idx-th request that brings none of its own."""
    return random_bits(engine_seed, request_idx, Purpose.REQUEST_SEED)
