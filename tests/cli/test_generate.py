"""`qnext generate` and `qnext chat` in a pipe, in a terminal, and under Ctrl-C."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from qnext.cli.main import main
from qnext.cli.stream_view import status_text
from qnext.engine.metrics import RequestMetrics

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the fox ran over the hill and the dog ran after the fox until the night came over them. "


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from qnext.tokenizer.bpe import save_trained, train_bpe
    from tests.engine.tiny import tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(vocab_size=288).save_pretrained(folder)
    save_trained(train_bpe([WORDS * 20], 288), folder, chat_template=TEMPLATE)
    return folder


def run_main(*arguments):
    return main([str(argument) for argument in arguments])


def test_a_pipe_gets_the_text_alone(checkpoint, capsys):
    arguments = ["generate", "the fox", "--model", checkpoint, "--max-tokens", 12]
    assert run_main(*arguments, "--temperature", 0, "--show-accepted") == 0
    text = capsys.readouterr().out
    assert text.endswith("\n")
    assert "\x1b" not in text
    assert "tokens/s" not in text
    assert run_main(*arguments, "--temperature", 0, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] + "\n" == text
    assert record["num_generated_tokens"] == len(record["token_ids"]) == 12
    assert record["finish_reason"] == "length"


def test_the_prompt_may_come_from_standard_input(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the dog ran"))
    assert run_main("generate", "-", "--model", checkpoint, "--max-tokens", 3, "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "the dog ran"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "2"], "top_p is 2.0"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--model", "no-such-folder"], "no-such-folder"),
        (["--dtype", "int7"], "dtype is 'int7'; want auto, int8, fp8, float32"),
        (["--device", "gpu"], "device is 'gpu'; want auto, cpu"),
        (["--num-threads", "0"], "--num-threads: 0 is too small; want at least 1"),
        (["--num-threads", "two"], "--num-threads: invalid integer value: 'two'"),
        (["--max-model-len", "1"], "--max-model-len: 1 is too small; want at least 2"),
        (["--num-speculative-tokens", "99"], "num_speculative_tokens is 99"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "hi"], ["chat"]])
def test_a_mistake_is_one_line_and_needs_no_torch(command, arguments, message):
    code = (
        "import sys\nfrom qnext.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as error:\n    code = error.code\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_chat_in_a_pipe_answers_each_line(checkpoint, capsys, monkeypatch):
    lines = "the fox\n\n/new\nthe dog\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    options = ["--max-tokens", 4, "--system", "Be brief.", "--ignore-eos", "--stop", "\n"]
    assert run_main("chat", "--model", checkpoint, *options) == 0
    # Random text may hold characters that splitlines() takes for the end of a line too.
    assert capsys.readouterr().out.count("\n") == 2


def heed_ctrl_c():
    """Undo what a shell does to background jobs: a CI may have started us with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def in_terminal(*arguments):
    """Start a command on a terminal of its own. Returns (process, our end of it)."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "qnext", *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "60", "LINES": "20"},
        preexec_fn=heed_ctrl_c,
    )
    os.close(theirs)
    return process, ours


def read_until(ours, mark: str, seconds: float = 20.0) -> str:
    """Screen output up to `mark`, or to its end."""
    shown, deadline = b"", time.monotonic() + seconds
    while mark.encode() not in shown and time.monotonic() < deadline:
        if not select.select([ours], [], [], 0.5)[0]:
            continue
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        shown += part
    return shown.decode(errors="replace")


def test_a_terminal_gets_a_status_line_and_ctrl_c_stops_cleanly(checkpoint):
    process, ours = in_terminal(
        "generate", "the fox", "--model", checkpoint, "--max-tokens", 480, "--ignore-eos",
        "--num-speculative-tokens", 2, "--show-accepted", "--temperature", 0,
    )  # fmt: skip
    shown = read_until(ours, "drafts accepted")
    shown += read_until(ours, "\x1b[32m")
    assert "tokens/s" in shown
    process.send_signal(signal.SIGINT)
    shown += read_until(ours, "no such mark")
    assert process.wait(timeout=30) == 130
    assert "Traceback" not in shown
    assert "\x1b[32m" in shown, "accepted drafts are tinted"


def test_chatting_in_a_terminal_ctrl_c_stops_the_answer_then_the_chat(checkpoint):
    process, ours = in_terminal(
        "chat", "--model", checkpoint, "--max-tokens", 480, "--ignore-eos", "--temperature", 0
    )
    assert "Commands:" in read_until(ours, "> ")
    os.write(ours, b"the fox\n")
    read_until(ours, "tokens/s")
    process.send_signal(signal.SIGINT)
    read_until(ours, "\n> ")
    assert process.poll() is None, "the chat goes on"
    # Python loses a signal that falls between showing the prompt and waiting for input.
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    rest = read_until(ours, "no such mark", seconds=10.0)
    assert process.wait(timeout=10) == 130
    assert "Traceback" not in rest


def test_ctrl_c_in_a_pipe_gives_130_and_no_traceback(checkpoint):
    command = [sys.executable, "-m", "qnext", "generate", "the fox", "--model", str(checkpoint)]
    process = subprocess.Popen(
        [*command, "--max-tokens", "480", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_the_status_names_speed_and_drafts():
    metrics = RequestMetrics(
        first_token_time=0.0,
        finished_time=2.0,
        num_generated_tokens=21,
        num_windows=10,
        num_draft_tokens=20,
        num_accepted_tokens=10,
    )
    assert status_text(metrics) == (
        "21 tokens · 10.0 tokens/s · drafts accepted 10 of 20 (50%) · 2.00 tokens a step"
    )
    assert status_text(RequestMetrics(num_generated_tokens=1)) == "1 tokens"
