"""The command line. Nothing heavy is imported before a command needs it: ``--help`` answers at once."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import platformdirs
import typer

from nbrunner.cli_options import (
    AnnounceOption,
    HostOption,
    IdentityOption,
    InviteOption,
    JsonOption,
    ListenOption,
    LogLevelOption,
    NameOption,
    PeersOption,
    PortOption,
    SwarmKeyFile,
    SwarmKeyOption,
    default_swarm_key,
    listen_addresses,
    load_identity,
    read_config,
    read_invite,
    set_up_logging,
    show_invites,
)
from nbrunner.errors import InviteError, MissingBlocksError, NBRunnerError, UserInputError

if TYPE_CHECKING:
    from nbrunner.server.options import ServerOptions

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_MISSING = 3
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="nbrunner",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Run and fine-tune language models that are too big for one machine, together.",
    epilog=(
        "Exit codes: 0 done, 1 it failed while running, 2 what you passed cannot be used (nothing was started), "
        "3 no server has some of the blocks, 130 interrupted. Messages for people go to standard error."
    ),
)


@app.callback()
def _common(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="TOML file with a table for each command and its long options, without the dashes in front, as "
            "keys; what is given on the command line wins. Default: "
            f"{platformdirs.user_config_path('nbrunner') / 'config.toml'}, if it exists.",
        ),
    ] = None,
) -> None:
    default = platformdirs.user_config_path("nbrunner") / "config.toml"
    path = config or (default if default.exists() else None)
    if path is not None:
        context.default_map = read_config(path, config_keys())


def config_keys() -> dict[str, dict[str, str]]:
    """Of each command: what may stand in its table of the config file → the parameter that takes it."""
    commands: dict[str, Any] = getattr(typer.main.get_command(app), "commands", {})
    return {
        name: {
            option.removeprefix("--"): str(one.name)
            for one in command.params
            for option in getattr(one, "opts", ())
            if option.startswith("--") and not getattr(one, "hidden", False)
        }
        for name, command in commands.items()
    }


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Directory of a model, its id on the hub, or 'tiny'.")],
    blocks: Annotated[
        str | None,
        typer.Option(
            "--blocks", "-b", help="Blocks to serve: 0:8, a number, or auto (what the swarm lacks and fits)."
        ),
    ] = None,
    invite: InviteOption = None,
    peers: PeersOption = None,
    new_swarm: Annotated[
        bool, typer.Option("--new-swarm", help="Begin a swarm of your own and print invites for it.")
    ] = False,
    swarm_key: SwarmKeyOption = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    quantize: Annotated[
        str,
        typer.Option(
            "--quantize", help="Keep the weights of linear layers in 8 or 4 bits: none, int8, int4, nf4 (GPUs)."
        ),
    ] = "none",
    port: PortOption = 0,
    host: HostOption = "0.0.0.0",  # noqa: S104 - a server is there to be reached; the invite says by whom
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    name: NameOption = "",
    identity: IdentityOption = None,
    threads: Annotated[
        int,
        typer.Option(
            "--threads", min=0, help="Torch threads; 0: this machine's cores, shared with your other servers on it."
        ),
    ] = 0,
    cache_memory: Annotated[
        str | None,
        typer.Option("--cache-memory", help="For caches, as in 4GB. Default: half of what is free after loading."),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="For blocks and caches, as in 8GB. Default: what is free.")
    ] = None,
    lens: Annotated[
        bool,
        typer.Option("--lens", help="Also hold the final norm and head, and read hidden states through them."),
    ] = False,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", help="Serve a LoRA adapter by name: NAME=DIRECTORY or NAME=REPOSITORY. Can be repeated."
        ),
    ] = None,
    accept_adapters: Annotated[
        bool, typer.Option("--accept-adapters", help="Also serve adapters that members of the swarm offer.")
    ] = False,
    run_for: Annotated[
        str | None, typer.Option("--for", help="Leave by itself after this time, as in 90s, 30m, 2h.")
    ] = None,
    max_sessions: Annotated[
        int, typer.Option("--max-sessions", min=1, help="Sessions one peer may have open.")
    ] = 32,
    peer_cache_memory: Annotated[
        str | None,
        typer.Option("--peer-cache-memory", help="Of the memory for caches, what one peer may have. Default: all."),
    ] = None,
    tokens_per_second: Annotated[
        float,
        typer.Option("--tokens-per-second", min=0, help="Tokens × rows computed for one peer; 0: no limit."),
    ] = 0.0,
    limit_session_tokens: Annotated[
        int, typer.Option("--limit-session-tokens", min=0, help="Longest session; 0: what the model was made for.")
    ] = 0,
    limit_part_tokens: Annotated[
        int, typer.Option("--limit-part-tokens", min=1, help="Tokens × rows one peer may send at once.")
    ] = 8192,
    limit_batch: Annotated[int, typer.Option("--limit-batch", min=1, help="Rows of one session or request.")] = 128,
    drain: Annotated[
        float, typer.Option("--drain", min=0, help="Seconds that sessions have to move after Ctrl-C.")
    ] = 30.0,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")] = None,
    token: Annotated[str | None, typer.Option("--token", envvar="HF_TOKEN", help="Of the hub.")] = None,
    cache_dir: Annotated[Path | None, typer.Option("--cache-dir", help="For files from the hub.")] = None,
    log_level: LogLevelOption = "info",
    json_lines: JsonOption = False,
    managed: Annotated[bool, typer.Option("--managed", hidden=True)] = False,
) -> None:
    """Serve blocks of a model to a swarm.

    Ctrl-C leaves politely: sessions are asked to move and waited for; a second Ctrl-C leaves at once.
    """
    set_up_logging(log_level)
    from nbrunner.protocol.limits import Limits
    from nbrunner.server.options import (
        ServerOptions,
        check_model_path,
        parse_adapter,
        parse_bytes,
        parse_choice,
        parse_seconds,
    )

    check_model_path(model)
    span, count = parse_choice(blocks or "auto")
    cache_bytes = parse_bytes(cache_memory) if cache_memory is not None else None
    key_file, joined = None, None
    if not managed:
        if invite and (new_swarm or swarm_key is not None):
            raise UserInputError(
                "an invite (--invite, or NBRUNNER_INVITE) joins a swarm, --new-swarm and --swarm-key run one of "
                "your own: use one of them"
            )
        joined = read_invite(invite, peers, needed=not new_swarm and swarm_key is None)
        addresses = listen_addresses(host, port, listen)
        if joined is None:
            key_file = SwarmKeyFile.find(swarm_key, create=new_swarm)
        elif joined.terms.role != "host":
            raise InviteError("this invite lets you use the swarm, not host blocks: ask for one with role 'host'.")
    else:
        addresses = listen_addresses(host, port, listen)
    me = load_identity(identity) or (key_file.identity() if key_file else None)
    options = ServerOptions(
        model=model,
        blocks=span,
        num_blocks=count,
        lens=lens,
        adapters=[parse_adapter(one) for one in adapters or ()],
        accept_adapters=accept_adapters,
        max_memory=parse_bytes(max_memory) if max_memory is not None else None,
        run_seconds=parse_seconds(run_for) if run_for is not None else None,
        invite=joined if key_file is None else key_file.way_back(peers),
        swarm_key=None if key_file is None else key_file.key,
        identity=me,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        device=device,
        dtype=dtype,
        quantize=quantize,
        threads=threads,
        listen=addresses,
        announce=announce,
        name=name,
        cache_bytes=cache_bytes,
        limits=Limits(
            part_tokens=limit_part_tokens,
            batch=limit_batch,
            session_tokens=limit_session_tokens,
            sessions=max_sessions,
            cache_bytes=0,
            peer_cache_bytes=parse_bytes(peer_cache_memory) if peer_cache_memory is not None else 0,
            tokens_per_second=tokens_per_second,
        ),
        drain_seconds=drain,
    )
    _run_server(options, key_file, managed=managed, machine=json_lines)


def _run_server(options: ServerOptions, key_file: SwarmKeyFile | None, *, managed: bool, machine: bool) -> None:
    # set before torch is imported: a thread that spins at a barrier takes the time of other processes
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # importing torch, transformers and hivemind takes 3.0 s of CPU without the garbage collector and 3.8 s with it
    gc.disable()
    from nbrunner.server.process import emit
    from nbrunner.server.process import serve as run

    def ready(server: Any) -> None:
        gc.freeze()  # what is here stays; walking through it in each collection would stall steps for 0.1 s
        gc.enable()
        if managed:
            return
        if key_file is not None:
            key_file.keep_addresses(server.node.addresses)
            invites = {role: str(server.make_invite(role)) for role in ("use", "host")}
            if machine:
                emit("invites", **invites)
            else:
                show_invites(invites)
        elif not machine:
            typer.echo(f"serving blocks {server.blocks[0]}:{server.blocks[1]} of {server.host.model}")

    raise typer.Exit(run(options, managed=managed, machine=machine, on_ready=ready))


@app.command()
def bootstrap(
    invite: InviteOption = None,
    swarm_key: SwarmKeyOption = None,
    port: PortOption = 0,
    host: HostOption = "0.0.0.0",  # noqa: S104 - it is there to be reached
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    identity: IdentityOption = None,
    log_level: LogLevelOption = "info",
    json_lines: JsonOption = False,
) -> None:
    """Keep a swarm findable: a node that serves no blocks, begins a swarm or joins one, and stays.

    Its address is in the invites it prints. Give it a fixed --port; its identity is kept, so that they stay good.
    """
    set_up_logging(log_level)
    joined = read_invite(invite, None, needed=False)
    key_file = SwarmKeyFile.find(swarm_key or default_swarm_key(), create=True) if joined is None else None
    addresses = listen_addresses(host, port, listen)
    kept = identity or platformdirs.user_data_path("nbrunner") / "bootstrap.identity"
    me = load_identity(kept)
    from nbrunner.server.process import emit, keep_node

    def ready(addresses: list[str], peer: str) -> None:
        if json_lines:
            emit("ready", peer=peer, addresses=addresses)
        if key_file is not None:
            key_file.keep_addresses(addresses)
            invites = {role: str(key_file.key.invite(addresses, role=role)) for role in ("use", "host")}
            if json_lines:
                emit("invites", **invites)
            else:
                show_invites(invites)

    code = keep_node(
        invite=joined,
        swarm_key=key_file.key if key_file else None,
        identity=me,
        listen=addresses,
        announce=announce,
        on_ready=ready,
    )
    raise typer.Exit(code)


@app.command()
def invite(
    role: Annotated[str, typer.Option("--role", help="use: run requests; host: also serve blocks.")] = "use",
    expires: Annotated[
        float | None, typer.Option("--expires", min=0.001, help="Hours from now. Default: never.")
    ] = None,
    max_sessions: Annotated[
        int, typer.Option("--max-sessions", min=0, help="Of each holder on each server; 0 leaves it to the server.")
    ] = 0,
    tokens_per_second: Annotated[
        float, typer.Option("--tokens-per-second", min=0, help="The same; 0 leaves it to the server.")
    ] = 0.0,
    address: Annotated[
        list[str] | None,
        typer.Option("--address", help="Of a peer that is up. Default: where servers of this swarm were last."),
    ] = None,
    swarm_key: SwarmKeyOption = None,
    json_lines: JsonOption = False,
) -> None:
    """Make another invite for a swarm you created."""
    if role not in ("use", "host"):
        raise UserInputError(f"{role!r} is not a role: use 'use' or 'host'")
    key_file = SwarmKeyFile.find(swarm_key or default_swarm_key(), create=False)
    if key_file is None:
        raise UserInputError("no swarm key")
    chosen: Literal["use", "host"] = "host" if role == "host" else "use"
    addresses = address or key_file.addresses
    if not addresses:
        raise UserInputError("no server of this swarm has run here yet: start one, or pass --address")
    made = key_file.key.invite(
        addresses,
        role=chosen,
        expires_in=None if expires is None else expires * 3600,
        max_sessions=max_sessions,
        tokens_per_second=tokens_per_second,
    )
    facts = {"invite": str(made), "role": chosen, "expires": made.terms.expires}
    typer.echo(json.dumps(facts) if json_lines else str(made))


@app.command()
def status(
    invite: InviteOption = None,
    peers: PeersOption = None,
    log_level: LogLevelOption = "warning",
    json_lines: JsonOption = False,
) -> None:
    """Show who serves what. The exit code is 3 if blocks are missing."""
    set_up_logging(log_level)
    joined = read_invite(invite, peers, needed=True)
    if joined is None:
        raise UserInputError("no invite")
    from nbrunner.cli_status import as_json, look, show
    from nbrunner.server.process import run

    found: list[Any] = []

    async def main(_: Any) -> int:
        found.append(await look(joined))
        return 0

    with _interruptible():
        run(main)
    report = as_json(found[0])
    if json_lines:
        typer.echo(json.dumps(report))
    else:
        show(found[0])
    raise typer.Exit(EXIT_MISSING if any(report["missing"].values()) or not report["servers"] else 0)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue; - reads standard input.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Directory, hub id, or 'tiny'.")] = "tiny",
    invite: InviteOption = None,
    peers: PeersOption = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="At most so many new tokens.")
    ] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            "-t",
            min=0,
            help="0: always the likeliest. Default: 0, but 1 with --top-p or --top-k.",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p", min=0, max=1, help="Sample among the likeliest tokens of so much probability together."
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Sample among so many of the likeliest tokens.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="For sampling.")] = None,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Beam search over so many texts.")] = 1,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")] = None,
    log_level: LogLevelOption = "warning",
    json_lines: JsonOption = False,
) -> None:
    """Continue a text, streaming. Without an invite a small swarm is started here, and ended."""
    set_up_logging(log_level)
    joined = read_invite(invite, peers, needed=False)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise UserInputError("the prompt is empty")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    gc.disable()  # as in _run_server
    from nbrunner.cli_generate import generate as run
    from nbrunner.client.sampling import temperature_unless_given

    gc.freeze()
    gc.enable()
    if temperature is None:
        temperature = temperature_unless_given(0.0, top_p=top_p, top_k=top_k, beams=beams)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "beams": beams}
    with _interruptible():
        receipt = run(
            text,
            model=model,
            invite=joined,
            revision=revision,
            max_new_tokens=max_new_tokens,
            write=None if json_lines else _write,
            **sampling,
        )
    if json_lines:
        typer.echo(json.dumps(receipt))


@app.command()
def version(json_lines: JsonOption = False) -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    from nbrunner.protocol.greeting import VERSION

    number = installed("nbrunner")
    typer.echo(json.dumps({"version": number, "protocol": VERSION}) if json_lines else f"nbrunner {number}")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends a command with the exit code that shells expect."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def main() -> None:
    """Run the command line; the process ends with the exit codes of ``--help``."""
    try:
        app(prog_name="nbrunner")
    except NBRunnerError as error:
        # part of it may be what another peer said: nothing in it may steer the terminal
        text = "".join(one for one in str(error) if one.isprintable() or one == "\n")
        typer.echo(f"nbrunner: {text}", err=True)
        sys.exit(exit_code(error))


def exit_code(error: NBRunnerError) -> int:
    """The exit code that stands for an error."""
    if isinstance(error, UserInputError):
        return EXIT_USAGE
    return EXIT_MISSING if isinstance(error, MissingBlocksError) else EXIT_FAILURE
