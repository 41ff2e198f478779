"""Model directories with a tokenizer and a chat template in the manner of published families, small enough for unit tests.

The templates are our own and shorter than the published ones; what they write around a conversation, and where they refuse one,
is as the families do it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ctpo_megatron.toy.model import _byte_symbols

THINK = ("<think>", "</think>")


@dataclass(frozen=True)
class Family:
    """`special` are tokens, the first of which the tokenizer names as eos; `stops` those of generation_config.json."""

    template: str
    special: tuple[str, ...]
    stops: tuple[str, ...]
    plain: tuple[str, ...] = THINK  # tokens that are not special

    def write(self, directory: Path, **changes: Any) -> Path:
        """A model directory of this family; `changes` replace its fields."""
        family = Family(**{**self.__dict__, **changes})
        directory.mkdir(parents=True, exist_ok=True)
        symbols = _byte_symbols()
        merges = [("Ċ", "Ċ"), ("Ġ", "Ġ")]  # so that a token can reach over the seam between a prompt and an answer
        vocab = {symbol: byte for byte, symbol in enumerate(symbols)} | {"ĊĊ": 256, "ĠĠ": 257}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(family.special))
        backend.add_tokens(list(family.plain))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=family.special[0], clean_up_tokenization_spaces=False
        )
        tokenizer.save_pretrained(directory)
        (directory / "chat_template.jinja").write_text(family.template, encoding="utf-8")
        ids = [tokenizer.convert_tokens_to_ids(stop) for stop in family.stops]
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        return directory


# Qwen 2.5: a tool speaks in the user's turn; the base model's tokenizer and generation_config.json know <|endoftext|> only
QWEN25 = Family(
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + "
    "'\n</tool_response><|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    ("<|im_end|>", "<|endoftext|>"),
)
QWEN25_BASE = Family(QWEN25.template, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<|endoftext|>",))

# Qwen 3: reasoning of turns before the last question is left out, and the last turn always has a block for it
QWEN3 = Family(
    "{%- set last = namespace(question=-1) %}{%- for m in messages if m.role == 'user' %}"
    "{%- set last.question = messages.index(m) %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + m.content + "
    "'\n</tool_response><|im_end|>\n' }}{%- elif m.role == 'assistant' %}{%- set why, said = '', m.content %}"
    "{%- if m.reasoning_content %}{%- set why = m.reasoning_content %}{%- elif '</think>' in said %}"
    "{%- set why = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > last.question and (loop.last or why) %}{{- '<think>\n' + why + '\n</think>\n\n' }}{%- endif %}"
    "{{- said }}{%- for c in m.tool_calls or [] %}{{- '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}",
    ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    ("<|im_end|>", "<|endoftext|>"),
)
# its models that always think: a generation begins inside of the block
QWEN3_THINKING = Family(
    QWEN3.template.partition("{%- if enable_thinking")[0].rpartition("'<|im_start|>assistant\n'")[0]
    + "'<|im_start|>assistant\n<think>\n' }}{%- endif %}",
    QWEN3.special,
    QWEN3.stops,
)
# DeepSeek R1: a generation begins inside of the block, and no rendering of a finished turn has its reasoning
DEEPSEEK_R1 = Family(
    "{{ '<|begin|>' }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|User|>' + m.content }}"
    "{%- elif m.role == 'assistant' %}{{- '<|Assistant|>' + m.content.split('</think>')[-1].lstrip('\n') + '<|end|>' }}"
    "{%- else %}{{- m.content }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{%- endif %}",
    ("<|end|>", "<|begin|>", "<|User|>", "<|Assistant|>"),
    ("<|end|>",),
)
# Llama 3.1 to 3.3: words are trimmed, a tool's output is JSON in the role ipython, and the prompt has a date
LLAMA3 = Family(
    "{{- '<|begin_of_text|>' }}{%- if date_string is not defined %}{%- if dated %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
    "{%- set talk = messages %}{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}"
    "{%- set talk = messages[1:] %}{%- endif %}{{- '<|eot_id|>' }}"
    "{%- for m in talk %}{%- if m.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) }}"
    "{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}{%- if m.tool_calls %}"
    "{{- {'name': m.tool_calls[0].function.name, 'parameters': m.tool_calls[0].function.arguments} | tojson }}"
    "{%- else %}{{- m.content | trim }}{%- endif %}{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|end_of_text|>"),
    ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
)
# GLM-4.5: nothing ends a turn but the token of the next role
GLM45 = Family(
    "{{- '[gMASK]<sop>' }}{%- set last = namespace(question=-1) %}{%- for m in messages if m.role == 'user' %}"
    "{%- set last.question = messages.index(m) %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|user|>\n' + m.content }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '/nothink' }}{%- endif %}"
    "{%- elif m.role == 'assistant' %}{%- set why, said = m.reasoning_content or '', m.content %}{%- if '</think>' in said %}"
    "{%- set why = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}{%- set said = said.split('</think>')[-1] %}"
    "{%- endif %}{{- '<|assistant|>\n<think>' + (why.strip() if loop.index0 > last.question else '') + '</think>' }}"
    "{%- if said.strip() %}{{- '\n' + said.strip() }}{%- endif %}{%- for c in m.tool_calls or [] %}"
    "{{- '\n<tool_call>' + c.function.name + (c.function.arguments | tojson) + '</tool_call>' }}{%- endfor %}"
    "{%- elif m.role == 'tool' %}{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|observation|>' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}{%- else %}{{- '<|system|>\n' + m.content }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '\n<think></think>' }}{%- endif %}{%- endif %}",
    ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ("<|endoftext|>", "<|user|>", "<|observation|>"),
)
# DeepSeek V3: a second output begins otherwise than the first, and an answer to a tool has no role token
DEEPSEEK_V3 = Family(
    "{%- set ns = namespace(system='', first=true, tool=false) %}{%- for m in messages if m.role == 'system' %}"
    "{%- set ns.system = ns.system + m.content %}{%- endfor %}{{- '<|begin|>' + ns.system }}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.tool = false %}{{- '<|User|>' + m.content }}"
    "{%- elif m.role == 'assistant' %}{{- '<|outputs_end|>' if ns.tool else '<|Assistant|>' }}"
    "{%- set ns.tool = false %}{{- m.content + '<|end|>' }}"
    "{%- elif m.role == 'tool' %}{%- set ns.tool = true %}{{- '<|outputs_begin|>' if ns.first else '\n' }}{%- set ns.first = false %}"
    "{{- '<|output_begin|>' + m.content + '<|output_end|>' }}{%- endif %}{%- endfor %}"
    "{%- if ns.tool %}{{- '<|outputs_end|>' }}{%- elif add_generation_prompt %}{{- '<|Assistant|>' }}{%- endif %}",
    ("<|end|>", "<|begin|>", "<|User|>", "<|Assistant|>", "<|outputs_begin|>", "<|output_begin|>", "<|output_end|>", "<|outputs_end|>"),
    ("<|end|>",),
)
# Mistral: nothing begins an assistant's turn; roles must alternate, and there is none for the system in the first versions
MISTRAL = Family(
    "{{- '<s>' }}{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}{%- elif m.role == 'assistant' %}"
    "{{- ' ' + m.content + '</s>' }}{%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}"
    "{%- endfor %}",
    ("</s>", "<s>", "[INST]", "[/INST]"),
    ("</s>",),
)
# its later versions put the system's words into the last question, wherever that is
MISTRAL_LAST = Family(
    "{{- '<s>' }}{%- set system = '' %}{%- set talk = messages %}{%- if messages[0].role == 'system' %}"
    "{%- set system = messages[0].content + '\n\n' %}{%- set talk = messages[1:] %}{%- endif %}"
    "{%- for m in talk %}{%- if m.role == 'user' %}{%- set last = talk[loop.index:] | selectattr('role', 'equalto', 'user') | list | "
    "length == 0 %}{{- '[INST]' + (system if last else '') + m.content + '[/INST]' }}{%- elif m.role == 'assistant' %}"
    "{{- m.content + '</s>' }}{%- else %}{{- raise_exception('only users and assistants speak') }}{%- endif %}{%- endfor %}",
    MISTRAL.special,
    MISTRAL.stops,
)
# Gemma: the assistant is the model, and roles must alternate
GEMMA = Family(
    "{{- '<bos>' }}{%- for m in messages %}{%- if m.role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Conversation roles must alternate') }}{%- endif %}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (m.content | trim) + '<end_of_turn>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}",
    ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    ("<eos>", "<end_of_turn>"),
)
# gpt-oss: channels; <|return|> ends the last turn, <|end|> those before, and only a call lets a tool speak
HARMONY = Family(
    "{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '\n\nReasoning: ' + "
    "(reasoning_effort or 'medium') + '<|end|>' }}{%- set talk = messages %}{%- if messages[0].role == 'system' %}"
    "{{- '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '\n\n<|end|>' }}"
    "{%- set talk = messages[1:] %}{%- endif %}{%- set call = namespace(name=none) %}"
    "{%- for m in talk %}{%- if m.role == 'assistant' and 'tool_calls' in m %}{%- set later = namespace(final=false) %}"
    "{%- for n in talk[loop.index:] if n.role == 'assistant' and 'tool_calls' not in n %}{%- set later.final = true %}{%- endfor %}"
    "{%- if m.thinking and not later.final %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}"
    "{%- endif %}{%- set f = m.tool_calls[0].function %}{%- set call.name = f.name %}{{- '<|start|>assistant to=functions.' + f.name "
    "+ '<|channel|>commentary json<|message|>' + (f.arguments | tojson) + '<|call|>' }}"
    "{%- elif m.role == 'assistant' and loop.last and not add_generation_prompt %}"
    "{%- if 'thinking' in m %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{%- elif m.role == 'assistant' %}{%- set call.name = none %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}"
    "{%- elif m.role == 'tool' %}{%- if call.name is none %}{{- raise_exception('a tool speaks, and nobody called it') }}{%- endif %}"
    "{{- '<|start|>functions.' + call.name + ' to=assistant<|channel|>commentary<|message|>' + (m.content | tojson) + '<|end|>' }}"
    "{%- else %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}",
    ("<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|endoftext|>"),
    ("<|return|>", "<|endoftext|>", "<|call|>"),
)
