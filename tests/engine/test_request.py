"""Sampling parameters are checked by name, value and limit; requests end where they should."""

import pytest

from qnext.engine.request import Request, SamplingParams
from qnext.engine.text import OutputText


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0.0}, r"top_p is 0.0; want a number in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -2}, "top_k is -2; want an integer, at least -1"),
        ({"min_p": 2}, "min_p is 2"),
        ({"presence_penalty": 3.0}, "presence_penalty is 3.0"),
        ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"max_tokens": 0}, "max_tokens is 0; want an integer, at least 1"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"seed": -1}, "seed is -1"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"stop": ["a", ""]}, "stop holds ''"),
        ({"stop": 5}, "stop is 5; want a list"),
        ({"stop_token_ids": [1, "x"]}, "stop_token_ids is 'x'"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; want a list"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'"),
    ],
)
def test_a_bad_sampling_parameter_is_refused_by_name_and_value(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_one_stop_string_and_many_are_held_alike():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams().stop == ()


def request_of(params: SamplingParams, **options) -> Request:
    defaults = {"request_id": "0", "prompt_token_ids": [1, 2], "seed": 0, "max_total_tokens": 6}
    return Request(params=params, output_text=OutputText(None), **{**defaults, **options})


def append(request: Request, *token_ids: int) -> None:
    for token_id in token_ids:
        request.append_token(token_id, False, now=1.0)


def test_an_end_token_stops_and_stays_in_the_ids():
    request = request_of(SamplingParams(), end_token_ids=frozenset({9}))
    append(request, 5, 9)
    completion = request.output().outputs[0]
    assert completion.finish_reason == "stop"
    assert completion.stop_reason is None
    assert completion.token_ids == [5, 9]


def test_a_stop_token_id_is_named_as_the_reason():
    request = request_of(SamplingParams(stop_token_ids=[7]))
    append(request, 7)
    assert (request.finish_reason, request.stop_reason) == ("stop", 7)


def test_length_ends_an_answer_when_nothing_else_does():
    request = request_of(SamplingParams())
    append(request, 3, 3, 3)
    assert request.finish_reason is None
    append(request, 3)
    assert request.finish_reason == "length"
    assert request.num_remaining == 0


def test_an_output_does_not_change_when_the_request_goes_on():
    request = request_of(SamplingParams())
    append(request, 3)
    early = request.output()
    append(request, 4)
    assert early.outputs[0].token_ids == [3]
    assert not early.finished


def test_metrics_count_tokens_and_time():
    request = request_of(SamplingParams())
    request.metrics.arrival_time = 0.5
    for second in (1.0, 1.5, 2.0):
        request.append_token(3, False, now=second)
    assert request.metrics.time_to_first_token == 0.5
    assert request.metrics.tokens_per_second(now=2.0) == 2.0
    assert request.metrics.acceptance_rate is None


WINDOWS = [[3, 4], [5], [6, 7, 8]]


@pytest.mark.parametrize(
    ("options", "kept", "num_windows", "reason"),
    [
        ({}, 6, 3, None),
        ({"max_total_tokens": 8}, 6, 3, "length"),
        ({"max_total_tokens": 5}, 3, 2, "length"),
        ({"end_token_ids": frozenset({7})}, 5, 3, "stop"),
        ({"stop_token_ids": [4]}, 2, 1, "stop"),
        ({"repetition_penalty": 1.5}, 6, 3, None),
    ],
)
def test_windows_at_once_are_their_tokens_one_by_one(options, kept, num_windows, reason):
    mine = {
        name: options[name] for name in ("max_total_tokens", "end_token_ids") if name in options
    }
    params = SamplingParams(**{name: v for name, v in options.items() if name not in mine})
    together, single = (request_of(params, **{"max_total_tokens": 20, **mine}) for _ in range(2))
    assert together.append_windows(WINDOWS, now=1.0) == num_windows
    append(single, *[token_id for window in WINDOWS for token_id in window][:kept])
    assert together.output() == single.output()
    assert together.token_ids == single.token_ids
    assert together.output_counts == single.output_counts
    assert together.finish_reason == reason
    assert together.metrics == single.metrics
