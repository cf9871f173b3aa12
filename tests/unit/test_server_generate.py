"""The embedded server's tokens, logprobs and routing against transformers' own, and its batching against itself."""

import asyncio
import base64

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megasapo.geometry import read_geometry
from megasapo.rollout.local.fused import Fused
from megasapo.routing.validate import RoutingRule, validate
from tests.serving import serving
from tests.tiny import make_model

PROMPTS = [[5, 6, 7, 8], [9] * 30, [100, 200], [11, 12, 13, 14, 15, 16, 17], list(range(3, 90))]
EXACT = 1e-4  # float32: two orders of summation
# Of what is sampled and compared with transformers: other tokens every time would now and then bring a router near a
# tie, where the two choose other experts.
SEED = 11


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def mixed_dir(tmp_path_factory):
    """A MoE model whose layer 1 is dense."""
    return make_model(tmp_path_factory.mktemp("mixed"), mlp_only_layers=[1])


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("dense"), kind="dense", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def server(moe_dir):
    with serving(moe_dir, enable_return_routed_experts=True) as s:
        yield s


@pytest.fixture(scope="module")
def reference(moe_dir):
    return load_reference(moe_dir)


def load_reference(directory):
    return AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()


def greedy(reference, prompt, count):
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None
        )
    return out[0, len(prompt) :].tolist()


def teacher_forced(reference, prompt, output, temperature):
    """[R] log-probabilities of `output` after `prompt`."""
    ids = torch.tensor([prompt + output])
    with torch.inference_mode():
        logits = reference(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(output)[:, None])[:, 0].numpy()


def is_greedy(reference, prompt, output):
    """Whether every token of `output` is the most likely one, by one forward pass."""
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + output]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return bool(output) and logits.argmax(-1).tolist() == output


def logprobs(answer):
    return np.array([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])


@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
@pytest.mark.parametrize("kind", ["moe_dir", "dense_dir", "mixed_dir"])
def test_greedy_equals_generate(kind, plain, request):
    check_greedy(request.getfixturevalue(kind), plain)


def check_greedy(directory, plain):
    counts = [20, 3, 35, 1, 10]
    params = [{"max_new_tokens": n, "temperature": 0, "ignore_eos": True} for n in counts]
    with serving(directory, plain_forward=plain) as server:
        assert (server.engine.batch._forward._fused is None) == plain
        answers = server.generate(input_ids=PROMPTS, sampling_params=params)
    reference = load_reference(directory)
    assert [a["output_ids"] for a in answers] == [greedy(reference, p, n) for p, n in zip(PROMPTS, counts, strict=True)]
    assert [a["meta_info"]["finish_reason"] for a in answers] == [{"type": "length", "length": n} for n in counts]
    assert [a["meta_info"]["prompt_tokens"] for a in answers] == [len(p) for p in PROMPTS]
    assert [a["meta_info"]["completion_tokens"] for a in answers] == counts


def test_requests_that_join_while_others_run_get_the_same_tokens(server, reference):
    async def staggered(client):
        async def one(prompt, count):
            params = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}
            return (await client.post("/generate", json={"input_ids": prompt, "sampling_params": params})).json()

        tasks = []
        with server.holding():
            for prompt, count in zip(PROMPTS, [40, 30, 45, 25, 20], strict=True):
                tasks.append(asyncio.create_task(one(prompt, count)))
                await server.started(len(tasks))
        return await asyncio.gather(*tasks)

    answers = server.ask(staggered)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert is_greedy(reference, prompt, answer["output_ids"])


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 20, "min_p": 0.01},
        {"temperature": 0},
    ],
    ids=str,
)
def test_logprobs_equal_teacher_forced_ones(server, reference, sampling):
    params = [{"max_new_tokens": n, "sampling_seed": SEED, "ignore_eos": True, **sampling} for n in (40, 10, 25, 3, 12)]
    answers = server.generate(input_ids=PROMPTS, sampling_params=params, return_logprob=True)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        want = teacher_forced(reference, prompt, answer["output_ids"], sampling["temperature"] or 1.0)
        assert np.abs(logprobs(answer) - want).max() < EXACT
        assert [e[1] for e in answer["meta_info"]["output_token_logprobs"]] == answer["output_ids"]
        assert answer["meta_info"]["input_token_logprobs"] == []


