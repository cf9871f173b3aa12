"""The embedded server of a block-FP8 model: its arithmetic, updates, what it refuses, and whole publishes to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megasapo.fp8.blocks import SCALE
from megasapo.publish import Bucket, Publisher
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.local.weights import WeightError
from megasapo.rollout.protocol import RolloutError
from megasapo.rollout.quantise import quantise_checkpoint
from megasapo.sections import RolloutConfig
from tests.serving import serving
from tests.tiny import make_model, weights_checksum

SIZES: dict[str, Any] = {"hidden_size": 160, "num_hidden_layers": 2, "head_dim": 32, "moe_intermediate_size": 192}
PROMPT = list(range(20, 44))
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of one shape, and their quantised copies: old, new, old8, new8."""
    root = tmp_path_factory.mktemp("models")
    found = {name: make_model(root / name, seed=seed, **SIZES) for seed, name in enumerate(("old", "new"))}
    for name in ("old", "new"):
        quantise_checkpoint(found[name], root / f"{name}8")
        found[f"{name}8"] = root / f"{name}8"
    return found


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def prompt_logprobs(server: Any) -> np.ndarray:
    """Of every token of PROMPT after the first, as the server's forward pass gives them."""
    answer = server.generate(
        input_ids=PROMPT, sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=0
    )
    return np.array([entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]])


def e4m3(x: np.ndarray, rows: int) -> np.ndarray:
    """[M, N] rounded by blocks of rows x 128, in numpy: three bits of mantissa, steps of 2^-9 at the bottom.

    Weights, which have many rows a block, have powers of two as scales.
    """
    out = np.empty(x.shape, dtype=np.float64)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], 128):
            block = x[i : i + rows, j : j + 128].astype(np.float32)
            scale = np.float32(np.abs(block).max() / np.float32(448)) or np.float32(1)
            scale = scale if rows == 1 else 2.0 ** np.ceil(np.log2(scale))
            scaled = (block / scale).astype(np.float64)
            step = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 2.0**-9))), -6) - 3)
            out[i : i + rows, j : j + 128] = np.round(scaled / step) * step * scale
    return out


