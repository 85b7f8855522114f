"""A model as one page that needs nothing else: the blocks, the layers, the expert grid, tables."""

from collections.abc import Iterable
from html import escape

from qnext.inspect.summary import Block, ModelSummary, repeated_blocks
from qnext.inspect.text import (
    PART_TITLES,
    format_bytes,
    mixer_detail,
    mixer_title,
    mlp_detail,
    mlp_title,
)

# Above this many cells a grid says nothing more and slows the page.
MAX_GRID_EXPERTS = 4096

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d0d7de; --soft: #f6f8fa;
  --delta: #0f766e; --attention: #a21caf; --expert: #15803d; --mtp: #b45309; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d;
  --soft: #161b22; --delta: #2dd4bf; --attention: #e879f9; --expert: #4ade80; --mtp: #fbbf24; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
.figure { display: flex; flex-direction: column; align-items: center; gap: .4rem; }
.plain { border: 1px solid var(--line); border-radius: .4rem; background: var(--soft);
  padding: .3rem 1rem; } .arrow { opacity: .5; line-height: 1; }
.repeat { border: 1.5px dashed var(--line); border-radius: .6rem; padding: .8rem; width: 100%;
  box-sizing: border-box; } .repeat > p { margin: 0 0 .5rem; font-weight: 600; }
.block { border-left: .35rem solid var(--kind); background: var(--soft); border-radius: .4rem;
  padding: .5rem .9rem; margin: .5rem 0; } .block b { color: var(--kind); }
.block .moe { color: var(--expert); } .delta { --kind: var(--delta); }
.attention { --kind: var(--attention); } .mtp { --kind: var(--mtp); }
.layers, .experts { display: flex; flex-wrap: wrap; gap: 3px; }
.layers span { width: 2rem; height: 2rem; line-height: 2rem; text-align: center; font-size: .75rem;
  border-radius: .3rem; color: var(--paper); background: var(--kind); }
.layers span.dense { outline: 2px solid var(--ink); outline-offset: -2px; }
.experts span { width: 11px; height: 11px; border-radius: 2px; background: var(--line); }
.experts span.on { background: var(--expert); } .experts span.shared { background: var(--mtp); }
table { border-collapse: collapse; } th, td { padding: .2rem 1.2rem .2rem 0; text-align: left;
  border-bottom: 1px solid var(--line); } td + td, th + th { text-align: right;
  font-variant-numeric: tabular-nums; } tr.sum td { font-weight: 600; }
