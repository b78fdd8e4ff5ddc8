"""Name and mark, as pictures that are legible on light and on dark ground."""

from __future__ import annotations

# Three experts meet in one point, seen through a lens.
_DRAWING = """
<g fill="none" stroke="#4F7BF0" stroke-width="3" stroke-linecap="round">
<circle cx="14" cy="14" r="11.5"/><path d="M22.5 22.5 29.5 29.5" stroke-width="4"/></g>
<g stroke="#E8762B" stroke-width="1.8" stroke-linecap="round">
<path d="M14 15V8M14 15l-5.6 4M14 15l5.6 4"/></g>
<g fill="#E8762B"><circle cx="14" cy="15" r="2.6"/><circle cx="14" cy="7.6" r="1.9"/>
<circle cx="8" cy="19.2" r="1.9"/><circle cx="20" cy="19.2" r="1.9"/></g>
"""
_SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 32" {size}>{inside}</svg>'

MARK = _SVG.format(width=32, size='width="64" height="64"', inside=_DRAWING)
LOGO = _SVG.format(
    width=176,
    size='width="176" height="32" role="img" aria-label="MergeScope"',
    inside=f"""{_DRAWING}<text x="40" y="23.5" fill="#4F7BF0" font-size="22" font-weight="600"
font-family="'Source Sans', 'Source Sans Pro', 'Helvetica Neue', Arial, sans-serif"
textLength="134">MergeScope</text>""",
)
