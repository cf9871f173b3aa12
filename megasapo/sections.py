"""The sections of a configuration: every setting, frozen, typed, documented under the field.

config.py puts them together, loads and checks them. It must not import torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, strict=False, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, strict=False, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=False)]
Path_ = Annotated[str, Field(min_length=1)]


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Directory name below `dir`."""
    dir: Path_ = "runs"
    """Where run directories live."""
    seed: NonNegativeInt = 1
    """Seeds the data order, sampling and any random initialisation."""


class ModelConfig(Section):
    path: Path_
    """HF directory: config.json, safetensors, tokenizer."""
    load: str = ""
    """Checkpoint whose weights the learner starts from in place of model.path's: one that tools/convert_checkpoint.py
    wrote, or a run's RUN/checkpoints/step_N, of any layout; its optimizer is not taken."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameters and activations of the learner; the optimizer keeps fp32 masters."""
    head: Literal["auto", "torch", "triton"] = "auto"
    """Row kernels of the output head; auto: triton on CUDA, torch elsewhere."""
    override_transformer_config: dict[str, Any] = {}
    """Passed to megatron-core's TransformerConfig; names are checked against it."""


FP8_MULTIPLES = {"fp8_delayed": 16, "fp8_tensorwise": 16, "fp8_blockwise": 128, "mxfp8": 32}


class PrecisionConfig(Section):
    """FP8 in the learner's matrix products (docs/fp8.md). Router, norms, attention itself, embedding and output head
    stay as they are without it."""

    recipe: Literal["bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8"] = "bf16"
    """bf16: nothing is quantised, all in model.dtype. The others: how inputs, weights and output gradients of linear
    layers and experts are scaled to FP8."""
    format: Literal["e4m3", "hybrid"] | None = None
    """hybrid: output gradients in e5m2; empty: e4m3 for fp8_blockwise and mxfp8, hybrid for the others."""
    first_layers_bf16: NonNegativeInt = 0
    """Decoder layers at the beginning that are not quantised."""
    last_layers_bf16: NonNegativeInt = 0
    """Decoder layers at the end that are not quantised."""
    fp8_param: bool = False
    """Keep the learner's weights in FP8 beside the optimizer's fp32 masters (Transformer Engine only)."""
    amax_history: PositiveInt = 1024
    """fp8_delayed: passes whose largest values decide the scale."""
    amax_algo: Literal["max", "most_recent"] = "max"
    """fp8_delayed: the largest of them, or the last."""
    emulate: bool = False
    """Compute in model.dtype on values rounded as the recipe rounds them: any device, no speed."""

    @property
    def quantises(self) -> bool:
        return self.recipe != "bf16"

    @property
    def rows(self) -> int:
        """Rows that matrices come in multiples of: what the recipe's blocks, or cuBLAS, ask for; emulation nothing."""
        return FP8_MULTIPLES[self.recipe] if self.quantises and not self.emulate else 1

    @property
    def chosen_format(self) -> Literal["e4m3", "hybrid"]:
        return self.format or ("e4m3" if self.recipe in ("fp8_blockwise", "mxfp8") else "hybrid")


class DataConfig(Section):
    train: Path_ | None = None
    """JSONL or parquet with `prompt` (text or chat messages), `answer`, any other fields."""
    eval: Path_ | None = None
    """Held-out problems in the same format."""
    prompt_key: str = "prompt"
    messages_key: str = "messages"
    answer_key: str = "answer"
    apply_chat_template: bool = False
    """Render text prompts as one user message with the tokenizer's chat template; `messages` always are."""
    system_prompt: str | None = None
    """Put before messages that do not begin with a system message of their own."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are an error (`overlong: error`) or left out (`overlong: drop`), counted."""
    overlong: Literal["error", "drop"] = "error"
    shuffle: bool = True
    """A new order every epoch, from run.seed; resumes exactly."""


