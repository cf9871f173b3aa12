"""The embedded server as SGLang up to 0.5.17: without /begin_weight_update and /end_weight_update.

usage: older_server.py --model HF_DIR --port PORT
"""

from __future__ import annotations

import sys
from typing import Any

from megasapo.rollout.local import main
from megasapo.rollout.local.app import App
from megasapo.rollout.local.control import Control

SESSION = ("/begin_weight_update", "/end_weight_update")


def without_session(asgi: Any) -> Any:
    def older(self: App) -> Any:
        guarded = asgi(self)
        routes = guarded._app.router.routes
        routes[:] = [route for route in routes if route.path not in SESSION]
        return guarded

    return older


if __name__ == "__main__":
    App.asgi = without_session(App.asgi)  # type: ignore[method-assign]
    Control._session = property(lambda self: True, lambda self, value: None)  # type: ignore[assignment]
    sys.exit(main())
