"""`megasapo train`: the loop. Rollouts, SAPO on the learner, weights to the servers, and everything restartable.

Start reading at `loop`. The setup is in `train`; every collective call is made by all ranks in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasapo import launch, layout, run
from megasapo.algo import settings
from megasapo.config import Config, ConfigError
from megasapo.rewards import model as rewards
from megasapo.types import Batch, Group, Prompt, TrainSequence

if TYPE_CHECKING:
    from megasapo.algo.settings import ResolvedAlgo
    from megasapo.data.prompts import PromptStream
    from megasapo.diagnosis import Diagnosis, Figures
    from megasapo.evaluate import Problem
    from megasapo.log.heartbeat import Heartbeat
    from megasapo.log.profile import Profiler
    from megasapo.log.sinks import Log
    from megasapo.mcore.exchange import PackingRule
    from megasapo.mcore.policy import Policy
    from megasapo.mcore.topology import Topology
    from megasapo.meter import Meter
    from megasapo.metrics import Metrics
    from megasapo.publish import Publisher
    from megasapo.rollout.fleet import Fleet
    from megasapo.rollout.loop import LoopThread
    from megasapo.rollout.source import RolloutSource
    from megasapo.routing.validate import RoutingRule
    from megasapo.stability import Event, Guard


def main(argv: list[str]) -> int:
    """Entry of the command; starts the ranks it needs and runs on each."""
    cfg, nproc = run.parse("train", "Reinforcement learning; every setting: `megasapo settings`.", argv)
    check(cfg)
    if run.finished(cfg) and not launch.is_rank():
        print(f"{cfg.run_dir} has already finished: choose another run.name, or a train.steps above {cfg.train.steps}")
        return 0
    code = run.on_ranks("train", argv, nproc, [cfg.parallel], cfg.run_dir)
    if code is None:
        train(cfg)
    return code or 0


def check(cfg: Config) -> None:
    """Refuse a configuration that this command cannot use (ConfigError); before any rank starts."""
    if cfg.data.train is None:
        raise ConfigError("data.train is required: JSONL or parquet with prompt (or messages) and answer")
    if cfg.train.eval_every and cfg.data.eval is None:
        raise ConfigError(f"train.eval_every={cfg.train.eval_every} needs data.eval")
    layout.check_tokens(cfg)
    settings.resolve(cfg.algo, cfg.rollout)
    run.refuse_other_command("train", cfg)
    rewards.check(cfg.reward)
    if cfg.rollout.episode:
        from megasapo.rollout.episode import load

        load(cfg.rollout.episode)


@dataclass(frozen=True)
class Parts:
    """What the loop works with, made once."""

    cfg: Config
    algo: ResolvedAlgo
    topo: Topology
    policy: Policy
    packing: PackingRule
    routing: RoutingRule | None  # that servers' routing must fit, where they are asked for it
    source: RolloutSource
    publish: Publisher
    diagnosis: Diagnosis
    evaluate: Callable[[int], dict[str, float]]
    log: Log
    meter: Meter
    profiler: Profiler
    heartbeat: Heartbeat
    guard: Guard
    directory: run.RunDir


def loop(p: Parts, step: int) -> int:
    """From `step` to train.steps, or until asked to stop; returns the step reached. Collective."""
    from megasapo import ceiling, metrics
    from megasapo.rollout.sequences import to_sequences
    from megasapo.rollout.stats import group_stats, routing_stats

    phases = run.Phases(p.heartbeat.phase, p.profiler.phase)
    with p.heartbeat.phase("publish"):
        p.publish(step)
    p.diagnosis.keep(step)
    while step < p.cfg.train.steps:
        p.heartbeat.at(step + 1, p.cfg.train.steps)
        p.profiler.at(step + 1)
        with phases("rollout"), ceiling.saving_first(p.source, partial(save_and_wait, p, step)):
            groups, dropped = p.source.next(version=step)
        with phases("batch"):
            sequences = to_sequences(groups, p.algo, p.routing)
            batch = make_batch(sequences, p)
        with phases("old_logprobs"):
            batch = p.policy.with_old_logprobs(batch)
        with phases("update"):
            learned = p.policy.update(batch, p.guard.allow)
        sampled = metrics.merge([group_stats(groups, step, dropped), routing_stats(sequences)])
        step += 1
        with phases("publish"):
            failure: Exception | None = ceiling.try_publish(p.publish, step)
        with phases("diagnose"):
            diagnosed = p.diagnosis(step, groups, sequences)
            p.diagnosis.keep(step)
        held_out: dict[str, float] = {}
        with phases("evaluate"):
            if _every(p.cfg.train.eval_every, step) and failure is None:
                held_out, failure = ceiling.try_evaluate(p.evaluate, step, p.source)
        own = [sampled, learned, p.source.take_metrics(), p.diagnosis.take_metrics(), p.meter.take(batch)]
        stats = metrics.merge(p.topo.gather(metrics.merge(own)))
        also = diagnosed.scalars | held_out | metrics.quantiles(stats, "ratio/log_hist", "ratio/log")
        figures = metrics.observed(stats) | metrics.defined(also)
        events = p.guard.observe(step, figures)
        write_step(p, step, stats, also, groups, diagnosed, phases, events)
        if act(p, step, events, groups, figures):
            step = roll_back(p, events)
            continue
        ending = p.topo.any(p.directory.stop_requested() or failure is not None or p.policy.saving_failed)
        if ending or step == p.cfg.train.steps or _every(p.cfg.train.save_every, step):
            with phases("save"):  # after the line of this step is on disk: a kill in between loses neither
                save(p, step)
        if _every(p.cfg.train.export_every, step):
            with p.heartbeat.phase("export"):
                p.policy.save_hf(p.directory.path / f"hf_{step:08d}")
        if failure is not None:
            raise failure
        if ending:
            break
    p.profiler.close()
    return step


def save(p: Parts, step: int, aside: str = "") -> Path:
    """Begin a checkpoint of `step`, which `latest` will name unless it is put `aside`. Collective."""
    p.diagnosis.flush()
    p.source.save(p.directory.path, step)  # before the checkpoint is complete
    return p.policy.save(p.directory.path, trainer_state(p, step), aside)


def save_and_wait(p: Parts, step: int) -> None:
    """A complete checkpoint of `step`, for a run that cannot go on. Collective."""
    save(p, step)
    p.policy.finish_saving()


def trainer_state(p: Parts, step: int) -> dict[str, Any]:
    """What a checkpoint keeps beside the learner's own state, equal on every rank."""
    return {"command": "train", "step": step, "source": p.source.state(), "stability": p.guard.state()}