class RewardSpec(Section):
    name: str
    """math | exact_match | format | http, or `package.module:function` (async or plain, run in a worker process)."""
    weight: Annotated[float, Field(strict=False, allow_inf_nan=False)] = 1.0
    options: dict[str, Any] = {}
    """Keyword arguments of the reward, such as `url` of http or `pattern` of format."""


class RewardConfig(Section):
    rewards: Annotated[tuple[RewardSpec, ...], Field(min_length=1, strict=False)] = (RewardSpec(name="math"),)
    timeout_s: PositiveFloat = 10.0
    """A grader that takes longer counts as failed."""
    on_error: Literal["error", "zero"] = "zero"
    """A grader that raises or hangs: stop the run, or score 0 and count it in reward/grader_errors."""
    max_errors_in_a_row: PositiveInt = 256
    """As many failures of one grader without a success between them stop the run even under `on_error: zero`."""


class RolloutConfig(Section):
    engine: Literal["embedded", "sglang"] = "embedded"
    """What the servers are, and what `spawn` starts."""
    servers: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """URLs of running servers; empty: start `spawn` of them on this machine."""
    spawn: PositiveInt = 1
    """Servers started (and restarted when they die) by the run when `servers` is empty."""
    spawn_command: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """For engine sglang: starts a server, {model}, {port}, {host} and {api_key_file} are filled in; empty:
    sglang.launch_server."""
    server_args: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Flags appended to the server's command line."""
    max_restarts: NonNegativeInt = 3
    """How often in a row a spawned server may be restarted; then it is left out, and without any the run stops."""
    restarts_forgiven_after_s: PositiveFloat = 3600.0
    """A server that was healthy for so long since its last start has all `max_restarts` again when it dies."""
    start_timeout_s: PositiveFloat = 300.0
    """A server not healthy after this long stops the run."""
    api_key_file: str | None = None
    """File that holds the servers' API key, else the variable MEGASAPO_API_KEY does; never put the key itself into a
    config. Servers that the run starts get a new one in RUN/api_key."""
    admin_api_key_file: str | None = None
    """The same for the key, else in MEGASAPO_ADMIN_API_KEY, that `servers` ask for where their state is changed."""
    prompts_per_step: PositiveInt = 32
    """Groups in one rollout batch, over all data-parallel ranks."""
    group_size: PositiveInt = 8
    """Samples of one prompt."""
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, strict=False)] = 1.0
    top_k: int = -1
    max_new_tokens: PositiveInt = 1024
    stop_token_ids: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """Beside the tokenizer's end-of-sequence token."""
    max_staleness: NonNegativeInt = 0
    """0: on-policy. k: groups may have been sampled with weights up to k versions old; generation overlaps learning."""
    oversample: Annotated[float, Field(ge=1, le=16, strict=False, allow_inf_nan=False)] = 1.0
    """Groups under way for each that a step needs; above 1 the step takes those that are finished first, which are the
    shorter ones (docs/asynchrony.md). The rest is carried over to the next step, at max_staleness 0 given up."""
    on_publish: Literal["retract", "in_place", "abort"] = "retract"
    """Requests in flight when weights change: retract: they wait, and the new weights read prompt and tokens anew;
    in_place: they go on with what the old weights remember of them, and so do cached prefixes that they hold; abort:
    they come back as far as they got and are asked for again from there, at any server."""
    max_in_flight: PositiveInt = 256
    """Requests in flight from one data-parallel leader."""
    request_timeout_s: PositiveFloat = 600.0
    health_timeout_s: PositiveFloat = 30.0
    """A server that leaves a health check unanswered for this long counts as dead: its requests go elsewhere. Raise it
    where one step of a server takes longer (docs/rollouts.md)."""
    retry_for_s: PositiveFloat = 600.0
    """A request that has failed for this long, retries included (no server is ready, say), ends the run: it saves a
    checkpoint, and the same command continues it."""
    hedge_after_s: PositiveFloat | None = None
    """A request unanswered for this long is sent to a second server too; the first answer counts, the other request is
    aborted. It prefers short responses, unless sampling is seeded: use it against slow servers; empty: never."""
    router: str | None = None
    """URL of an sglang-router in front of `servers`: requests go to it, weights and pauses to the servers."""
    episode: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """Async function `module:function(engine, sample)` that makes a sample in several turns (docs/asynchrony.md);
    empty: one request a sample."""
    max_turns: PositiveInt = 8
    """Most calls of the engine in an episode; max_new_tokens holds for all it adds to the prompt together."""
    tool_timeout_s: PositiveFloat = 60.0
    """An episode that takes longer than this between two turns has failed (reward.on_error)."""
    drop_zero_variance: bool = False
    """Drop groups whose rewards are all equal and draw new ones (DAPO); counted either way."""
    deterministic: bool = True
    """Embedded server at max_staleness 0: a run gives the same samples bit for bit (one request a leader and step,
    seeded, run by itself). False: requests mix freely, which is faster."""
    publish: Literal["disk", "distributed", "tensor"] = "disk"
    """How weights reach the servers: an HF directory; broadcast over gloo (CPU) or NCCL (GPU); or, to servers of the
    learner's machine (colocated ones), through shared memory (CPU) or CUDA IPC (GPU)."""
    publish_changed_only: bool = False
    """publish=distributed or tensor: send only tensors that are not those that servers have, by their hashes."""
    publish_bucket_mb: PositiveFloat = 256.0
    """Most bytes of full tensors gathered at once."""
    quantization: Literal["none", "fp8_block"] = "none"
    """fp8_block: servers get linear weights as e4m3 with a scale for each 128 x 128 block (docs/fp8.md)."""
    publish_verify: bool = False
    """After every publish compare each server's checksum with the export's (embedded servers of the same dtype)."""

    @property
    def repeatable(self) -> bool:
        """Whether the same run gives the same samples bit for bit."""
        return self.deterministic and self.max_staleness == 0 and self.engine == "embedded"


