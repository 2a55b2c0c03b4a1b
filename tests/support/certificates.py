"""Certificates of an authority of our own, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import trustme


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    certificate: Path
    key: Path


class Authority:
    """Vouches for certificates; its own is `ca`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ca = trustme.CA()
        self.ca = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.ca)

    def issue(self, name: str, *hosts: str, until: datetime | None = None) -> Pair:
        """Issue a certificate; written again under the same name, it replaces the one before."""
        made = self._ca.issue_cert(*(hosts or ("127.0.0.1",)), not_after=until)
        pair = Pair(certificate=self._folder / f"{name}.pem", key=self._folder / f"{name}.key")
        made.private_key_pem.write_to_path(pair.key)
        pair.certificate.write_bytes(b"".join(one.bytes() for one in made.cert_chain_pems))
        return pair
