"""A model drawn in the terminal: the stack of layers, then tables of parameters and memory."""

from rich import box
from rich.align import Align
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qnext.inspect.summary import Block, ModelSummary, repeated_blocks
from qnext.inspect.text import (
    PART_TITLES,
    format_bytes,
    format_count,
    mixer_detail,
    mixer_title,
    mlp_detail,
    mlp_title,
)

DELTA_NET_STYLE = "cyan"
ATTENTION_STYLE = "magenta"
STACK_WIDTH = 78


def render(summary: ModelSummary) -> RenderableType:
    """Returns the whole report; printing it wraps to the console's width."""
    return Group(
        draw_stack(summary),
        "",
        parameter_table(summary),
        "",
        memory_table(summary),
        *_notes(summary),
    )


def draw_stack(summary: ModelSummary) -> RenderableType:
    """Returns the stack from tokens, at the top, to logits."""
    config = summary.config
    times, blocks = repeated_blocks(config)
    layers = Group(*(_draw_block(summary, block) for block in blocks))
    title = f"{times} ×" if times > 1 else f"{config.num_hidden_layers} layers"
    stack: list[RenderableType] = [
        _line(f"embedding  {config.vocab_size:,} × {config.hidden_size:,}"),
        _arrow(),
        Panel(layers, title=title, title_align="left", box=box.ROUNDED, width=STACK_WIDTH),
        _arrow(),
        _line("norm"),
    ]
    tied = "the embedding again" if config.tie_word_embeddings else "own matrix"
    stack += [_arrow(), _line(f"head  {config.hidden_size:,} × {config.vocab_size:,}, {tied}")]
    if summary.has_mtp:
        stack += [_arrow("and, from the state after the norm,"), _draw_mtp(summary)]
    return Group(*stack)


def parameter_table(summary: ModelSummary) -> Table:
    """Returns parameters by part, in all and active per token."""
    table = Table(box=box.SIMPLE_HEAD, title="Parameters", title_justify="left", pad_edge=False)
    table.add_column("part")
    table.add_column("all", justify="right")
    table.add_column("active per token", justify="right")
    for name, part in summary.counts.parts.items():
        if name != "mtp":
            table.add_row(PART_TITLES[name], f"{part.total:,}", f"{part.active:,}")
    table.add_section()
    counts = summary.counts
    table.add_row("Model", f"{counts.main:,}", f"{counts.active:,}", style="bold")
    if "mtp" in counts.parts:
        mtp = counts.parts["mtp"]
        table.add_row(PART_TITLES["mtp"], f"{mtp.total:,}", f"{mtp.active:,} a draft")
        table.add_row("In all", f"{counts.total:,}", "", style="bold")
    return table


def memory_table(summary: ModelSummary) -> Table:
    """Returns the memory of weights by dtype, and that of one sequence at the context."""
    table = Table(box=box.SIMPLE_HEAD, title="Memory", title_justify="left", pad_edge=False)
    table.add_column("of")
    table.add_column("bytes", justify="right")
    table.add_column("", justify="right")
    weights = summary.weight_bytes()
    kind = "weights, stored" if summary.stored_bytes is not None else "weights, all in"
    for dtype, size in weights.items():
        table.add_row(f"{kind} {dtype}", f"{size:,}", format_bytes(size))
    if summary.stored_bytes is not None and len(weights) > 1:
        table.add_row("weights together", f"{sum(weights.values()):,}", _sum(weights))
    table.add_section()
    context = f"{summary.context:,} tokens"
    for title, size in (
        ("DeltaNet state per sequence, float32", summary.state_bytes),
        ("convolution state per sequence, bfloat16", summary.conv_bytes),
        ("keys and values per token, bfloat16", summary.kv_bytes_per_token),
        (f"keys and values of {context}", summary.kv_bytes),
        (f"one sequence of {context}", summary.sequence_bytes),
    ):
        table.add_row(title, f"{size:,}", format_bytes(size))
    return table


def _notes(summary: ModelSummary) -> list[RenderableType]:
    notes: list[RenderableType] = []
    if summary.stored_bytes is None:
        notes.append(Text("No weights here; the tensors would tell whether there is an MTP head."))
    else:
        files = "file" if summary.num_files == 1 else "files"
        text = f"{len(summary.shapes):,} tensors in {summary.num_files} {files}"
        notes.append(Text(text + (", as config.json asks." if not summary.comparison else ":")))
    if summary.config.quant_method is not None:
        method = summary.config.quant_method
        notes.append(Text(f"Quantised by {method!r}: sizes can be read, weights not yet."))
    for line in summary.comparison.lines() if summary.comparison else ():
        notes.append(Text("  " + line, style="red"))
    return notes


def _draw_block(summary: ModelSummary, block: Block) -> RenderableType:
    style = ATTENTION_STYLE if block.is_attention else DELTA_NET_STYLE
    lines = Text()
    lines.append(mixer_title(block.is_attention), style=f"bold {style}")
    lines.append("  " + mixer_detail(summary.config, block.is_attention) + "\n")
    lines.append(mlp_title(block.is_moe), style="bold green")
    lines.append("  " + mlp_detail(summary.config, block.is_moe))
    return Panel(lines, title=f"{block.num_layers} ×", title_align="left", border_style=style)


def _draw_mtp(summary: ModelSummary) -> RenderableType:
    is_moe = summary.config.num_experts > 0
    lines = Text("next token's embedding and state, joined\n")
    lines.append(mixer_title(True), style=f"bold {ATTENTION_STYLE}")
    lines.append("  with keys of its own\n")
    lines.append(mlp_title(is_moe), style="bold green")
    lines.append("  " + mlp_detail(summary.config, is_moe) + "\nnorm, then the same head")
    return Panel(
        lines,
        title="Multi-Token Prediction",
        title_align="left",
        border_style="yellow",
        width=STACK_WIDTH,
    )


def _line(text: str) -> RenderableType:
    return Align.center(Text(text, style="bold"), width=STACK_WIDTH)


def _arrow(text: str = "") -> RenderableType:
    return Align.center(Text(f"│ {text}".rstrip(), style="dim"), width=STACK_WIDTH)


def _sum(sizes: dict[str, int]) -> str:
    return format_bytes(sum(sizes.values()))


def headline(summary: ModelSummary) -> Text:
    """Returns one line: name, parameters in all and active."""
    counts = summary.counts
    text = Text(summary.name, style="bold")
    text.append(
        f"  {counts.total:,} parameters ({format_count(counts.total).strip()}), "
        f"{counts.active:,} active ({format_count(counts.active).strip()})",
        style="not bold",
    )
    return text
