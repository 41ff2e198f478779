"""When a run calls for a look: what each alarm looks at, from which value on, and what follows.

Every alarm of `AlarmsConfig` can be turned off with null.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from ctpo_megatron.config.base import FilePath, Section

Share = Annotated[float, Field(gt=0, lt=1)]
Factor = Annotated[float, Field(gt=1)]
NAME = r"^[A-Za-z0-9_-]+$"


class Alarm(Section):
    """What all alarms have. An alarm is raised once, and again only after it has cleared."""

    then: Literal["tell", "save", "stop"] = "tell"
    """What follows when it is raised, besides telling. save: a checkpoint after the step. stop: the run stops in order."""
    patience: PositiveInt = 3
    """Readings in a row beyond the limit before it is raised."""
    calm: PositiveInt = 5
    """Readings in a row well within the limit before it clears."""


class EntropyAlarm(Alarm):
    """Entropy collapse: the policy's entropy has fallen since the reward was at its best, and the reward is no better for it."""

    share: Share = 0.6
    """Raised below this share of the entropy at the best reward."""
    collapsed: Share = 0.15
    """Raised below this share of the largest entropy, whatever the reward does, while the task is not solved."""
    explosion: Factor | None = 2.0
    """Raised above so many times the entropy at the best reward, too: the policy comes apart. null: not looked for."""


class PlateauAlarm(Alarm):
    """The mean reward has not been better than before for long, and the task is not solved."""

    steps: PositiveInt = 200
    """Raised after so many training steps without a better one."""
    patience: PositiveInt = 1
    """Readings in a row beyond the limit before it is raised."""


class LengthAlarm(Alarm):
    """Length drift: responses became longer or shorter, and answers are no better: a sign of a reward that is being played."""

    factor: Factor = 1.5
    """Raised beyond so many times the tokens, or less than one part in so many, of when answers were at their best."""


class FormatAlarm(Alarm):
    """Format drift: more responses break off, stay unanswered or call the tool wrongly, and answers are no better."""

    rise: Share = 0.15
    """Raised where one of these shares is so much above what it was when answers were at their best."""


class AccuracyAlarm(Alarm):
    """Accuracy on held-out prompts falls behind its best: the reward pays for something else, or training comes apart."""

    fall: Share = 0.05
    """Raised where the median of three evaluations is so much below its best, and by more than evaluations vary."""
    patience: PositiveInt = 2
    """Readings in a row beyond the limit before it is raised; there is one after each evaluation."""
    calm: PositiveInt = 2
    """Readings in a row well within the limit before it clears."""


class ClipAlarm(Alarm):
    """Clip fraction by position out of its band: too much is clipped, or the end of trajectories much more than the beginning."""

    high: Share = 0.6
    """Raised where more of the tokens of some tenth of the trajectories are clipped."""
    tilt: Share = 0.3
    """Raised where the last three tenths have so much more of theirs clipped than the first three."""


class DriftAlarm(Alarm):
    """Drift growth: trainer and engine agree less and less about log-probs, on the whole or late in trajectories."""

    factor: Factor = 2.0
    """Raised beyond so many times the drift of the first steps, if it is no noise either."""
    late: Factor = 3.0
    """Raised where the drift of the latest positions over that of the first has grown by such a factor."""
    least: PositiveFloat = 1e-5
    """Drift below this, in nats, is none, whatever the first steps had: float32's own rounding is some 1e-7."""


class SampleSizeAlarm(Alarm):
    """Effective sample size: a few tokens carry most of the gradient before clipping."""

    share: Share = 0.6
    """Raised below this share of the first steps' effective sample size."""
    least: Share = 0.02
    """Raised below this effective sample size, whatever the first steps had."""


class MismatchAlarm(Alarm):
    """Mismatch weights before they are held to their range: their products over long trajectories run away from 1."""

    log_weight: PositiveFloat = 0.35
    """Raised where the mean log-weight is further below 0, in nats. 0.35 of a sequence's leaves half of a batch."""


class StaleAlarm(Alarm):
    """Rollouts fall behind the trainer: tokens get older, or groups become too old to be trained on."""

    factor: Factor = 1.5
    """Raised beyond so many times the mean staleness of the first steps, once it is at least `versions`."""
    versions: PositiveFloat = 2.0
    """Mean staleness below which nothing is said."""
    aborted: Share = 0.1
    """Raised where this share of the groups that were asked for became too old."""


class ExpertAlarm(Alarm):
    """Expert imbalance: some layer sends most of its tokens to a few experts."""

    most: Factor = 4.0
    """Raised where the busiest expert of a layer has so many times the mean load."""


class ServerAlarm(Alarm):
    """A slow or failing inference server: steps wait longer for their last groups, or servers are lost again and again."""

    factor: Factor = 2.0
    """Raised beyond so many times the first steps' wait for the last fifth of a step's groups."""
    tail: Share = 0.3
    """Share of the rollout that the wait for the last fifth has at least."""
    losses: PositiveInt = 3
    """Raised where one server was lost or suspended so often within `within` steps."""
    within: PositiveInt = 20
    """Steps that losses are counted in."""