@pytest.mark.parametrize("start", [0, 2, 3, 4])
def test_prompt_logprobs(server, reference, start):
    prompt = PROMPTS[0]
    answer = server.generate(
        input_ids=prompt, sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=start
    )
    got = answer["meta_info"]["input_token_logprobs"]
    assert [e[1] for e in got] == prompt[start:]
    assert [e[0] for e in got[:1]] == [None] * len(got[:1])
    if got[1:]:
        want = teacher_forced(reference, prompt[: start + 1], prompt[start + 1 :], 1.0)
        assert np.abs(np.array([e[0] for e in got[1:]]) - want).max() < EXACT
    assert answer["output_ids"] == []
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


def test_plain_forward_scores_and_routes_alike(moe_dir, reference):
    params = [{"max_new_tokens": n, "sampling_seed": SEED, "ignore_eos": True} for n in (30, 9, 16, 1, 5)]
    with serving(moe_dir, plain_forward=True, enable_return_routed_experts=True) as server:
        answers = server.generate(
            input_ids=PROMPTS, sampling_params=params, return_logprob=True, return_routed_experts=True
        )
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        want = teacher_forced(reference, prompt, answer["output_ids"], 1.0)
        assert np.abs(logprobs(answer) - want).max() < EXACT
        assert (routed(answer) == router_choices(reference, prompt + answer["output_ids"][:-1])).all()


@pytest.mark.parametrize("over", [{"norm_topk_prob": False}, {"rope_theta": 100.0}, {"rms_norm_eps": 1e-2}], ids=str)
def test_settings_of_the_model_are_heeded(tmp_path, over):
    directory = make_model(tmp_path, **over)
    params = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    with serving(directory) as server:
        assert server.engine.batch._forward._fused is not None
        answers = server.generate(input_ids=PROMPTS, sampling_params=params, return_logprob=True)
    reference = load_reference(directory)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert is_greedy(reference, prompt, answer["output_ids"])
        assert np.abs(logprobs(answer) - teacher_forced(reference, prompt, answer["output_ids"], 1.0)).max() < EXACT


def test_fused_arithmetic_that_is_wrong_does_not_start(moe_dir, monkeypatch):
    monkeypatch.setattr(Fused, "_norm", lambda self, x, weight: x * weight)
    with pytest.raises(RuntimeError, match="--plain-forward"):
        with serving(moe_dir):
            pass


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral", "glm4_moe", "gpt_oss", "deepseek_v3"])
def test_other_families_generate_as_transformers_does(kind, tmp_path):
    directory = make_model(tmp_path, kind=kind)
    check_greedy(directory, plain=True)
    reference = load_reference(directory)
    chosen = []  # by each layer's router: what transformers gives its experts
    for module in reference.modules():
        if hasattr(module, "_apply_gate"):
            module.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1]))
    with serving(directory, enable_return_routed_experts=True) as server:
        params = {"max_new_tokens": 9, "sampling_seed": SEED, "ignore_eos": True}
        answer = server.generate(input_ids=PROMPTS[1], sampling_params=params, return_routed_experts=True)
    with torch.inference_mode():
        reference(torch.tensor([PROMPTS[1] + answer["output_ids"][:-1]]), use_cache=False)
    rule = RoutingRule.of(read_geometry(directory))
    rows = routed(answer, top_k=rule.top_k)
    got = validate(rows, tokens=len(rows) + 1, rule=rule, where=kind)
    assert (np.sort(got) == torch.stack(chosen, 1).sort().values.numpy()).all()


