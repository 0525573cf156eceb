"""Render HTML pages from ``training/templates``: values are escaped, images embedded."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: str, **fields: object) -> str:
    """Return ``template`` rendered with ``fields``."""
    return TEMPLATES.get_template(template).render(fields)


def data_uri(content: bytes) -> str:
    """Return a PNG or SVG image as a data URI."""
    kind = "png" if content.startswith(b"\x89PNG") else "svg+xml"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["data_uri"] = data_uri
