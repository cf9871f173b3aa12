"""`megasapo cluster`: what slurm/sapo_moe.sh has to start for a configuration, checked before anything is started.

The batch script calls it once an attempt and evaluates what it prints; it holds no logic about configurations itself.
It knows nothing of Slurm: nodes and numbers come as arguments. It imports no torch, unless the servers' model has to be
quantised first.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from megasapo import config, keys, layout, run, train
from megasapo.arguments import Parser
from megasapo.config import Config, ConfigError
from megasapo.placed import refuse_unwritable_directory
from megasapo.rollout.fleet import served_model
from megasapo.rollout.limits import ModelLimits, flag, size_of
from megasapo.rollout.spawn import LOOPBACK, server_command, with_routing

TP_FLAGS = ("--tp-size", "--tp", "--tensor-parallel-size")  # SGLang's names for one setting
MEMORY_FLAG = "--mem-fraction-static"  # of SGLang: the share of a GPU that weights and KV cache may take
LOCAL = {"localhost", LOOPBACK}


@dataclass(frozen=True)
class Server:
    """One rollout server: where it listens, which of its node's GPUs are its own (empty: all), how it is started."""

    host: str
    port: int
    devices: tuple[int, ...]
    command: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def shell(self) -> str:
        """The command, for a shell on its node."""
        own = f"CUDA_VISIBLE_DEVICES={','.join(map(str, self.devices))} " if self.devices else ""
        return own + "exec " + shlex.join(self.command)


@dataclass(frozen=True)
class Plan:
    """A configuration on so many nodes."""

    cfg: Config
    learner_nodes: int
    nproc: int  # ranks on each of them
    servers: tuple[Server, ...]
    train: tuple[str, ...]  # arguments of the python that torchrun starts as each rank

    @property
    def run_dir(self) -> Path:
        return self.cfg.run_dir.absolute()


def main(argv: list[str]) -> int:
    """Print the plan, for a shell or (--dry-run) for a reader; ConfigError when it cannot be."""
    args = _parser().parse_intermixed_args(argv)
    plan = make_plan(args)
    print(describe(plan) if args.dry_run else shell_assignments(plan))
    return 0


def _parser() -> Parser:
    p = Parser(prog="megasapo cluster", description="what slurm/sapo_moe.sh will start, checked")
    p.add_config()
    p.add_argument("--learner-nodes", type=int, required=True, metavar="N")
    p.add_argument("--gpus", type=int, required=True, metavar="G", help="GPUs on each node; 0: learn on CPUs")
    p.add_argument("--nproc", type=int, metavar="P", help="ranks on each learner node (default: G)")
    p.add_argument("--servers", required=True, metavar="HOST:PORT,...", help="the first server of each rollout node")
    p.add_argument("--server-tp", type=int, metavar="T", help="GPUs of one server (default: all of its node)")
    p.add_argument("--server-command", metavar="LINE", help="instead of rollout.spawn_command, split as a shell would")
    python = os.environ.get("SERVER_PYTHON", sys.executable)  # an image with two environments sets it
    p.add_argument(
        "--server-python", metavar="PATH", default=python, help=f"of SGLang's environment (default: {python})"
    )
    p.add_argument("--colocated", action="store_true", help="servers share the learners' nodes and GPUs")
    p.add_argument("--dry-run", action="store_true", help="a plan to read; makes no file")
    return p


