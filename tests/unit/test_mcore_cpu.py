"""The CPU platform changes what megatron-core asks of CUDA and nothing that others would notice."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megasapo.mcore import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU platform is off where CUDA is")


def test_enabling_twice_changes_nothing() -> None:
    before = torch.tensor, torch.Tensor.type, torch.cuda.current_device
    cpu.enable()
    assert before == (torch.tensor, torch.Tensor.type, torch.cuda.current_device)


def test_cuda_factories_make_cpu_tensors() -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.tensor([1], device="cuda:0").device.type == "cpu"
    assert torch.ones(1).cuda().device.type == "cpu"


def test_meta_device_still_means_meta() -> None:
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"
    assert torch.empty(2, device="meta").device.type == "meta"


def test_only_megatron_hears_cuda_type_names() -> None:
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64
    namespace = {"__name__": "megatron.core.optimizer.optimizer"}
    exec("def ask(x): return x.type()", namespace)
    assert namespace["ask"](torch.zeros(1)) == "torch.cuda.FloatTensor"
    assert namespace["ask"](torch.zeros(1, dtype=torch.bfloat16)) == "torch.cuda.BFloat16Tensor"


def test_compile_is_back_and_megatrons_fuser_is_off() -> None:
    from megatron.core import jit

    def plain(x: int) -> int:
        return x

    assert torch.compile.__module__.startswith("torch")
    assert jit.jit_fuser(plain) is plain


def test_chunks_of_tokens_are_copied_only_to_change_their_order() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    tokens, counts = torch.arange(6.0).view(3, 2), torch.tensor([1, 2])
    same, gates = token_dispatcher.sort_chunks_by_idxs(tokens, counts, torch.tensor([0, 1]), probs=tokens[:, 0])
    assert same is tokens
    assert torch.equal(gates, tokens[:, 0])
    swapped, gates = token_dispatcher.sort_chunks_by_idxs(tokens, counts, torch.tensor([1, 0]), probs=tokens[:, 0])
    assert torch.equal(swapped, tokens[[1, 2, 0]])
    assert torch.equal(gates, swapped[:, 0])


def test_random_state_round_trips_through_megatrons_tracker() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("a", 5)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with tracker.fork("a"):
        inside = torch.rand(2)
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.rand(2), inside, rtol=0, atol=0)


def test_too_late_is_an_error() -> None:
    code = "import megatron.core\ntry:\n    import megasapo.mcore\nexcept RuntimeError as e:\n    print(e)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert "megatron.core was imported before megasapo.mcore" in done.stdout, done.stderr
