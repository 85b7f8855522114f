"""Draw the figures of the docs: `python docs/figures/draw.py` writes stack, router and mtp .svg."""

import sys
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

import svg as s  # noqa: E402  (beside this file, which is no package)

NUM_BLOCKS = 12
TOWER_X, TOWER_WIDTH = 84, 190
BAR, BAR_GAP, BLOCK_GAP = 10, 2, 5
TOWER_TOP = 216


def draw_stack() -> s.Drawing:
    """The 48 layers as a tower, one block of four enlarged, and the inside of both mixers."""
    drawing = s.Drawing(1180, 960, "The 48-layer stack of Qwen3-Next-80B-A3B")
    drawing.text(40, 50, "Qwen3-Next-80B-A3B, the whole stack", size=22, weight=700)
    drawing.text(
        40,
        74,
        "48 layers = 12 blocks of three Gated DeltaNet layers and one Gated Attention layer; "
        "each layer ends in a mixture of 512 experts, 10 of them at work.",
        fill=s.SOFT,
    )
    zoom_top, zoom_bottom = _tower(drawing)
    _block(drawing, zoom_top, zoom_bottom)
    _mtp_note(drawing)
    _delta_card(drawing, 728, 104)
    _attention_card(drawing, 728, 558)
    return drawing


def _tower(drawing: s.Drawing) -> tuple[float, float]:
    """Draw head, 48 layers and embedding; return the upper and lower edge of the enlarged block."""
    x, width = TOWER_X, TOWER_WIDTH
    drawing.box(x, 108, width, 36, "LM head", note="2,048 → 151,936")
    drawing.box(x, 164, width, 28, "final RMSNorm")
    drawing.arrow((x + width / 2, 164), (x + width / 2, 145))
    drawing.arrow((x + width / 2, TOWER_TOP - 4), (x + width / 2, 193))
    block_height = 4 * (BAR + BAR_GAP) + BLOCK_GAP
    zoom = (0.0, 0.0)
    for row in range(NUM_BLOCKS):
        block = NUM_BLOCKS - 1 - row
        top = TOWER_TOP + row * block_height
        for place in range(4):
            layer = 4 * block + 3 - place
            y = top + place * (BAR + BAR_GAP)
            fill, stroke, _ = s.ATTENTION if place == 0 else s.DELTA
            drawing.rect(x, y, width * 0.58, BAR, fill=fill, stroke=stroke, radius=2)
            fill, stroke, _ = s.EXPERTS
            drawing.rect(x + width * 0.6, y, width * 0.4, BAR, fill=fill, stroke=stroke, radius=2)
            if place == 0:
                drawing.text(x - 10, y + 9, str(layer), size=11, fill=s.SOFT, anchor="end")
        if block == 5:
            zoom = (top - 3, top + 4 * (BAR + BAR_GAP) + 1)
            drawing.rect(
                x - 4, zoom[0], width + 8, zoom[1] - zoom[0], fill="none", stroke=s.INK, radius=4
            )
    bottom = TOWER_TOP + NUM_BLOCKS * block_height
    drawing.text(x - 10, bottom - 9, "0", size=11, fill=s.SOFT, anchor="end")
    drawing.text(x - 10, TOWER_TOP - 8, "layer", size=11, fill=s.SOFT, anchor="end")
    drawing.arrow((x + width / 2, bottom + 22), (x + width / 2, bottom + 1))
    drawing.box(x, bottom + 23, width, 36, "Embedding", note="151,936 × 2,048")
    drawing.text(x + width / 2, bottom + 80, "token ids", fill=s.SOFT, anchor="middle", size=12)
    return zoom