class MemoryAlarm(Alarm):
    """Memory slope: the memory in use of the driver's host grows towards its end."""

    full: Share = 0.95
    """Share of the host's memory that counts as the end."""
    ahead: PositiveInt = 200
    """Raised where the end is reached within so many steps, as memory has grown over the last `window`."""
    window: PositiveInt = Field(40, ge=10)
    """Steps that the slope is taken from."""


class EqualGroupsAlarm(Alarm):
    """Groups whose rewards are all equal, and not because their prompts are solved: nothing is learnt from them."""

    mixed: Share = 0.3
    """Raised where fewer groups than this share have different rewards."""


class UndecidedAlarm(Alarm):
    """The grader gives no verdict on more and more answers, which count as wrong."""

    share: Share = 0.03
    """Raised above this share of a step's answers. `rollout.undecided_share` ends the run."""


class GoodputAlarm(Alarm):
    """Goodput: too little of the time of the last steps went into rollouts and training."""

    share: Share = 0.6
    """Raised below this useful share of the time."""
    window: PositiveInt = Field(20, ge=2)
    """Steps that are looked at together."""


class BoundAlarm(Alarm):
    """A bound of your own on any metric."""

    metric: str
    """Its name, as docs/metrics.md lists it; of a family, one member."""
    above: float | None = None
    """Raised where the median of the last `smooth` values is above. null: no such bound."""
    below: float | None = None
    """Raised where it is below. null: no such bound."""
    smooth: PositiveInt = 5
    """Values that the median is taken of."""
    advice: str = "look at the metric"
    """What to do, for whoever is told."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> BoundAlarm:
        if self.above is None and self.below is None:
            raise ValueError(f"{self.metric} has neither `above` nor `below`; give one of them or both")
        if self.above is not None and self.below is not None and self.below >= self.above:
            raise ValueError(f"below={self.below:g} is not under above={self.above:g}: one of them would always be crossed")
        return self


class WebhookConfig(Section):
    """Alarms as JSON to a URL, in the background: a step never waits for it."""

    url: str
    """Where each alarm is posted to: http:// or https://, without a password in it."""
    header_file: FilePath | None = None
    """File with one line `Name: value`, sent as a header, such as `Authorization: Bearer ...`. null: none."""
    timeout_s: PositiveFloat = 10.0
    """Time of one try."""
    retries: NonNegativeInt = 3
    """Further tries, each after a longer wait."""
    waiting: PositiveInt = 100
    """Alarms that may wait to be sent; further ones are not sent, and counted in an event."""

    @field_validator("url")
    @classmethod
    def _is_plain(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")) or "@" in url.partition("://")[2].partition("/")[0]:
            raise ValueError("needed: http://... or https://... without a name or password in it; these go into header_file")
        return url


class AlarmsConfig(Section):
    """What is told while a run goes on (docs/alarms.md). `ctpo alarms RUN_DIR` tries other values on what was recorded."""

    warmup: NonNegativeInt = 10
    """Training steps at the beginning of a run in which nothing is raised, and which are no measure for later ones."""
    baseline: PositiveInt = Field(20, ge=5)
    """Training steps after these which later ones are compared with, where an alarm compares."""
    solved: float = 0.9
    """Mean reward from which on the task counts as solved: little entropy, equal groups and a plateau are no matter then."""
    entropy: EntropyAlarm | None = EntropyAlarm()
    plateau: PlateauAlarm | None = PlateauAlarm()
    length: LengthAlarm | None = LengthAlarm()
    format: FormatAlarm | None = FormatAlarm()
    accuracy: AccuracyAlarm | None = AccuracyAlarm()
    clip: ClipAlarm | None = ClipAlarm()
    drift: DriftAlarm | None = DriftAlarm()
    sample_size: SampleSizeAlarm | None = SampleSizeAlarm()
    mismatch: MismatchAlarm | None = MismatchAlarm()
    stale: StaleAlarm | None = StaleAlarm()
    experts: ExpertAlarm | None = ExpertAlarm()
    servers: ServerAlarm | None = ServerAlarm()
    memory: MemoryAlarm | None = MemoryAlarm()
    equal_groups: EqualGroupsAlarm | None = EqualGroupsAlarm()
    undecided: UndecidedAlarm | None = UndecidedAlarm()
    goodput: GoodputAlarm | None = GoodputAlarm()
    bounds: dict[Annotated[str, Field(pattern=NAME)], BoundAlarm] = Field({})
    """Alarms of your own, by name."""
    webhook: WebhookConfig | None = None
    """Where alarms are posted to. null: nowhere."""

    @field_validator("bounds")
    @classmethod
    def _names_are_free(cls, bounds: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(set(bounds) & set(cls.model_fields))
        if taken:
            raise ValueError(f"{', '.join(taken)}: that is the name of an alarm there is; choose another")
        return bounds