def routed(answer, start=0, layers=4, top_k=2):
    rows = answer["meta_info"]["prompt_tokens"] + len(answer["output_ids"]) - 1 - start
    ids = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), np.int32)
    return ids.reshape(rows, layers, top_k)


def router_choices(reference, tokens):
    """[tokens, MoE layers, K] in descending weight."""
    with torch.inference_mode():
        out = reference(torch.tensor([tokens]), use_cache=False, output_router_logits=True)
    return torch.stack([x.topk(2, -1).indices for x in out.router_logits], 1).numpy()


def test_routed_experts_equal_the_routers_choices(server, reference):
    params = [{"max_new_tokens": n, "sampling_seed": SEED, "ignore_eos": True} for n in (30, 9, 16, 1, 5)]
    answers = server.generate(input_ids=PROMPTS, sampling_params=params, return_routed_experts=True)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert (routed(answer) == router_choices(reference, prompt + answer["output_ids"][:-1])).all()


def test_routing_is_not_kept_for_others(server):
    """Each of 8 responses holds its own tokens' choices alone, however many ran beside it."""
    kept = []

    async def run(client):
        prompts = [[i + 3] * 5 for i in range(8)]
        params = {"max_new_tokens": 200, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompts, "sampling_params": params, "return_routed_experts": True}
        with server.holding(20):
            task = asyncio.create_task(client.post("/generate", json=body))
            await server.started(8)
            kept.extend(server.engine.batch.rows)
            await client.post("/abort_request", json={"abort_all": True})
            return await task

    server.ask(run)
    assert len(kept) == 8
    for s in kept:
        held = sum((piece if piece.base is None else piece.base).nbytes for piece in s.routing)
        assert held == sum(piece.nbytes for piece in s.routing)


def test_routed_experts_from_a_start(server, reference):
    answer = server.generate(
        input_ids=PROMPTS[3],
        sampling_params={"max_new_tokens": 6, "temperature": 0},
        return_routed_experts=True,
        routed_experts_start_len=5,
    )
    want = router_choices(reference, PROMPTS[3] + answer["output_ids"][:-1])
    assert (routed(answer, start=5) == want[5:]).all()


def test_dense_layers_have_rows_of_zeros(mixed_dir):
    with serving(mixed_dir, enable_return_routed_experts=True) as server:
        params = {"max_new_tokens": 8, "sampling_seed": SEED, "ignore_eos": True}
        answer = server.generate(input_ids=PROMPTS[0], sampling_params=params, return_routed_experts=True)
    got = routed(answer)
    want = router_choices(load_reference(mixed_dir), PROMPTS[0] + answer["output_ids"][:-1])
    assert (got[:, [0, 2, 3]] == want).all()
    assert (got[:, 1] == 0).all()


def test_without_the_flag_routing_is_silently_absent(moe_dir):
    with serving(moe_dir) as server:
        answer = server.generate(
            input_ids=[5], sampling_params={"max_new_tokens": 2, "ignore_eos": True}, return_routed_experts=True
        )
    assert "routed_experts" not in answer["meta_info"]


def test_a_dense_model_refuses_the_routing_flag(dense_dir):
    with pytest.raises(ValueError, match="no experts to record"):
        with serving(dense_dir, enable_return_routed_experts=True):
            pass


def test_a_small_cache_retracts_and_gives_the_same_tokens(moe_dir, reference):
    prompts = [[7 + i] * 20 for i in range(6)]
    params = {"max_new_tokens": 100, "temperature": 0, "ignore_eos": True}
    with serving(moe_dir, max_total_tokens=320, enable_return_routed_experts=True) as server:
        answers = server.generate(
            input_ids=prompts, sampling_params=params, return_logprob=True, return_routed_experts=True
        )
    assert sum(a["meta_info"]["num_retractions"] for a in answers) > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer["output_ids"]) == 100
        assert is_greedy(reference, prompt, answer["output_ids"])
        assert np.abs(logprobs(answer) - teacher_forced(reference, prompt, answer["output_ids"], 1.0)).max() < EXACT
        assert (routed(answer) == router_choices(reference, prompt + answer["output_ids"][:-1])).all()


