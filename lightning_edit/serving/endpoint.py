# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Requests to a server: HTTP with a time limit, an optional key, and errors that say what to do."""

# http.client rather than urllib: it follows no redirect, to which a key would be sent along, and
# opens nothing but http and https.

from __future__ import annotations

import http.client
import json
import os
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import urlsplit

from lightning_edit.core.errors import ServerError
from lightning_edit.rendering.escaping import visible
from lightning_edit.serving.server import JSON

__all__ = ["API_KEY", "Client", "Endpoint"]

#: Name of the environment variable that holds the server's key, if it wants one.
API_KEY = "LIGHTNING_EDIT_API_KEY"

# A server that sends more than this says nothing that is wanted.
MAX_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Endpoint:
    """Where a server is.

    Args:
        url: Its address, such as ``http://127.0.0.1:8000``.
        timeout: Seconds to wait for it.
        api_key_env: Name of the environment variable with its key. The key is sent as bearer token
            and appears nowhere else.
        hint: How the server must be started, for errors.

    Raises:
        ServerError: If the address is none of http or https.

    Examples:
        >>> Endpoint("file:///etc/passwd")
        Traceback (most recent call last):
        ...
        lightning_edit.core.errors.ServerError: `file:///etc/passwd` is no address of a server...
    """

    url: str
    timeout: float = 60.0
    api_key_env: str = API_KEY
    hint: str = ""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
            is_address = is_address and not parts.username and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address:
            raise ServerError(
                f"`{visible(self.url)}` is no address of a server. Give `url` as "
                "`http://HOST:PORT` or `https://HOST`; a key belongs into the environment "
                f"variable {self.api_key_env}."
            )
        if self.timeout <= 0:
            raise ServerError(f"`timeout` is expected to be positive, but got {self.timeout}.")

    def get(self, path: str) -> JSON:
        """What the server answers to GET: JSON, or text where it sends none.

        Raises:
            ServerError: If it does not answer, or with an error.
        """
        return self._ask("GET", path, None)

    def post(self, path: str, body: JSON) -> JSON:
        """What the server answers to POST: JSON, or text where it sends none.

        Raises:
            ServerError: If it does not answer, or with an error.
        """
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: JSON) -> JSON:
        parts = urlsplit(self.url)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
        key = os.environ.get(self.api_key_env, "").strip()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, parts.path.rstrip("/") + path, data, headers)
            response = connection.getresponse()
            status, answer = response.status, response.read(MAX_BYTES)
        except TimeoutError as error:
            raise ServerError(
                f"{self.url} did not answer {path} within {self.timeout:g} seconds. It may be "
                "loading or overloaded: look at its log, and give a longer `timeout`."
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = _without(str(error) or type(error).__name__, key)
            raise ServerError(
                f"No server answers at {self.url} ({reason}). Start it, or give the address of "
                "the one that runs (`url`)."
            ) from error
        finally:
            connection.close()
        text = answer.decode("utf-8", errors="replace")
        if status >= 300:
            raise ServerError(self._refusal(status, path, _without(_message(text), key)))
        try:
            found: JSON = json.loads(text)
        except ValueError:
            return text
        return found

    def _refusal(self, status: int, path: str, message: str) -> str:
        said = f": {message}" if message else ""
        what = f"{self.url} answered {path} with {status}{said}."
        if status in (401, 403):
            return (
                f"{what} It wants a key: put it into the environment variable {self.api_key_env}."
            )
        if status < 400:
            return f"{what} It sends elsewhere, which is not followed. Give its address as `url`."
        if status in (404, 405, 501):
            return (
                f"{what} It is another server, or does not take adapters now. {self.hint}".strip()
            )
        return f"{what} {self.hint}".strip()


@dataclass(frozen=True)
class Client:
    """Base of what speaks to one kind of server.

    Args:
        url: Its address.
        timeout: Seconds to wait for it.
        api_key_env: Name of the environment variable with its key.
    """

    #: How such a server must be started, for errors.
    hint: ClassVar[str]

    url: str
    timeout: float = 60.0
    api_key_env: str = API_KEY

    @property
    def endpoint(self) -> Endpoint:
        """Where the server is."""
        return Endpoint(self.url, self.timeout, self.api_key_env, self.hint)


def _message(text: str) -> str:
    """What an answer says of an error, in one line."""
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    for key in ("error", "message", "detail", "error_message"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    words = " ".join(str(found).split()) if found else ""
    return visible(words[:300]).rstrip(".")


def _without(text: str, key: str) -> str:
    return text.replace(key, "…") if key else text
