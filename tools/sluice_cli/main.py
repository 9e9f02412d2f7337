# SPDX-License-Identifier: Apache-2.0
"""The command ``sluice``: finds the subcommand, runs it, and turns every error into one line.

Subcommands are modules of their own and are imported only when they are run, so that ``sluice --help``
and a mistyped argument answer at once.  Exit codes are those of :mod:`xdp.errors` (docs/troubleshooting.md
lists them), 2 for a wrong command line, 130 after Ctrl-C.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import click

from sluice_cli.output import Output, common_options, examples, write_json
from xdp.errors import PermissionsError, SluiceError, UnsupportedError, UsageError

#: As click names it, for `eval "$(_SLUICE_COMPLETE=bash_source sluice)"`.
COMPLETE_VARIABLE = "_SLUICE_COMPLETE"
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Subcommand(NamedTuple):
    """Where a command lives.  The help line is repeated here so that the list needs no import."""

    module: str
    attribute: str
    help: str


SUBCOMMANDS: dict[str, Subcommand] = {
    "up": Subcommand("up", "up", "Load a policy's program, attach it and serve its lanes."),
    "down": Subcommand("down", "down", "Take Sluice's program off an interface."),
    "status": Subcommand("status", "status", "Show what is loaded, its mode, owner and rates."),
    "check": Subcommand("check", "check", "Validate policy files without touching anything."),
    "doctor": Subcommand(
        "doctor", "doctor", "Say what this kernel and interface can do, and what to do about the rest."
    ),
    "map": Subcommand(
        "map_command", "map_command", "Look into the maps of the loaded program, and change them."
    ),
    "peers": Subcommand("peers", "peers", "List the remote addresses that the program has counted."),
    "lanes": Subcommand("lanes", "lanes", "Show each lane's traffic, drops and limits."),
    "connections": Subcommand(
        "connections", "connections", "Show the connections that programs keep, and how well they are."
    ),
    "replay": Subcommand("replay", "replay", "Send the UDP datagrams of a capture into the lab."),
    "lab": Subcommand("lab_command", "lab_command", "Make two hosts on this machine to try things on."),
    "demo": Subcommand("demo", "demo", "Show the promise: votes arrive while the low lane is flooded."),
    "bench": Subcommand("bench", "bench", "Measure Sluice beside its alternatives."),
    "simulate": Subcommand("simulate", "simulate", "Run networks in virtual time, seeded."),
    "test": Subcommand("testing", "test", "Run the test suite: all levels, or some."),
}

HINTS_FOR_ERRNO = {
    errno.EPERM: "run it as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
    errno.EACCES: "run it as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
    errno.ENOSPC: "free some space on that file system",
    errno.EMFILE: "raise the limit on open files: ulimit -n 65536",
    errno.ENOMEM: "free memory, or raise the locked memory limit: ulimit -l unlimited",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, without importing anything."""
        return [*SUBCOMMANDS, *sorted(super().list_commands(ctx))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command. Raises `UnsupportedError` when something it needs is not installed."""
        entry = SUBCOMMANDS.get(cmd_name)
        if entry is None:
            return super().get_command(ctx, cmd_name)
        try:
            module = importlib.import_module(f"sluice_cli.{entry.module}")
        except ImportError as error:
            raise UnsupportedError(
                f"`sluice {cmd_name}` needs a module that is not installed: {error}",
                hint="run tools/sluice, which installs what is needed, or pip install . in a checkout",
            ) from error
        command = getattr(module, entry.attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"sluice_cli.{entry.module}.{entry.attribute} is no click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The list in the help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in SUBCOMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command. Raises `UsageError` with what may have been meant."""
        if args and args[0] not in SUBCOMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], SUBCOMMANDS, n=1)
            hint = f"did you mean `sluice {near[0]}`?" if near else "`sluice --help` lists the commands"
            raise UsageError(f"no such command: {args[0]}", hint=hint)
        return super().resolve_command(ctx, args)


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib import metadata

    try:
        version = metadata.version("sluice")
    except metadata.PackageNotFoundError:
        version = "(not installed: run from a checkout)"
    click.echo(f"sluice {version}")
    ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples("""
        sluice doctor eth1                     what can this interface do?
        sluice check validator.toml            is this policy right?
        sudo sluice up eth1 validator.toml     load it (Ctrl-C takes it off again)
        sudo sluice status                     what is loaded, and how busy is it?
    """),
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
@common_options
def cli(output: Output) -> None:
    """UDP at the speed of the kernel's fast path: priority lanes by XDP, read in batches."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; never raises for what a user can cause."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if instruction := os.environ.get(COMPLETE_VARIABLE):
            from click.shell_completion import shell_complete

            return shell_complete(cli, {}, "sluice", COMPLETE_VARIABLE, instruction)
        # Not cli.main(): what it does with errors and broken pipes differs between click's versions.
        with cli.make_context("sluice", list(words)) as context:
            result = cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return _flushed(stop.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except BrokenPipeError:
        return _reader_went_away()
    except Exception as error:  # noqa: BLE001 - the last place where an error can be told in one line
        report_error(_described(error), Output.from_words(words), error)
        return _described(error).exit_code
    return result if isinstance(result, int) else 0


def _flushed(code: int) -> int:
    """The exit code, once all that was printed is out (or nobody reads it any more)."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_went_away()
    return code


def _described(error: Exception) -> SluiceError:
    """Any error as one with a message and a hint."""
    if isinstance(error, SluiceError):
        return error
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        path = context.command_path if isinstance(context, click.Context) else "sluice"
        message = error.format_message()
        return UsageError(
            message[:1].lower() + message[1:].rstrip("."), hint=f"`{path} --help` shows the usage"
        )
    if isinstance(error, OSError) and error.errno is not None:
        kind = PermissionsError if error.errno in (errno.EPERM, errno.EACCES) else SluiceError
        what = f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror}"
        return kind(what, hint=HINTS_FOR_ERRNO.get(error.errno, ""))
    return SluiceError(
        f"internal error: {type(error).__name__}: {error}",
        hint="this is a bug in Sluice: run it again with --verbose and report what it prints",
    )


def report_error(error: SluiceError, output: Output, cause: BaseException | None = None) -> None:
    """Say it in one line and a hint on stderr, or as a JSON document on stdout."""
    if output.json:
        fields: dict[str, object] = {
            "type": type(error).__name__,
            "message": str(error),
            "hint": error.hint,
            "exit_code": error.exit_code,
        }
        if output.verbose and error.detail:
            fields["detail"] = error.detail
        write_json({"error": fields})
        return
    output.error_line(f"sluice: error: {error}", "red")
    if error.hint:
        output.error_line(f"hint: {error.hint}")
    if output.verbose and error.detail:
        output.error_line(error.detail.rstrip("\n"))
    if output.verbose and cause is not None and not isinstance(cause, (SluiceError, click.ClickException)):
        import traceback

        output.error_line("".join(traceback.format_exception(cause)).rstrip("\n"))


def _reader_went_away() -> int:
    """`sluice ... | head` has read enough: nothing to complain about, and nothing to flush at exit."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, sys.stdout.fileno())
    os.close(quiet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
