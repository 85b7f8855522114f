import pytest

from qnext import tokenizer as tokenizer_package
from qnext.tokenizer.bpe import FAMILY_SPECIAL_TOKENS, byte_of_character, save_trained, train_bpe

TEXTS = ["the cat sat on the mat with the other cat, " * 5, "Zahlen 123 und 4567, naïve café " * 5]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    trained = train_bpe(TEXTS, 300)
    save_trained(trained, folder, chat_template="{{ messages[0].content }}")
    return tokenizer_package.load(folder)


def test_the_vocabulary_has_the_size_asked_for_and_the_special_tokens_last(small):
    assert small.vocab_size == 300
    ids = [small.token_id(text) for text, _ in FAMILY_SPECIAL_TOKENS]
    assert ids == list(range(300 - len(ids), 300))
    assert small.eos_token_ids == (small.token_id("<|im_end|>"), small.token_id("<|endoftext|>"))


def test_digits_stay_single_and_any_text_comes_back(small):
    ids = small.encode("4567123")
    assert [small.decode([idx]) for idx in ids] == list("4567123")
    for text in ("", " ", "\n\n x", "naïve 平方 😀\t\x00", "a\r\nb   c"):
        assert small.decode(small.encode(text)) == text


def test_every_byte_has_its_own_character():
    table = byte_of_character()
    assert sorted(table.values()) == list(range(256))


def test_special_tokens_in_documents_can_stay_plain_text(small):
    end = small.token_id("<|im_end|>")
    assert end in small.encode("a<|im_end|>")
    (plain,) = small.encode_batch(["a<|im_end|>"], use_special_tokens=False)
    assert end not in plain
    assert small.decode(plain) == "a<|im_end|>"


def test_training_is_deterministic():
    assert train_bpe(TEXTS, 300).to_str() == train_bpe(TEXTS, 300).to_str()


def test_a_vocabulary_without_room_or_text_is_refused():
    with pytest.raises(ValueError, match="vocab_size 200 is below 266"):
        train_bpe(TEXTS, 200)
    with pytest.raises(ValueError, match="vocab_size 5000 needs more text"):
        train_bpe(TEXTS, 5000)


def test_transformers_opens_what_we_save(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_trained(train_bpe(TEXTS, 300), tmp_path, chat_template="{{ messages[0].content }}!")
    peer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = "the cat 平方 <|im_end|> 12"
    assert peer.encode(text, add_special_tokens=False) == small.encode(text)
    assert peer.eos_token == "<|im_end|>"
    assert peer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x!"
