import math

import pytest
import torch

from qnext import tokenizer as tokenizer_package
from qnext.cli.main import main
from qnext.eval.loss import cut_windows, read_texts, score_texts
from tests.data.corpus import NANO, story, write_jsonl
from tests.train.tiny import tiny_model

TEXTS = [story(1, 40), "a", "", "Grüße an alle, 你好!", story(2, 90)]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_package.load(NANO)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        # Far from uniform, so that mistakes show.
        model.embed_tokens.mul_(20)
    return model


def plain_score(model, tokenizer, texts, context):
    """Bits, bytes, agreeing and compared drafts, one document after another."""
    bits = num_bytes = agreeing = compared = 0
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text)[:context])
        if len(ids) < 2:
            continue
        logits = model.logits(ids)
        log_probs = logits.log_softmax(-1)
        for position in range(1, len(ids)):
            bits -= log_probs[position - 1, ids[position]].item() / math.log(2)
            num_bytes += len(tokenizer.token_bytes(int(ids[position])))
        drafts = model.mtp_logits(ids)[:, 0]
        for position in range(len(ids) - 2):
            compared += 1
            agreeing += int(drafts[position].argmax() == logits[position + 1].argmax())
    return bits, num_bytes, agreeing, compared


@pytest.mark.parametrize("context", [2, 16, 2048])
@pytest.mark.parametrize("max_batch_tokens", [1, 60, 10000])
def test_bits_per_byte_are_those_of_one_document_at_a_time(
    model, tokenizer, context, max_batch_tokens
):
    report = score_texts(
        model,
        tokenizer,
        TEXTS,
        context=context,
        max_batch_tokens=max_batch_tokens,
        with_mtp=True,
    )
    bits, num_bytes, agreeing, compared = plain_score(model, tokenizer, TEXTS, context)
    assert report.num_bytes == num_bytes
    assert report.num_documents == sum(len(tokenizer.encode(text)) > 1 for text in TEXTS)
    assert report.bits_per_byte == pytest.approx(bits / num_bytes, rel=1e-5)
    assert (report.num_agreeing, report.num_drafts) == (agreeing, compared)


def test_all_windows_score_every_token_but_a_documents_first_once(model, tokenizer):
    whole = score_texts(model, tokenizer, TEXTS, context=4096, windows="all")
    first = score_texts(model, tokenizer, TEXTS, context=4096)
    pieces = score_texts(model, tokenizer, TEXTS, context=8, windows="all")
    assert whole == first
    assert pieces.num_tokens == whole.num_tokens
    assert pieces.num_bytes == whole.num_bytes
    assert pieces.num_documents == whole.num_documents
    assert pieces.nats != whole.nats


def test_windows_share_one_token():
    windows = list(cut_windows([range(8), range(1), range(4)], 4, "all"))
    assert windows == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7], [0, 1, 2, 3]]
    assert list(cut_windows([range(8), range(1)], 4, "first")) == [[0, 1, 2, 3]]


def test_bytes_of_a_text_are_all_counted_but_the_first_tokens(model, tokenizer):
    text = "Grüße, 你好, and a smile 🙂"
    report = score_texts(model, tokenizer, [text])
    first = tokenizer.token_bytes(tokenizer.encode(text)[0])
    assert report.num_bytes == len(text.encode()) - len(first)


def test_a_long_document_is_cut_before_it_is_tokenised_with_the_same_result(model, tokenizer):
    text = story(3, 2000)
    ids = tokenizer.encode(text)
    assert len(text) > 16 * 32
    report = score_texts(model, tokenizer, [text], context=32)
    expected = score_texts(model, tokenizer, [tokenizer.decode(ids[:32])], context=32)
    assert report.nats == pytest.approx(expected.nats)
    assert report.num_tokens == 31


def test_special_tokens_in_a_text_are_plain_characters(model, tokenizer):
    report = score_texts(model, tokenizer, ["x<|im_end|>"])
    assert report.num_tokens > 2


def test_nothing_to_score_is_not_a_number(model, tokenizer):
    report = score_texts(model, tokenizer, [""])
    assert math.isnan(report.bits_per_byte)
    assert report.mtp_agreement is None


def test_mistakes_are_named(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="context = 1"):
        score_texts(model, tokenizer, TEXTS, context=1)
    with pytest.raises(ValueError, match="no such file"):
        read_texts(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no documents"):
        read_texts(tmp_path / "empty.jsonl")
    plain = tiny_model(vocab_size=tokenizer.vocab_size)
    plain.mtp = None
    with pytest.raises(ValueError, match="no MTP head"):
        score_texts(plain, tokenizer, TEXTS, with_mtp=True)


def test_a_file_is_read_up_to_a_number_of_documents(tmp_path):
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": str(i)} for i in range(5)])
    assert read_texts(file) == ["0", "1", "2", "3", "4"]
    assert read_texts(file, max_documents=2) == ["0", "1"]


def test_the_command_opens_a_shipped_model_by_name(tmp_path, capsys):
    write_jsonl(tmp_path / "few.jsonl", [{"text": story(0, 40)}])
    command = ["eval", "nano", "--bpb", str(tmp_path / "few.jsonl"), "--context", "64"]
    assert main([*command, "--device", "cpu"]) == 0
    assert "few.jsonl" in capsys.readouterr().out
