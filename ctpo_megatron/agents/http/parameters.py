"""What becomes of each parameter that a client may send: it is honoured, set by the run, refused, or means nothing here.

A run decides how it samples, else rewards of one group would not compare, so what only shapes chance is *set*: the request is
answered, and the header `x-not-applied` names what was asked for and not done. What changes which text can come out at all, and
which a harness relies on, is *refused*, unless the run is told to overlook it. A parameter that is not in the table is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ctpo_megatron.agents.http.refusals import Refusal, shown
from ctpo_megatron.errors import near_miss

Kind = Literal["honoured", "set", "refused", "nothing"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of a parameter. `words`: how, or instead of what. `harmless`: values that ask for nothing special."""

    kind: Kind
    words: str
    harmless: tuple[Any, ...] = ()


Rules = Mapping[str, Rule]


def _rules(kind: Kind, words: str, *names: str, harmless: tuple[Any, ...] = ()) -> Rules:
    return dict.fromkeys(names, Rule(kind, words, harmless))


_SAMPLING = "the run's own, in the header `x-sampling`"
_STOP = "the answer ends with the first of at most 16 texts"
_CHOICE = "the model chooses"
_GRAMMAR = "nothing is sampled by a grammar; say in the prompt what form the answer has"
_TEXT = "only text is generated"

OPENAI: Rules = {
    **_rules("honoured", "the conversation", "messages", "tools"),
    **_rules("honoured", "any name is accepted, and is what the answer says", "model"),
    **_rules("honoured", "of one answer; never more than the attempt has left", "max_tokens", "max_completion_tokens"),
    **_rules("honoured", _STOP, "stop"),
    **_rules("honoured", "server-sent events; with `include_usage` the last one has the usage", "stream", "stream_options"),
    **_rules("honoured", "of all sampled tokens, the end of the turn too", "logprobs"),
    **_rules("honoured", "adds `prompt_token_ids` and `token_ids`", "return_token_ids"),
    **_rules("honoured", "tokens of `logprobs` are written `token_id:N`", "return_tokens_as_token_ids"),
    **_rules("honoured", "`enable_thinking` or `thinking`: true or false; other keys are refused", "chat_template_kwargs"),
    **_rules("set", "`none` is honoured: without thinking; else the run's own", "reasoning_effort", harmless=("none",)),
    **_rules("set", _SAMPLING, "temperature", "top_p", "top_k", "min_p", "seed"),
    **_rules("set", _SAMPLING, "frequency_penalty", "presence_penalty", harmless=(0,)),
    **_rules("set", _SAMPLING, "repetition_penalty", harmless=(1,)),
    **_rules("set", _CHOICE, "tool_choice", harmless=("auto",)),
    **_rules("set", "as many calls as the model writes", "parallel_tool_calls", harmless=(True,)),
    **_rules("set", "only the sampled token is told", "top_logprobs", harmless=(0, 1)),
    **_rules("set", _CHOICE, "verbosity", harmless=("medium",)),
    **_rules("refused", "one answer a request; ask again for another attempt", "n", "best_of", harmless=(1,)),
    **_rules("refused", "the model's own distribution is trained", "logit_bias", harmless=({},)),
    **_rules("refused", _GRAMMAR, "response_format", harmless=({"type": "text"},)),
    **_rules("refused", _GRAMMAR, "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
    **_rules("refused", _GRAMMAR, "regex", "ebnf"),
    **_rules("refused", _TEXT, "audio", "modalities", harmless=(["text"],)),
    **_rules("refused", "use `tools`", "functions", harmless=([],)),
    **_rules("refused", "use `tool_choice`", "function_call", harmless=("auto", "none")),
    **_rules("refused", "nothing is foretold", "prediction"),
    **_rules("refused", "the endpoint searches nothing; bring a tool", "web_search_options"),
    **_rules("refused", "the sampled turn ends where the model ends it", "ignore_eos", "min_tokens", harmless=(False, 0)),
    **_rules("refused", "a turn begins anew", "continue_final_message", "echo", harmless=(False,)),
    **_rules("refused", "a turn begins anew", "add_generation_prompt", harmless=(True,)),
    **_rules("nothing", "the attempt's key says whose it is", "user", "metadata", "safety_identifier", "session_id", "rid"),
    **_rules("nothing", "nothing is sold or stored here", "store", "service_tier", "priority"),
    **_rules("nothing", "prefixes are cached by themselves", "prompt_cache_key", "prompt_cache_retention", "cache_salt"),
    **_rules("nothing", "special tokens are no text here", "skip_special_tokens"),
}

ANTHROPIC: Rules = {
    **_rules("honoured", "the conversation", "messages", "system", "tools"),
    **_rules("honoured", "any name is accepted, and is what the answer says", "model"),
    **_rules("honoured", "of one answer; never more than the attempt has left", "max_tokens"),
    **_rules("honoured", _STOP, "stop_sequences"),
    **_rules("honoured", "server-sent events", "stream"),
    **_rules("honoured", "`enabled` and `disabled`; else the run's own. `budget_tokens` is not applied", "thinking"),
    **_rules("set", _SAMPLING, "temperature", "top_p", "top_k"),
    **_rules("set", _CHOICE, "tool_choice", harmless=({"type": "auto"},)),
    **_rules("set", "`effort` is the model's; a `format` is refused", "output_config", harmless=({},)),
    **_rules("set", "nothing is removed from the history", "context_management", harmless=({},)),
    **_rules("refused", _GRAMMAR, "output_format"),
    **_rules("refused", "a turn begins anew", "prefill"),
    **_rules("refused", "the endpoint calls no servers; bring a tool", "mcp_servers", harmless=([],)),
    **_rules("refused", "there are no containers here", "container"),
    **_rules("nothing", "the attempt's key says whose it is", "metadata", "betas"),
    **_rules("nothing", "nothing is sold here", "service_tier", "inference_geo", "speed"),
    **_rules("nothing", "prefixes are cached by themselves", "cache_control"),
}


def not_applied(body: Mapping[str, Any], rules: Rules, overlooked: Iterable[str]) -> tuple[str, ...]:
    """Returns the parameters of `body` that were set otherwise than asked. Raises Refusal for one that is refused.

    `overlooked`: parameters that are set where they would be refused.
    """
    found = []
    for name, value in body.items():
        rule = rules.get(name)
        if value is None or (rule is not None and (rule.kind in ("honoured", "nothing") or value in rule.harmless)):
            continue
        if rule is not None and rule.kind == "set":
            found.append(name)
        elif name in overlooked:
            found.append(_printable(name))
        elif rule is None:
            raise Refusal(f"{shown(name)} is no parameter of this endpoint.{near_miss(name, rules)}{_OVERLOOK}")
        else:
            raise Refusal(f"{name} = {shown(value)} is refused: {rule.words}.{_OVERLOOK}")
    return tuple(found)


_OVERLOOK = " Leave it out, or name it among the parameters that the run overlooks."


def _printable(name: str) -> str:
    return "".join(each for each in name if each.isalnum() or each in "_-.")


def table(rules: Rules) -> str:
    """Returns the rows of the documentation's table, in the order of the rules."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name, rule in rules.items():
        harmless = ", ".join(f"`{each!r}`" for each in rule.harmless)
        rows.setdefault((rule.kind, rule.words, harmless), []).append(f"`{name}`")
    return "\n".join(f"| {', '.join(names)} | {kind} | {words} | {free} |" for (kind, words, free), names in rows.items())
