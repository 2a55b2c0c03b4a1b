"""The part of the configuration that names destinations: where results go, how, and when."""

from __future__ import annotations

import re
from datetime import date, time
from typing import Annotated
from zoneinfo import ZoneInfo

from pydantic import AnyHttpUrl, Field, SecretStr, field_validator, model_validator

from clarion.fields import AeTitle, BesideFile, Model, Name, Port, TlsProfile
from clarion.model import DAYS, Day, Destination, Schedule, TlsFiles, WebAccess, Window, is_uid

_MIDNIGHT = "24:00"
_HOUR, _DAY = 60, 24 * 60


class TlsClientConfig(Model):
    """TLS towards a destination: whom we trust (the system's list if left out), and who we are if it asks."""

    ca: BesideFile | None = None
    certificate: BesideFile | None = None
    key: BesideFile | None = None
    check_host: bool = True
    profile: TlsProfile = "bcp195"

    @model_validator(mode="after")
    def _both_or_none(self) -> TlsClientConfig:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        return self

    @property
    def files(self) -> TlsFiles:
        """The files, as the wire takes them."""
        return TlsFiles(
            profile=self.profile,
            trusted=self.ca,
            certificate=self.certificate,
            key=self.key,
            check_host=self.check_host,
        )


class WebConfig(Model):
    """A DICOMweb service (PS3.18): its root, below which `/studies` is, and how we say who we are."""

    url: AnyHttpUrl
    user: str | None = None
    password: SecretStr | None = None
    token: SecretStr | None = None

    @model_validator(mode="after")
    def _one_way(self) -> WebConfig:
        if (self.user is None) != (self.password is None):
            raise ValueError("user and password go together")
        if self.token is not None and self.user is not None:
            raise ValueError("give a token, or user and password, not both")
        return self

    @property
    def access(self) -> WebAccess:
        """The service, as the sender takes it."""
        secret = self.token or self.password
        return WebAccess(
            url=str(self.url).rstrip("/"), user=self.user, secret=secret.get_secret_value() if secret else None
        )


class WindowConfig(Model):
    """When sending may begin: on these days, from a time to a time; over midnight it belongs to the day it begins."""

    days: Annotated[tuple[Day, ...], Field(min_length=1)] = DAYS
    from_: Annotated[time, Field(alias="from")]
    to: time | None

    @field_validator("from_", "to", mode="before")
    @classmethod
    def _as_written(cls, value: object) -> object:
        """Take a time as HH:MM; YAML makes minutes of one without quotes."""
        if isinstance(value, int) and _HOUR <= value <= _DAY:
            value = f"{value // _HOUR:02d}:{value % _HOUR:02d}"
        if value == _MIDNIGHT:
            return None
        found = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", value) if isinstance(value, str) else None
        if found is None:
            raise ValueError('is a time as "22:00", in quotes')
        return f"{int(found[1]):02d}:{found[2]}"


class DestinationConfig(Model):
    """A PACS that results are delivered to: by DIMSE at an address, or by STOW-RS.

    `windows` say when, in the zone `timezone` (this machine's if left out); on `holidays` it is all day.
    """

    name: Name
    ae_title: AeTitle | None = None
    host: Annotated[str, Field(min_length=1)] | None = None
    port: Port | None = None
    tls: TlsClientConfig | None = None
    dicomweb: WebConfig | None = None
    max_associations: Annotated[int, Field(ge=1, le=16)] = 2
    max_pdu: Annotated[int, Field(ge=4096, le=131072)] = 131072
    transfer_syntaxes: tuple[str, ...] = ()
    windows: tuple[WindowConfig, ...] = ()
    holidays: tuple[date, ...] = ()
    timezone: str | None = None

    @field_validator("transfer_syntaxes")
    @classmethod
    def _uids(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            if not is_uid(one):
                raise ValueError(
                    f"{one!r} is no UID; write transfer syntaxes as in PS3.6 A-1, e.g. 1.2.840.10008.1.2.1"
                )
        return value

    @field_validator("timezone")
    @classmethod
    def _zone(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                ZoneInfo(value)
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(f"no time zone {value!r}; write it as Europe/Berlin") from error
        return value

    @model_validator(mode="after")
    def _one_way(self) -> DestinationConfig:
        address = (self.ae_title, self.host, self.port)
        if self.dicomweb is None and None in address:
            raise ValueError("give ae_title, host and port, or dicomweb")
        if self.dicomweb is not None and address != (None, None, None):
            raise ValueError("give ae_title, host and port, or dicomweb, not both")
        return self

    @property
    def destination(self) -> Destination:
        """The destination, as the rest of the program knows it."""
        return Destination(
            name=self.name,
            ae_title=self.ae_title or "",
            host=self.host or "",
            port=self.port or 0,
            tls=self.tls.files if self.tls is not None else None,
            web=self.dicomweb.access if self.dicomweb is not None else None,
            max_associations=self.max_associations,
            max_pdu=self.max_pdu,
            transfer_syntaxes=self.transfer_syntaxes,
            schedule=self._schedule if self.windows else None,
        )

    @property
    def _schedule(self) -> Schedule:
        windows = tuple(Window(days=one.days, begins=one.from_, ends=one.to) for one in self.windows)
        return Schedule(windows=windows, holidays=self.holidays, timezone=self.timezone)
