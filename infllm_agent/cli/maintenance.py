"""``infllm-agent sessions check``, ``export``, ``import`` and ``prune``: the upkeep of what is stored."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, cast

import typer

from infllm_agent.cli.input import Interrupts, standard_input
from infllm_agent.cli.options import AsJson, BucketUrl, Root, SessionName
from infllm_agent.cli.output import FAILED, confirmed, note, print_json, print_table, progress, session_fields
from infllm_agent.errors import Cancelled, InfLLMError, UnknownSession
from infllm_agent.platform.text import counted, local_time, printable
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.session_store import SessionStore

if TYPE_CHECKING:
    from infllm_agent.maintenance.check import Checked

BESIDE_A_WRITER = "not locked, as another process has it open: leftover files and the search index were left aside"

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def check(
    sessions: Annotated[
        list[str] | None, typer.Argument(metavar="[SESSION...]", help="Those to check.", show_default="all")
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Put right what needs no model: leftover files, modes, the catalogue, the full-text index."
        ),
    ] = False,
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="Where blocks or tail are damaged, have the model read the log again."),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="To rebuild with.", show_default="the one the session was made with")
    ] = None,
    device: Annotated[str, typer.Option(help="To rebuild on: auto, cpu, cuda, cuda:1, ...")] = "auto",
    *,
    root: Root,
    as_json: AsJson = False,
) -> None:
    """Read stored sessions to the last byte and compare every checksum. Exit code 1 if anything is wrong."""
    from infllm_agent.maintenance.check import Cure, Problem, stored_bytes  # loads torch
    from infllm_agent.maintenance.check import check as check_stored

    names = sessions or []
    with _bytes_bar("checking", stored_bytes(root, names)) as read:
        found = list(check_stored(root, names, repair=repair, read=read))
    if rebuild:
        damaged = [one.name for one in found if one.name is not None and one.has(Cure.REBUILD)]
        errors = _rebuild(root, damaged, model, device)
        for i, before in enumerate(found):
            if before.name in errors:
                before.problems.append(Problem(f"not rebuilt: {errors[before.name]}", Cure.OTHER))
            elif before.name in damaged:
                (found[i],) = check_stored(root, [before.name], repair=repair)
                found[i].repaired[:0] = [*before.repaired, *(p for p in before.problems if p.cure is Cure.REBUILD)]
    _report(found, as_json)
    if not all(one.ok for one in found):
        raise typer.Exit(FAILED)


def _rebuild(root: Path, names: Sequence[str], model: str | None, device: str) -> dict[str, str]:
    """Rebuild sessions, one model after the other. Returns the errors of those that could not be."""
    from infllm_agent.runtime import AgentRuntime

    wanted: dict[tuple[str, str], list[str]] = {}
    tokens: dict[str, int] = {}
    for name in names:
        with closing(SessionStore.open(root, name, readonly=True)) as store:
            tokens[name] = store.token_count
            wanted.setdefault((model or store.fingerprint["model"], store.fingerprint["dtype"]), []).append(name)
    errors: dict[str, str] = {}
    for (which, dtype), group in wanted.items():
        try:
            with (
                Interrupts() as interrupts,
                AgentRuntime.open(root, which, device=device, dtype=dtype, progress=note) as runtime,
            ):
                for name in group:
                    try:
                        with progress(f"rebuilding {name}", tokens[name]) as show:
                            told = partial(_told_tokens, show)
                            runtime.rebuild(name, cancelled=interrupts, progress=told)
                    except Cancelled:
                        raise
                    except InfLLMError as error:
                        errors[name] = str(error)
        except Cancelled:
            raise
        except InfLLMError as error:  # the model
            errors |= dict.fromkeys(group, str(error))
    return errors


def _told_tokens(show: Callable[[int, str], None], done: int, total: int) -> None:
    show(done, f"{done:,} of {total:,} tokens")


def _report(found: Sequence[Checked], as_json: bool) -> None:
    errors = [str(problem) for one in found for problem in one.problems]
    if as_json:
        print_json(
            {
                "ok": not errors,
                "sessions": [_checked_fields(one) for one in found if one.name is not None],
                "errors": errors,
                "repaired": [problem.what for one in found for problem in one.repaired],
            }
        )
        return
    for one in found:
        if one.name is None and one.ok and not one.repaired:
            continue
        state = "ok" if one.ok else counted(len(one.problems), "problem")
        beside = f" ({BESIDE_A_WRITER})" if one.read_only else ""
        print(f"{one.name or 'the catalogue'}: {state}{beside}")
        for problem in one.repaired:
            print(printable(f"    put right: {problem.what}"))
        for problem in one.problems:
            print(printable(f"    {problem}"))
    if all(one.name is None and one.ok for one in found):
        print("no sessions")
    if errors:
        print(counted(len(errors), "problem"), file=sys.stderr)


def _checked_fields(one: Checked) -> dict[str, Any]:
    return {
        "name": one.name,
        "ok": one.ok,
        "read_only": one.read_only,
        "problems": [{"problem": problem.what, "cure": problem.cure.value} for problem in one.problems],
        "repaired": [problem.what for problem in one.repaired],
    }


def export(
    session: SessionName,
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="A tar archive; - is stdout.", show_default=False)],
    *,
    root: Root,
    as_json: AsJson = False,
) -> None:
    """Write a session, as of its last commit, to one file. Another process may go on with it meanwhile."""
    from infllm_agent.maintenance.archive import export_session, write_archive  # loads torch

    if file == "-" and (as_json or sys.stdout.isatty()):
        raise typer.BadParameter("stdout is for the archive: name a file, or a pipe without --json", param_hint="FILE")
    catalog = Catalog(root)
    catalog.require(session)
    total = next(info.bytes["disk"] for info in catalog.list() if info.name == session)
    with _bytes_bar(f"exporting {session}", total) as written:
        if file == "-":
            size = write_archive(root, session, cast(BinaryIO, sys.stdout.buffer), progress=written)
            sys.stdout.flush()
        else:
            size = export_session(root, session, os.path.expanduser(file), progress=written)
    if as_json:
        print_json({"session": session, "file": file, "bytes": size})
    elif file != "-":
        print(f"{session}: {size:,} bytes in {printable(file)}")


def import_(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="What export wrote; - is stdin.", show_default=False)],
    name: Annotated[
        str | None, typer.Option(help="The new session's name.", show_default="the one it was exported under")
    ] = None,
    *,
    root: Root,
    as_json: AsJson = False,
) -> None:
    """Make a session of a file that export wrote. All of it is checked before the session appears."""
    from infllm_agent.maintenance.archive import import_session, read_archive  # loads torch

    path = None if file == "-" else Path(file).expanduser()
    with _bytes_bar("importing", path.stat().st_size if path else None) as read:
        if path is not None:
            info = import_session(root, path, name, progress=read)
        else:
            info = read_archive(root, cast(BinaryIO, standard_input()), name, origin="stdin", progress=read)
    if as_json:
        print_json(session_fields(info))
    else:
        print(f"{info.name}: {counted(info.messages, 'message')}, {counted(info.tokens, 'token')}")


def publish(session: SessionName, bucket: BucketUrl, *, root: Root, as_json: AsJson = False) -> None:
    """Make a session's last commit the one in a bucket. What is there already is not sent again."""
    from infllm_agent.maintenance.bucket import Bucket  # loads torch

    done = Bucket(bucket).publish(root, session)
    if as_json:
        print_json({"session": session, **done._asdict()})
    elif done.objects:
        print(f"{session}: {counted(done.objects, 'object')}, {done.bytes:,} bytes")
    else:
        print(f"{session}: published already")


