"""The errors of the server, in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

TYPES = {401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError", 501: "NotImplementedError"}


class BadRequest(Exception):
    """A request that is not answered with 200.

    Args:
      message: what is wrong, in words.
      status: the HTTP status.
      param: the request's field that is wrong, if it is one field.
      kind: the error's type, as OpenAI's API names it; by default the one of the status.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, kind: str | None = None):
        super().__init__(message)
        self.status, self.param, self.kind = status, param, kind or TYPES.get(status, "BadRequestError")

    def body(self) -> dict[str, Any]:
        """Return the response's JSON: ``{"error": {...}}``."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}}


class ErrorFields(BaseModel):
    """What is wrong: in words, by type, with the request's field if it is one, and the HTTP status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(BaseModel):
    """The body of every answer that is not 200."""

    error: ErrorFields