class AlgoConfig(Section):
    objective: Literal["sapo", "grpo", "gspo", "dapo", "dr_grpo", "cispo", "gmpo", "reinforce"] = "sapo"
    tau_pos: PositiveFloat = 1.0
    """SAPO temperature where the advantage is positive."""
    tau_neg: PositiveFloat = 1.05
    """SAPO temperature where it is not."""
    clip_low: NonNegativeFloat | None = None
    """Clip range below 1; empty: the objective's own (docs/algorithms.md)."""
    clip_high: NonNegativeFloat | None = None
    normalisation: Literal["auto", "sequence", "token", "constant"] = "auto"
    """Who divides by what (docs/algorithms.md); auto: the objective's own."""
    constant_length: PositiveInt | None = None
    """L_const of normalisation `constant`; empty: rollout.max_new_tokens."""
    advantage: Literal["auto", "group", "group_no_std", "leave_one_out"] = "auto"
    """Group mean with or without division by std, or leave-one-out; auto: group (dr_grpo: group_no_std)."""
    advantage_eps: PositiveFloat = 1e-6
    mini_batches: PositiveInt = 1
    """Optimizer steps a rollout batch."""
    old_logprobs: Literal["learner", "rollout"] = "learner"
    """Ratios are measured from the learner's own recomputed logprobs, or from the server's."""
    routing_replay: Literal["none", "R2", "R3"] = "none"
    """R2: the update routes every token as the pass that computed its old logprobs did; R3: that pass and the update
    route it as the rollout server did when it sampled."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the k3 KL to the starting model."""
    entropy_coef: Annotated[float, Field(strict=False, allow_inf_nan=False)] = 0.0
    """Weight of the entropy bonus."""
    tis_cap: PositiveFloat | None = None
    """Truncated importance sampling: the objective times min(exp(old - rollout), cap); empty: off."""
    tis_mask: Annotated[tuple[float, float], Field(strict=False)] | None = None
    """Drop tokens whose exp(old - rollout) lies outside [lo, hi]; empty: off."""
    overlong_penalty_tokens: NonNegativeInt = 0
    """DAPO's soft over-long punishment: the reward falls linearly to -1 over the last this many tokens; 0: off."""


