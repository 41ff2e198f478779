"""Wrong samples that users of other stacks have trained on, each as a case that has to come out right here.

re-tokenisation drift             here
masks off by one at turn borders  here with a real tokenizer; data/test_samples.py for any lengths, test_families.py by family
tool text trained on              here down to the gradient; algorithms/test_theory.py for the ratio
a stop string cut in a token      here; engine/test_answers.py: no stop string is ever asked for; test_environment.py: an
                                  engine that stops after another token is refused
empty responses                   here; test_environment.py: an answer without any token is refused
prompts that fill the context     models/test_context.py before the start; integration/test_sglang.py with the server
tool output that fills the rest   test_environment.py, test_how_it_ends
an engine two tokens short        here; models/test_context.py: the room that SGLang keeps is left free
abort of a group                  test_environment.py, test_a_failure_ends_the_group_and_comes_out_as_itself; engine/test_fleet.py
                                  and integration/test_sglang.py: what was in flight goes on, or ends at the server too
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from ctpo_megatron.algorithms import policy_loss
from ctpo_megatron.algorithms.advantages import compute_advantages
from ctpo_megatron.config.advantages import GroupAdvantage, ShapingConfig
from ctpo_megatron.data.packing import pack
from ctpo_megatron.data.samples import build_samples
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.calculator import Calculator
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.protocols import Outcome, Sampling, Score
from ctpo_megatron.types import Generation, Prompt, Status, TrainSample, Trajectory, TrajectoryGroup
from tests.support.chat_models import QWEN25
from tests.support.trajectories import ATTEMPT, GROUP

PROMPT = Prompt(0, ({"role": "user", "content": "What is 7 * 8?"},), "56")
CALL = "Let me see.\n\n```python\nprint(7 * 8)\n```"


class Lines:
    """An engine that samples the given tokens in turn, cut to what was asked for, less `short` where that cuts."""

    def __init__(self, turns: list[list[int]], short: int = 0) -> None:
        self.turns, self.short, self.asked = iter(turns), short, []

    async def generate(self, input_ids: list[int], done: Generation, *, max_new_tokens: int, **options: Any) -> Generation:
        self.asked.append(list(input_ids))
        ids = next(self.turns)
        finish = "stop" if len(ids) <= max_new_tokens else "length"
        ids = ids if finish == "stop" else ids[: max_new_tokens - self.short]
        return Generation(ids, [-0.5] * len(ids), [0] * len(ids), finish)


class Nothing:
    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        return Score(float("56" in outcome.text))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer(QWEN25.write(tmp_path_factory.mktemp("model") / "qwen2.5"))


def bytewise(chat: ChatTokenizer, text: str) -> list[int]:
    """Tokens of `text` that no tokenizer would give: one for each byte, whatever merges there are."""
    return [token for character in text for token in chat._tokenizer.encode(character, add_special_tokens=False)]


def play(chat: ChatTokenizer, engine: Lines, budget: int = 500) -> Trajectory:
    environment = ToolEnvironment(engine, chat, Calculator(), Nothing())
    return asyncio.run(environment.run(environment.begin(PROMPT, ATTEMPT), PROMPT, 0, Sampling(1.0, 3, budget)))


def sample_of(trajectory: Trajectory) -> TrainSample:
    (sample,) = build_samples(TrajectoryGroup(PROMPT, [trajectory], id=GROUP), [1.0], 0)
    return sample


def two_turns(chat: ChatTokenizer) -> tuple[list[list[int]], Trajectory, Lines]:
    end = chat.assistant_ids("")[-1]
    turns = [[*bytewise(chat, CALL), end], [*bytewise(chat, "\n\nIt is\n\n56."), end]]
    engine = Lines(turns)
    return turns, play(chat, engine), engine


def test_what_was_sampled_is_trained_on_not_what_its_text_would_be_tokenised_to(chat: ChatTokenizer) -> None:
    turns, trajectory, engine = two_turns(chat)
    again = chat._tokenizer.encode(chat.decode(turns[0], special=True), add_special_tokens=False)
    assert again != turns[0]
    assert len(again) < len(turns[0])
    said = [turn for turn in trajectory.turns if turn.role == "assistant"]
    assert [turn.token_ids for turn in said] == turns
    assert engine.asked[1][: len(engine.asked[0]) + len(turns[0])] == engine.asked[0] + turns[0]  # nor in the next prompt
    sample = sample_of(trajectory)
    assert [label for label, wrote in zip(sample.labels, sample.mask, strict=True) if wrote] == turns[0] + turns[1]


def test_masks_begin_and_end_where_the_model_began_and_ended(chat: ChatTokenizer) -> None:
    """The first label of a turn is its first token, predicted from the last one before it; the last is its end."""
    turns, trajectory, _ = two_turns(chat)
    sample = sample_of(trajectory)
    borders = [t for t in range(1, len(sample)) if sample.mask[t] != sample.mask[t - 1]]
    first, second = (
        len(trajectory.prompt_ids) - 1,
        len(trajectory.prompt_ids) - 1 + sum(len(t.token_ids) for t in trajectory.turns[:2]),
    )
    assert borders == [first, first + len(turns[0]), second]
    assert (sample.labels[first], sample.labels[second]) == (turns[0][0], turns[1][0])
    assert sample.labels[first + len(turns[0]) - 1] == sample.labels[-1] == turns[0][-1]
    frame = chat.decode(sample.labels[first + len(turns[0]) : second], special=True)
    assert frame.startswith("\n<|im_start|>user")
    assert frame.endswith("<|im_start|>assistant\n")


def test_tool_text_has_no_gradient_and_is_not_in_the_ratio(chat: ChatTokenizer) -> None:
    """Whatever the trainer thinks of the tool's tokens: neither loss nor gradient of the others changes."""
    _, trajectory, _ = two_turns(chat)
    ((packed,),) = pack([sample_of(trajectory)], dp=1, max_tokens=2000)
    tokens, found = packed.tokens, []
    assert any(turn.role == "tool" for turn in trajectory.turns)
    for of_tool in (-3.0, -1000.0, float("nan")):
        logp = torch.where(tokens.mask, -0.499, of_tool).requires_grad_()
        out = policy_loss(
            {"type": "ctpo"},
            logp=logp,
            old_logp=torch.where(tokens.mask, -0.5, 0.0),
            advantages=tokens.advantages,
            mask=tokens.mask,
            cu_seqlens=packed.sequences.cu_seqlens,
        )
        found.append((float(out.loss.detach()), torch.autograd.grad(out.loss, logp)[0]))
    assert all(loss == found[0][0] and torch.equal(gradient, found[0][1]) for loss, gradient in found)
    assert not found[0][1][~tokens.mask].any()
    assert found[0][1][tokens.mask].any()


