"""The command line answers at once and in one line."""

import os
import subprocess
import sys
import time

import pytest

from qnext.cli.main import COMMANDS, build_parser, describe, main

LIMIT_SECONDS = 0.3


def run_qnext(*arguments):
    command = [sys.executable, "-m", "qnext", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def fastest_seconds(*arguments):
    """Best of several runs: the others measure what else this machine was doing."""
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        run_qnext(*arguments)
        best = min(best, time.perf_counter() - start)
        if best < LIMIT_SECONDS:
            break
    return best


def loaded_modules(*arguments):
    code = (
        "import sys\nfrom qnext.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


def test_help_names_every_command_and_is_quick():
    done = run_qnext("--help")
    assert done.returncode == 0
    for name, summary in COMMANDS.items():
        assert name in done.stdout
        assert summary.split(",")[0].split()[0] in done.stdout
    assert fastest_seconds("--help") < LIMIT_SECONDS


def test_a_mistake_in_the_arguments_is_quick_and_exits_with_2():
    done = run_qnext("doctor", "--no-such-option")
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr
    assert fastest_seconds("doctor", "--no-such-option") < LIMIT_SECONDS


def test_an_unknown_command_is_refused_and_the_known_ones_are_named():
    done = run_qnext("explode")
    assert done.returncode == 2
    assert "explode" in done.stderr
    assert "generate" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_loads_neither_torch_nor_the_model(command):
    loaded = loaded_modules(command, "--help")
    heavy = {"torch", "numba", "transformers", "pyarrow", "tensorboard", "qnext.model"}
    assert loaded & heavy == set()
    assert f"qnext.cli.{command}" in loaded


def test_importing_the_package_loads_no_torch():
    code = "import qnext, sys; print('torch' in sys.modules, qnext.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False 0.")


def test_a_name_the_package_lacks_is_an_attribute_error():
    import qnext

    with pytest.raises(AttributeError, match="Llama"):
        _ = qnext.Llama


def test_only_the_named_command_is_imported():
    others = {f"qnext.cli.{name}" for name in COMMANDS if name != "doctor"}
    assert loaded_modules("doctor", "--help") & others == set()


def test_errors_of_the_user_become_one_line(monkeypatch, capsys):
    import qnext.cli.doctor

    def fail(args):
        raise ValueError("max_tokens is -1; want at least 1")

    monkeypatch.setattr(qnext.cli.doctor, "run", fail)
    assert main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert err == "qnext doctor: error: max_tokens is -1; want at least 1\n"
    with pytest.raises(ValueError, match="max_tokens"):
        main(["--traceback", "doctor"])


def test_errors_of_ours_keep_their_traceback(monkeypatch):
    import qnext.cli.doctor

    def fail(args):
        raise AssertionError("state slot 3 is used twice")

    monkeypatch.setattr(qnext.cli.doctor, "run", fail)
    with pytest.raises(AssertionError, match="slot 3"):
        main(["doctor"])


def test_ctrl_c_exits_with_130(monkeypatch, capsys):
    import qnext.cli.doctor

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(qnext.cli.doctor, "run", interrupt)
    assert main(["doctor"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_file_and_a_missing_package_are_named():
    missing = FileNotFoundError(2, "No such file or directory", "model/config.json")
    assert describe(missing) == "No such file or directory: model/config.json"
    package = ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow.parquet")
    assert "pip install 'qnext[train]'" in describe(package)


def test_only_whole_commands_are_recognised():
    with pytest.raises(SystemExit):
        build_parser(None).parse_args(["gen"])


def test_characters_that_the_terminal_lacks_are_replaced():
    code = (
        "import sys, qnext.cli.doctor\nfrom qnext.cli.main import main\n"
        "qnext.cli.doctor.run = lambda args: print('caf\\u00e9')\nsys.exit(main(['doctor']))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stdout.split()) == (0, [b"caf?"])
