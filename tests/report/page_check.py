"""What the tests ask of an HTML page, with html.parser and an XML parser only."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link"}
SVG = {"svg", "g", "path", "polyline", "circle", "text", "rect", "title"}
PARTS = {
    "html",
    "head",
    "style",
    "body",
    "header",
    "main",
    "footer",
    "section",
    "article",
    "div",
    "figure",
    "figcaption",
}
TEXTS = {"h1", "h2", "h3", "p", "b", "ul", "li", "pre", "span", "details", "summary"}
KNOWN = SVG | VOID | PARTS | TEXTS | {"table", "thead", "tbody", "tr", "th", "td"}


class Page(HTMLParser):
    """A page that was parsed. text: its text. titles: of its tooltips. cells: rows of all tables, as texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.titles: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        self.svgs = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.S)]

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert tag in KNOWN, f"<{tag}> was made from data"
        assert len(names) == len(set(names)) and not any(name.startswith("on") for name in names), attrs
        for name, value in attrs:
            assert name not in ("src", "href", "srcset", "action"), f"a reference: {name}={value}"
            assert "url(" not in (value or ""), value
        self.tags.append((tag, dict(attrs)))
        self.titles += [value for name, value in attrs if name == "title" and value]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):  # of SVG
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """The cells of the table row that begins with this text."""
        (row,) = [row for row in self.cells if row and row[0].strip() == first]
        return [cell.strip() for cell in row]
