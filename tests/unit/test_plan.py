"""The planner: numbers counted by hand, identities that hold in every layout, and what the command answers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from megasapo import config, plan
from megasapo.config import ConfigError
from megasapo.geometry import Geometry, geometry
from megasapo.layout import check_layout, layout_problems
from megasapo.mcore import head
from megasapo.plan import memory
from megasapo.plan.hardware import ASSUMED, GPUS
from megasapo.plan.search import Cluster, judge, layouts, problems, rank
from megasapo.plan.traffic import Group, Groups, Setting, layer_traffic
from megasapo.plan.work import Degrees, Work
from megasapo.sections import ParallelConfig
from tests.unit.test_geometry import QWEN3_0_6B, QWEN3_30B_A3B

H100 = GPUS["h100"]
BIG, SMALL = geometry(QWEN3_30B_A3B), geometry(QWEN3_0_6B)


def settings(*overrides: str, path: str = "m") -> config.Config:
    raw: dict[str, Any] = {"model": {"path": path}, "data": {"max_prompt_tokens": 1024}}
    raw |= {"rollout": {"max_new_tokens": 7168, "prompts_per_step": 64}, "train": {"micro_batch_tokens": 8192}}
    return config.from_dict(raw, list(overrides))


def degrees(world: int, **sizes: int) -> Degrees:
    return Degrees.of(ParallelConfig(**sizes), world)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (BIG, {}),
        (BIG, {"pp": 4, "vpp": 3, "ep": 16}),
        (BIG, {"tp": 4, "cp": 2, "pp": 2, "ep": 4, "etp": 2}),
        (SMALL, {"tp": 8, "pp": 2}),
        (replace(BIG, moe_layers=(False, True) * 24, shared_ffn=512, tied=True), {"tp": 2, "pp": 2, "ep": 8}),
    ],
)
def test_what_ranks_hold_adds_up_to_the_model(model: Geometry, sizes: dict[str, int]) -> None:
    d = degrees(64, **sizes)
    held = [memory.held_parameters(model, d, stage) for stage in range(d.pp)]
    count = model.parameters()
    assert sum(h.experts for h in held) * d.ep * d.etp == count.experts
    moe = sum(model.moe_layers)
    whole = model.layers * model.layer_vectors + model.hidden + moe * model.router  # on every tensor-parallel rank
    copies = count.embedding if model.tied and d.pp > 1 else 0  # of the embedding on the last stage
    cut = count.total - count.experts - whole + copies
    assert sum(h.dense for h in held) * d.tp == cut + whole * d.tp


def test_bytes_of_one_gpu_by_hand() -> None:
    d = degrees(64, ep=8)
    held = memory.held_parameters(BIG, d, 0)
    assert held.experts == 48 * 16 * 3 * 2048 * 768
    assert held.dense == BIG.parameters().total - BIG.parameters().experts
    weights, gradients, optimizer = memory.parameter_bytes(held, d, "bfloat16")
    assert weights == 2 * (held.dense + held.experts)
    assert gradients == 4 * (held.dense + held.experts)
    assert optimizer == pytest.approx(12 * (held.dense / 64 + held.experts / 8), abs=24)
    assert memory.parameter_bytes(held, d, "float32")[2] == pytest.approx(optimizer * 8 / 12, rel=1e-6)


def test_the_vocabulary_is_padded_and_counted_so() -> None:
    odd = replace(SMALL, vocab=SMALL.vocab - 3)
    assert memory.held_parameters(odd, degrees(4, tp=4), 0) == memory.held_parameters(SMALL, degrees(4, tp=4), 0)


def test_micro_batches_in_flight() -> None:
    def flying(pp: int, vpp: int, micro: int) -> list[float]:
        d = degrees(pp, pp=pp, vpp=vpp)
        return [memory.in_flight(d, stage, micro) for stage in range(pp)]

    assert flying(1, 1, 8) == [1]
    assert flying(4, 1, 8) == [4, 3, 2, 1]
    assert flying(4, 1, 2) == [2, 2, 2, 1]
    assert flying(4, 2, 8) == [5.5, 4.5, 3.5, 2.5]  # 11, 9, 7, 5 chunks of half a stage
    assert flying(4, 2, 4) == [4, 4, 3.5, 2.5]  # no more than there are


def test_chunks_of_an_interleaved_pipeline() -> None:
    model = replace(BIG, moe_layers=tuple(i >= 6 for i in range(12)))
    d = degrees(2, pp=2, vpp=2)
    assert memory.stage_chunks(model, d, 0) == [(False,) * 3, (True,) * 3]
    assert memory.stage_chunks(model, d, 1) == [(False,) * 3, (True,) * 3]
    assert memory.stage_chunks(model, degrees(2, pp=2), 0) == [(False,) * 6]
    assert memory.layer_counts(model, d, 1) == {True: 3, False: 3}


def test_recomputation_and_sharding_shrink_activations() -> None:
    def kept(recompute: str, **sizes: int) -> float:
        d = degrees(8, **sizes)
        return memory.layer_saved_bytes(BIG, d, 8192, moe=True, dtype="bfloat16", recompute=recompute)

    assert kept("full") == 8192 * 2048 * 2
    assert kept("full") < kept("selective") < kept("none")
    assert kept("none", tp=2) == kept("none") / 2
    assert kept("none") / 2 < kept("none", cp=2) < kept("none", cp=1)  # keys and values of both are kept


def test_the_head_never_holds_all_logits() -> None:
    assert head.CHUNK_BYTES["cuda"] == memory.CHUNK_BYTES
    d = degrees(2, tp=2)
    needed = memory.head_bytes(BIG, d, 32768, "bfloat16")
    all_logits = 32768 * BIG.vocab / 2 * 2
    states = 2 * 32768 * 2048 * 2
    assert needed == 2**29 + states + 32 * 32768
    assert needed < all_logits / 3
    few = memory.head_bytes(BIG, d, 64, "float32")
    assert few == 64 * BIG.vocab / 2 * 4 + 2 * 64 * 2048 * 4 + 32 * 64


def test_work_counts_micro_batches() -> None:
    cfg = settings("algo.mini_batches=4")  # 512 sequences: 128 a mini-batch, 16 a replica on 8
    assert Work.of(cfg, degrees(8), 4096) == Work(512, 4096, 4, 8, 8192, 8192.0, False)
    assert Work.of(cfg, degrees(16, pp=2), 4000).micro_batches == 8  # 7.8 packs
    assert Work.of(settings("train.packing=false"), degrees(8), 4096).micro_batches == 64  # one sequence each
    interleaved = settings("parallel.pp=4", "parallel.vpp=2")
    assert Work.of(interleaved, Degrees.of(interleaved.parallel, 32), 1100).micro_batches == 12  # 8.6 in rounds of 4
    assert Work.of(cfg, degrees(256), 4096).idle


def test_messages_of_a_group_by_hand() -> None:
    inside, across, mixed = Group(8, 1, 8), Group(4, 8, 8), Group(16, 1, 8)
    assert (inside.gather(8e9, H100).nvlink, inside.gather(8e9, H100).network) == (7e9, 0)
    assert (across.gather(8e9, H100).nvlink, across.gather(8e9, H100).network) == (0, 6e9)
    found = mixed.gather(16e9, H100)  # half of it comes from the other machine, over eight cards
    assert (found.nvlink, found.network) == (14e9, 1e9)
    assert found.seconds == max(14e9 / 450e9, 1e9 / 50e9) / ASSUMED.link
    found = mixed.exchange(16e9, H100)
    assert (found.nvlink, found.network) == (7e9, 8e9)
    assert Group(1, 1, 8).gather(1e9, H100).seconds == Group(1, 1, 8).exchange(1e9, H100).seconds == 0
    assert Group(2, 8, 8).send(1e9, H100).network == Group(2, 4, 8).send(1e9, H100).nvlink == 1e9


def test_groups_lie_where_ranks_do() -> None:
    groups = Groups.of(degrees(64, tp=2, cp=2, pp=2, ep=8, etp=2), 8)
    assert [groups.tp.per_node, groups.cp.per_node, groups.pp.per_node] == [2, 2, 1]
    assert (groups.dense.size, groups.dense.stride) == (16, 2)
    assert (groups.ep.size, groups.ep.stride, groups.ep.per_node) == (8, 2, 4)
    assert (groups.experts.size, groups.experts.stride) == (2, 16)


def test_messages_of_a_layer_by_hand() -> None:
    d = degrees(8, tp=2, cp=2, ep=4)
    work = replace(Work.of(settings(), d, 4096), mean_micro_tokens=4096)
    setting = Setting(settings(), BIG, d, work, H100, 8, "none")
    moved = {backward: layer_traffic(setting, moe=True, backward=backward) for backward in (False, True)}
    states = 4096 / 2 * 2048 * 2
    assert moved[False]["tp"].nvlink == 2 * states / 2  # one gather, one scatter; half is not one's own
    assert moved[True]["tp"].nvlink == 3 * states / 2
    assert moved[False]["cp"].nvlink == 4096 * (2 * 4 * 128 / 2) * 2 / 2
    routed = 4096 / 4 * 8 * 2048 * 2 * ASSUMED.load_imbalance
    assert moved[False]["ep"].nvlink == pytest.approx(2 * routed * 3 / 4)


def test_one_gpu_by_hand() -> None:
    cfg = settings("algo.mini_batches=2", "rollout.prompts_per_step=8", "algo.old_logprobs=learner")
    cluster = Cluster(1, H100, 8)
    found = judge(cfg, SMALL, cluster, 2048, "none").timing
    tokens, matrices = (
        64 * 2048,
        SMALL.parameters().total - SMALL.vocab * SMALL.hidden - 28 * SMALL.layer_vectors - 1024,
    )
    rate = H100.flops * ASSUMED.gemm
    assert found.parts["dense"] == pytest.approx(3.5 * 2 * matrices * tokens / rate)  # half of the old logprobs
    assert found.parts["head"] == pytest.approx(4.5 * 2 * 151936 * 1024 * tokens / rate)
    pairs = 64 * 2048 * 2049 / 2 * SMALL.pair_flops
    attention = 1.5 / ASSUMED.attention_forward + ASSUMED.attention_backward_work / ASSUMED.attention_backward
    assert found.parts["attention"] == pytest.approx(pairs * attention / H100.flops)
    assert found.model_flops == SMALL.training_flops([2048] * 64)
    assert set(found.traffic) == {"publish"}
    assert sum(found.parts.values()) == found.seconds
    assert found.parts["bubble"] == 0


@pytest.mark.parametrize("vpp", [1, 2])
def test_the_bubble(vpp: int) -> None:
    cfg = settings("parallel.pp=4", f"parallel.vpp={vpp}", "rollout.prompts_per_step=8")
    found = judge(cfg, BIG, Cluster(4, H100, 8), 8192, "none")
    inside = {k: v for k, v in found.timing.parts.items() if k not in ("bubble", "dp", "optimizer", "publish")}
    micro = found.work.micro_batches
    assert micro == 64
    assert found.timing.parts["bubble"] == pytest.approx(sum(inside.values()) / micro * 3 / vpp)


def test_full_recomputation_is_one_more_forward() -> None:
    none, full = (judge(settings(), SMALL, Cluster(2, H100, 8), 2048, how).timing for how in ("none", "full"))
    assert full.parts["dense"] == pytest.approx(none.parts["dense"] * 4 / 3)
    assert full.parts["head"] == none.parts["head"]
    assert full.model_flops == none.model_flops


def test_ranking_is_complete_and_sorted() -> None:
    cfg, cluster = settings(), Cluster(16, H100, 8)
    found = rank(cfg, BIG, cluster, 4096, top=10_000)
    tried = list(layouts(16, BIG))
    assert len(tried) == len(set(map(str, tried))) == found.fitting + sum(found.dropped.values())
    assert len(found.best) == found.fitting > 10
    assert all(a.timing.seconds <= b.timing.seconds for a, b in pairwise(found.best))
    for p in found.best:
        d = p.degrees
        check_layout(ParallelConfig(tp=d.tp, cp=d.cp, pp=d.pp, ep=d.ep, etp=d.etp, vpp=d.vpp), 16, BIG)
        assert p.memory.total <= H100.memory_bytes
        assert 0 < p.timing.utilisation(16, H100) < 0.6
    assert found.dropped["does not fit in memory"] > 0
    impossible = sum(bool(list(layout_problems(one, 16, BIG))) for one in tried)
    assert sum(count for why, count in found.dropped.items() if "divide" in why) == impossible


def test_every_size_of_cluster_and_card_orders_as_it_must() -> None:
    def fastest(gpus: int, gpu: str) -> float:
        return rank(settings(), BIG, Cluster(gpus, GPUS[gpu], 8), 4096, top=1).best[0].timing.seconds

    assert fastest(16, "h200") < fastest(8, "h200")
    assert fastest(8, "b200") < fastest(8, "h200") <= fastest(8, "h100")


def test_extra_copies_and_records_are_counted() -> None:
    cluster = Cluster(8, H100, 8)
    plain = judge(settings("parallel.ep=8"), BIG, cluster, 4096, "full").memory
    more = judge(settings("parallel.ep=8", "algo.kl_coef=0.1", "algo.routing_replay=R2"), BIG, cluster, 4096, "full")
    assert plain.reference == plain.routing == 0
    assert more.memory.reference >= more.memory.weights
    assert more.memory.routing == 512 * 4096 / 8 * 48 * 8  # own tokens, layers, experts a token, one byte each


def test_impossible_layouts_are_listed_with_all_reasons() -> None:
    kinds = [p.kind for p in problems(settings("parallel.tp=8", "parallel.cp=7"), BIG, Cluster(8, H100, 8))]
    assert kinds == [
        "tp*pp*cp does not divide the ranks",
        "tp does not divide num_key_value_heads",
        "a sequence is longer than train.micro_batch_tokens",
    ]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings("parallel.ep=8", path=str(tmp_path)).model_dump(mode="json")))
    return path


def test_the_command_prints_and_answers(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(config_file), "--gpus", "16", "--gpu", "h200", "--top", "3"]
    assert plan.main([*arguments, "train.recompute=full"]) == 0
    out = capsys.readouterr().out
    assert "parameters 30.53B in total, 3.35B active" in out
    assert "layout tp=1 cp=1 pp=1 vpp=1 dp=16 ep=8 etp=1 edp=2, recompute full" in out
    assert "the fastest 3:" in out
    assert "dropped" in out

    assert plan.main([*arguments, "parallel.tp=8"]) == 2
    assert "parallel.tp=8 does not divide the model's num_key_value_heads=4" in capsys.readouterr().out
    assert plan.main([*arguments, "parallel.ep=1", "--top", "0"]) == 2
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_the_command_answers_in_json(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([str(config_file), "--gpus", "16", "--gpu", "h200", "--top", "2", "--json"]) in (0, 2)
    record = json.loads(capsys.readouterr().out)
    assert record["parameters"]["total"] == 30_532_122_624
    assert len(record["best"]) == 2
    assert record["layout"]["ep"] == 8
    assert (
        sum(v for k, v in record["layout"]["memory_bytes"].items() if k != "total")
        == (record["layout"]["memory_bytes"]["total"])
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--gpus", "0"], "--gpus 0"),
        (["--gpus", "8", "--tokens", "9000"], "--tokens 9000 is more than .* = 8192, the longest sequence"),
        (["--gpus", "8", "--nodes-of", "0"], "--nodes-of 0"),
    ],
)
def test_unusable_arguments(config_file: Path, extra: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan.main([str(config_file), "--gpu", "h100", *extra])


def test_a_plan_needs_no_torch(config_file: Path) -> None:
    code = (
        "import sys\nfrom megasapo.cli import main\n"
        f"code = main(['plan', {str(config_file)!r}, '--gpus', '16', '--gpu', 'b200', '--top', '1'])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
