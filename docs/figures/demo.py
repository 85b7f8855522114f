"""Draw what `make demo` writes, drafted tokens tinted, as demo.svg.

python docs/figures/demo.py
"""

import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

from qnext import LLM

FOLDER = Path(__file__).resolve().parent
MAKEFILE = (FOLDER.parents[1] / "Makefile").read_text(encoding="utf-8")
WIDTH = 84


def setting(pattern: str) -> str:
    """One setting of the demo, read from the Makefile so that picture and command agree."""
    found = re.search(pattern, MAKEFILE)
    assert found, f"the Makefile has no {pattern}"
    return found.group(1)


def main() -> None:
    """Write the text once and save the picture."""
    prompt = setting(r"PROMPT \?= (.+)")
    llm = LLM("nano", num_speculative_tokens=int(setting(r"--num-speculative-tokens (\d+)")))
    params = llm.get_default_sampling_params(
        temperature=float(setting(r"--temperature ([\d.]+)")),
        seed=int(setting(r"--seed (\d+)")),
        max_tokens=int(setting(r"--max-tokens (\d+)")),
    )
    text = Text(prompt, style="bold")
    drafted = kept = 0
    for chunk in llm.stream(prompt, params):
        for segment in chunk.segments:
            text.append(
                segment.text, style="not bold green" if segment.is_accepted_draft else "not bold"
            )
        metrics = chunk.output.metrics
        drafted, kept = metrics.num_draft_tokens, metrics.num_accepted_tokens
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print("$ make demo", style="dim")
    console.print(text)
    summary = f"\n{kept} of {drafted} drafts accepted ({kept / drafted:.0%})"
    console.print(Text(summary, style="dim"))
    picture = console.export_svg(title="qnext generate --show-accepted")
    # The reader's own monospaced font serves; none is fetched from elsewhere.
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
    # Spaces at the start of a tinted piece count, in renderers that would drop them too.
    picture = picture.replace("<text ", '<text xml:space="preserve" ')
    (FOLDER / "demo.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
