"""`clarion association list`: who associated, what came of it, who was turned away and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from console.command import DEFAULT_CONFIG, AsJson, ConfigFile, print_json, run

if TYPE_CHECKING:
    from collections.abc import Callable

association_cli = typer.Typer(help="Look at associations that ended or were rejected.", no_args_is_help=True)


@association_cli.command("list")
def list_associations(
    config: ConfigFile = DEFAULT_CONFIG,
    rejected: Annotated[bool, typer.Option("--rejected", help="Only those that were turned away, or lost.")] = False,
    calling: Annotated[str | None, typer.Option("--calling", help="Only those of this calling AE title.")] = None,
    address: Annotated[str | None, typer.Option("--address", help="Only those from this address.")] = None,
    last: Annotated[int, typer.Option("--last", "-n", min=1, max=100_000, help="So many, the newest.")] = 30,
    as_json: AsJson = False,
) -> None:
    """List associations, the newest last; kept for a month."""

    def body() -> int:
        from console.checks import check_config  # noqa: PLC0415  quick --help
        from gateway.association_log import read  # noqa: PLC0415  as above

        wanted = _filter(rejected=rejected, calling=calling, address=address)
        lines = read(check_config(config).config.data, wanted, last)
        if as_json:
            print_json(lines)
        else:
            _show(lines)
        return 0

    run(body)


def _filter(*, rejected: bool, calling: str | None, address: str | None) -> Callable[[dict[str, Any]], bool]:
    def wanted(line: dict[str, Any]) -> bool:
        if rejected and line["kind"] == "ended":
            return False
        if calling is not None and line.get("calling_ae") != calling:
            return False
        return address is None or line.get("address") == address

    return wanted


def _show(lines: list[dict[str, Any]]) -> None:
    for one in lines:
        by = "STOW-RS" if one.get("web") else "TLS" if one.get("tls") else "clear"
        who = f"{one.get('calling_ae', '-'):<16} → {one.get('called_ae', '-'):<16} {one.get('address', ''):<15} {by:<7}"
        typer.echo(f"{one['time'][:19]}Z  {who}  {_what(one)}")
    if not lines:
        typer.echo("no association that is like that", err=True)


def _what(line: dict[str, Any]) -> str:
    """Say what came of an association."""
    if line["kind"] != "ended":
        return ": ".join(one for one in (line["kind"], line.get("check"), line.get("reason")) if one)
    refused = "".join(f", {count} refused {status}" for status, count in line["refused"].items())
    size = f"{line['bytes'] / 1e6:,.1f} MB in {line['seconds']:,.1f} s"
    return f"{line['stored']} stored{refused}, {size}, {line['reason']}"
