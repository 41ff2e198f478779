"""What a chat template writes from the end of an assistant's turn to the start of its next, around what a tool said."""

from __future__ import annotations

from collections.abc import Sequence

from ctpo_megatron.errors import ModelError, RenderError
from ctpo_megatron.rollout.template import ChatTemplate, Message
from ctpo_megatron.rollout.tokens import MARK, Tokens

# stand-ins that the template is rendered with, to find what it writes around them
_ASSISTANT, _TOOL = "assistantsaysthis", "toolsaysthis"


class ToolFrames:
    """A tool's output as the template writes it in its own role, and in the user's.

    `roles` are those that the template writes, the tool's first; `ends` has for each the stop token that ends the turn before
    it, None where the template writes none there. Raises ModelError where it writes neither role.
    """

    def __init__(self, template: ChatTemplate, tokens: Tokens) -> None:
        self._template = template
        self._tokens = tokens
        self.roles = self._find_roles()
        self.ends = {role: self._find_end(role) for role in self.roles}

    def text(self, role: str, outputs: Sequence[str]) -> str:
        """Text after the words of an assistant's turn, up to its next: the turn's end, and the last of `outputs`.

        The others were said after turns before this one. Names of special tokens in outputs bear marks; the mark's own
        character, if a program writes it, is shown as one that cannot be read.
        """
        outputs = [output.replace(MARK, "\N{REPLACEMENT CHARACTER}") for output in outputs]
        words = _ASSISTANT
        while any(words in output for output in outputs):
            words += "s"
        messages: list[Message] = [{"role": "user", "content": "question"}]
        for output in outputs:
            messages.append({"role": "assistant", "content": "answer"})
            messages.append({"role": role, "content": self._tokens.mark(output)})
        messages[-2]["content"] = words
        rendered = self._template.render(messages, prompt=True)
        _, found, after = rendered.partition(words)
        if not found or words in after:
            raise RenderError(f"{self._template.name} does not write an assistant's words as they are; it writes {rendered!r}")
        return after

    def after_end(self, end: str | None, outputs: Sequence[str]) -> str:
        """What follows a turn that ended with the stop token `end`; with None, with the template's own.

        Where roles differ in the token that ends the turn before them, `end` decides the role. Where it is none of theirs, it
        counts among the assistant's words, and the template's end of the turn comes after it.
        """
        role = self.role_after(end)
        frame, own = self.text(role, outputs), self.ends[role]
        return frame if own is None or end not in (None, own) else frame[frame.index(own) + len(own) :]

    def role_after(self, end: str | None) -> str:
        """The role in which a tool speaks after a turn that ended with the stop token `end`."""
        fitting = [role for role, own in self.ends.items() if own is not None and end in (None, own)]
        return fitting[0] if fitting else self.roles[0]

    def _find_roles(self) -> tuple[str, ...]:
        found, words = [], ""
        for role in ("tool", "user"):
            try:
                if self.text(role, [_TOOL]).count(_TOOL) == 1:
                    found.append(role)
            except RenderError as error:
                words = f": {error}"
        if not found:
            raise ModelError(f"{self._template.name} renders neither a tool's nor a user's turn after an assistant's{words}")
        return tuple(found)

    def _find_end(self, role: str) -> str | None:
        before = self.text(role, [_TOOL]).partition(_TOOL)[0]
        return None if (found := self._tokens.find_end(before)) is None else found[0]