def pull(session: SessionName, bucket: BucketUrl, *, root: Root, as_json: AsJson = False) -> None:
    """Have a session as it is in a bucket. Its blocks are fetched when they are needed."""
    from infllm_agent.maintenance.bucket import Bucket  # loads torch

    place = Bucket(bucket)
    fetched = place.pull(root, session)
    if not fetched and place.last(session) is None:
        raise UnknownSession(f'session "{session}" is not in the bucket {place.url}')
    if as_json:
        print_json({"session": session, "fetched": fetched})
    else:
        print(f"{session}: {'fetched' if fetched else 'as it is in the bucket already'}")


def prune(
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Those without a commit for so long: 30d, 12h, 90m, 2w.")
    ] = None,
    larger_than: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Those that take more on disk: 5GB, 500MB, 2GiB.")
    ] = None,
    keep_under: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Then those used longest ago, until all together take at most so much."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted.")] = False,
    yes: Yes = False,
    *,
    root: Root,
    as_json: AsJson = False,
) -> None:
    """Delete sessions by age and size; with both, those to which both apply. What is open elsewhere stays."""
    from infllm_agent.maintenance import prune as pruning

    limits = {
        "older_than": _parsed(pruning.parse_age, older_than, "--older-than"),
        "larger_than": _parsed(pruning.parse_size, larger_than, "--larger-than"),
        "keep_under": _parsed(pruning.parse_size, keep_under, "--keep-under"),
    }
    plan = pruning.plan_prune(root, **limits)
    if not dry_run and not sys.stdin.isatty():
        confirmed("", yes=yes, what="pruning")  # refuses before it shows anything
    gone: list[pruning.Pruned] = []
    if not as_json:
        _show_plan(plan)
    if plan.sessions and not dry_run:
        if not confirmed(f"Delete {counted(len(plan.sessions), 'session')} for good?", yes=yes, what="pruning"):
            print("nothing deleted", file=sys.stderr)
            raise typer.Exit(FAILED)
        known = len(plan.skipped)
        gone = list(pruning.prune(root, plan.sessions, plan.skipped.append))
        if not as_json:
            print("".join(f"skipped: {printable(line)}\n" for line in plan.skipped[known:]), end="")
            print(f"{counted(len(gone), 'session')} deleted")
    if as_json:
        shown = plan.sessions if dry_run else gone
        print_json(
            {
                "dry_run": dry_run,
                "pruned": [
                    {"name": one.info.name, "bytes": one.bytes, "updated": one.info.updated, "why": one.why}
                    for one in shown
                ],
                "skipped": plan.skipped,
                "bytes": {"total": plan.total, "freed": plan.freed},
            }
        )


def _show_plan(plan: Any) -> None:
    if plan.sessions:
        print_table(
            ["name", "disk bytes", "updated", "why"],
            [[p.info.name, f"{p.bytes:,}", local_time(p.info.updated), p.why] for p in plan.sessions],
        )
    else:
        print("nothing to delete")
    for line in plan.skipped:
        print(f"skipped: {printable(line)}")
    print(f"{plan.total:,} bytes on disk, of which this frees {plan.freed:,}")


def _parsed(parse: Callable[[str], Any], text: str | None, option: str) -> Any:
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


@contextmanager
def _bytes_bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Progress by bytes. Yields a function that takes those done since the last call."""
    done = 0
    with progress(what, total) as show:

        def add(size: int) -> None:
            nonlocal done
            done += size
            show(done, f"{done / 1e6:,.0f} MB")

        yield add