def act(p: Parts, step: int, events: list[Event], groups: list[Group], figures: dict[str, float]) -> bool:
    """Whether to go back to the last checkpoint. Collective.

    Raises Unstable when the run has to end, after a checkpoint of this step, which `latest` does not name.
    """
    from megasapo.errors import UserError
    from megasapo.stability import Unstable

    try:
        return p.guard.act(step, events, groups, figures)
    except Unstable as e:
        try:
            kept = f"The state of this step is kept in {save(p, step, 'unstable')}"
            p.policy.finish_saving()
        except UserError as failure:
            kept = f"The state of this step could not be kept: {failure}"
        raise Unstable(f"{e}. {kept}") from e


def roll_back(p: Parts, events: list[Event]) -> int:
    """Weights, optimizer and schedule as in the last checkpoint, for learner and servers; returns its step. Collective.

    The data go on from where they are: the batches since that checkpoint are left out. The checkpoint is told so, that
    a resumed run goes the same way.
    """
    from megasapo.mcore import checkpoint

    p.policy.finish_saving()
    last = checkpoint.find(p.directory.path, p.topo, verify=p.cfg.train.verify_checkpoints)
    assert last is not None, "`train` saves step 0 where a rule may roll back"
    state = p.policy.load(last)
    step = int(state["step"])
    p.source.discard_pending()
    p.diagnosis.rolled_back(step)
    p.guard.rolled_back(step, state.get("stability"))
    why = "; ".join(f"{event.why} at step {event.step}" for event in events if event.action == "rollback")
    p.log.rewind(step, p.guard.rollbacks, why)
    if p.topo.rank == 0:
        checkpoint.set_trainer_state(last, trainer_state(p, step))
    p.publish(step)
    p.diagnosis.keep(step)
    return step


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def make_batch(sequences: list[TrainSequence], p: Parts) -> Batch:
    """Token weights, mini-batches balanced over ranks, packed. Collective."""
    from megasapo.algo.weights import token_weights
    from megasapo.mcore.exchange import build_batch

    return build_batch(
        sequences,
        p.topo,
        mini_batches=p.cfg.algo.mini_batches,
        group_size=p.cfg.rollout.group_size,
        packing=p.packing,
        weight_rule=partial(token_weights, normalisation=p.algo.normalisation, constant_length=p.algo.constant_length),
        routing=p.policy.routing_layout if p.cfg.algo.routing_replay == "R3" else None,
    )


