"""A stand-in for the model whose distributions are tables, so that the exact ones are known."""

import itertools

import numpy as np
import torch
from scipy import stats

from qnext.engine.request import SamplingParams
from qnext.engine.sampler import cuts_of, penalized_logits
from qnext.kernels.decide_token.reference import token_weights
from tests.engine.tiny import tiny_config


class MarkovModel:
    """The next token depends on the last one alone; the drafts follow a table of their own.

    Rows of "hidden states" are one-hot: the first W columns pick a row of the target's table, the
    last W one of the draft's.
    """

    has_mtp = True
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, vocab_size: int, seed: int = 0, contrast: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.config = tiny_config(vocab_size)
        shape = (vocab_size, vocab_size)
        self.target = contrast * torch.randn(shape, generator=generator)
        self.draft = contrast * torch.randn(shape, generator=generator)

    def named_parameters(self):
        return iter(())

    def __call__(self, batch, cache):
        return torch.nn.functional.one_hot(batch.token_ids, 2 * self.config.vocab_size).float()

    def mtp_step(self, next_token_ids, hidden, batch, cache):
        return self(batch, cache).roll(self.config.vocab_size, dims=-1)

    def compute_logits(self, hidden, *, row_stable=False):
        return hidden @ torch.cat([self.target, self.draft])


def exact_distribution(
    model: MarkovModel, prompt: list[int], params: SamplingParams, num_tokens: int
) -> dict[tuple[int, ...], float]:
    """Probability of every answer of num_tokens tokens."""
    found = {}
    for answer in itertools.product(range(model.config.vocab_size), repeat=num_tokens):
        probability = 1.0
        for idx, token_id in enumerate(answer):
            last = (prompt + list(answer))[len(prompt) + idx - 1]
            counts = {i: answer[:idx].count(i) for i in answer[:idx]}
            row = penalized_logits(
                model.target[last].numpy(), params, frozenset(prompt), counts, []
            )
            weights = token_weights(row, cuts_of(params))
            probability *= weights[token_id] / weights.sum()
        if probability > 0:
            found[answer] = probability
    return found


def chi_square_p_value(
    answers: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]
) -> float:
    """How likely counts this far from the expected ones are; 0 for an answer that can't happen."""
    if any(answer not in expected for answer in answers):
        return 0.0
    total = len(answers)
    observed, wanted, rest = [], [], [0.0, 0.0]
    for answer, probability in expected.items():
        count = answers.count(answer)
        if probability * total >= 5:
            observed.append(count)
            wanted.append(probability * total)
        else:  # too rare for the approximation: pooled
            rest[0] += count
            rest[1] += probability * total
    if rest[1] >= 5:
        observed.append(rest[0])
        wanted.append(rest[1])
    observed_array, wanted_array = np.array(observed, float), np.array(wanted)
    statistic = ((observed_array - wanted_array) ** 2 / wanted_array).sum()
    return float(stats.chi2.sf(statistic, len(observed) - 1))
