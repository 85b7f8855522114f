"""Pieces of work that an engine is measured on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One piece of work.

    Attributes:
        kind: "start", "prefill", "decode" or "steps".
        num_seqs: sequences at once.
        context: tokens of each prompt.
        name: as it was asked for.
    """

    kind: str
    num_seqs: int
    context: int
    name: str

    @classmethod
    def parse(cls, name: str, step_context: int) -> "Cell":
        """The cell that "start", "prefill-4096", "decode-8x1024" or "steps-8" names.

        Raises:
            ValueError: any other text.
        """
        kind, _, sizes = name.partition("-")
        numbers = [int(part) if part.isdecimal() else 0 for part in sizes.split("x")]
        if all(numbers):
            if kind == "prefill" and len(numbers) == 1:
                return cls(kind, 1, numbers[0], name)
            if kind == "decode" and len(numbers) == 2:
                return cls(kind, numbers[0], numbers[1], name)
            if kind == "steps" and len(numbers) == 1:
                return cls(kind, numbers[0], step_context, name)
        if name == "start":
            return cls(kind, 1, step_context, name)
        raise ValueError(
            f"--cells {name}: want start, prefill-TOKENS, decode-SEQUENCESxTOKENS or "
            "steps-SEQUENCES"
        )
