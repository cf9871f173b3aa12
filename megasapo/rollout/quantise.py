"""Block FP8 for rollout servers: which weights are quantised, and HF directories that hold them so.

publish calls it bucket by bucket, the fleet for the model that its servers start with. The layout is that of
DeepSeek-V3's and Qwen3's FP8 checkpoints: `NAME` in e4m3 beside `NAME_scale_inv` in fp32, one scale for each 128 x 128
block, by which the stored values are multiplied. Scales are powers of two, as Transformer Engine's: so both round to
the same numbers, although the learner's matrices, fused, have other blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megasapo.fp8.blocks import SCALE, WEIGHT_BLOCK, quantise_blocks
from megasapo.geometry import geometry, read_config
from megasapo.hf_files import HFFiles
from megasapo.rollout.protocol import RolloutError
from megasapo.rollout.weight_files import Bucket, Writer

LATENT = frozenset({"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"})  # DeepSeek's attention
LINEAR = LATENT | {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# gates, both ends of the model, and what layers for multi-token prediction have beside those of others
KEPT = frozenset({"gate", "shared_expert_gate", "embed_tokens", "lm_head", "eh_proj", "head"})
BUCKET_BYTES = 1 << 30


def is_quantised(name: str, num_dims: int) -> bool:
    """Whether servers get this HF weight as FP8. RolloutError for a matrix that is not known here.

    SGLang expects FP8 in every linear layer of such a checkpoint: one left out by mistake would be read wrongly.
    """
    *_, module, parameter = ("", *name.split("."))
    if parameter == "weight" and module in LINEAR:
        if num_dims != 2:
            raise RolloutError(f"weight {name!r} has {num_dims} dimensions: only matrices have FP8 blocks")
        return True
    if num_dims < 2 or module in KEPT:
        return False
    raise RolloutError(
        f"weight {name!r}: not known whether block FP8 covers it (quantised are "
        f"{', '.join(sorted(LINEAR))}; kept are {', '.join(sorted(KEPT))}): leave out rollout.quantization, or a "
        "conversion's --quantize"
    )


def quantise_bucket(bucket: Bucket) -> Bucket:
    """The same weights, on the same device: linear ones as e4m3, each followed by its scales; the rest as they are."""
    quantised: Bucket = []
    for name, tensor in bucket:
        if is_quantised(name, tensor.dim()):
            values, scale_inv = quantise_blocks(tensor.detach(), power_of_two=True)
            quantised += [(name, values), (name + SCALE, scale_inv)]
        else:
            quantised.append((name, tensor))
    return quantised


def quantised_config(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """The config.json of the quantised model. RolloutError when `config`, that of `source`, is one already."""
    if config.get("quantization_config") is not None:
        raise RolloutError(
            f"{source}: already quantised ({config['quantization_config']}): give a model in bfloat16 or float32"
        )
    experts = [i for i, has_experts in enumerate(geometry(config, str(source)).moe_layers) if has_experts]
    return config | {
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": list(WEIGHT_BLOCK),
            "fmt": "e4m3",
            "modules_to_not_convert": ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in experts)],
        }
    }


def quantise_checkpoint(source: str | Path, target: str | Path, *, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Write `target`, a quantised copy of the HF directory `source`: complete or not at all, `target` must not exist.

    Tensor by tensor; at most `bucket_bytes` of the result are held in memory, which is the size of its files.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise RolloutError(f"{target} exists: remove it, or name another directory")
    config = quantised_config(read_config(source), source)
    writer = Writer(target)
    try:
        files, bucket = HFFiles(source), Bucket()
        for name in files.names:
            bucket += quantise_bucket([(name, files.read(name))])
            if sum(tensor.nbytes for _, tensor in bucket) >= bucket_bytes:
                writer.add(bucket)
                bucket = []
        writer.add(bucket)
        writer.finish(source, config)
    except BaseException:
        writer.abandon()
        raise


def rollout_model(source: str | Path, target: Path) -> Path:
    """`target`, the quantised copy of `source` that servers start from; made unless an earlier start of the run did."""
    if not target.exists():
        quantise_checkpoint(source, target)
    elif read_config(target) != quantised_config(read_config(Path(source)), Path(source)):
        raise RolloutError(f"{target} was made of another model than {source}: remove it")
    return target