def make_plan(args: argparse.Namespace) -> Plan:
    """Check everything that can be checked before a rank or a server starts.

    Unless it is a dry run, makes the run directory, and in it api_key and rollout_model where they are needed.
    """
    cfg = config.load(args.config, args.overrides)
    if cfg.rollout.servers:
        raise ConfigError(f"rollout.servers={list(cfg.rollout.servers)}: the batch script starts them: remove it")
    cfg, tp = _settle_servers(cfg, args)
    servers = _place(args.servers, args.gpus, tp)
    if cfg.rollout.publish == "tensor" and not all(server.host in LOCAL for server in servers):
        raise ConfigError(
            f"rollout.publish=tensor is for servers on loopback, and these listen for all nodes ({servers[0].url}): "
            f"use disk{'' if args.colocated else ' or distributed'}"
        )
    if not args.dry_run:
        refuse_unwritable_directory(cfg.run_dir, f"run.dir={cfg.run.dir}, run.name={cfg.run.name}")
    settings = [f"rollout.servers=[{', '.join(server.url for server in servers)}]"]
    settings.append(f"rollout.api_key_file={json.dumps(str(_key_file(cfg, args.dry_run)))}")  # YAML: a path can hold #
    cfg = config.from_dict(cfg.model_dump(mode="json"), settings, source=args.config)
    run.check_files(cfg)
    train.check(cfg)
    nproc = _ranks_a_node(args)
    layout.check_run(cfg, args.learner_nodes * nproc)
    ModelLimits.read(cfg.model.path).check_engine(cfg.rollout.engine)
    model = Path(cfg.model.path).absolute()
    if not args.dry_run:
        model = served_model(cfg.rollout, model, cfg.run_dir.absolute())
    return Plan(
        cfg=cfg,
        learner_nodes=args.learner_nodes,
        nproc=nproc,
        servers=tuple(_with_command(cfg, server, model, args.server_python) for server in servers),
        train=("-m", "megasapo.cli", "train", args.config, *args.overrides, *settings),
    )


def _ranks_a_node(args: argparse.Namespace) -> int:
    nproc = args.nproc if args.nproc is not None else args.gpus
    if args.learner_nodes < 1 or args.gpus < 0 or nproc < 1:
        raise ConfigError(
            f"--learner-nodes {args.learner_nodes}, --gpus {args.gpus}, ranks a node {nproc}: give at least one node "
            "and one rank on it (without GPUs by --nproc)"
        )
    if args.gpus and nproc > args.gpus:
        raise ConfigError(f"--nproc {nproc} ranks do not fit on --gpus {args.gpus}: each needs a GPU of its own")
    return nproc


def _settle_servers(cfg: Config, args: argparse.Namespace) -> tuple[Config, int]:
    """The configuration with every flag that its servers need, and the GPUs of each."""
    rollout = cfg.rollout
    if args.server_command is not None:
        try:
            words = tuple(shlex.split(args.server_command))
        except ValueError as e:
            raise ConfigError(f"--server-command {args.server_command}: {e}") from e
        rollout = rollout.model_copy(update={"spawn_command": words})
    if rollout.spawn_command and rollout.engine != "sglang":
        raise ConfigError(f"a command of one's own for the servers needs rollout.engine=sglang, not {rollout.engine}")
    flags = (*rollout.spawn_command, *rollout.server_args)
    named = rollout.engine == "sglang" and flag(flags, *TP_FLAGS) is not None
    given = size_of(flags, *TP_FLAGS) if named else None
    if given is not None and args.server_tp is not None and given != args.server_tp:
        raise ConfigError(f"--server-tp {args.server_tp}, but the servers' own flags say {given}: drop one of them")
    tp = given or args.server_tp or max(1, args.gpus)
    if tp < 1 or args.gpus % tp:
        raise ConfigError(
            f"servers of {tp} GPUs do not fill a node of {args.gpus}: choose a divisor; a server cannot span nodes here"
        )
    if rollout.engine == "sglang" and given is None and tp > 1 and (args.server_tp or not rollout.spawn_command):
        rollout = rollout.model_copy(update={"server_args": (*rollout.server_args, TP_FLAGS[0], str(tp))})
    if args.colocated and args.gpus:
        _check_sharing(rollout, flags, all_gpus=tp == args.gpus)
    rollout = with_routing(rollout) if cfg.asks_for_routing else rollout
    return cfg.model_copy(update={"rollout": rollout}), tp


