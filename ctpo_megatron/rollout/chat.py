"""Between text and tokens, by the model's own chat template.

Rollouts never render a conversation twice: a prompt is rendered once, sampled tokens are kept as they came, and a tool's
output is put between them as what the template writes between two assistant turns. Demonstrations become the same streams.
docs/chat.md says what follows from that.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctpo_megatron.config.model import ChatConfig
from ctpo_megatron.errors import ModelError, RenderError
from ctpo_megatron.imports import modules_stay, packages_told_quickly
from ctpo_megatron.rollout.comparison import compare
from ctpo_megatron.rollout.frames import ToolFrames
from ctpo_megatron.rollout.imagined import OUTPUTS, imagine
from ctpo_megatron.rollout.messages import MessageForms
from ctpo_megatron.rollout.same_tokens import check_same_tokens
from ctpo_megatron.rollout.stops import find_stop_tokens
from ctpo_megatron.rollout.talk import Talk
from ctpo_megatron.rollout.template import ChatTemplate, Message, given_template
from ctpo_megatron.rollout.tokens import Tokens
from ctpo_megatron.rollout.turns import SpokenTurn, TurnReader, common_start, difference

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # one class of transformers 5: what TOKENIZER says, and no more


class ChatTokenizer:
    """The tokenizer and chat template of a model directory, with what the configuration says about them.

    Raises ModelError or ConfigError where the directory has no tokenizer or chat template, or the template does not end an
    assistant's turn with one of the stop tokens.
    """

    def __init__(self, model_path: str | Path, chat: ChatConfig | None = None) -> None:
        self._path = Path(model_path)
        chat = chat or ChatConfig()
        self._given = chat
        self._tokenizer = _load(self._path)
        check_same_tokens(self._path, self._tokenizer)
        if chat.chat_template is not None:
            self._tokenizer.chat_template = given_template(chat.chat_template)
        if not self._tokenizer.chat_template:
            raise ModelError(
                f"{self._path} has no chat template (chat_template.jinja, or in tokenizer_config.json); give one with "
                "model.chat_template"
            )
        self.stop_token_ids: list[int] = find_stop_tokens(self._path, self._tokenizer, chat.stop_tokens)
        self._tokens = Tokens(self._tokenizer, self.stop_token_ids)
        self._template = ChatTemplate(self._tokenizer, str(self._path), chat)
        self._frames = ToolFrames(self._template, self._tokens)
        self._turns = TurnReader(self._template, self._tokens)
        self._forms = MessageForms(self._template, self._frames.roles[0])
        self._talk = Talk(self._template, self._tokens, self._forms)
        self._end = self._find_end()
        self._said: set[str] = set()

    @property
    def template(self) -> str:
        """Returns the chat template itself."""
        return self._template.source

    @property
    def thinks(self) -> bool:
        """Returns whether the template knows reasoning between think tags."""
        return "</think>" in self._template.source

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of `messages`, generation prompt included. Raises RenderError where the template cannot write them."""
        return self._tokens.ids(self._template.render(self._forms.fitting(messages), prompt=True))

    def prompt_lengths(self, conversations: Sequence[Sequence[Message]]) -> list[int]:
        """Number of tokens that `prompt_ids` gives each of `conversations`; many at once are quicker than one by one."""
        return self._tokens.lengths([self._template.render(self._forms.fitting(each), prompt=True) for each in conversations])

    def assistant_ids(self, text: str) -> list[int]:
        """Token ids of an assistant's turn of plain `text`, its end token included."""
        return [*self._tokens.plain_ids(text), self._tokens.ends[self._end]]

    def tool_ids(self, text: str, *, earlier: Sequence[str] = (), end: int | None = None) -> list[int]:
        """Token ids between an assistant's turn, which ended with the token `end`, and its next, for a tool that said `text`.

        `earlier` are the outputs after turns before this one; `end` None is the template's own end of a turn. Names of special
        tokens in `text` stay plain text, so a program cannot write turns of the conversation.
        """
        name = next((name for name, id_ in self._tokens.ends.items() if id_ == end), self._end)
        return self._tokens.ids_after(name, self._frames.after_end(name, [*earlier, text]))

    def talk_ids(
        self, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] = (), thinking: bool | None = None
    ) -> list[int]:
        """Token ids of an agent's conversation (`rollout.protocols.TalkChat`)."""
        return self._talk.whole(messages, tools, thinking)

    def tail_ids(
        self,
        before: Sequence[Message],
        new: Sequence[Message],
        *,
        end: int,
        tools: Sequence[dict[str, Any]] = (),
        thinking: bool | None = None,
    ) -> list[int]:
        """Token ids of what is new in an agent's conversation (`rollout.protocols.TalkChat`)."""
        return self._talk.tail(before, new, end, tools, thinking)

    def demonstration(self, messages: Sequence[Message], start: int) -> tuple[list[int], list[tuple[str, list[int]]]]:
        """Token ids of the prompt messages[:start], and of what follows it as (role, ids) of assistant and tool by turns.

        An assistant's turn ends with its stop token. Raises RenderError where the template cannot write the conversation,
        leaves a key of a message out, or writes the whole otherwise than turn by turn.
        """
        messages = self._forms.fitting(messages)
        self._forms.check_keys(messages)
        turns = self._turns.read(messages, start)
        marked = [*messages[:start], *(self._tokens.mark(message) for message in messages[start:])]
        turns = self._as_in_whole(turns, self._template.render(marked, prompt=False))
        parts: list[tuple[str, list[int]]] = []
        for turn in turns:
            parts.append(("assistant", self._tokens.ids_after(turn.head, turn.body + turn.end)))
            if turn.tail:
                parts.append(("tool", self._tokens.ids_after(turn.end, turn.between)))
        return self._tokens.ids(turns[0].head), parts

    def check_prompt(self, messages: Sequence[Message]) -> None:
        """Raise RenderError where a prompt has a key that the template leaves out, or other tokens than the template's own."""
        messages = self._forms.fitting(messages)
        self._forms.check_keys(messages)
        ours, theirs = self.prompt_ids(messages), self._template.token_ids(messages)
        if ours != theirs:
            raise RenderError(f"the tokenizer reads the prompt in two ways. {self._ids_differ(ours, theirs)}")

    def check_turns(self, messages: Sequence[Message]) -> None:
        """Raise RenderError where a rollout from the prompt `messages` would not be what the template writes of it.

        Two turns with a tool's output after each are built as a rollout builds them, and compared with the template's rendering
        of the whole conversation, for every stop token after which a tool can speak.
        """
        for end in dict.fromkeys([self._end, *filter(None, self._frames.ends.values())]):
            self._check_turn_ids(self._imagined_turns(self._forms.fitting(messages), end))

    def save(self, directory: Path) -> None:
        """Write into a model directory the template and stop tokens that the configuration gave, so that it stands alone."""
        if self._given.chat_template is not None:
            (directory / "chat_template.jinja").write_text(self._template.source, encoding="utf-8")
        if self._given.stop_tokens:
            file = directory / "generation_config.json"
            config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            file.write_text(json.dumps(config | {"eos_token_id": self.stop_token_ids}, indent=2) + "\n", encoding="utf-8")

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`, with or without special tokens. For tools, rewards and people only."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def _as_in_whole(self, turns: list[SpokenTurn], whole: str) -> list[SpokenTurn]:
        """`turns` of a demonstration without the empty reasoning that the template writes into the last turn alone."""
        likeness = compare(whole, turns, last=True)
        same = [
            replace(turn, body=turn.body[len(left) :]) if opened and left == self._turns.lead else turn
            for turn, left, opened in zip(turns, likeness.left_out, likeness.opened, strict=True)
        ]
        self._say(compare(whole, same, last=True).said)
        return same

    def _imagined_turns(self, messages: list[Message], end: str) -> list[SpokenTurn]:
        """Turns that a rollout could have, in the form in which the template's own text is most like them."""
        errors, found = [], []
        for reasoning in ("<think>\nI add.\n</think>\n\n", "") if "</think>" in self._template.source else ("",):
            try:
                turns, whole = imagine(self._template, self._frames, self._turns, messages, end, reasoning)
                found.append((sorted(compare(whole, turns, last=False).said), turns))
            except RenderError as error:
                errors.append(error)
        if not found:
            advice = "Set rollout.tool=null (single-turn), or give a template with model.chat_template."
            raise RenderError(f"{errors[-1]} {advice}") from errors[-1]
        said, turns = min(found, key=lambda each: len(each[0]))
        self._say(said)
        return turns

    def _check_turn_ids(self, turns: Sequence[SpokenTurn]) -> None:
        """Raise RenderError where the ids that rollouts put together are not those of the text as a whole.

        A turn begins with a new token, as it does when a model writes it.
        """
        built, before = self._tokens.ids(turns[0].head), turns[0].head
        pieces = [before]
        for number, turn in enumerate(turns):
            built += self._tokens.ids_after(before, turn.body + turn.end)
            built += self.tool_ids(OUTPUTS[number], earlier=OUTPUTS[:number], end=self._tokens.ends[turn.end])
            pieces.append(turn.body + turn.end + turn.between)
            before = turn.between
        whole = self._tokens.ids("".join(pieces))
        if built != whole and built != [id_ for piece in pieces for id_ in self._tokens.ids(piece)]:
            raise RenderError(f"turns have other tokens than the conversation as a whole. {self._ids_differ(built, whole)}")

    def _ids_differ(self, ours: list[int], theirs: list[int]) -> str:
        names = self._tokenizer.convert_ids_to_tokens
        return difference(" ".join(names(ours)), " ".join(names(theirs)), "here", "by the template")

    def _say(self, sentences: Iterable[str]) -> None:
        """Tell each sentence once."""
        for sentence in sorted(set(sentences) - self._said):
            log.warning("%s: %s (docs/chat.md).", self._path, sentence)
            self._said.add(sentence)

    def _find_end(self) -> str:
        """The stop token that the template writes after an assistant's words: in the middle of a conversation, or at its end."""
        question: list[Message] = [{"role": "user", "content": "question"}]
        for end in self._frames.ends.values():
            if end is not None:
                return end
        head = self._template.render(question, prompt=True)
        answer = self._template.render([*question, {"role": "assistant", "content": "answer"}], prompt=False)
        found = self._tokens.find_end(answer[common_start(head, answer) :])
        if found is not None:
            return found[0]
        after = self._frames.text(self._frames.roles[0], ["output"])
        special = self._tokens.specials(after)
        advice = f", such as model.stop_tokens='[\"{special[0]}\"]'" if special else ""
        raise ModelError(
            f"{self._template.name} ends an assistant's turn with none of the stop tokens {list(self._tokens.ends)}; it writes "
            f"{after!r} after the turn. Add the token that ends a turn to model.stop_tokens{advice}, or give another template "
            "with model.chat_template."
        )


def _load(path: Path) -> Any:
    """The tokenizer in the directory `path`.

    Where the directory names the class that adds nothing to tokenizer.json, it is that: for some model types, such as qwen2,
    AutoTokenizer of transformers 5.19 takes another whatever is named, with a normalizer and a splitting of its own.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is not a directory; needed: a model in Hugging Face format")
    try:
        plain = (path / TOKENIZER).is_file() and _class_of(path) in PLAIN_CLASSES
        return _reader(plain).from_pretrained(path, local_files_only=True)
    except Exception as error:  # tokenizers raises plain ones about a broken tokenizer.json
        for file in sorted(path.glob("*.jinja")) if isinstance(error, UnicodeDecodeError) else ():
            _check_text(file)
        raise ModelError(f"{path} holds no tokenizer that transformers can load: {error}") from error


def _reader(plain: bool) -> Any:
    """The class of transformers that loads a tokenizer. AutoTokenizer knows of all models and takes a second longer to import."""
    with modules_stay(), packages_told_quickly():
        if plain:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast
        from transformers import AutoTokenizer

        return AutoTokenizer


def _class_of(path: Path) -> str | None:
    """What tokenizer_config.json in the directory `path` names as the tokenizer's class."""
    file = path / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class") if file.is_file() else None


def _check_text(file: Path) -> None:
    """Raise ModelError where a file is not UTF-8."""
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{file} is not UTF-8 text: {error}. Save it as UTF-8.") from error
