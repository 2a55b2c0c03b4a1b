"""The configuration file: its models, loading it as a whole, masking what is secret.

Every fault is found in one pass and names file, line, key and what to write instead. Nothing reads the environment.
"""

from __future__ import annotations

import difflib
import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SecretStr, ValidationError, field_validator, model_validator

from clarion.destinations import DestinationConfig
from clarion.errors import ConfigError
from clarion.fields import AeTitle, BesideFile, Model, Name, Port, TlsProfile
from clarion.located import Keys, Located
from clarion.model import TlsFiles


class VerificationConfig(Model):
    """The Verification SOP Class."""

    enabled: bool = True


class ServerTlsConfig(Model):
    """TLS 1.2 and 1.3 (PS3.15 B.12), of PEM files that are read again when they change.

    With `client_ca` a peer has to show a certificate that one of those vouches for.
    """

    certificate: BesideFile
    key: BesideFile
    client_ca: BesideFile | None = None
    profile: TlsProfile = "bcp195"

    @property
    def files(self) -> TlsFiles:
        """The files, as the wire takes them."""
        return TlsFiles(profile=self.profile, trusted=self.client_ca, certificate=self.certificate, key=self.key)


class ScpTlsConfig(ServerTlsConfig):
    """A second port for associations, that speaks TLS only."""

    host: str = "127.0.0.1"
    port: Port = 2762


class ScpConfig(Model):
    """The address that modalities send to."""

    host: str = "127.0.0.1"
    port: Port = 11112
    max_associations: Annotated[int, Field(ge=1, le=1000)] = 25
    max_associations_per_address: Annotated[int, Field(ge=1, le=1000)] | None = None
    workers: Annotated[int, Field(ge=1, le=16)] | None = None
    idle_timeout_s: Annotated[float, Field(gt=0, le=86400)] = 300.0
    max_pdu: Annotated[int, Field(ge=4096, le=131072)] = 131072
    max_instance_gb: Annotated[float, Field(gt=0, le=4)] = 2.0
    accept_private_sop_classes: bool = True
    reject_unknown_sources: bool = True
    allow_anybody: bool = False
    verification: VerificationConfig = VerificationConfig()
    tls: ScpTlsConfig | None = None


class CalledAe(Model):
    """A called AE title, and the rule that groups what is sent to it."""

    ae_title: AeTitle
    rule: str = "by-tag"
    settings: dict[str, str] = Field(default_factory=dict)
    overwrite_same_instance: bool = False
    ignored_sop_classes: tuple[str, ...] = ()

    @field_validator("settings", mode="before")
    @classmethod
    def _numbers_as_text(cls, value: object) -> object:
        if isinstance(value, dict):
            return {key: str(one) if isinstance(one, int | float) else one for key, one in value.items()}
        return value


class Source(Model):
    """Who may send: a calling AE title together with its addresses (address, CIDR or host name, comma-separated).

    With `user`, the association has to carry that user identity as well, with `passcode` also that (PS3.7 D.3.3.7).
    """

    ae_title: AeTitle
    host: str
    user: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    passcode: SecretStr | None = None

    @model_validator(mode="after")
    def _passcode_of_a_user(self) -> Source:
        if self.passcode is not None and self.user is None:
            raise ValueError("a passcode belongs to a user; add `user`")
        return self

    @field_validator("host")
    @classmethod
    def _addresses(cls, value: str) -> str:
        parts = [part.strip() for part in value.split(",")]
        if not all(parts):
            raise ValueError("must name an address, a network like 10.1.0.0/16 or a host name")
        for part in parts:
            if "/" in part:
                ipaddress.ip_network(part, strict=False)
        return value


class StowClient(Model):
    """Who may send by STOW-RS: its token, and the calling AE title that its instances get."""

    ae_title: AeTitle
    token: Annotated[SecretStr, Field(min_length=16)]


class StowConfig(Model):
    """Receiving by STOW-RS: `POST /CALLED_AE_TITLE/studies`. Beyond loopback it needs TLS."""

    host: str = "127.0.0.1"
    port: Port = 5080
    tls: ServerTlsConfig | None = None
    clients: Annotated[tuple[StowClient, ...], Field(min_length=1)]
    max_requests: Annotated[int, Field(ge=1, le=256)] = 32


