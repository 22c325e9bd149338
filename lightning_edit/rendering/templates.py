# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Templates of HTML, Markdown and LaTeX; every value is escaped unless it is markup already."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from markupsafe import Markup

from lightning_edit.rendering.escaping import (
    code_block,
    code_span,
    escape_latex,
    escape_markdown,
    is_web_address,
    visible,
)

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["render"]


def render(package: str, name: str, **values: object) -> Markup:
    """Fills in one of a package's templates.

    Args:
        package: Package with a folder ``templates``.
        name: File in it; ``.html``, ``.md`` or ``.tex`` says how values are escaped.
        values: What the template names. A `markupsafe.Markup` is taken as it is.

    Raises:
        jinja2.UndefinedError: If the template names a value that is not given.
    """
    kinds = {"html": _html, "md": _markdown, "tex": _latex}
    environment = kinds[name.rpartition(".")[2]](package)
    return Markup(environment.get_template(name).render(values))  # noqa: S704 - escaped by then


@cache
def _html(package: str) -> Environment:
    return _environment(package, visible)  # what HTML has to escape, Jinja does by itself


@cache
def _markdown(package: str) -> Environment:
    made = _environment(package, lambda value: Markup(escape_markdown(value)))  # noqa: S704
    made.filters |= {"code": code_span, "code_block": code_block}
    return made


@cache
def _latex(package: str) -> Environment:
    return _environment(package, lambda value: Markup(escape_latex(value)))  # noqa: S704


def _environment(package: str, escape: Callable[[object], str]) -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else escape(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.tests["web_address"] = is_web_address
    return made
