"""Settings that contradict one another, each refused with the values and what to change.

Called by config.py once a configuration is complete. What depends on the model or the ranks is layout.py's.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from megasapo.config import Config


# what is known of a mini-batch before the optimizer moves the weights
BEFORE_STEP = ("ratio/", "sapo/", "mismatch/", "loss/", "entropy/mean", "grad/norm")
MOST_PROFILED = 10  # steps: a trace of more does not open, and its events are kept in memory
KEY_FLAGS = ("--api-key", "--admin-api-key")  # SGLang's
NOT_SHARED = ("time/", "perf/", "gpu/")  # differ between ranks, which must all come to the same decision


def refuse(cfg: Config) -> None:
    """Raise ValueError for the first contradiction."""
    for check in (
        _check_precision,
        _check_mini_batches,
        _check_algo,
        _check_rollout,
        _check_optim,
        _check_eval,
        _check_profile,
        _check_stability,
    ):
        check(cfg)


def _check_precision(cfg: Config) -> None:
    p = cfg.precision
    if not p.quantises:
        idle = p.model_dump(exclude={"recipe"}, exclude_defaults=True)
        if idle:
            settings = ", ".join(f"precision.{name}={value}" for name, value in idle.items())
            raise ValueError(
                f"precision.recipe=bf16 quantises nothing, so {settings} would do nothing: choose a recipe"
            )
        return
    if p.recipe != "fp8_delayed" and {"amax_history", "amax_algo"} & p.model_dump(exclude_defaults=True).keys():
        raise ValueError(
            f"precision.amax_history={p.amax_history}, amax_algo={p.amax_algo} mean something to fp8_delayed only, and "
            f"precision.recipe={p.recipe}: leave them out"
        )
    bf16_layers = p.first_layers_bf16 + p.last_layers_bf16
    if p.recipe == "fp8_delayed" and bf16_layers:
        raise ValueError(
            f"precision.recipe=fp8_delayed keeps one history for all layers, so first_layers_bf16="
            f"{p.first_layers_bf16}, last_layers_bf16={p.last_layers_bf16} cannot be: use 0, or fp8_tensorwise"
        )
    if p.emulate and p.fp8_param:
        raise ValueError(
            "precision.fp8_param=true keeps real FP8 weights, which precision.emulate=true has not: drop one"
        )
    if p.recipe == "mxfp8" and p.fp8_param:
        raise ValueError(
            "precision.fp8_param=true with recipe=mxfp8 would keep every weight twice and in no buffer that "
            "megatron-core's optimizer gathers: drop fp8_param, or use another recipe"
        )
    if not p.emulate and cfg.model.dtype != "bfloat16":
        raise ValueError(
            f"precision.recipe={p.recipe} computes in FP8 and bfloat16, but model.dtype={cfg.model.dtype}: use bfloat16"
        )


def _check_mini_batches(cfg: Config) -> None:
    if cfg.algo.mini_batches > cfg.rollout.prompts_per_step:
        raise ValueError(
            f"algo.mini_batches={cfg.algo.mini_batches} is more than rollout.prompts_per_step="
            f"{cfg.rollout.prompts_per_step}: each mini-batch needs a group; lower the first or raise the second"
        )


def _check_algo(cfg: Config) -> None:
    a = cfg.algo
    if cfg.rollout.group_size == 1 and a.objective != "reinforce":
        raise ValueError(
            "rollout.group_size=1 gives every advantage the value 0: use a group of at least 2, "
            "or algo.objective=reinforce"
        )
    if a.tis_cap is not None and a.tis_mask is not None:
        raise ValueError("algo.tis_cap and algo.tis_mask exclude one another: keep one")
    if a.tis_mask is not None and not 0 <= a.tis_mask[0] < a.tis_mask[1]:
        raise ValueError(f"algo.tis_mask={list(a.tis_mask)} is not a range [lo, hi] with 0 <= lo < hi")
    if a.old_logprobs == "rollout" and (a.tis_cap is not None or a.tis_mask is not None):
        raise ValueError(
            "algo.old_logprobs=rollout makes exp(old - rollout) = 1 everywhere, so algo.tis_cap and algo.tis_mask "
            "do nothing: use old_logprobs=learner or remove them"
        )
    if a.old_logprobs == "rollout" and a.routing_replay == "R2":
        raise ValueError(
            "algo.routing_replay=R2 replays what the learner's own pass over the batch chose, and "
            "algo.old_logprobs=rollout leaves that pass out: use old_logprobs=learner"
        )
    if a.overlong_penalty_tokens >= cfg.rollout.max_new_tokens:
        raise ValueError(
            f"algo.overlong_penalty_tokens={a.overlong_penalty_tokens} must be below rollout.max_new_tokens="
            f"{cfg.rollout.max_new_tokens}"
        )


def _check_rollout(cfg: Config) -> None:
    r = cfg.rollout
    _check_servers(cfg)
    _check_publish(cfg)
    if r.drop_zero_variance and r.group_size == 1:
        raise ValueError("rollout.drop_zero_variance needs groups of at least 2: a group of one has no variance")
    if r.oversample > 1 and r.repeatable:
        raise ValueError(
            f"rollout.oversample={r.oversample:g} takes the groups that finish first, and rollout.deterministic=true "
            "with max_staleness=0 asks for all of them in one request: set deterministic=false or oversample=1"
        )
    if r.top_k != -1 and r.top_k < 1:
        raise ValueError(f"rollout.top_k={r.top_k}: use -1 for the whole vocabulary or a positive number")
    corrects = cfg.algo.tis_cap is not None or cfg.algo.tis_mask is not None
    if (r.top_p < 1 or r.top_k != -1) and (corrects or cfg.algo.old_logprobs == "rollout"):
        raise ValueError(
            f"rollout.top_p={r.top_p}, top_k={r.top_k} truncate the sampling distribution, but servers report "
            "logprobs of the full one: train/inference correction and old_logprobs=rollout would be wrong; "
            "use top_p=1 and top_k=-1"
        )


def _check_servers(cfg: Config) -> None:
    r = cfg.rollout
    for url in (*r.servers, *([r.router] if r.router else [])):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"rollout.servers and rollout.router: {url!r} is no URL: write http://{url}")
    known = [url.rstrip("/") for url in r.servers]
    for url in known:
        if known.count(url) > 1:
            raise ValueError(f"rollout.servers names {url} twice: it would be sent two updates at once")
    named = [flag for flag in (*r.spawn_command, *r.server_args) if flag.split("=")[0] in KEY_FLAGS]
    if named:
        raise ValueError(
            f"{named[0].split('=')[0]} in rollout.spawn_command or server_args would put a key on a command line and "
            "into the run's config.yaml: name a file that holds it in rollout.api_key_file"
        )
    if r.admin_api_key_file is not None and not r.servers:
        raise ValueError(
            f"rollout.admin_api_key_file={r.admin_api_key_file} is for servers that others started and rollout.servers "
            "names: those of the run ask for one key"
        )
    if r.hedge_after_s is not None and r.repeatable:
        raise ValueError(
            f"rollout.hedge_after_s={r.hedge_after_s:g} needs requests that can be told apart, and a repeatable run "
            "sends one a step: use rollout.deterministic=false"
        )
    if r.router is None:
        return
    if cfg.asks_for_routing:
        raise ValueError(
            f"rollout.router={r.router}: sglang-router does not pass return_routed_experts on, which "
            "algo.routing_replay=R3, routing.trace_rate and routing.diagnose_every need: leave rollout.router empty, "
            "the run balances over rollout.servers itself"
        )
    if not r.servers:
        raise ValueError(
            f"rollout.router={r.router} carries no pause or weight calls: name the servers behind it in rollout.servers"
        )
    if r.repeatable:
        raise ValueError(f"rollout.router={r.router} chooses the server of a request: use rollout.deterministic=false")
    if r.hedge_after_s is not None:
        raise ValueError(
            f"rollout.hedge_after_s={r.hedge_after_s:g} asks a second server, and rollout.router={r.router} lets "
            "nobody choose which: leave one of them empty"
        )


def _check_optim(cfg: Config) -> None:
    if cfg.optim.min_lr > cfg.optim.lr:
        raise ValueError(
            f"optim.min_lr={cfg.optim.min_lr} is more than optim.lr={cfg.optim.lr}: lower the first or raise the second"
        )


def _check_publish(cfg: Config) -> None:
    r = cfg.rollout
    if r.publish_changed_only and (r.publish == "disk" or r.quantization != "none"):
        raise ValueError(
            f"rollout.publish_changed_only=true with publish={r.publish}, quantization={r.quantization}: a directory "
            "is always whole, and quantised weights go with their scales: use publish=distributed or tensor, without "
            "quantization"
        )
    elsewhere = [url for url in r.servers if not _on_loopback(url)]
    if r.publish == "tensor" and elsewhere:
        raise ValueError(
            f"rollout.publish=tensor gives servers memory of this machine, and rollout.servers names {elsewhere[0]}: "
            "use publish=distributed or disk, or http://127.0.0.1:PORT if it does run here"
        )


def _on_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _check_eval(cfg: Config) -> None:
    too_many = [k for k in cfg.eval.k if not 1 <= k <= cfg.eval.samples]
    if too_many:
        raise ValueError(f"eval.k={too_many} needs at least that many eval.samples (now {cfg.eval.samples})")


def _check_profile(cfg: Config) -> None:
    spec = cfg.train.profile
    if spec is None:
        return
    asked = f"train.profile: start={spec.start}, stop={spec.stop}"
    if spec.start > spec.stop:
        raise ValueError(f"{asked}: the last step comes before the first; swap them")
    if spec.stop > cfg.train.steps:
        raise ValueError(f"{asked} is beyond train.steps={cfg.train.steps}: choose steps that the run has")
    steps = spec.stop - spec.start + 1
    if steps > MOST_PROFILED:
        raise ValueError(f"{asked} are {steps} steps, whose events would fill the memory: at most {MOST_PROFILED}")


def _check_stability(cfg: Config) -> None:
    s = cfg.stability
    if s.warmup > s.window:
        raise ValueError(
            f"stability.warmup={s.warmup} is more than stability.window={s.window}, so no z-score would ever count: "
            "lower the first or raise the second"
        )
    for rule in s.rules or ():
        if rule.metric.startswith(NOT_SHARED):
            raise ValueError(f"stability.rules: {rule.metric} is not the same on every rank: it cannot be watched")
        if rule.action == "skip" and not rule.metric.startswith(BEFORE_STEP):
            raise ValueError(
                f"stability.rules: {rule.metric} is not known before the optimizer step, so its rule cannot skip it; "
                f"known are: {', '.join(name + '*' * name.endswith('/') for name in BEFORE_STEP)}"
            )
