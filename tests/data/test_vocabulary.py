import pytest

from qnext.data.vocabulary import SampleConfig, VocabularyConfig, sample_texts
from tests.data.corpus import write_jsonl


def texts(*samples):
    return list(sample_texts(VocabularyConfig(300, "unused", samples)))


def test_samples_keep_their_limits(tmp_path):
    records = [{"text": f"{i:010d}", "lang": "en" if i % 2 else "de"} for i in range(100)]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    assert len(texts(SampleConfig((file,)))) == 100
    assert len(texts(SampleConfig((file,), max_bytes=105))) == 10
    assert texts(SampleConfig((file,), max_characters=4)) == [f"{i:010d}"[:4] for i in range(100)]
    assert len(texts(SampleConfig((file,), languages=("de",)))) == 50
    some = texts(SampleConfig((file,), share=0.3))
    assert 15 < len(some) < 45
    assert some == texts(SampleConfig((file,), share=0.3))


def test_a_share_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="share 0"):
        SampleConfig(("a",), share=0)
