"""Binds the options of a reward to its function and refuses those that it does not have."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any


def bind_options(
    name: str, function: Callable[..., Any], options: dict[str, Any], given: tuple[str, ...] = ()
) -> functools.partial[Any]:
    """`function(prompt, response, **options)` with the options filled in; `given` are filled in by the caller.

    Raises ValueError that names an unknown or a missing option.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) < 2:
        raise ValueError(
            f"reward {name}: must take (prompt, response), takes ({', '.join(p.name for p in parameters)})"
        )
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = {p.name: p for p in parameters[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for option in options:
        if option in given or (option not in known and not takes_any):
            usable = [k for k in known if k not in given]
            close = difflib.get_close_matches(option, usable, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(usable) or 'none'}"
            raise ValueError(f"reward {name}: unknown option {option!r}; {hint}")
    missing = [k for k, p in known.items() if p.default is p.empty and k not in options and k not in given]
    if missing:
        raise ValueError(f"reward {name}: needs the option {missing[0]!r}")
    return functools.partial(function, **options)