class ParallelConfig(Section):
    """How the learner is cut; what is left of the ranks is data parallel: world = tp * cp * pp * dp."""

    tp: PositiveInt = 1
    """Tensor parallel, always with sequence parallel: weights and, between them, tokens are cut over tp ranks."""
    pp: PositiveInt = 1
    """Pipeline parallel: stages of consecutive layers."""
    ep: PositiveInt = 1
    """Expert parallel: the experts of a layer are spread over ep ranks of the stage."""
    cp: PositiveInt = 1
    """Context parallel: every sequence is cut over cp ranks."""
    etp: PositiveInt = 1
    """Tensor parallel inside the experts, apart from tp."""
    vpp: PositiveInt = 1
    """Virtual pipeline: model chunks a stage, interleaved to shorten the pipeline's bubble; needs pp > 1."""


class OptimConfig(Section):
    lr: PositiveFloat = 1e-6
    min_lr: NonNegativeFloat = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    """In optimizer steps."""
    weight_decay: NonNegativeFloat = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1, strict=False)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, strict=False)] = 0.95
    eps: PositiveFloat = 1e-8
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient norm; 0: off."""
    max_skipped_steps: NonNegativeInt = 10
    """Steps with a NaN or infinite gradient are skipped and counted; more than this many stop the run."""
    override_optimizer_config: dict[str, Any] = {}
    """Passed to megatron-core's OptimizerConfig; names are checked against it. An optimizer whose state cannot be saved
    (not Adam, offloaded to the CPU) is refused."""


class ProfileSpec(Section):
    """Steps of `megasapo train` (docs/monitoring.md)."""

    start: PositiveInt
    """First step that is profiled."""
    stop: PositiveInt
    """Last one; at most 10 steps, whose events are kept in memory until then."""


class TrainConfig(Section):
    steps: PositiveInt = 100
    """Rollout batches."""
    micro_batch_tokens: PositiveInt = 4096
    """Most tokens packed into one micro-batch (counted before context parallelism); a longer sequence is an error."""
    packing: bool = True
    """False: one sequence a micro-batch; the same step, slower."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in backward: those of attention (selective), or all but each layer's input (full)."""
    save_every: PositiveInt = 20
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: PositiveInt = 2
    """The last so many are kept."""
    keep_every: NonNegativeInt = 0
    """Checkpoints of steps that this divides are kept as well, for good; 0: none."""
    async_save: bool = True
    """Write them beside the training, from a copy in host memory; false: the step waits (docs/checkpoints.md)."""
    save_timeout_s: PositiveFloat = 1800.0
    """Longest that a rank which has written its part of a checkpoint waits for the slowest one."""
    verify_checkpoints: bool = True
    """Compare a checkpoint's files with their SHA-256 before continuing from it; false: trust them."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations on data.eval; 0: off."""
    profile: ProfileSpec | None = None
    """Steps of which every rank writes a torch profiler trace to RUN/profile; empty: none."""
    export_every: NonNegativeInt = 0
    """Steps between HF exports to RUN/hf_STEP; 0: only at the end, to RUN/hf."""


class SftConfig(Section):
    data: Path_ | None = None
    """JSONL or parquet with `prompt` or `messages`, and `response`."""
    response_key: str = "response"
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 64
    """Sequences in one optimizer step, over all data-parallel ranks."""
    max_tokens: PositiveInt = 2048
    """Longer examples are an error."""
    out: Path_ | None = None
    """HF directory to write at the end; empty: RUN/hf."""


class EvalConfig(Section):
    samples: PositiveInt = 4
    """Responses a problem."""
    k: Annotated[tuple[int, ...], Field(strict=False)] = (1,)
    """Which pass@k."""
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, strict=False)] = 1.0
    max_problems: PositiveInt | None = None


