"""Tokens a second of greedy generation on a CPU, beside transformers with the same weights, in turns:

    python -m fastllm.bench.generation [--model gpt llama t5] [--tokens 64] [--rounds 7] [--threads 1] [--json FILE]

Models of 6 layers and 512 columns with random weights, in fp32; one sequence, and for t5 a beam of 5. Each side writes
--tokens tokens a turn with its own ``generate``, the prompt included, and the tokens must be equal. Speed-up: the
quartiles of the ratio of times within a round. To see a CPU with AVX2 alone, set the caps that ``fastllm info`` names.
Where other work takes the cores, two threads wait for each other; OMP_WAIT_POLICY=passive keeps them from spinning.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import cpu
from ..generate import beam_search, generate
from ..models import EncoderDecoder, ModelConfig, Transformer, load_model
from ..parser import first_paragraph
from .environment import environment
from .timing import interleaved, ratios

OURS, THEIRS = "fastllm", "transformers"
PROMPT = 16
BEAMS = 5
SHAPE = dict(vocab_size=8192, context_length=512, num_layers=6, num_heads=8, hidden_size=512)
DECODERS = {
    "gpt": dict(activation="gelu_tanh"),
    "llama": dict(
        num_kv_heads=4, positions="rotary", norm="rms", activation="swiglu", bias=False, tie_embeddings=False
    ),
}
MODELS = (*DECODERS, "t5")
Write = Callable[[], list[int]]


def _spread(model: torch.nn.Module) -> None:
    """Weights large enough that the likeliest token is clear, and another one after each."""
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(3.0)


def decoders(name: str, tokens: int, shape: dict) -> dict[str, Write]:
    """Our Transformer and transformers' model of its weights, each writing ``tokens`` tokens after one prompt."""
    from transformers import AutoModelForCausalLM

    model = Transformer(ModelConfig(**shape, **DECODERS[name])).eval()
    _spread(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, layout="transformers")
        theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.randint(shape["vocab_size"], (1, PROMPT))

    def write():
        with torch.inference_mode():
            ids = theirs.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return ids[0, PROMPT:].tolist()

    return {
        OURS: lambda: list(generate(model, prompt[0].tolist(), max_new_tokens=tokens, temperature=0.0)),
        THEIRS: write,
    }


def translators(tokens: int, shape: dict) -> dict[str, Write]:
    """transformers' T5 and our encoder-decoder of its weights, each writing ``tokens`` tokens with a beam of 5."""
    from transformers import T5Config, T5ForConditionalGeneration

    size, end = shape["hidden_size"], 1
    # transformers' decorators hide what their classes take.
    made: Any = T5Config
    config = made(
        vocab_size=shape["vocab_size"], d_model=size, d_kv=size // shape["num_heads"], d_ff=4 * size,
        num_layers=shape["num_layers"], num_heads=shape["num_heads"], feed_forward_proj="relu",
        tie_word_embeddings=False, decoder_start_token_id=0, eos_token_id=end, pad_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    theirs: Any = T5ForConditionalGeneration(config).eval()
    # The end of the sequence must not be the likeliest before all tokens are written.
    theirs.lm_head.weight.data[end] = 0.0
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = load_model(folder).eval()
    assert isinstance(model, EncoderDecoder)
    source = torch.randint(2, shape["vocab_size"], (1, PROMPT))
    start = torch.zeros(1, 1, dtype=torch.long)

    def write():
        with torch.inference_mode():
            ids = theirs.generate(
                source, attention_mask=torch.ones_like(source), min_new_tokens=tokens, max_new_tokens=tokens,
                do_sample=False, num_beams=BEAMS, length_penalty=0.0,
            )  # fmt: skip
        return ids[0, 1:].tolist()

    def ours():
        with torch.inference_mode():
            memory = model.encode(source)
        options: dict[str, Any] = dict(beams=BEAMS, max_new_tokens=tokens, stop_token=end, length_penalty=0.0)
        return beam_search(model, start, memory=memory, **options)[0][0].tokens

    return {OURS: ours, THEIRS: write}


def measured(name: str, tokens: int, rounds: int, shape: dict | None = None) -> dict:
    """Seconds a turn by side, and whether both wrote the same tokens."""
    torch.manual_seed(0)
    shape = shape or SHAPE
    sides = translators(tokens, shape) if name == "t5" else decoders(name, tokens, shape)
    texts = {side: write() for side, write in sides.items()}
    found = interleaved(sides, rounds, torch.device("cpu"), warmup=0)
    return {"seconds": found, "equal": texts[OURS] == texts[THEIRS], "written": len(texts[OURS])}


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring. Returns 1 where tokens differ."""
    parser = argparse.ArgumentParser(prog="python -m fastllm.bench.generation", description=first_paragraph(__doc__))
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=64, help="of a turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for every sample")
    options = parser.parse_args(argv)
    for name in ("tokens", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    print(f"CPU: {cpu.summary()}; {options.threads} threads; {options.tokens} tokens a turn")
    results = {"environment": environment(torch.device("cpu")), "shape": SHAPE, "tokens": options.tokens, "models": {}}
    for name in options.model:
        row = measured(name, options.tokens, options.rounds)
        speed = ratios(row["seconds"], OURS, THEIRS)
        results["models"][name] = row | {"speed": asdict(speed)}
        rates = ", ".join(f"{side} {options.tokens / min(times):.0f}" for side, times in row["seconds"].items())
        same = "the same tokens" if row["equal"] else "OTHER TOKENS"
        print(f"{name}: {speed.median:.2f} of {THEIRS}' speed ({speed.low:.2f} to {speed.high:.2f}); best tokens a "
              f"second: {rates}; {same}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    return 0 if all(row["equal"] for row in results["models"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