def write_step(
    p: Parts,
    step: int,
    stats: Metrics,
    also: dict[str, float],
    groups: list[Group],
    diagnosed: Figures,
    phases: run.Phases,
    events: list[Event],
) -> None:
    """The step's line, histograms and samples; `stats` and `also` are of all ranks, `groups` this leader's."""
    from megasapo.log.rollouts import sample_texts, write_rollouts
    from megasapo.metrics import Hist, scalars

    if p.cfg.log.keep_rollouts and p.topo.is_leader:
        write_rollouts(p.directory.path, step, groups, shard=(p.topo.dp_rank, p.topo.dp))
    numbers = scalars(stats) | also | phases.take()
    numbers |= p.meter.rates(numbers, numbers["rollout/tokens"])
    numbers["stability/events"] = float(len(events))
    histograms = {name: value for name, value in stats.items() if isinstance(value, Hist)} | diagnosed.histograms
    texts = sample_texts(groups, p.cfg.log.samples_per_step)
    if events:
        texts["stability/events"] = "\n\n".join(f"{event.why}: {event.action}" for event in events)
    p.log(step, numbers, histograms, texts, diagnosed.images)


def train(cfg: Config) -> None:
    """Set everything up on this rank, resume, run the loop, export."""
    from megasapo.mcore import checkpoint
    from megasapo.rollout import disk

    with ExitStack() as cleanup:
        topo, heartbeat, directory = run.join(cfg, cleanup)
        with heartbeat.phase("load"):
            last = checkpoint.find(directory.path, topo, verify=cfg.train.verify_checkpoints)
            parts = _make_parts(cfg, topo, directory, last, heartbeat, cleanup)
            step = resume(parts, last)
        directory.resumed(last, finished=step >= cfg.train.steps)
        launch.freeze_heap()
        step = loop(parts, step)
        with heartbeat.phase("save"):
            parts.policy.finish_saving()
        finished, out = step >= cfg.train.steps, directory.path / "hf"
        if finished:
            with heartbeat.phase("export"):
                parts.policy.save_hf(out)
            directory.finish("train", step)
    # servers of others may name it as their model, and load it again
    if topo.rank == 0 and finished and not cfg.rollout.servers:
        disk.forget(directory.path)  # hf/ has the same
    directory.report_end(step, cfg.train.steps, out)


def resume(p: Parts, last: Path | None) -> int:
    """Restore everything from checkpoint `last`, if there is one; the step to go on from. Collective."""
    state: dict[str, Any] = p.policy.load(last) if last is not None else {"step": 0}
    if last is not None:
        p.source.restore(state["source"], p.directory.path, int(state["step"]))
    p.guard.begin(state["step"], state.get("stability"))
    if last is None and p.guard.may_roll_back:
        save(p, 0)  # the first steps may be the unstable ones
    return int(state["step"])


def _make_parts(
    cfg: Config,
    topo: Topology,
    directory: run.RunDir,
    last: Path | None,
    heartbeat: Heartbeat,
    cleanup: ExitStack,
) -> Parts:
    from megasapo.data.prompts import PromptDataset, PromptStream
    from megasapo.data.tokenizer import load_tokenizer
    from megasapo.diagnosis import Diagnosis
    from megasapo.evaluate import load_eval_prompts
    from megasapo.geometry import read_geometry
    from megasapo.log.profile import Profiler
    from megasapo.log.sinks import make_log
    from megasapo.mcore import checkpoint
    from megasapo.mcore.exchange import PackingRule
    from megasapo.mcore.policy import Policy
    from megasapo.meter import Meter
    from megasapo.publish import Publisher
    from megasapo.rollout.limits import check_prompts
    from megasapo.routing.validate import RoutingRule
    from megasapo.stability import Guard

    tokenizer = load_tokenizer(cfg.model.path)
    dataset = PromptDataset(cfg.data.train or "", tokenizer, cfg.data)
    if dataset.num_dropped and topo.rank == 0:
        print(f"{dataset.path}: {dataset.num_dropped} prompts above data.max_prompt_tokens left out", flush=True)
    check_prompts(cfg.model.path, dataset, cfg.rollout.max_new_tokens)
    held_out = load_eval_prompts(cfg, tokenizer)[topo.dp_rank :: topo.dp] if cfg.train.eval_every else []
    stream = PromptStream(dataset, cfg.run.seed, cfg.data.shuffle)
    thread, scorer = _start_graders(cfg, topo, cleanup)
    algo, steps = settings.resolve(cfg.algo, cfg.rollout), cfg.train.steps * cfg.algo.mini_batches
    policy = Policy(cfg, topo, algo, temperature=cfg.rollout.temperature, total_steps=steps)
    cleanup.callback(policy.close)
    if topo.rank == 0:
        print(*policy.summary(), sep="\n", flush=True)
    packing = PackingRule.of(cfg)
    rule = RoutingRule.of(read_geometry(cfg.model.path), check=cfg.routing.validation) if cfg.asks_for_routing else None
    fleet = _connect_fleet(cfg, topo, directory, cleanup)
    publisher = Publisher(
        lambda: policy.export(int(cfg.rollout.publish_bucket_mb * 2**20)),
        fleet,
        cfg.rollout,
        rank=topo.rank,
        agree=topo.first,
        run_dir=directory.path,
        model_dir=Path(cfg.model.path),
        device=topo.device,
        verify=cfg.rollout.publish_verify,
    )
    cleanup.callback(publisher.close)
    source, evaluate = _make_source(cfg, topo, tokenizer, stream, held_out, fleet, publisher, thread, scorer, cleanup)
    resume_step = checkpoint.step_of(last) if last else None
    log = make_log(cfg.log, directory.path, topo.rank == 0, resume_step=resume_step, total_steps=cfg.train.steps)
    cleanup.callback(log.close)
    meter = Meter.start(cfg, topo, old_logprobs=cfg.algo.old_logprobs == "learner", reference=bool(cfg.algo.kl_coef))
    cleanup.callback(meter.close)
    profiler = Profiler(cfg.train.profile, directory.path, topo.rank, topo.device)
    diagnosis = Diagnosis(cfg, topo, policy, packing, directory.path, tokenizer.decode, rule, resume_step)
    cleanup.callback(diagnosis.close)
    guard = Guard(cfg.stability, topo, directory.path)
    return Parts(
        *(cfg, algo, topo, policy, packing, rule, source, publisher, diagnosis, evaluate),
        *(log, meter, profiler, heartbeat, guard, directory),
    )


