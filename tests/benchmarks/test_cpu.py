"""The CPU benchmark measures what it says, refuses wrong answers and hides no gap."""

import io
import json

import pytest

from benchmarks import cpu
from benchmarks.contenders import Cell, Contender, Machine, ModelFiles, contenders
from benchmarks.peers import protocol
from benchmarks.peers.process import PeerError
from benchmarks.peers.qnext import KernelTimes
from benchmarks.prompts import decode_prompts, random_ids
from benchmarks.rates import (
    Results,
    Runner,
    Work,
    check_beginnings,
    measure_parity,
    measure_rates,
)
from tests.engine.tiny import greedy, id_prompts, step_by_step, tiny_llm, tiny_model

QNEXT, LLAMA = Contender("qnext", "float32"), Contender("llama_cpp", "float32")


class FakeWorker:
    """Answers with a time for each variant."""

    def __init__(self, seconds=1.0, logits=(0.0, 1.0), fails=False):
        self.seconds, self.logits, self.fails, self.asked = seconds, list(logits), fails, []

    def ask(self, command, **arguments):
        self.asked.append((command, arguments))
        if self.fails:
            raise PeerError("out of memory")
        if command == "logits":
            return {"logits": self.logits}
        seconds = self.seconds
        if callable(seconds):
            seconds = seconds(arguments["variant"])
        return {"seconds": seconds, "total_seconds": seconds, "token_ids": []}


@pytest.fixture
def work(tmp_path):
    tiny_model().save_pretrained(tmp_path / "tiny")
    machine = Machine(1)
    files = ModelFiles(str(tmp_path / "tiny"), tmp_path, machine)
    return Work(files, machine, repeats=2, num_tokens=6, prompt_tokens=4)


def test_rates_are_tokens_over_the_time_of_the_fastest_variant(work):
    fast = {"flash": False, "ubatch": 512}
    runners = [
        Runner(QNEXT, FakeWorker(0.5)),
        Runner(LLAMA, FakeWorker(lambda variant: 1.0 if variant == fast else 4.0)),
    ]
    cells = [Cell("prefill", 8), Cell("decode", 2)]
    found = measure_rates(work, runners, cells, Results())
    values = {each.name: each.values for each in found}
    assert values == {
        "tiny prefill 8, qnext float32": (16.0, 16.0),
        "tiny prefill 8, llama.cpp F32": (8.0, 8.0),
        "tiny decode 2, qnext float32": (24.0, 24.0),
        "tiny decode 2, llama.cpp F32": (12.0, 12.0),
    }
    ours = {each.name: each.baseline for each in found if each.labels["engine"] == "qnext"}
    assert ours["tiny decode 2, qnext float32"] == "tiny decode 2, llama.cpp F32"
    assert "flash False" in next(each.note for each in found if "llama" in each.name)


def test_an_engine_that_fails_is_listed_with_its_reason(work):
    results = Results()
    runners = [Runner(QNEXT, FakeWorker()), Runner(LLAMA, FakeWorker(fails=True))]
    found = measure_rates(work, runners, [Cell("decode", 1)], results)
    assert [each.name for each in found] == ["tiny decode 1, qnext float32"]
    assert [(one.name, one.reason) for one in results.skipped] == [
        ("tiny decode 1, llama.cpp F32", "out of memory")
    ]


def test_wrong_logits_are_not_timed(work):
    right, wrong = FakeWorker(logits=(0.0, 1.0, 2.0)), FakeWorker(logits=(0.0, 1.0, 2.01))
    results = Results()
    reference = measure_parity(work, [Runner(QNEXT, right), Runner(LLAMA, right)], None, results)
    assert reference == [0.0, 1.0, 2.0]
    assert [each.values for each in results.measurements] == [(0.0,)]
    with pytest.raises(ValueError, match=r"llama\.cpp F32 differ"):
        measure_parity(work, [Runner(LLAMA, wrong)], reference, results)
    narrow = Runner(Contender("llama_cpp", "int8"), wrong)
    measure_parity(work, [narrow], reference, results)
    assert results.measurements[-1].values[0] == pytest.approx(0.01 / (2 / 3) ** 0.5)


def test_an_engine_that_writes_other_text_is_not_timed(work):
    ours, same, other = (Runner(who, FakeWorker()) for who in (QNEXT, LLAMA, LLAMA))
    cell = Cell("decode", 2)
    ours.written[cell] = [[1, 2, 3], [4, 5, 6]]
    same.written[cell] = [[1, 2, 3], [4, 5, 0]]  # one near tie is no fault
    other.written[cell] = [[1, 2, 0], [4, 5, 0]]
    check_beginnings([ours, same])
    with pytest.raises(ValueError, match=r"llama\.cpp F32 writes as qnext does in 0 of 2"):
        check_beginnings([ours, other])