.note { opacity: .75; }
"""


def render_page(summary: ModelSummary) -> str:
    """Returns the page's HTML; it loads nothing and runs no script."""
    name = escape(summary.name)
    counts = summary.counts
    sections = [
        f"<h1>{name}</h1>",
        f"<p>{counts.total:,} parameters, {counts.active:,} active per token.</p>",
        "<h2>The stack</h2>",
        _stack(summary),
        "<h2>Layers</h2>",
        _layers(summary),
    ]
    if summary.config.num_experts > 0:
        sections += ["<h2>Experts of one layer</h2>", _expert_grid(summary)]
    sections += ["<h2>Parameters</h2>", _parameters(summary), "<h2>Memory</h2>", _memory(summary)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _stack(summary: ModelSummary) -> str:
    config = summary.config
    times, blocks = repeated_blocks(config)
    tied = "the embedding again" if config.tie_word_embeddings else "own matrix"
    title = f"{times} ×" if times > 1 else f"{config.num_hidden_layers} layers"
    inside = "".join(_block(summary, block) for block in blocks)
    parts = [
        f'<div class="plain">Embedding {config.vocab_size:,} × {config.hidden_size:,}</div>',
        f'<div class="repeat"><p>{title}</p>{inside}</div>',
        '<div class="plain">Norm</div>',
        f'<div class="plain">Head {config.hidden_size:,} × {config.vocab_size:,}, {tied}</div>',
    ]
    if summary.has_mtp:
        is_moe = config.num_experts > 0
        parts.append(
            '<div class="repeat"><div class="block mtp"><b>Multi-Token Prediction</b><br>'
            "the next token's embedding and the state after the norm, joined; "
            f'{mixer_title(True)} with keys of its own; <span class="moe">{mlp_title(is_moe)}'
            f"</span> {escape(mlp_detail(config, is_moe))}; norm, then the same head</div></div>"
        )
    arrow = '<div class="arrow">↓</div>'
    return f'<div class="figure">{arrow.join(parts)}</div>'


def _block(summary: ModelSummary, block: Block) -> str:
    kind = "attention" if block.is_attention else "delta"
    return (
        f'<div class="block {kind}"><b>{block.num_layers} × {mixer_title(block.is_attention)}</b> '
        f"{escape(mixer_detail(summary.config, block.is_attention))}<br>"
        f'<span class="moe">{mlp_title(block.is_moe)}</span> '
        f"{escape(mlp_detail(summary.config, block.is_moe))}</div>"
    )


def _layers(summary: ModelSummary) -> str:
    config = summary.config
    cells = []
    for i in range(config.num_hidden_layers):
        is_attention, is_moe = config.is_attention_layer(i), config.is_moe_layer(i)
        kind = ("attention" if is_attention else "delta") + ("" if is_moe else " dense")
        title = f"layer {i}: {mixer_title(is_attention)}, {mlp_title(is_moe)}"
        cells.append(f'<span class="{kind}" title="{title}">{i}</span>')
    return f'<div class="layers">{"".join(cells)}</div>'


def _expert_grid(summary: ModelSummary) -> str:
    config = summary.config
    num_cells = min(config.num_experts, MAX_GRID_EXPERTS)
    # One token's choice, spread evenly: a picture of the share, not of any router.
    active = {
        (2 * i + 1) * num_cells // (2 * config.num_experts_per_tok)
        for i in range(min(config.num_experts_per_tok, num_cells))
    }
    cells = [
        f'<span{" class=on" if i in active else ""} title="expert {i}"></span>'
        for i in range(num_cells)
    ]
    if config.shared_expert_intermediate_size > 0:
        cells.append('<span class="shared" title="shared expert"></span>')
    note = (
        f"One token passes through {config.num_experts_per_tok} of {config.num_experts} experts"
        + (" and the shared one." if config.shared_expert_intermediate_size > 0 else ".")
        + " Which ones light up here is an example."
    )
    return f'<div class="experts">{"".join(cells)}</div><p class="note">{note}</p>'


def _parameters(summary: ModelSummary) -> str:
    counts = summary.counts
    rows = [
        (PART_TITLES[name], f"{part.total:,}", f"{part.active:,}")
        for name, part in counts.parts.items()
        if name != "mtp"
    ]
    sums = [("Model", f"{counts.main:,}", f"{counts.active:,}")]
    if "mtp" in counts.parts:
        mtp = counts.parts["mtp"]
        sums.append((PART_TITLES["mtp"], f"{mtp.total:,}", f"{mtp.active:,} a draft"))
        sums.append(("In all", f"{counts.total:,}", ""))
    return _table(("Part", "all", "active per token"), rows, sums)


def _memory(summary: ModelSummary) -> str:
    kind = "Weights, stored" if summary.stored_bytes is not None else "Weights, all in"
    weights = summary.weight_bytes()
    context = f"{summary.context:,} tokens"
    sizes = [(f"{kind} {dtype}", size) for dtype, size in weights.items()]
    sizes += [
        ("DeltaNet state per sequence, float32", summary.state_bytes),
        ("Convolution state per sequence, bfloat16", summary.conv_bytes),
        ("Keys and values per token, bfloat16", summary.kv_bytes_per_token),
        (f"Keys and values of {context}", summary.kv_bytes),
    ]
    rows = [(title, f"{size:,}", format_bytes(size)) for title, size in sizes]
    size = summary.sequence_bytes
    return _table(
        ("Of", "bytes", ""), rows, [(f"One sequence of {context}", f"{size:,}", format_bytes(size))]
    )


def _table(
    head: tuple[str, str, str],
    rows: Iterable[tuple[str, str, str]],
    sums: Iterable[tuple[str, str, str]],
) -> str:
    def row(cells: tuple[str, ...], tag: str, kind: str = "") -> str:
        inside = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
        return f"<tr{kind}>{inside}</tr>"

    lines = [row(head, "th"), *(row(cells, "td") for cells in rows)]
    lines += [row(cells, "td", ' class="sum"') for cells in sums]
    return f"<table>{''.join(lines)}</table>"
