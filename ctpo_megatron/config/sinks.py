"""Where a run's numbers go besides its own files."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from ctpo_megatron.config.base import FilePath, Section


class SinkSection(Section):
    """What all sinks share. Each is fed by a process of its own."""

    package: ClassVar[str]  # that its process imports
    install: ClassVar[str]  # what pip is to install for that

    type: str
    python: FilePath | None = None
    """Interpreter that has the sink's package, where the run's own environment is to stay as it is. null: the run's."""

    def words(self) -> dict[str, Any]:
        """Returns the settings as JSON values, for the process; no secret is among them."""
        return self.model_dump(mode="json")


class WandbSink(SinkSection):
    """Weights & Biases, alarms as alerts. Its key comes from WANDB_API_KEY, from ~/.netrc or from `key_file`."""

    package: ClassVar[str] = "wandb"
    install: ClassVar[str] = "wandb"

    type: Literal["wandb"] = "wandb"
    project: str = "ctpo"
    """The project there."""
    entity: str | None = None
    """The user or team that it belongs to. null: the default of the key."""
    group: str | None = None
    """Runs of the same group are shown together, as seeds of one experiment."""
    mode: Literal["online", "offline"] = "online"
    """`offline`: to RUN_DIR/wandb only; `wandb sync` sends it later."""
    key_file: FilePath | None = None
    """A file with the key, and nothing else. null: where the package itself looks for it."""


class MlflowSink(SinkSection):
    """MLflow. What its server asks for comes from MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN."""

    package: ClassVar[str] = "mlflow"
    install: ClassVar[str] = "mlflow-skinny"

    type: Literal["mlflow"] = "mlflow"
    uri: str | None = None
    """The tracking server, such as http://host:5000. null: files in RUN_DIR/mlruns."""
    experiment: str = "ctpo"
    """The experiment there; it is made where it is not there."""

    @field_validator("uri")
    @classmethod
    def _has_no_key(cls, uri: str | None) -> str | None:
        return None if uri is None else _without_key(uri)


class PrometheusSink(SinkSection):
    """An endpoint that a Prometheus server scrapes: the last value of every metric, and counts of events, at /metrics."""

    package: ClassVar[str] = "prometheus_client"
    install: ClassVar[str] = "prometheus-client"

    type: Literal["prometheus"] = "prometheus"
    host: str = "127.0.0.1"
    """Address to listen at. Whoever reaches it may read all numbers: there is no key."""
    port: int = Field(9464, ge=1, le=65535)
    """The port."""


class OtelSink(SinkSection):
    """OpenTelemetry: a span for each training step with the events in it, and below it one for each of its phases."""

    package: ClassVar[str] = "opentelemetry.sdk"
    install: ClassVar[str] = "opentelemetry-sdk"

    type: Literal["otel"] = "otel"
    endpoint: str | None = None
    """Collector that takes OTLP over HTTP, such as http://host:4318/v1/traces; the package opentelemetry-exporter-otlp-proto-http
    sends, with headers of OTEL_EXPORTER_OTLP_HEADERS. null: RUN_DIR/spans.jsonl, a line of JSON for each span."""

    @field_validator("endpoint")
    @classmethod
    def _has_no_key(cls, endpoint: str | None) -> str | None:
        return None if endpoint is None else _without_key(endpoint)


AnySink = Annotated[WandbSink | MlflowSink | PrometheusSink | OtelSink, Field(discriminator="type")]


def _without_key(url: str) -> str:
    parts = urlsplit(url)
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("a name, a password or a query in the address would be in logs; give it by the environment")
    return url
