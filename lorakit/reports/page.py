"""A page of Jinja templates, as HTML that needs no other file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATES = Path(__file__).parent / "templates"


def render(name: str, **values: Any) -> str:
    """Return the page that ``templates/NAME.html`` makes of ``values``, with its style and program
    inside; texts are escaped.
    """
    return _environment().get_template(f"{name}.html").render(name=name, **values)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=lambda name: bool(name and name.endswith(".html")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