def _check_sharing(rollout: config.sections.RolloutConfig, flags: tuple[str, ...], all_gpus: bool) -> None:
    if rollout.publish == "distributed":
        raise ConfigError(
            "rollout.publish=distributed: learner and server share their GPUs, which NCCL refuses: use disk"
        )
    if rollout.publish == "tensor" and not all_gpus:
        raise ConfigError("rollout.publish=tensor: a server would not see the GPU of the learner's rank 0: use disk")
    if rollout.engine == "sglang" and flag(flags, MEMORY_FLAG) is None:
        raise ConfigError(
            f"learner and server share their GPUs, and SGLang takes most of the memory unless told otherwise: add "
            f"{MEMORY_FLAG} and a share to rollout.server_args (megasapo plan says what the learner leaves)"
        )


def _place(nodes: str, gpus: int, tp: int) -> list[Server]:
    """As many servers on each node as its GPUs give, on consecutive ports; one without GPUs."""
    servers = []
    for node in nodes.split(","):
        host, _, port = node.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError(f"--servers {nodes}: {node!r} is not HOST:PORT, with a port up to 65535")
        for i in range(max(1, gpus // tp)):
            devices = tuple(range(i * tp, (i + 1) * tp)) if tp < gpus else ()
            servers.append(Server(host, int(port) + i, devices))
    return servers


def _with_command(cfg: Config, server: Server, model: Path, python: str) -> Server:
    listen = LOOPBACK if server.host in LOCAL else "0.0.0.0"
    command = server_command(cfg.rollout, model, server.port, host=listen, python=python)
    return Server(server.host, server.port, server.devices, tuple(command))


def _key_file(cfg: Config, dry_run: bool) -> Path:
    """The key that servers ask for; RUN/api_key, made once, where none is configured."""
    if cfg.rollout.api_key_file is not None:
        path = Path(cfg.rollout.api_key_file).absolute()
        if not path.is_file():
            raise ConfigError(f"rollout.api_key_file={path}: no such file")
        return path
    path = cfg.run_dir.absolute() / "api_key"
    if not dry_run and not path.exists():
        keys.make(path)
    return path


def shell_assignments(plan: Plan) -> str:
    """The plan as assignments to bash variables, every value quoted."""
    arrays = {
        "SERVER_HOSTS": [server.host for server in plan.servers],
        "SERVER_PORTS": [str(server.port) for server in plan.servers],
        "SERVER_COMMANDS": [server.shell for server in plan.servers],
        "TRAIN": list(plan.train),
    }
    lines = [f"RUN_DIR={shlex.quote(str(plan.run_dir))}", f"NPROC={plan.nproc}"]
    return "\n".join([*lines, *(f"{name}=({shlex.join(values)})" for name, values in arrays.items())])


def describe(plan: Plan) -> str:
    """The plan for a reader."""
    cfg, ranks = plan.cfg, plan.learner_nodes * plan.nproc
    degrees = cfg.parallel.model_dump()
    replicas = ranks // (cfg.parallel.tp * cfg.parallel.pp * cfg.parallel.cp)
    pointer = plan.run_dir / "checkpoints" / "latest"
    state = f"resumes from {pointer.read_text().strip()}" if pointer.exists() else "begins"
    if (plan.run_dir / "done").exists():
        state = "has finished: nothing will be started"
    lines = [
        f"run       {plan.run_dir}: {state}",
        f"learners  {plan.learner_nodes} nodes x {plan.nproc} = {ranks} ranks: "
        f"{' '.join(f'{name}={degree}' for name, degree in degrees.items())}, data parallel {replicas}",
        f"          {shlex.join(['python', *plan.train])}",
        f"servers   {len(plan.servers)}, {cfg.rollout.engine}; weights by {cfg.rollout.publish}; "
        f"API key in {cfg.rollout.api_key_file}",
    ]
    for server in plan.servers:
        on = f"GPUs {','.join(map(str, server.devices))}" if server.devices else "the whole node"
        lines += [f"          {server.url} on {on}", f"            {server.shell}"]
    return "\n".join(lines)
