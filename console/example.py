"""The configuration that `clarion config example` prints: complete, commented, and good as it is."""

from __future__ import annotations

EXAMPLE = """\
# Clarion: one file, checked as a whole before anything starts (`clarion config check`).

data: ./clarion-data                # objects, journal, database; a folder on a local disk

database: {}                        # url: postgresql://USER:PASSWORD@HOST:PORT/NAME; default is SQLite under `data`

bus:
  kind: embedded                    # or kafka, with kafka.bootstrap; see docs/operations.md

gateway:
  scp:
    host: 127.0.0.1                 # 0.0.0.0 to be reached by modalities
    port: 11112
    max_associations: 25
    # tls: {port: 2762, certificate: ours.pem, key: ours.key, client_ca: modalities.pem}
  scu:
    ae_title: CLARION               # how we call ourselves when we deliver
  ae_titles:                        # what may be called, and the rule that groups what comes
  - ae_title: CHEST
    rule: by-tag
    settings:
      timeout: 5                    # seconds of quiet before a group is complete
      groupBy: 0020,000D            # Study Instance UID
      pipeline-chest: chest-ct      # pipeline-NAME: id of a pipeline below; give other modalities another AE title
  sources:                          # who may send: AE title and address, both must match
  - {ae_title: MODALITY, host: 127.0.0.1}
  destinations:
  - {name: pacs, ae_title: PACS, host: 127.0.0.1, port: 4242}
  # - {name: cloud, dicomweb: {url: "https://pacs.example.org/dicom-web", token: SECRET}}
  # and for either: windows: [{from: "22:00", to: "06:00"}], max_associations: 2; see docs/operations.md
  # stow: {port: 5080, clients: [{ae_title: WEB, token: A-SECRET-OF-16-OR-MORE}]}   # receive by STOW-RS
  intake:
    watermark_percent: 85           # of the disk; beyond it senders are told to try later
    reserve_gb: 5
  delivery:
    max_retries: 3
    retry_delay_s: 180              # doubling, at most an hour

pipelines:
- id: chest-ct
  file: builtin:chest-ct            # or the path of a definition beside this file
  destinations: [pacs]

console:
  host: 127.0.0.1                   # beyond loopback a `token` is required
  port: 5000

log:
  level: info
  format: text                      # or json
"""
