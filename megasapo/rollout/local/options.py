"""What the embedded server is started with: the command line of `megasapo serve` as one frozen record.

Read by everything in this package; must not import torch, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from megasapo import keys
from megasapo.arguments import Parser


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of one server process, with the defaults of its flags; the keys are held as text, never printed."""

    model: str
    host: str = "127.0.0.1"
    port: int = 30000
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    max_running_requests: int = 256
    max_total_tokens: int | None = None
    max_prefill_tokens: int = 16384
    context_length: int | None = None
    max_body_bytes: int = 64 << 20
    health_timeout_s: float = 20.0
    weight_version: str = "default"
    deterministic: bool = False
    enable_return_routed_experts: bool = False
    plain_forward: bool = False
    exit_with_parent: bool = False
    log_requests: bool = False
    api_key: str | None = None
    admin_api_key: str | None = None


def parse(argv: list[str] | None) -> Options:
    """The options in `argv`; exits with a message when they cannot be served."""
    parser = _parser()
    args = vars(parser.parse_args(argv))
    try:
        wanted = keys.read(args.pop("api_key_file", None), args.pop("admin_api_key_file", None))
        options = Options(**args, api_key=wanted.api, admin_api_key=wanted.admin)
        _check(options)
    except ValueError as e:
        parser.error(str(e))
    return options


def _parser() -> Parser:
    p = Parser(
        prog="megasapo serve",
        description="The embedded rollout server: SGLang's HTTP protocol on transformers' model code.",
        argument_default=argparse.SUPPRESS,  # those of Options
    )
    p.add_argument("--model", required=True, metavar="HF_DIR", help="config.json, safetensors, tokenizer")
    p.add_argument("--host", help="anything but loopback needs a key")
    p.add_argument("--port", type=int, help="0: any free port, printed when ready")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), help="auto: the model's own")
    p.add_argument("--device", help="cpu, cuda or cuda:N")
    p.add_argument("--threads", type=_positive, help="threads of torch; default: torch's own choice")
    p.add_argument("--max-running-requests", type=_positive, help="sequences decoded together")
    p.add_argument("--max-total-tokens", type=_positive, help="rows times length of the KV cache; default: 2 GiB of it")
    p.add_argument("--max-prefill-tokens", type=_positive, help="prompt tokens admitted in one step")
    p.add_argument("--context-length", type=_positive, help="default: the model's max_position_embeddings")
    p.add_argument("--max-body-bytes", type=_positive, help="larger requests are refused with 413")
    p.add_argument(
        "--health-timeout-s",
        type=float,
        default=20.0,
        help="an engine silent for so long, as in a step, is not healthy",
    )
    p.add_argument(
        "--api-key-file", metavar="FILE", help=f"holds the key of /generate and the rest; else ${keys.VARIABLE} does"
    )
    p.add_argument(
        "--admin-api-key-file", metavar="FILE", help=f"holds that of control endpoints; else ${keys.ADMIN_VARIABLE}"
    )
    p.add_argument("--weight-version", help="stamp of the weights the server starts with")
    p.add_argument("--deterministic", action="store_true", help="run every request by itself, one after another")
    p.add_argument("--enable-return-routed-experts", action="store_true", help="record the experts of every token")
    p.add_argument("--plain-forward", action="store_true", help="transformers' modules as they are: slower when small")
    p.add_argument("--exit-with-parent", action="store_true", help="exit when standard input is closed")
    p.add_argument("--log-requests", action="store_true", help="one line for every HTTP request")
    return p


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _check(options: Options) -> None:
    if not (Path(options.model) / "config.json").is_file():
        raise ValueError(f"--model {options.model}: no config.json there")
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port {options.port}: use 0 to 65535")
    if options.api_key is None and not _loopback(options.host):
        raise ValueError(
            f"--host {options.host} is reachable from other machines: give --api-key-file, or {keys.VARIABLE}"
        )


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
