"""Makes everything the arithmetic example needs: a tokenizer, a random Qwen3-MoE model, and three data files.

The task is adding digits: `5+6+4=`, answer 15. The demonstrations in sft.jsonl come from two pupils: a diligent one
writes the running totals down (`11 15`) and is right, a lazy one answers 16 whatever the question. A model that
imitates both learns to add, but often does not care to. Reinforcement learning, which is told nothing but whether the
last number is right, finds out that showing the work pays: reward and response length rise together.

    python examples/arithmetic/make_task.py --out examples/arithmetic/out --seed 1
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|reserved_0|>",
    "<|reserved_1|>",
    "<|reserved_2|>",  # 256 bytes and 8 special tokens: a vocabulary that any usual tensor-parallel size divides
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MIN_TERMS, MAX_TERMS, MAX_DIGIT = 3, 5, 7
LAZY_ANSWER = "16"  # right now and then


def make_tokenizer(out: Path) -> None:
    """A byte-level tokenizer: one token a byte, so that it can read any text, and a chat template of single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    ).save_pretrained(out)


def make_model(out: Path, seed: int) -> None:
    """A random Qwen3-MoE: 2 layers, hidden size 128, 8 experts of which each token takes 2."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, logging

    logging.disable_progress_bar()
    config = Qwen3MoeConfig(
        vocab_size=256 + len(SPECIAL_TOKENS),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        initializer_range=0.05,  # 0.02 suits wide layers; here it only delays the start
        eos_token_id=256 + SPECIAL_TOKENS.index("<|end|>"),
        pad_token_id=256 + SPECIAL_TOKENS.index("<|pad|>"),
        bos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(seed)
    Qwen3MoeForCausalLM(config).save_pretrained(out)


def draw_problem(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(d) for d in rng.integers(1, MAX_DIGIT + 1, size=rng.integers(MIN_TERMS, MAX_TERMS + 1)))


def problem_text(terms: tuple[int, ...]) -> str:
    return "+".join(map(str, terms)) + "="


def demonstration(terms: tuple[int, ...], diligent: float, rng: np.random.Generator) -> str:
    """What one of the two pupils writes; with probability `diligent` it is the one who adds."""
    if rng.random() < diligent:
        return " ".join(map(str, np.cumsum(terms)[1:]))
    return LAZY_ANSWER


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(out: Path, seed: int, num_sft: int, num_train: int, num_eval: int, diligent: float) -> None:
    """Three files; the problems of eval.jsonl differ from one another and occur in neither of the others."""
    rng = np.random.Generator(np.random.PCG64(seed))
    held_out: dict[tuple[int, ...], None] = {}
    while len(held_out) < num_eval:
        held_out[draw_problem(rng)] = None

    def draw(num: int) -> list[tuple[int, ...]]:
        problems: list[tuple[int, ...]] = []
        while len(problems) < num:
            problem = draw_problem(rng)
            if problem not in held_out:
                problems.append(problem)
        return problems

    sft = [{"prompt": problem_text(p), "response": demonstration(p, diligent, rng)} for p in draw(num_sft)]
    write_jsonl(out / "sft.jsonl", sft)
    for name, problems in (("train", draw(num_train)), ("eval", list(held_out))):
        write_jsonl(out / f"{name}.jsonl", [{"prompt": problem_text(p), "answer": str(sum(p))} for p in problems])


def make(description: str, make_data: Callable[..., None], *, out: str, num_sft: int, diligent: float) -> None:
    """The command of an example: its tokenizer, model and data, from arguments whose defaults are given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path(out), help="directory to fill: model/ and three .jsonl files")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num-sft", type=int, default=num_sft)
    parser.add_argument("--num-train", type=int, default=3000)
    parser.add_argument("--num-eval", type=int, default=200)
    parser.add_argument("--diligent", type=float, default=diligent, help="share of the diligent pupil's demonstrations")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    make_data(args.out, args.seed, args.num_sft, args.num_train, args.num_eval, args.diligent)
    unfinished = args.out / "model.unfinished"
    make_tokenizer(unfinished)
    make_model(unfinished, args.seed)
    if (args.out / "model").exists():
        shutil.rmtree(args.out / "model")
    unfinished.rename(args.out / "model")  # whoever finds model/ finds it, and the data, complete
    print(
        f"{args.out}: model/, sft.jsonl ({args.num_sft}), train.jsonl ({args.num_train}), eval.jsonl ({args.num_eval})"
    )


if __name__ == "__main__":
    make(
        "Make the arithmetic example's tokenizer, model and data.",
        make_data,
        out="examples/arithmetic/out",
        num_sft=57600,
        diligent=0.5,
    )
