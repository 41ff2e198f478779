"""Anthropic's messages: requests read, answers written, whole and as a stream."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec

from ctpo_megatron.agents.http.anthropic_reading import read_history, read_tools
from ctpo_megatron.agents.http.bodies import Body
from ctpo_megatron.agents.http.dialects import Asked, flag, message_list, model_name, pieces, positive, texts
from ctpo_megatron.agents.http.parameters import ANTHROPIC, not_applied
from ctpo_megatron.agents.http.refusals import Refusal, shown
from ctpo_megatron.agents.protocols import AgentAnswer, AgentRequest, ToolCall

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_KINDS = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
_THINKING = {"enabled": True, "disabled": False}


class AnthropicMessages:
    """The dialect of `POST /v1/messages`."""

    sign_of_life = b'event: ping\ndata: {"type":"ping"}\n\n'

    def read(self, body: Body, *, retries: int, overlooked: Collection[str]) -> Asked:
        """Returns what `body` asks for. Raises Refusal."""
        values = body.values
        given = not_applied(values, ANTHROPIC, overlooked)
        output = values.get("output_config")
        if isinstance(output, dict) and output.get("format") and "output_config" not in overlooked:
            raise Refusal(f"output_config.format is refused: {ANTHROPIC['output_format'].words}")
        request = AgentRequest(
            messages=read_history(values.get("system"), message_list(values)),
            tools=read_tools(values.get("tools")),
            max_tokens=positive(values, "max_tokens"),
            digest=body.digest,
            retries=retries,
            stop=texts(values, "stop_sequences"),
            thinking=_thinking(values),
        )
        return Asked(request, model=model_name(values), stream=flag(values, "stream"), not_applied=given)

    def answer(self, asked: Asked, answer: AgentAnswer) -> bytes:
        """Returns the JSON of a whole answer."""
        content: list[dict[str, Any]] = []
        if answer.reasoning:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": answer.id})
        if answer.content:
            content.append({"type": "text", "text": answer.content})
        content += [{"type": "tool_use", "id": each.id, "name": each.name, "input": _input(each)} for each in answer.calls]
        end = {"stop_reason": _REASONS[answer.finish], "stop_sequence": None}
        return msgspec.json.encode(_message(asked, answer, len(answer.token_ids)) | {"content": content} | end)

    def stream(self, asked: Asked, answer: AgentAnswer) -> bytes:
        """Returns all events of an answer."""
        return b"".join(_events(asked, answer))

    def error(self, refusal: Refusal) -> bytes:
        """Returns the JSON of an error."""
        error = {"type": _KINDS.get(refusal.status, "invalid_request_error"), "message": refusal.message}
        return msgspec.json.encode({"type": "error", "error": error, "code": refusal.code})

    def stream_error(self, refusal: Refusal) -> bytes:
        """Returns the event of an error within a stream."""
        return b"event: error\ndata: " + self.error(refusal) + b"\n\n"


def _thinking(values: Mapping[str, Any]) -> bool | None:
    given = values.get("thinking")
    if given is None:
        return None
    if not isinstance(given, dict) or not isinstance(given.get("type"), str):
        raise Refusal(f"thinking is an object with a type, not {shown(given)}")
    return _THINKING.get(given["type"])


def _message(asked: Asked, answer: AgentAnswer, sampled: int) -> dict[str, Any]:
    usage = {"input_tokens": len(answer.prompt_ids), "output_tokens": sampled}
    return {
        "id": answer.id,
        "type": "message",
        "role": "assistant",
        "model": asked.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def _input(call: ToolCall) -> Any:
    """The arguments as a value. What is no JSON, which a usable call has not, is brought as it is: nothing is lost."""
    try:
        return msgspec.json.decode(call.arguments or "{}")
    except msgspec.DecodeError:
        return {"arguments": call.arguments}


def _events(asked: Asked, answer: AgentAnswer) -> Iterator[bytes]:
    yield _event("message_start", {"message": _message(asked, answer, 0)})
    for index, (block, deltas) in enumerate(_blocks(answer)):
        yield _event("content_block_start", {"index": index, "content_block": block})
        for delta in deltas:
            yield _event("content_block_delta", {"index": index, "delta": delta})
        yield _event("content_block_stop", {"index": index})
    usage = {"input_tokens": len(answer.prompt_ids), "output_tokens": len(answer.token_ids)}
    end = {"stop_reason": _REASONS[answer.finish], "stop_sequence": None}
    yield _event("message_delta", {"delta": end, "usage": usage})
    yield _event("message_stop", {})


def _blocks(answer: AgentAnswer) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield each block as it begins, empty, and what is added to it."""
    if answer.reasoning:
        deltas = [{"type": "thinking_delta", "thinking": text} for text in pieces(answer.reasoning)]
        signature = {"type": "signature_delta", "signature": answer.id}
        yield {"type": "thinking", "thinking": "", "signature": ""}, [*deltas, signature]
    if answer.content:
        yield {"type": "text", "text": ""}, [{"type": "text_delta", "text": text} for text in pieces(answer.content)]
    for call in answer.calls:
        parts = [{"type": "input_json_delta", "partial_json": text} for text in pieces(call.arguments)]
        yield {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}, parts


def _event(kind: str, values: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind} | values))