def test_only_widths_that_an_engine_has_are_contenders():
    names = [
        each.name for each in contenders(("qnext", "transformers", "llama_cpp"), ("int8", "q4"))
    ]
    assert names == ["qnext int8", "llama.cpp Q8_0", "llama.cpp Q4_K_M"]


@pytest.mark.parametrize("text", ["decode", "decode-0", "decode-x", "prefil-8", "memory"])
def test_other_texts_are_no_cell(text):
    assert Cell.parse(text) is None


def test_a_cell_is_a_kind_and_a_size():
    assert Cell.parse("prefill-2048") == Cell("prefill", 2048)
    with pytest.raises(SystemExit):
        cpu.parse_arguments(["--cells", "decode-"])


def test_prompts_are_equally_long_and_all_different():
    letters = decode_prompts(8, 300, 256, lambda text: list(text.encode()))
    ids = decode_prompts(3, 5, 96, None)
    assert {len(prompt) for prompt in letters} == {300}
    assert {len(prompt) for prompt in ids} == {5}
    assert len({tuple(prompt) for prompt in letters}) == 8
    assert len({tuple(prompt) for prompt in ids}) == 3
    assert random_ids(7, 96) == random_ids(7, 96)


def test_kernel_times_tell_windows_from_drafts_and_leave_nothing_behind():
    from qnext.kernels.decode_step import numba

    before = numba.run_step
    times = KernelTimes()
    llm = step_by_step(tiny_llm(num_speculative_tokens=2))
    llm.generate(id_prompts(5), greedy(8))
    times.remove()
    assert numba.run_step is before
    assert len(times.times["draft"]) > 1
    assert len(times.times["window"]) > 1
    assert 0 < times.median("draft") < 1


def test_a_worker_answers_each_line_and_says_what_it_cannot(monkeypatch):
    class Echo:
        info = {"echo": "1.0"}

        def prefill(self, prompt, variant):
            raise protocol.Unsupported("no prompts today")

        def decode(self, prompts, num_tokens, variant):
            return 2.0, 1.0, prompts

    answers = io.StringIO()
    lines = [
        {"model": "any"},
        {"do": "decode", "prompts": [[1]], "num_tokens": 1},
        {"do": "prefill", "prompt": [1]},
        {"do": "extra"},
        {"do": "memory"},
    ]
    monkeypatch.setattr(protocol, "_claim_stdout", lambda: answers)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, lines))))
    protocol.serve(lambda job: Echo(), {"extra": lambda peer, command: {"own": True}})
    opened, decoded, refused, extra, memory = map(json.loads, answers.getvalue().splitlines())
    assert opened["info"] == {"echo": "1.0"}
    assert decoded == {"total_seconds": 2.0, "seconds": 1.0, "token_ids": [[1]]}
    assert refused == {"unsupported": "no prompts today"}
    assert extra == {"own": True}
    assert memory["peak_bytes"] > 1 << 20


def test_a_missing_engine_is_skipped_with_the_reason(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "tiny")
    options = "--engines llama_cpp --widths float32 --cells decode-1 start --repeats 1".split()
    python = str(tmp_path / "no-python")
    cpu.main(["--models", str(tmp_path / "tiny"), *options, "--llama-python", python])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["measurements"] == []
    assert [one["name"] for one in record["skipped"]] == [
        "tiny, llama.cpp F32",
        "tiny start, llama.cpp BF16",
    ]


def test_this_package_is_measured_from_command_line_to_file(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "tiny")
    options = "--engines qnext --widths float32 --cells prefill-8 decode-2 memory --repeats 2"
    cpu.main(
        ["--models", str(tmp_path / "tiny"), *options.split(), "--tokens", "3", "--prompt-tokens"]
        + ["4", "--json", str(tmp_path / "cpu.json")]
    )
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record == json.loads((tmp_path / "cpu.json").read_text())
    assert record["skipped"] == []
    found = {each["name"]: each for each in record["measurements"]}
    assert list(found) == [
        "tiny prefill 8, qnext float32",
        "tiny decode 2, qnext float32",
        "tiny peak memory, qnext float32",
    ]
    assert len(found["tiny decode 2, qnext float32"]["values"]) == 2
    assert found["tiny decode 2, qnext float32"]["labels"]["cell"] == "decode 2"
    assert found["tiny peak memory, qnext float32"]["values"][0] > 50