def test_the_text_of_an_end_is_no_end(chat: ChatTokenizer) -> None:
    """Spelled in plain tokens, and with its last character in a token that goes on: only the token itself ends a turn."""
    end = chat.assistant_ids("")[-1]
    spelled = [*bytewise(chat, "so <|im_end"), *bytewise(chat, "|>"), *chat._tokenizer.encode("\n\n"), *bytewise(chat, "56")]
    assert end not in spelled
    trajectory = play(chat, Lines([[*spelled, end]]))
    assert trajectory.status is Status.FINISHED
    assert trajectory.turns[0].token_ids == [*spelled, end]
    assert trajectory.reward == 1.0


def test_empty_responses_are_one_token_each_and_cost_nothing_else(chat: ChatTokenizer) -> None:
    """The end alone: a sample with one trained token. A group of nothing else has no advantage, and is still a batch."""
    end = chat.assistant_ids("")[-1]
    empty = [play(chat, Lines([[end]])) for _ in range(2)]
    assert [(t.status, t.reward, t.sampled_length) for t in empty] == [(Status.FINISHED, 0.0, 1)] * 2
    assert [sum(sample_of(t).mask) for t in empty] == [1, 1]
    alone = TrajectoryGroup(PROMPT, empty, id=GROUP)
    (advantages,) = compute_advantages([alone], GroupAdvantage(), ShapingConfig())
    assert not any(value for each in advantages for value in each)
    _, answered, _ = two_turns(chat)
    (advantages,) = compute_advantages(
        [TrajectoryGroup(PROMPT, [empty[0], answered], id=GROUP)], GroupAdvantage(), ShapingConfig()
    )
    assert max(advantages[0]) < 0 < min(advantages[1])


@pytest.mark.parametrize("short", [1, 2])
def test_an_engine_that_ends_too_early_is_an_error_and_no_short_sample(chat: ChatTokenizer, short: int) -> None:
    """With finish reason "length": its context or its cache is smaller than the run was told."""
    long = bytewise(chat, "x" * 40)
    assert play(chat, Lines([long]), budget=30).status is Status.LENGTH
    with pytest.raises(RolloutError, match=f"after {30 - short} of 30 tokens"):
        play(chat, Lines([long], short=short), budget=30)


def test_all_of_it_is_told_above() -> None:
    """The files that the list names are there."""
    unit = Path(__file__).parents[1]
    named = ("data/test_samples.py", "rollout/test_families.py", "algorithms/test_theory.py", "engine/test_answers.py")
    named += ("rollout/test_environment.py", "models/test_context.py", "engine/test_fleet.py")
    assert all((unit / name).is_file() for name in named)