class RoutingConfig(Section):
    """What is kept and computed to explain importance ratios (docs/routing.md)."""

    validation: bool = True
    """Look at every routing that a server sends before it is used; wrong data stops the run."""
    trace_rate: Fraction = 0.0
    """Share of the samples whose expert choices are written to RUN/routing/trace; 0: off."""
    trace_budget_mb: PositiveFloat = 1024.0
    """The trace of a run ends when its files hold this much."""
    diagnose_every: NonNegativeInt = 0
    """Steps between decompositions of the log-ratio into engine, fp8 (if any), mismatch, update and drift; 0: off."""
    diagnose_sequences: PositiveInt = 64
    """Most responses in one of them, over all ranks."""
    diagnose_sweep: NonNegativeInt = 0
    """Runs of consecutive MoE layers to which mismatch and drift are attributed, each another two forward passes;
    0: off; more than there are layers: every layer."""
    diagnose_samples: NonNegativeInt = 8
    """Responses whose every token is kept for the report."""

    @property
    def uses_rollout_routing(self) -> bool:
        """Whether servers are asked for the experts of (some) samples."""
        return self.trace_rate > 0 or self.diagnose_every > 0


Action = Literal["warn", "dump", "skip", "rollback", "stop"]


class StabilityRule(Section):
    """What counts as unstable, and what is done about it. Of `above`, `below` and `z` any one suffices; a value that
    is not finite always does."""

    metric: Path_
    """Name in metrics.jsonl, such as ratio/log_var."""
    above: Annotated[float, Field(strict=False, allow_inf_nan=False)] | None = None
    below: Annotated[float, Field(strict=False, allow_inf_nan=False)] | None = None
    z: PositiveFloat | None = None
    """Robust z-score (by median and MAD of the last `stability.window` steps) above which a value is out of line."""
    side: Literal["high", "low", "both"] = "high"
    """Which deviations `z` is about."""
    patience: PositiveInt = 1
    """Steps in a row that break the rule before it acts."""
    action: Action = "warn"
    """warn; dump: and keep the step's batch in RUN/dumps; skip: leave the optimizer step out; rollback: and go back to
    the last checkpoint, leaving out the batches since; stop: and end the run."""

    @model_validator(mode="after")
    def _has_a_limit(self) -> StabilityRule:
        if self.above is None and self.below is None and self.z is None:
            raise ValueError(f"the rule on {self.metric} has no limit: give it above, below or z")
        return self


class StabilityConfig(Section):
    """The instability watch (docs/stability.md)."""

    # YAML 1.1 reads off as false
    mode: Annotated[Literal["off", "warn", "act"], BeforeValidator(lambda x: "off" if x is False else x)] = "warn"
    """warn: rules only warn, whatever their action; act: they act."""
    window: PositiveInt = 50
    """Steps that a z-score compares with: the last ones that broke no rule on the metric."""
    warmup: PositiveInt = 20
    """Steps with the metric before its z-scores count."""
    max_rollbacks: NonNegativeInt = 3
    """More than this many roll-backs stop the run."""
    max_skips_in_a_row: NonNegativeInt = 10
    """More optimizer steps left out one after another than this stop the run."""
    rules: Annotated[tuple[StabilityRule, ...], Field(strict=False)] | None = None
    """Empty: megasapo.stability.DEFAULT_RULES."""


class LogConfig(Section):
    sinks: Annotated[tuple[Literal["console", "jsonl", "tensorboard"], ...], Field(strict=False)] = (
        "console",
        "jsonl",
        "tensorboard",
    )
    samples_per_step: NonNegativeInt = 2
    """Rollouts shown as text in TensorBoard each step."""
    gpu_every_s: NonNegativeFloat = 5.0
    """Seconds between readings of each learner rank's GPU (docs/monitoring.md); 0: none."""
    keep_rollouts: bool = True
    """Write every scored sample to RUN/rollouts/step_*.jsonl."""