def test_few_rows_and_a_prefill_budget_serve_everyone(moe_dir, reference):
    prompts = [[7 + i] * (i + 1) for i in range(9)]
    params = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    with serving(moe_dir, max_running_requests=3, max_prefill_tokens=8) as server:
        answers = server.generate(input_ids=prompts, sampling_params=params)
    assert [len(a["output_ids"]) for a in answers] == [12] * 9
    assert all(is_greedy(reference, p, a["output_ids"]) for p, a in zip(prompts, answers, strict=True))


def test_a_seed_gives_the_same_tokens_in_any_company(server):
    alone = {"max_new_tokens": 30, "sampling_seed": 7, "ignore_eos": True}
    first = server.generate(input_ids=PROMPTS[0], sampling_params=alone)["output_ids"]
    others = [{"max_new_tokens": 5 * i, "ignore_eos": True} for i in range(1, 5)]
    crowd = server.generate(input_ids=PROMPTS[1:] + PROMPTS[:1], sampling_params=[*others, alone])
    assert crowd[-1]["output_ids"] == first
    assert server.generate(input_ids=PROMPTS[0], sampling_params=alone | {"sampling_seed": 8})["output_ids"] != first


def test_without_a_seed_every_request_differs(server):
    params = {"max_new_tokens": 20, "ignore_eos": True}
    outputs = [a["output_ids"] for a in server.generate(input_ids=[PROMPTS[0]] * 4, sampling_params=params)]
    assert len(set(map(tuple, outputs))) == 4


