"""Renders pages with jinja2, which escapes every value. A page is one file that loads nothing; Vega-Lite in it draws its charts.

The content security policy allows the page's own style and scripts by their hashes, and no request.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from sft.common.files import write_atomic
from sft.reporting.charts import number

TEMPLATES = Path(__file__).parent / "templates"
TEXT = 1500
"""Characters shown of one text."""


def document(title: str, sections: Mapping[str, str], **values: Any) -> str:
    """A page of {heading: HTML} sections. Empty ones are left out."""
    charts = any('<figure class="chart"' in body for body in sections.values())
    viewer = any('id="items"' in body for body in sections.values())
    names = [*(["vega", "charts.js"] if charts else []), *(["replies.js"] if viewer else [])]
    return render("base.html.jinja", names, title=title, sections=sections, **values)


def render(template: str, scripts: list[str], **values: Any) -> str:
    """A template with these scripts after its body."""
    style, texts = (TEMPLATES / "style.css").read_text(), [_script(name) for name in scripts]
    policy = (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src {_hash(style)}; script-src"
    )
    policy = " ".join([policy, *map(_hash, texts)] if texts else [policy, "'none'"])
    page = _environment().get_template(template)
    return page.render(style=Markup(style), scripts=[Markup(t) for t in texts], policy=Markup(policy), **values)


def part(name: str, *values: Any) -> Markup:
    """A macro of sections.html.jinja with its values."""
    return Markup(getattr(_environment().get_template("sections.html.jinja").module, name)(*values))


def clip(text: str) -> str:
    """A long text is cut in the middle."""
    return text if len(text) <= TEXT else text[: TEXT // 2] + " … " + text[-TEXT // 2 :]


def interval(bounds: tuple[float, float] | None) -> str:
    """A 95 % interval with three digits."""
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else "no interval"


def embedded(value: Any) -> Markup:
    """JSON for a script element: < > & ' are escaped, and all beyond ASCII. JSON has no NaN, which becomes a text."""
    return htmlsafe_json_dumps(_finite(value), dumps=functools.partial(json.dumps, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True)  # fmt: skip
    environment.filters |= {"embedded": embedded, "clip": clip, "number": number, "interval": interval,
                            "anchor": lambda title: title.lower().replace(" ", "-")}  # fmt: skip
    return environment


@functools.cache
def _script(name: str) -> str:
    return _vega() if name == "vega" else (TEMPLATES / name).read_text()


def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed of the pinned package as one script; making it takes seconds, so it is kept in the environment."""
    file = Path(sys.prefix) / f"vega-{version('vl-convert-python')}.js"
    if file.is_file():
        return file.read_text()
    text = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", r"<\/script")
    with contextlib.suppress(OSError):  # an environment that others own
        write_atomic(file, text.encode())
    return text


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
