"""OpenAI's chat completions: requests read, answers written, whole and as a stream."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec

from ctpo_megatron.agents.http.bodies import Body
from ctpo_megatron.agents.http.dialects import PIECE_TOKENS, Asked, flag, message_list, model_name, pieces, positive, texts
from ctpo_megatron.agents.http.openai_messages import read_messages, read_tools
from ctpo_megatron.agents.http.parameters import OPENAI, not_applied
from ctpo_megatron.agents.http.refusals import Refusal, shown
from ctpo_megatron.agents.protocols import AgentAnswer, AgentRequest

_KINDS = {401: "authentication_error", 404: "not_found_error"}


class OpenAIChat:
    """The dialect of `POST /v1/chat/completions`."""

    sign_of_life = b": waiting for the model\n\n"

    def read(self, body: Body, *, retries: int, overlooked: Collection[str]) -> Asked:
        """Returns what `body` asks for. Raises Refusal."""
        values = body.values
        given = not_applied(values, OPENAI, overlooked)
        longest = [each for each in (positive(values, "max_tokens"), positive(values, "max_completion_tokens")) if each]
        options = values.get("stream_options") or {}
        if not isinstance(options, dict):
            raise Refusal(f"stream_options is an object, not {shown(options)}")
        request = AgentRequest(
            messages=read_messages(message_list(values)),
            tools=read_tools(values.get("tools")),
            max_tokens=min(longest, default=None),
            digest=body.digest,
            retries=retries,
            stop=texts(values, "stop"),
            thinking=_thinking(values),
        )
        return Asked(
            request,
            model=model_name(values),
            stream=flag(values, "stream"),
            not_applied=given,
            usage=flag(options, "include_usage"),
            logprobs=flag(values, "logprobs"),
            token_ids=flag(values, "return_token_ids"),
            tokens_as_ids=flag(values, "return_tokens_as_token_ids"),
        )

    def answer(self, asked: Asked, answer: AgentAnswer) -> bytes:
        """Returns the JSON of a whole answer."""
        calls = [_call(each) for each in answer.calls]
        message: dict[str, Any] = {"role": "assistant", "content": answer.content or (None if calls else "")}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if calls:
            message["tool_calls"] = calls
        choice: dict[str, Any] = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish}
        if asked.logprobs:
            choice["logprobs"] = {"content": _logprobs(asked, answer, 0, len(answer.token_ids)), "refusal": None}
        whole = _frame(asked, answer, "chat.completion") | {"choices": [choice], "usage": _usage(answer)}
        if asked.token_ids:
            choice["token_ids"] = list(answer.token_ids)
            whole["prompt_token_ids"] = list(answer.prompt_ids)
        return msgspec.json.encode(whole)

    def stream(self, asked: Asked, answer: AgentAnswer) -> bytes:
        """Returns all events of an answer: role, id and name come once, lists of tokens inside `delta`."""
        frame = _frame(asked, answer, "chat.completion.chunk")
        if asked.usage:
            frame["usage"] = None
        events: list[bytes] = []
        for choice in _choices(asked, answer):
            chunk = frame | {"choices": [choice]}
            if asked.token_ids and not events:
                chunk["prompt_token_ids"] = list(answer.prompt_ids)
            events.append(_event(chunk))
        if asked.usage:
            events.append(_event(frame | {"choices": [], "usage": _usage(answer)}))
        return b"".join([*events, b"data: [DONE]\n\n"])

    def error(self, refusal: Refusal) -> bytes:
        """Returns the JSON of an error."""
        kind = _KINDS.get(refusal.status, "invalid_request_error")
        error = {"message": refusal.message, "type": kind, "param": None, "code": refusal.code}
        return msgspec.json.encode({"error": error})

    def stream_error(self, refusal: Refusal) -> bytes:
        """Returns the event of an error within a stream."""
        return b"data: " + self.error(refusal) + b"\n\n"


def _thinking(values: Mapping[str, Any]) -> bool | None:
    given = values.get("chat_template_kwargs") or {}
    if not isinstance(given, dict) or given.keys() - {"enable_thinking", "thinking"}:
        raise Refusal(f"chat_template_kwargs may hold enable_thinking or thinking, and nothing else; it is {shown(given)}")
    for name in given:
        if given[name] is not None:
            return flag(given, name)
    return False if values.get("reasoning_effort") == "none" else None


def _frame(asked: Asked, answer: AgentAnswer, kind: str) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": int(time.time()), "model": asked.model}


def _usage(answer: AgentAnswer) -> dict[str, int]:
    prompt, sampled = len(answer.prompt_ids), len(answer.token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def _call(call: Any) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprobs(asked: Asked, answer: AgentAnswer, begin: int, end: int) -> list[dict[str, Any]]:
    made = []
    for number in range(begin, end):
        text = answer.texts[number]
        whole = "\ufffd" not in text  # a token that is part of a character has no bytes that its text could tell
        made.append(
            {
                "token": f"token_id:{answer.token_ids[number]}" if asked.tokens_as_ids else text,
                "logprob": answer.logp[number],
                "bytes": list(text.encode("utf-8", "replace")) if whole else None,
                "top_logprobs": [],
            }
        )
    return made


def _choices(asked: Asked, answer: AgentAnswer) -> Iterator[dict[str, Any]]:
    """Yield the parts of the streamed choice."""
    yield _part({"role": "assistant", "content": ""})
    for text in pieces(answer.reasoning or ""):
        yield _part({"reasoning_content": text})
    for text in pieces(answer.content or ""):
        yield _part({"content": text})
    for index, call in enumerate(answer.calls):
        first, *others = pieces(call.arguments) or [""]
        yield _part({"tool_calls": [{"index": index} | _call(call) | {"function": {"name": call.name, "arguments": first}}]})
        for text in others:
            yield _part({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
    if asked.logprobs or asked.token_ids:
        for begin in range(0, len(answer.token_ids), PIECE_TOKENS):
            end = min(begin + PIECE_TOKENS, len(answer.token_ids))
            part = _part({"token_ids": list(answer.token_ids[begin:end])} if asked.token_ids else {})
            if asked.logprobs:
                part["logprobs"] = {"content": _logprobs(asked, answer, begin, end), "refusal": None}
            yield part
    yield _part({}, answer.finish)


def _part(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
