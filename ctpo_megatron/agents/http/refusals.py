"""Why a request is refused: one exception, with what each client needs to take it as final.

    status   when                                        why this one
    400      the request cannot be used                  no client repeats it
    401      no such key, or not of this URL             says no more than that
    404      no such place, or the attempt is over       final for clients that sort errors by kind: litellm 1.9x knows 400 as
                                                         `BadRequestError`, which mini-swe-agent 2 repeats ten times, and 404 as
                                                         `NotFoundError`, which it does not
    405, 413 another method; a body that is too large    no client repeats it

No answer has a status that makes a client repeat what cannot heal (408, 409, 429, 500 and above), and each says
`x-should-retry: false`, which the clients of OpenAI and Anthropic obey. What heals is waited for.
"""

from __future__ import annotations

SHOWN_CHARACTERS = 200  # of what a client sent, in a message to it


class Refusal(Exception):
    """A request that is answered with an error. `status`: of HTTP; `code`: a word for programs; `message`: for people."""

    def __init__(self, message: str, *, status: int = 400, code: str = "request_unusable") -> None:
        super().__init__(message)
        self.message, self.status, self.code = message, status, code


def shown(value: object) -> str:
    """Returns `value` as a message quotes it: cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text):,} characters)"
