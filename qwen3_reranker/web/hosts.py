"""Which names a server on this machine answers to, so that no web page reaches it by DNS rebinding.

Decides what stands before any route: the `Host` of a request and, where it is asked for, the
`Origin`. Knows nothing of keys and bodies.

A page of a foreign site may point its own name at 127.0.0.1 and then talk to a server here as if it
were its own. Its requests still carry the foreign name.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import InputError, named

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Say whether an address to listen at is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_name(header: str) -> str:
    """Return the name of a `Host` header in lower case, without port and brackets.

    Example:
        >>> host_name("LocalHost:8012"), host_name("[::1]:8012"), host_name("a@b")
        ('localhost', '::1', '')
    """
    try:
        parts = urlsplit(f"//{header}")
        _ = parts.port  # a port that is no number makes the header none
    except ValueError:
        return ""
    is_plain = parts.netloc == header and "@" not in header
    return (parts.hostname or "").rstrip(".") if is_plain else ""


def _checked_name(given: str) -> str:
    name = host_name(given.strip())
    if not name or "*" in name:
        raise InputError(
            f"an allowed host must be a name such as rerank.example, got {named(given)}, which no "
            "request carries. Leave out scheme, path and wildcards, and give each name."
        )
    return name


class AllowedHosts:
    """Passes on requests that name this server as it is known, and refuses others.

    Args:
        app: What answers.
        names: Names beside those of loopback; a port is passed over.
        refuse: Returns the response to a refused request, given what is wrong.
        only_own_pages: Refuse a request whose `Origin` is another site, as browsers send it.

    Raises:
        InputError: If a name is none that a request could carry.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        names: Iterable[str] = (),
        refuse: Callable[[str], Response],
        only_own_pages: bool = False,
    ) -> None:
        self._app = app
        self._names = {*LOOPBACK_NAMES, *map(_checked_name, names)}
        self._refuse = refuse
        self._only_own_pages = only_own_pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request or a websocket's handshake, or refuse it."""
        fault = self._fault(scope) if scope["type"] in ("http", "websocket") else None
        if fault is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._refuse(fault)(scope, receive, send)

    def _fault(self, scope: Scope) -> str | None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or host_name(hosts[0]) not in self._names:
            return (
                "the Host header names another server. Call this one as localhost, or start it "
                "with --allowed-host NAME."
            )
        origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
        # A page's own origin is its scheme and the very name that it calls this server by.
        own = (f"http://{hosts[0]}", f"https://{hosts[0]}")
        if self._only_own_pages and any(origin not in own for origin in origins):
            return "the request comes from the page of another site. Use this server's own page."
        return None
