import io
import logging

import pytest

from qnext.runtime import log


@pytest.fixture(autouse=True)
def _restore_logging():
    root = logging.getLogger(log.ROOT_NAME)
    saved = root.handlers[:], root.level, root.propagate
    yield
    root.handlers, root.level, root.propagate = saved[0], saved[1], saved[2]


def test_a_message_is_one_line_with_its_level():
    stream = io.StringIO()
    log.setup_logging(stream=stream)
    logger = log.get_logger("qnext.train.loop")
    logger.info("step %d", 3)
    logger.warning("loss is high")
    assert stream.getvalue() == "step 3\nwarning: loss is high\n"


def test_other_ranks_show_only_warnings_and_their_rank():
    stream = io.StringIO()
    log.setup_logging(rank=2, stream=stream)
    logger = log.get_logger("train")
    logger.info("hidden")
    logger.warning("shown")
    assert stream.getvalue() == "[rank 2] warning: shown\n"


def test_setting_up_twice_does_not_print_twice():
    stream = io.StringIO()
    log.setup_logging(stream=stream)
    log.setup_logging(stream=stream)
    log.get_logger("a").info("once")
    assert stream.getvalue() == "once\n"


def test_a_repeated_message_is_logged_once():
    stream = io.StringIO()
    log.setup_logging(stream=stream)
    for _ in range(3):
        log.log_once(log.get_logger("a"), "triton is not installed: unique to this test")
    assert stream.getvalue().count("unique to this test") == 1
