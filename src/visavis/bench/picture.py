"""A report as a picture: a bar per rate against the floor the machine sets. SVG, no library."""

from __future__ import annotations

from html import escape

from visavis.bench.measure import Report

WIDTH, LEFT, BAR, GAP, TOP = 760, 190, 22, 14, 74
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1b1f24 }
  .small { font-size: 12px; fill: #57606a }
  .floor { fill: #e6e9ed }  .bar { fill: #2f6fdb }
  @media (prefers-color-scheme: dark) {
    .sheet { fill: #0d1117 }  text { fill: #e6edf3 }  .small { fill: #9198a1 }
    .floor { fill: #262c34 }  .bar { fill: #4c8dff }
  }
"""


def draw(report: Report) -> str:
    """Return an SVG of the rows that have a floor; the bar's length is the share reached."""
    rows = [row for row in report.rows if row.share is not None]
    height = TOP + len(rows) * (BAR + GAP) + 20
    machine = report.machine
    peaks = (
        f"{machine.device}, {machine.threads} threads: reads {machine.bandwidth / 1e9:.0f} GB/s, "
        f"multiplies {machine.flops / 1e9:.0f} GFLOP/s in {machine.dtype}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(report.model)}: share of what the machine allows">',
        f"<style>{STYLE}</style>",
        f'<rect class="sheet" width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="16" y="28" font-weight="600">{escape(report.model)}: how much of what the '
        "machine allows is reached</text>",
        f'<text class="small" x="16" y="50">{escape(peaks)}</text>',
    ]
    length = WIDTH - LEFT - 150
    for number, row in enumerate(rows):
        y = TOP + number * (BAR + GAP)
        share = min(1.0, row.share or 0.0)
        parts += [
            f'<text x="{LEFT - 10}" y="{y + 16}" text-anchor="end">{escape(row.name)}</text>',
            f'<rect class="floor" x="{LEFT}" y="{y}" width="{length}" height="{BAR}" rx="3"/>',
            f'<rect class="bar" x="{LEFT}" y="{y}" width="{length * share:.1f}" height="{BAR}" '
            'rx="3"/>',
            f'<text x="{LEFT + length + 10}" y="{y + 16}">{row.value:.3g} {escape(row.unit)} '
            f"({share:.0%})</text>",
        ]
    return "\n".join([*parts, "</svg>\n"])