def _connect_fleet(cfg: Config, topo: Topology, directory: run.RunDir, cleanup: ExitStack) -> Fleet | None:
    """Rank 0 starts the servers, the other leaders connect to them, the rest has no use for them. Collective."""
    from megasapo.rollout.fleet import Fleet

    fleet = None
    if topo.rank == 0:
        known, spawned = cfg.rollout.servers, f"{cfg.rollout.spawn} {cfg.rollout.engine}; output in"
        print("waiting for rollout servers:", *(known or [spawned, directory.path / "logs"]), flush=True)
        fleet = Fleet.start(cfg.rollout, cfg.model.path, directory.path, routing=cfg.asks_for_routing)
    urls, rollout = topo.first((fleet.urls, fleet.cfg) if fleet else None)
    if fleet is None and topo.is_leader:
        fleet = Fleet.connect(rollout, urls, cfg.model.path, leader_index=topo.dp_rank)
    if fleet is not None:
        cleanup.callback(fleet.stop)
    return fleet


def _start_graders(cfg: Config, topo: Topology, cleanup: ExitStack) -> tuple[LoopThread, rewards.RewardModel]:
    """The event loop of rollouts, and in it the graders; leaders load them, before a model takes its time to load."""
    from megasapo.rollout.loop import LoopThread

    thread, scorer = LoopThread(), rewards.RewardModel(cfg.reward)
    cleanup.callback(thread.close)
    if topo.is_leader:
        thread.run(scorer.start())
        cleanup.callback(lambda: thread.run(scorer.close()))
    return thread, scorer


def _make_source(
    cfg: Config,
    topo: Topology,
    tokenizer: Any,
    stream: PromptStream,
    held_out: list[Prompt],
    fleet: Fleet | None,
    publisher: Publisher,
    thread: LoopThread,
    scorer: rewards.RewardModel,
    cleanup: ExitStack,
) -> tuple[RolloutSource, Callable[[int], dict[str, float]]]:
    """The source of groups, and the function that measures this leader's held-out problems through the same servers."""
    from megasapo.evaluate import evaluate, summary
    from megasapo.rollout.episode import Completer
    from megasapo.rollout.sampler import Sampler
    from megasapo.rollout.source import RolloutSource

    if fleet is not None:
        cleanup.callback(lambda: thread.run(fleet.close()))

    decode = partial(tokenizer.decode, skip_special_tokens=True)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    complete, sampler = None, None
    if fleet is not None:
        complete = Completer(fleet, cfg.rollout, decode, encode, version=lambda: fleet.version or 0)
        sampler = Sampler(cfg, complete, scorer, decode)
    source = RolloutSource(cfg, fleet, stream, scorer, sampler, topo, thread, republish=publisher)
    cleanup.callback(source.discard_pending)

    async def measure() -> list[Problem]:
        found = [] if complete is None else await evaluate(complete, held_out, scorer, decode, cfg)
        return [replace(problem, texts=()) for problem in found]  # other ranks count them, nobody reads them

    def evaluate_now(version: int) -> dict[str, float]:
        found = topo.gather(source.wait(thread.submit(measure()), version))
        figures = summary([problem for part in found for problem in part], cfg.eval.k)
        return {f"eval/{name}": value for name, value in figures.items() if name not in ("problems", "samples")}

    return source, evaluate_now
