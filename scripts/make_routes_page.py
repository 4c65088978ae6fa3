"""Writes docs/routes.md from the server's own routes: `python scripts/make_routes_page.py`. A
test compares.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from fastapi.routing import APIRoute

from lorakit.service.http import connection, listing, openai, sampling, training
from lorakit.service.http.app import NOT_OFFERED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "routes.md"


def page() -> str:
    """The page's text."""
    lines = [
        "# Routes of `lorakit serve`",
        "",
        (
            "Made from the code by `scripts/make_routes_page.py`. Tinker's protocol lies under"
            " `/api/v1`, OpenAI's under `/v1`."
        ),
        "",
        "| route | state | what it does |",
        "| --- | --- | --- |",
    ]
    for module in (connection, training, sampling, listing, openai):
        for route in module.router.routes:
            assert isinstance(route, APIRoute)
            method = min(route.methods)
            text = (
                (inspect.getdoc(route.endpoint) or "")
                .split("\n\n")[0]
                .replace("\n", " ")
                .replace("|", "\\|")
            )
            lines.append(f"| `{method} {route.path}` | done | {text} |")
    lines += [
        f"| `/api/v1/{pattern}` | not offered (404) | {reason} |"
        for pattern, reason in NOT_OFFERED.items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