def _block(drawing: s.Drawing, zoom_top: float, zoom_bottom: float) -> None:
    """One block of four layers at reading size, tied to its place in the tower."""
    x, y, width, height = 352.0, 300.0, 318.0, 470.0
    edge = TOWER_X + TOWER_WIDTH + 4
    drawing.path(
        f"M{edge} {zoom_top}L{x} {y}V{y + height}L{edge} {zoom_bottom}Z",
        fill="#efede6",
        stroke="none",
        opacity=0.75,
    )
    drawing.rect(x, y, width, height, radius=10)
    drawing.text(x + 18, y + 28, "One block: layers 4n to 4n+3", size=15, weight=700)
    spine = x + 34
    mixers = [("Gated Attention", s.ATTENTION), *[("Gated DeltaNet", s.DELTA)] * 3]
    boxes = [pair for mixer in mixers for pair in (("mixture, 10 of 512 + 1", s.EXPERTS), mixer)]
    bottom = y + height - 46
    drawing.arrow((spine, bottom), (spine, y + 46))
    for place, (label, style) in enumerate(boxes):
        top = y + 58 + place * 45 + (place // 2) * 2
        drawing.box(x + 88, top, 206, 32, label, style)
        drawing.arrow((spine, top + 25), (x + 87, top + 25))
        drawing.arrow((x + 88, top + 7), (spine + 8, top + 7))
        drawing.plus(spine, top + 7, 7)
    drawing.text(x + 18, y + height - 26, "each branch starts with an RMSNorm of its own:", size=12)
    drawing.text(x + 18, y + height - 10, "x += mixer(norm(x));  x += mixture(norm(x))", size=11)


def _mtp_note(drawing: s.Drawing) -> None:
    """The drafting head beside the final norm."""
    x, y = 352.0, 104.0
    drawing.rect(x, y, 318, 172, radius=10)
    drawing.text(x + 18, y + 28, "Multi-Token Prediction head", size=15, weight=700)
    drawing.box(x + 18, y + 44, 282, 30, "one Gated Attention layer + mixture", s.MTP)
    lines = [
        "Reads the trunk's state after the final norm",
        "and the embedding of the next token; drafts",
        "the one after. Embedding and LM head are",
        "shared. Run k times, it drafts k tokens.",
    ]
    for row, line in enumerate(lines):
        drawing.text(x + 18, y + 99 + 18 * row, line, size=12)
    drawing.arrow((TOWER_X + TOWER_WIDTH, 178), (x - 1, 178))


def _delta_card(drawing: s.Drawing, x: float, y: float) -> None:
    drawing.rect(x, y, 412, 432, radius=10)
    drawing.rect(x, y, 412, 6, fill=s.DELTA[1], stroke=s.DELTA[1], radius=3)
    drawing.text(x + 20, y + 36, "Gated DeltaNet", size=16, weight=700, fill=s.DELTA[2])
    drawing.text(x + 392, y + 36, "36 of 48 layers", size=12, fill=s.SOFT, anchor="end")
    columns = [(x + 20, 176, "q · k · v"), (x + 212, 84, "b · a"), (x + 312, 80, "z")]
    drawing.box(x + 20, y + 54, 372, 28, "in_proj: one matrix product for all")
    for left, width, label in columns:
        drawing.text(left + width / 2 + 8, y + 101, label, size=12, mono=True, anchor="start")
        if label != "z":
            drawing.arrow((left + width / 2, y + 82), (left + width / 2, y + 109))
    drawing.box(
        x + 20,
        y + 110,
        176,
        44,
        "causal conv, width 4",
        s.DELTA,
        note="SiLU; then q, k to length 1",
    )
    drawing.box(x + 212, y + 110, 84, 44, "gates", s.DELTA, note="β and g ≤ 0")
    drawing.arrow((x + 108, y + 154), (x + 108, y + 175))
    drawing.arrow((x + 254, y + 154), (x + 254, y + 175))
    drawing.rect(x + 20, y + 176, 276, 116, fill=s.DELTA[0], stroke=s.DELTA[1])
    drawing.text(x + 158, y + 199, "delta rule, in fp32", weight=600, anchor="middle")
    for row, line in enumerate(["S ← e^g · S", "d = β · (v − Sᵀk)", "S ← S + k dᵀ"]):
        drawing.text(x + 44, y + 223 + 20 * row, line, size=13, mono=True, fill=s.DELTA[2])
    drawing.text(x + 196, y + 263, "o = Sᵀq", size=13, mono=True, fill=s.DELTA[2])
    drawing.text(
        x + 158, y + 284, "32 heads, S is 128 × 128", size=11, fill=s.DELTA[2], anchor="middle"
    )
    drawing.arrow((x + 158, y + 292), (x + 158, y + 313))
    drawing.path(f"M{x + 352} {y + 82}V{y + 332}H{x + 297}", arrow=True)
    drawing.box(x + 20, y + 314, 276, 36, "RMSNorm(o) · silu(z)")
    drawing.arrow((x + 158, y + 350), (x + 158, y + 367))
    drawing.box(x + 20, y + 368, 276, 28, "out_proj")
    drawing.text(
        x + 20, y + 418, "Memory per sequence: 2 MiB a layer, whatever its length.", size=12
    )


def _attention_card(drawing: s.Drawing, x: float, y: float) -> None:
    drawing.rect(x, y, 412, 366, radius=10)
    drawing.rect(x, y, 412, 6, fill=s.ATTENTION[1], stroke=s.ATTENTION[1], radius=3)
    drawing.text(x + 20, y + 36, "Gated Attention", size=16, weight=700, fill=s.ATTENTION[2])
    drawing.text(x + 392, y + 36, "12 of 48 layers", size=12, fill=s.SOFT, anchor="end")
    drawing.box(x + 20, y + 54, 372, 28, "qkv_proj: one matrix product for all")
    for left, width, label in [
        (x + 20, 190, "q · k"),
        (x + 226, 70, "v"),
        (x + 312, 80, "gate"),
    ]:
        drawing.text(left + width / 2 + 8, y + 101, label, size=12, mono=True)
    drawing.arrow((x + 115, y + 82), (x + 115, y + 109))
    drawing.box(
        x + 20, y + 110, 190, 44, "RMSNorm per head", s.ATTENTION, note="RoPE on 64 of 256 dims"
    )
    drawing.arrow((x + 115, y + 154), (x + 115, y + 175))
    drawing.path(f"M{x + 261} {y + 82}V{y + 175}", arrow=True)
    drawing.box(
        x + 20,
        y + 176,
        276,
        58,
        "causal softmax attention",
        s.ATTENTION,
        note="16 query heads share 2 key-value heads",
    )
    drawing.arrow((x + 158, y + 234), (x + 158, y + 255))
    drawing.path(f"M{x + 352} {y + 82}V{y + 273}H{x + 297}", arrow=True)
    drawing.box(x + 20, y + 256, 276, 34, "out · sigmoid(gate)")
    drawing.arrow((x + 158, y + 290), (x + 158, y + 307))
    drawing.box(x + 20, y + 308, 276, 28, "o_proj")
    drawing.text(x + 20, y + 355, "Memory per token: 2 KiB a layer in bfloat16.", size=12)


# Ten experts of one token: cell of the 16 x 32 grid, and weight after renormalisation.
CHOSEN = {
    (2, 5): 0.21,
    (11, 3): 0.17,
    (5, 22): 0.13,
    (14, 29): 0.11,
    (8, 14): 0.10,
    (0, 18): 0.08,
    (12, 11): 0.07,
    (3, 30): 0.05,
    (9, 25): 0.04,
    (6, 1): 0.04,
}


def draw_router() -> s.Drawing:
    """One token through the router: 512 probabilities, ten experts, the shared one, the sum."""
    drawing = s.Drawing(1180, 560, "The router of one mixture-of-experts layer")
    drawing.text(40, 50, "One token through the router", size=22, weight=700)
    drawing.text(
        40,
        74,
        "512 small experts per layer, ten chosen per token and layer, one shared by all tokens: "
        "1.6 billion weights per layer, 36 million used.",
        fill=s.SOFT,
    )
    drawing.box(40, 250, 110, 52, "x", note="2,048 numbers", size=14)
    drawing.arrow((150, 276), (189, 276))
    drawing.box(190, 236, 140, 80, "router", s.EXPERTS, size=15, note="softmax in fp32")
    drawing.text(260, 336, "512 × 2,048", size=11, fill=s.SOFT, anchor="middle")
    drawing.arrow((330, 276), (379, 276))
    _expert_grid(drawing, 380, 112)
    _weight_bars(drawing, 792, 112)
    _shared_expert(drawing)
    return drawing


def _expert_grid(drawing: s.Drawing, x: float, y: float) -> None:
    cell, gap = 9.0, 2.0
    pitch = cell + gap
    drawing.rect(x, y, 32 * pitch + 24, 16 * pitch + 56, radius=10)
    drawing.text(x + 14, y + 24, "512 experts, 10 chosen", weight=600)
    for row in range(16):
        for column in range(32):
            left, top = x + 13 + column * pitch, y + 38 + row * pitch
            weight = CHOSEN.get((row, column))
            if weight is None:
                drawing.rect(left, top, cell, cell, fill="#f0efea", stroke="#e4e2dc", radius=2)
            else:
                drawing.rect(
                    left - 1,
                    top - 1,
                    cell + 2,
                    cell + 2,
                    fill=_tint(weight),
                    radius=3,
                    stroke=s.EXPERTS[1],
                )


def _tint(weight: float) -> str:
    """Indigo, deeper for a larger weight."""
    share = min(1.0, 0.25 + weight * 3.5)
    light, deep = (224, 226, 252), (79, 70, 229)
    return "#" + "".join(
        f"{round(a + (b - a) * share):02x}" for a, b in zip(light, deep, strict=True)
    )


def _weight_bars(drawing: s.Drawing, x: float, y: float) -> None:
    drawing.rect(x, y, 348, 232, radius=10)
    drawing.text(x + 14, y + 24, "weights p, renormalised to sum 1", weight=600)
    drawing.arrow((x - 30, y + 116), (x - 1, y + 116))
    for index, weight in enumerate(sorted(CHOSEN.values(), reverse=True)):
        top = y + 38 + index * 18.5
        drawing.rect(
            x + 14, top, weight * 560, 13, fill=_tint(weight), stroke=s.EXPERTS[1], radius=3
        )
        drawing.text(
            x + 22 + weight * 560, top + 11, "p · SwiGLU(x)", size=11, fill=s.SOFT, mono=True
        )
    drawing.text(x + 222, y + 214, "width 512 each", size=11, fill=s.SOFT)


def _shared_expert(drawing: s.Drawing) -> None:
    drawing.box(
        380, 384, 376, 52, "shared expert", s.MTP, size=14, note="SwiGLU of width 512, always on"
    )
    drawing.box(380, 456, 376, 38, "gate: sigmoid(x · w)", s.MTP)
    drawing.path("M95 302V410H379", arrow=True)
    drawing.path("M95 410V475H379", arrow=True)
    drawing.path("M756 475H800V432", arrow=True)
    drawing.circle(800, 410, 16, fill=s.CARD, stroke=s.LINE)
    drawing.text(800, 415, "×", size=16, anchor="middle")
    drawing.arrow((756, 410), (783, 410))
    drawing.arrow((816, 410), (923, 410))
    drawing.arrow((940, 344), (940, 393))
    drawing.plus(940, 410, 16)
    drawing.arrow((956, 410), (1019, 410))
    drawing.box(1020, 386, 120, 48, "y", note="2,048 numbers", size=14)
    drawing.text(
        40,
        528,
        "Training keeps the load even: the loss E · Σ fₑ pₑ is counted per layer, over all "
        "accumulation steps; a balanced router scores 1.",
        size=12,
        fill=s.SOFT,
    )


def draw_mtp() -> s.Drawing:
    """One round of drafting and checking."""
    drawing = s.Drawing(1180, 470, "Drafting and checking with Multi-Token Prediction")
    drawing.text(40, 50, "Several tokens per pass, the same text", size=22, weight=700)
    drawing.text(
        40,
        74,
        "The head drafts, the trunk checks all drafts at once, and the state moves on by what was "
        "accepted. Words are examples.",
        fill=s.SOFT,
    )
    _token_row(drawing, 116, "known", ["The", "little", "fox"], s.PLAIN)
    x = 176 + 3 * 106
    for index, word in enumerate(["ran", "into", "a"]):
        drawing.box(x + index * 106, 116, 96, 40, word, s.MTP, size=14)
    drawing.text(x + 3 * 106 + 10, 133, "1  draft: the MTP head runs k = 3 times,", size=13)
    drawing.text(x + 3 * 106 + 10, 151, "each time one layer, fed with its own state", size=13)
    drawing.rect(
        166 + 2 * 106, 176, 4 * 106 + 6, 122, fill="none", stroke=s.INK, radius=8, dash="4 4"
    )
    drawing.text(60, 213, "trunk", weight=600, fill=s.SOFT)
    for index in range(4):
        left = 176 + (2 + index) * 106
        drawing.arrow((left + 48, 156), (left + 48, 193))
        drawing.box(left, 194, 96, 30, "row", s.DELTA, size=12, weight=400)
        drawing.arrow((left + 48, 224), (left + 48, 247))
    answers = [("ran", True), ("into", True), ("the", False), ("–", False)]
    for index, (word, accepted) in enumerate(answers):
        left = 176 + (2 + index) * 106
        style = s.DELTA if accepted else (s.ATTENTION if index == 2 else s.PLAIN)
        drawing.box(left, 248, 96, 40, word, style, size=14)
    drawing.text(x + 3 * 106 + 10, 213, "2  check: one pass over the last token and", size=13)
    drawing.text(x + 3 * 106 + 10, 231, "the drafts gives the next token after each", size=13)
    drawing.text(x + 3 * 106 + 10, 265, "3  accept “ran into”; “a” is refused and the", size=13)
    drawing.text(x + 3 * 106 + 10, 283, "trunk's own “the” takes its place", size=13)
    _token_row(drawing, 330, "new text", ["The", "little", "fox"], s.PLAIN)
    for index, (word, style) in enumerate(
        [("ran", s.DELTA), ("into", s.DELTA), ("the", s.ATTENTION)]
    ):
        drawing.box(x + index * 106, 330, 96, 40, word, style, size=14)
    drawing.text(x + 3 * 106 + 10, 347, "4  commit: replay the accepted rows into the", size=13)
    drawing.text(x + 3 * 106 + 10, 365, "DeltaNet state; nothing of the rest remains", size=13)
    legend = [("drafted", s.MTP), ("accepted", s.DELTA), ("the trunk's own", s.ATTENTION)]
    for index, (label, style) in enumerate(legend):
        drawing.rect(176 + index * 150, 412, 16, 16, fill=style[0], stroke=style[1], radius=4)
        drawing.text(200 + index * 150, 425, label, size=12, fill=s.SOFT)
    return drawing


def _token_row(drawing: s.Drawing, y: float, label: str, words: list[str], style: s.Style) -> None:
    drawing.text(60, y + 25, label, weight=600, fill=s.SOFT)
    for index, word in enumerate(words):
        drawing.box(176 + index * 106, y, 96, 40, word, style, size=14, weight=400)


FIGURES: dict[str, Callable[[], s.Drawing]] = {
    "stack": draw_stack,
    "router": draw_router,
    "mtp": draw_mtp,
}


def main() -> None:
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().render(), encoding="utf-8")


if __name__ == "__main__":
    main()
