"""The chart shows every engine of a record, at widths that can be compared."""

from xml.etree import ElementTree

import pytest

from benchmarks.cpu_chart import draw

NAMESPACE = "{http://www.w3.org/2000/svg}"


def measurement(cell, engine, width, *values):
    labels = {"model": "nano", "cell": cell, "engine": engine, "width": width}
    return {"name": f"{cell} {engine} {width}", "values": list(values), "labels": labels}


def record(*measurements):
    return {
        "cpu": "a CPU",
        "num_threads": 2,
        "peers": {"llama.cpp": "0c1e570"},
        "measurements": list(measurements),
    }


def test_bars_carry_medians_and_only_comparable_widths():
    drawing = draw(
        record(
            measurement("decode 1", "qnext", "int8", 2100.0, 2000.0, 9000.0),
            measurement("decode 1", "llama_cpp", "int8", 1189.0),
            measurement("decode 1", "llama_cpp", "q4", 1172.0),
            measurement("prefill 512", "qnext", "int8", 7777.0),
            measurement("peak memory", "qnext", "int8", 300.0),
        )
    )
    root = ElementTree.fromstring(drawing.render())
    texts = [element.text for element in root.iter(f"{NAMESPACE}text")]
    for shown in ("nano", "decode 1", "prefill 512", "2,100", "1,189", "7,777"):
        assert shown in texts
    for hidden in ("1,172", "300", "peak memory"):
        assert hidden not in texts
    assert "a CPU, 2 threads; llama.cpp 0c1e570" in texts


def test_every_element_lies_on_the_page():
    drawing = draw(record(measurement("decode 8", "transformers", "float32", 10.0, 12.0)))
    for element in ElementTree.fromstring(drawing.render()).iter(f"{NAMESPACE}rect"):
        right = float(element.get("x", 0)) + float(element.get("width", 0))
        bottom = float(element.get("y", 0)) + float(element.get("height", 0))
        assert right <= drawing.width
        assert bottom <= drawing.height


def test_a_record_without_rates_is_refused():
    with pytest.raises(ValueError, match="no rates"):
        draw(record(measurement("peak memory", "qnext", "int8", 300.0)))