class IntakeConfig(Model):
    """How much of the disk receiving may use, and how long what was received is kept.

    Longer than late instances may come for a group, a day; without `failed_retention_days`, a failed job keeps what it
    was to be run on until a person takes it up or lets it go.
    """

    watermark_percent: Annotated[int, Field(ge=1, le=100)] = 85
    reserve_gb: Annotated[float, Field(ge=0)] = 5.0
    retention_days: Annotated[float, Field(ge=1, le=36500)] = 7.0
    ignored_retention_days: Annotated[float, Field(ge=1, le=36500)] = 7.0
    failed_retention_days: Annotated[float, Field(ge=1, le=36500)] | None = None


class QuarantineConfig(Model):
    """How long is kept what was set aside, and what came again with other content."""

    retention_days: Annotated[float, Field(ge=8, le=36500)] = 90.0


class ScuConfig(Model):
    """How we call ourselves when we send, and how many associations we have at once, over all destinations."""

    ae_title: AeTitle = "CLARION"
    max_associations: Annotated[int, Field(ge=1, le=100)] = 8


class DeliveryConfig(Model):
    """Delivering results: budgets and deadlines.

    An attempt that reaches nobody spends none of `max_retries`: an outage may last `outage_h`.
    """

    max_retries: Annotated[int, Field(ge=0, le=100)] = 3
    outage_h: Annotated[float, Field(ge=0, le=24 * 365)] = 72.0
    retry_delay_s: Annotated[float, Field(gt=0)] = 180.0
    retry_delay_max_s: Annotated[float, Field(gt=0)] = 3600.0
    failure_threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    connect_timeout_s: Annotated[float, Field(gt=0, le=300)] = 10.0
    dimse_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    verify: bool = True
    commitment_timeout_s: Annotated[float, Field(gt=0)] = 60.0


class GatewayConfig(Model):
    """DICOM in, DICOM out."""

    scp: ScpConfig = ScpConfig()
    scu: ScuConfig = ScuConfig()
    stow: StowConfig | None = None
    ae_titles: tuple[CalledAe, ...] = ()
    sources: tuple[Source, ...] = ()
    destinations: tuple[DestinationConfig, ...] = ()
    intake: IntakeConfig = IntakeConfig()
    quarantine: QuarantineConfig = QuarantineConfig()
    delivery: DeliveryConfig = DeliveryConfig()


class PipelineConfig(Model):
    """A pipeline definition and where its results go; `file` is a path or `builtin:NAME`."""

    id: Name
    file: str
    destinations: tuple[str, ...] = ()


class OrchestratorConfig(Model):
    """Running jobs on this machine."""

    max_jobs: Annotated[int, Field(ge=1, le=64)] = 1
    timeout_default_s: Annotated[float, Field(gt=0)] = 600.0
    timeout_max_s: Annotated[float, Field(gt=0)] = 1800.0
    retry_budget: Annotated[int, Field(ge=0, le=10)] = 2


class ConsoleConfig(Model):
    """The web page; beyond loopback it needs a token."""

    host: str = "127.0.0.1"
    port: Port = 5000
    token: Annotated[SecretStr, Field(min_length=16)] | None = None


class DatabaseConfig(Model):
    """Where the tables are: SQLite under `data` by default, or postgresql://USER:PASSWORD@HOST:PORT/NAME."""

    url: SecretStr | None = None


class KafkaSecurity(Model):
    """How the broker is reached: in the clear on a trusted network, or with TLS, or with a name and a password."""

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    ca_file: BesideFile | None = None
    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    username: str | None = None
    password: SecretStr | None = None