def test_copies_of_a_seeded_request_differ_and_repeat(server):
    params = {"max_new_tokens": 15, "sampling_seed": 3, "ignore_eos": True, "n": 3}
    runs = [[a["output_ids"] for a in server.generate(input_ids=PROMPTS[0], sampling_params=params)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(map(tuple, runs[0]))) == 3
    assert runs[0][0] == server.generate(input_ids=PROMPTS[0], sampling_params=params | {"n": 1})["output_ids"]


def test_deterministic_is_bit_for_bit_whatever_else_runs(moe_dir):
    """The same request gives the same bits before, after and amid others, in any order of arrival."""
    params = [{"max_new_tokens": n, "sampling_seed": n, "ignore_eos": True} for n in (40, 7, 60, 3, 21)]
    body = {"input_ids": PROMPTS, "sampling_params": params, "return_logprob": True}
    noise = {"input_ids": [[50] * 40] * 7, "sampling_params": {"max_new_tokens": 90, "ignore_eos": True}}

    def bits(answers):
        return [(a["output_ids"], a["meta_info"]["output_token_logprobs"]) for a in answers]

    async def crowd(client, order):
        answers = await asyncio.gather(*(client.post("/generate", json=b) for b in order))
        return [bits(a.json()) for a, b in zip(answers, order, strict=True) if b is body]

    with serving(moe_dir, deterministic=True) as server:
        first = bits(server.generate(**body))
        for order in ([noise, body, noise], [body, noise, body], [noise, noise, body]):
            assert all(got == first for got in server.ask(lambda c, order=order: crowd(c, order)))


def test_stop_token_eos_and_ignore_eos(server, reference):
    prompt = PROMPTS[0]
    free = greedy(reference, prompt, 30)
    stop = free[4]
    first = free.index(stop)
    answer = server.generate(
        input_ids=prompt, sampling_params={"max_new_tokens": 30, "temperature": 0, "stop_token_ids": [stop]}
    )
    assert answer["output_ids"] == free[: first + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    on = {"max_new_tokens": 30, "temperature": 0, "stop_token_ids": [stop], "ignore_eos": True}
    assert server.generate(input_ids=prompt, sampling_params=on)["output_ids"] == free
    late = server.generate(
        input_ids=prompt,
        sampling_params={"max_new_tokens": 30, "min_new_tokens": 10, "temperature": 0, "stop_token_ids": [stop]},
    )
    assert stop not in late["output_ids"][:10]
    assert len(late["output_ids"]) >= 10


def test_end_of_sequence_stops_and_is_part_of_the_output(tmp_path):
    directory = make_model(tmp_path, eos_token_id=[2, 40])
    with serving(directory) as server:
        answers = server.generate(
            input_ids=[[i] for i in range(3, 67)], sampling_params={"max_new_tokens": 60, "sampling_seed": 1}
        )
        ignoring = server.generate(
            input_ids=[[i] for i in range(3, 67)],
            sampling_params={"max_new_tokens": 60, "sampling_seed": 1, "ignore_eos": True},
        )
    stopped = [a for a in answers if a["meta_info"]["finish_reason"]["type"] == "stop"]
    assert stopped
    for a in stopped:
        assert a["output_ids"][-1] == a["meta_info"]["finish_reason"]["matched"]
        assert a["output_ids"][-1] in (2, 40)
        assert not {2, 40} & set(a["output_ids"][:-1])
    for a, b in zip(answers, ignoring, strict=True):
        assert len(b["output_ids"]) == 60
        assert b["output_ids"][: len(a["output_ids"])] == a["output_ids"]


def test_an_end_of_sequence_outside_the_vocabulary_is_left_out(tmp_path):
    directory = make_model(tmp_path, eos_token_id=[2, 9999])
    with serving(directory) as server:
        assert server.loaded.eos_ids == {2}
        params = {"max_new_tokens": 5, "min_new_tokens": 3, "sampling_seed": 1}
        assert 2 not in server.generate(input_ids=[5], sampling_params=params)["output_ids"][:3]


def test_stop_string_ends_and_trims(server):
    params = {"max_new_tokens": 60, "sampling_seed": 5, "ignore_eos": True}
    free = server.generate(text="hello world", sampling_params=params)
    text = free["text"]
    stop = next(c for c in text[10:] if c.isalpha() and c.isascii())
    answer = server.generate(text="hello world", sampling_params=params | {"stop": [stop, "\u0000never"]})
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert answer["text"] == text[: text.index(stop)]
    count = len(answer["output_ids"])
    assert answer["output_ids"] == free["output_ids"][:count]
    untrimmed = server.generate(text="hello world", sampling_params=params | {"stop": stop, "no_stop_trim": True})
    assert stop in untrimmed["text"]
    assert untrimmed["text"].startswith(answer["text"])


def test_text_in_text_out(server):
    tokenizer = server.loaded.tokenizer
    answer = server.generate(
        text=["hello world", "the fox"],
        sampling_params={"max_new_tokens": 6, "ignore_eos": True},
        return_logprob=True,
        return_text_in_logprobs=True,
    )
    for prompt, a in zip(["hello world", "the fox"], answer, strict=True):
        assert a["meta_info"]["prompt_tokens"] == len(tokenizer.encode(prompt))
        assert a["text"] == tokenizer.decode(a["output_ids"], skip_special_tokens=True)
        assert [e[2] for e in a["meta_info"]["output_token_logprobs"]] == [
            tokenizer.decode([t]) for t in a["output_ids"]
        ]


def test_bfloat16_serves_and_scores(moe_dir):
    with serving(moe_dir, dtype="bfloat16") as server:
        answer = server.generate(
            input_ids=PROMPTS,
            sampling_params={"max_new_tokens": 20, "temperature": 0, "ignore_eos": True},
            return_logprob=True,
        )
        assert server.engine.batch._forward._fused is None  # only float32 is
        reference = server.loaded.model.__class__.from_pretrained(moe_dir, dtype=torch.bfloat16).eval()
    for prompt, a in zip(PROMPTS, answer, strict=True):
        want = teacher_forced(reference, prompt, a["output_ids"], 1.0)
        assert np.abs(logprobs(a) - want).mean() < 0.05
