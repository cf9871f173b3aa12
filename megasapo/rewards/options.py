"""Binds the options of a reward to its function and refuses those that it does not have."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any


class OptionError(ValueError):
    """A reward's function cannot be called as it will be; the message says all there is to know."""


def bind_options(name: str, function: Callable[..., Any], options: dict[str, Any]) -> functools.partial[Any]:
    """`function(prompt, response, **options)` with the options filled in.

    Raises OptionError that names an unknown or a missing option, or parameters that do not take prompt and response.
    """
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    try:
        signature.bind_partial(None, None)
    except TypeError:
        raise OptionError(f"reward {name}: is called as f(prompt, response), and takes {signature}") from None
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = {p.name: p for p in parameters[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for option in options:
        if option not in known and not takes_any:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known) or 'none'}"
            raise OptionError(f"reward {name}: unknown option {option!r}; {hint}")
    missing = [k for k, p in known.items() if p.default is p.empty and k not in options]
    if missing:
        given_instead = "; what a problem has is in prompt.answer and prompt.fields" if ":" in name else ""
        raise OptionError(f"reward {name}: needs the option {missing[0]!r}{given_instead}")
    return functools.partial(function, **options)