class KafkaConfig(Model):
    """A Kafka cluster: where it is, and how our topics are to be (`clarion topics apply`)."""

    bootstrap: Annotated[tuple[str, ...], Field(min_length=1)]
    prefix: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")] = "clarion"
    partitions: Annotated[int, Field(ge=1, le=1000)] = 12
    replication: Annotated[int, Field(ge=1, le=9)] = 3
    min_insync_replicas: Annotated[int, Field(ge=1, le=9)] = 2
    retention_hours: Annotated[int, Field(ge=1)] = 24 * 14
    streams_runtime: Literal["faust", "kafka-python"] = "faust"
    security: KafkaSecurity = KafkaSecurity()

    @field_validator("bootstrap", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return [one.strip() for one in value.split(",")] if isinstance(value, str) else value


class BusConfig(Model):
    """What carries the events; `kafka` is needed when that is Kafka."""

    kind: Literal["embedded", "kafka"] = "embedded"
    kafka: KafkaConfig | None = None


class LogConfig(Model):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class Config(Model):
    """The whole configuration file."""

    data: Path = Path("clarion-data")
    database: DatabaseConfig = DatabaseConfig()
    bus: BusConfig = BusConfig()
    gateway: GatewayConfig = GatewayConfig()
    pipelines: tuple[PipelineConfig, ...] = ()
    orchestrator: OrchestratorConfig = OrchestratorConfig()
    console: ConsoleConfig = ConsoleConfig()
    log: LogConfig = LogConfig()

    @property
    def database_url(self) -> str:
        """The database to use."""
        given = self.database.url
        return f"sqlite:///{self.data / 'clarion.db'}" if given is None else given.get_secret_value()


def load_config(path: Path) -> tuple[Config, Located]:
    """Read and check the file against the models; relative `data` and pipeline files are beside the file.

    Raises ConfigError with every fault found. The located document is given for the checks that need plug-ins.
    """
    located = Located.of_file(path)
    if not isinstance(located.value, dict):
        located.fault((), "must be a mapping of keys, as `clarion config example` prints it")
        _raise(located)
    try:
        config = Config.model_validate(located.value, context={"beside": path.parent})
    except ValidationError as error:
        for fault in error.errors():
            located.fault(tuple(fault["loc"]), _remedy(fault["type"], fault["msg"], tuple(fault["loc"])))
        _raise(located)
        raise
    _check_references(config, located)
    _raise(located)
    return config.model_copy(update={"data": (path.parent / config.data).resolve()}), located


def _raise(located: Located) -> None:
    if located.faults:
        raise ConfigError([f"{place}: {what}" for place, what in located.faults])


def _remedy(kind: str, message: str, keys: Keys) -> str:
    if kind == "path_type":
        return "must be the path of a folder"
    if kind == "extra_forbidden":
        known = _known_keys(keys[:-1])
        close = difflib.get_close_matches(str(keys[-1]), known, n=1)
        return f"unknown key; did you mean {close[0]!r}?" if close else f"unknown key; known here: {', '.join(known)}"
    if kind == "missing":
        return "is required; add it"
    return message.removeprefix("Value error, ")


def _known_keys(keys: Keys) -> list[str]:
    model: type[BaseModel] = Config
    for key in keys:
        if isinstance(key, str) and key in model.model_fields:
            model = _model_in(model.model_fields[key].annotation) or model
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _model_in(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401  a type annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _model_in(part)
        if found is not None:
            return found
    return None


def _check_references(config: Config, located: Located) -> None:
    if config.bus.kind == "kafka" and config.bus.kafka is None:
        located.fault(("bus", "kind"), "bus.kafka.bootstrap is needed as well: the brokers as HOST:PORT")
    gateway = config.gateway
    _check_unique(located, ("gateway", "ae_titles"), "ae_title", [one.ae_title for one in gateway.ae_titles])
    _check_unique(located, ("gateway", "destinations"), "name", [one.name.lower() for one in gateway.destinations])
    _check_unique(located, ("pipelines",), "id", [one.id for one in config.pipelines])
    names = {one.name.lower(): one.name for one in gateway.destinations}
    for index, pipeline in enumerate(config.pipelines):
        for place, name in enumerate(pipeline.destinations):
            if name.lower() not in names:
                known = ", ".join(sorted(names.values())) or "none"
                keys = ("pipelines", index, "destinations", place)
                located.fault(keys, f"no destination {name!r}; gateway.destinations has: {known}")


def _check_unique(located: Located, keys: Keys, field: str, values: list[str]) -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            located.fault((*keys, index, field), f"{value!r} is used twice; each must be unique")