def reference_logprobs(directory: Path) -> np.ndarray:
    """transformers' model with weights and activations rounded by this file's `e4m3`."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def rounded(x: torch.Tensor, rows: int = 1) -> torch.Tensor:
        flat = x.detach().reshape(-1, x.shape[-1]).numpy()
        return torch.from_numpy(e4m3(flat, rows).astype(np.float32)).view(x.shape)

    def experts(module: Any, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for token in range(hidden.shape[0]):
            for expert, share in zip(index[token].tolist(), weight[token], strict=True):
                x = rounded(hidden[token : token + 1])
                gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                inner = rounded(torch.nn.functional.silu(gate) * up)
                out[token] += share * (inner @ module.down_proj[expert].T)[0]
        return out

    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj):
            linear.weight.data = rounded(linear.weight.data, 128)
            linear.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
        moe = layer.mlp.experts
        width = moe.gate_up_proj.shape[1] // 2
        for e in range(moe.num_experts):
            for part in (moe.gate_up_proj.data[e, :width], moe.gate_up_proj.data[e, width:], moe.down_proj.data[e]):
                part.copy_(rounded(part, 128))
        moe.forward = experts.__get__(moe)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, :-1]
    return logits.log_softmax(-1)[torch.arange(len(PROMPT) - 1), PROMPT[1:]].numpy()


def test_arithmetic_is_that_of_rounded_weights_and_activations(dirs: dict[str, Path]) -> None:
    with serving(dirs["old8"]) as server:
        got = prompt_logprobs(server)
        assert server.post("/server_info", method="GET").json()["quantization"] == "fp8"
    with serving(dirs["old"]) as server:
        plain = prompt_logprobs(server)
        assert server.post("/server_info", method="GET").json()["quantization"] is None
    want = reference_logprobs(dirs["old"])
    # summing in another order now and then moves a value over a rounding boundary: far less than rounding itself does
    assert np.abs(plain - want).mean() > 0.02
    assert np.abs(got - want).mean() < 0.1 * np.abs(plain - want).mean()


def test_an_update_from_disk_is_the_other_model(dirs: dict[str, Path]) -> None:
    with serving(dirs["new8"]) as fresh:
        want = prompt_logprobs(fresh)
    with serving(dirs["old8"]) as server:
        assert server.checksum() == weights_checksum(tensors_of(dirs["old8"]))
        assert not np.array_equal(prompt_logprobs(server), want)
        answer = server.post("/update_weights_from_disk", {"model_path": str(dirs["new8"]), "weight_version": "3"})
        assert answer.status_code == 200
        assert server.checksum() == weights_checksum(tensors_of(dirs["new8"]))
        assert np.array_equal(prompt_logprobs(server), want)


def without_scale(file: dict[str, torch.Tensor]) -> None:
    del file[Q + SCALE]


def smaller_scale(file: dict[str, torch.Tensor]) -> None:
    file[Q + SCALE] = file[Q + SCALE][:, :1].contiguous()


def half_scale(file: dict[str, torch.Tensor]) -> None:
    file[Q + SCALE] = file[Q + SCALE].bfloat16()


def nan_scale(file: dict[str, torch.Tensor]) -> None:
    file[Q + SCALE][0, 0] = float("nan")


def unquantised(file: dict[str, torch.Tensor]) -> None:
    file[Q] = file[Q].float()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_scale, f"lacks 1 weights, the first is '{Q}{SCALE}'"),
        (smaller_scale, f"weight '{Q}{SCALE}' has shape [1, 1], the model's has [1, 2]"),
        (half_scale, f"weight '{Q}{SCALE}' is bfloat16, this server's is float32"),
        (nan_scale, f"weight '{Q}{SCALE}' holds scales that are not positive numbers"),
        (unquantised, f"weight '{Q}' is float32, this server's is float8_e4m3fn"),
    ],
)
def test_wrong_files_are_refused_and_the_old_weights_stay(
    dirs: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    file = tensors_of(dirs["new8"])
    change(file)
    save_file(file, tmp_path / "model.safetensors")
    with serving(dirs["old8"]) as server:
        before = prompt_logprobs(server)
        answer = server.post("/update_weights_from_disk", {"model_path": str(tmp_path)})
        assert answer.status_code == 400
        assert words in answer.json()["message"]
        assert np.array_equal(prompt_logprobs(server), before)
        assert server.checksum() == weights_checksum(tensors_of(dirs["old8"]))


@pytest.mark.parametrize(
    ("served", "published", "words"),
    [("old8", "new", "is float32, this server's is float8_e4m3fn"), ("old", "new8", "float8_e4m3fn, this server's is")],
)
def test_a_directory_of_the_other_kind_is_refused(
    dirs: dict[str, Path], served: str, published: str, words: str
) -> None:
    with serving(dirs[served]) as server:
        answer = server.post("/update_weights_from_disk", {"model_path": str(dirs[published])})
        assert answer.status_code == 400
        assert words in answer.json()["message"]


def test_values_and_scales_may_come_apart_but_not_alone(dirs: dict[str, Path]) -> None:
    new = tensors_of(dirs["new8"])
    with serving(dirs["old8"]) as server:
        weights = server.loaded.weights
        assert weights is not None
        dense = weights._views[Q]
        before = dense.clone()
        weights.begin()
        weights.write([(Q, new[Q])])
        assert torch.equal(dense, before)  # not yet: its scales are the old ones'
        with pytest.raises(WeightError, match=f"weight '{Q}' was updated without '{Q}{SCALE}'"):
            weights.end()
        for order in ((Q, Q + SCALE), (Q + SCALE, Q)):
            dense.copy_(before)
            weights.begin()
            for name in order:
                weights.write([(name, new[name])])
            weights.end()
            scales = new[Q + SCALE].repeat_interleave(128, 0).repeat_interleave(128, 1)[:128, :160]
            assert torch.equal(dense, new[Q].float() * scales)


def test_a_plain_server_names_the_scale_that_it_cannot_take(dirs: dict[str, Path]) -> None:
    with serving(dirs["old"]) as server:
        answer = server.post("/get_weights_by_name", {"name": Q + SCALE})
        assert answer.status_code == 400
        assert f"'{Q}' is not quantised in this server's model" in answer.text


def test_another_quantisation_is_refused(dirs: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(dirs["old8"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"weight_block_size.*\[64, 64\].*fp8_block"), serving(other):
        pass


# --- whole publishes, to real server processes ---


def fp8_config(method: Literal["disk", "distributed", "tensor"] = "disk", **over: Any) -> RolloutConfig:
    flags = ("--threads", "1")
    return RolloutConfig(quantization="fp8_block", publish=method, server_args=flags, start_timeout_s=120.0, **over)


def export_of(directory: Path) -> Iterator[Bucket]:
    tensors = list(load_file(directory / "model.safetensors").items())
    for i in range(0, len(tensors), 20):
        yield tensors[i : i + 20]


def publisher(fleet: Fleet, cfg: RolloutConfig, source: Path, run_dir: Path) -> Publisher:
    return Publisher(
        lambda: export_of(source),
        fleet,
        cfg,
        rank=0,
        agree=lambda x: x,
        run_dir=run_dir,
        model_dir=source,
        verify=True,
    )


def test_a_run_starts_quantised_servers_and_publishes_to_them(dirs: dict[str, Path], tmp_path: Path) -> None:
    """`verify` compares the server's hash with that of what was published, for all ways."""
    with Fleet.start(fp8_config(), dirs["old"], tmp_path) as fleet:
        client = fleet.control(fleet.servers[0])
        assert fleet.run(client.model_info())["model_path"] == str(tmp_path / "rollout_model")
        assert fleet.run(client.checksum()) == weights_checksum(tensors_of(dirs["old8"]))
        for version, (method, name) in enumerate([("disk", "new"), ("distributed", "old"), ("tensor", "new")], 1):
            p = publisher(fleet, fp8_config(method), dirs[name], tmp_path)
            p(version)
            p.close()
            assert fleet.run(client.checksum()) == weights_checksum(tensors_of(dirs[f"{name}8"]))
            assert fleet.version == version
        written = tensors_of(tmp_path / "weights" / "v1")
        assert weights_checksum(written) == weights_checksum(tensors_of(dirs["new8"]))
        remote = RolloutConfig(servers=fleet.urls, api_key_file=fleet.cfg.api_key_file, start_timeout_s=20.0)
        with Fleet.start(remote, dirs["old"], tmp_path / "other") as other:
            with pytest.raises(RolloutError, match=r"quantised as fp8, .* but rollout\.quantization=none"):
                publisher(other, remote, dirs["new"], tmp_path / "other")
