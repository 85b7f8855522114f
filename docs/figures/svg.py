"""A few shapes to draw our figures with: boxes, arrows, text, all in one palette."""

from html import escape

INK = "#1f2937"
SOFT = "#667085"
LINE = "#98a2b3"
PAPER = "#fcfbf8"
CARD = "#ffffff"
EDGE = "#e4e2dc"
FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "'JetBrains Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"

# (fill, border, text) of each part of the model, the same in every figure.
DELTA = ("#cdeee8", "#0f766e", "#0b4f4a")
ATTENTION = ("#fde2b3", "#b45309", "#7a3806")
EXPERTS = ("#e0e2fc", "#4f46e5", "#312e81")
MTP = ("#fbdce9", "#be185d", "#831843")
PLAIN = ("#f3f2ee", "#a8a29e", INK)

Style = tuple[str, str, str]


class Drawing:
    """Collects elements in drawing order; coordinates are pixels, y grows downwards."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []
        self.rect(0.5, 0.5, width - 1, height - 1, fill=PAPER, stroke=EDGE, radius=14)

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = CARD,
        stroke: str = EDGE,
        radius: float = 6,
        stroke_width: float = 1,
        dash: str = "",
        opacity: float = 1,
    ) -> None:
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        extra += f' opacity="{opacity:g}"' if opacity != 1 else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="{stroke_width:g}"{extra}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        content: str,
        *,
        size: float = 13,
        fill: str = INK,
        anchor: str = "start",
        weight: int = 400,
        mono: bool = False,
    ) -> None:
        """One line; y is the baseline."""
        family = f' font-family="{MONO}"' if mono else ""
        bold = f' font-weight="{weight}"' if weight != 400 else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}" '
            f'text-anchor="{anchor}"{bold}{family}>{escape(content)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        label: str,
        style: Style = PLAIN,
        *,
        size: float = 13,
        note: str = "",
        weight: int = 600,
    ) -> None:
        """A rounded box with its label in the middle and, under it, a smaller note."""
        fill, stroke, ink = style
        self.rect(x, y, width, height, fill=fill, stroke=stroke)
        middle = y + height / 2 + size * 0.35
        if note:
            self.text(
                x + width / 2,
                middle - 7,
                label,
                size=size,
                fill=ink,
                anchor="middle",
                weight=weight,
            )
            self.text(x + width / 2, middle + 9, note, size=size - 2, fill=ink, anchor="middle")
        else:
            self.text(
                x + width / 2, middle, label, size=size, fill=ink, anchor="middle", weight=weight
            )

    def path(
        self,
        commands: str,
        *,
        stroke: str = LINE,
        width: float = 1.5,
        arrow: bool = False,
        dash: str = "",
        fill: str = "none",
        opacity: float = 1,
    ) -> None:
        """A line through SVG path commands, with an arrow head at its end when asked."""
        extra = ' marker-end="url(#head)"' if arrow else ""
        extra += f' stroke-dasharray="{dash}"' if dash else ""
        extra += f' opacity="{opacity:g}"' if opacity != 1 else ""
        self.parts.append(
            f'<path d="{commands}" fill="{fill}" stroke="{stroke}" '
            f'stroke-width="{width:g}"{extra}/>'
        )

    def arrow(self, *points: tuple[float, float], stroke: str = LINE) -> None:
        """A straight or cornered line with a head at its last point."""
        commands = " ".join(
            f"{'M' if index == 0 else 'L'}{x:g} {y:g}" for index, (x, y) in enumerate(points)
        )
        self.path(commands, stroke=stroke, arrow=True)

    def circle(self, x: float, y: float, radius: float, *, fill: str, stroke: str = "none") -> None:
        self.parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{fill}" stroke="{stroke}"/>'
        )

    def plus(self, x: float, y: float, radius: float = 9) -> None:
        """The addition that closes a residual branch."""
        self.circle(x, y, radius, fill=CARD, stroke=LINE)
        arm = radius * 0.5
        self.path(f"M{x - arm:g} {y:g}H{x + arm:g}M{x:g} {y - arm:g}V{y + arm:g}", stroke=INK)

    def render(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" font-family="{FONT}" role="img">\n'
            f"<title>{escape(self.title)}</title>\n"
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0.5L8 4L0 7.5z" fill="{LINE}"/>'
            "</marker></defs>\n"
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"
