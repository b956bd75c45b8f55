"""Train by direct preference optimisation with TRL's trainer, its log-probabilities from this library.

    pip install trl
    python examples/dpo_trl.py --model gpt2 --pairs preferences.jsonl

Without ``--model`` a tiny Llama with random weights is trained on bytes, so that it runs anywhere. The pairs are then
synthetic: an answer in lower case is preferred to the same in upper case.
"""

import argparse
import copy
import json
import tempfile

import datasets
import tokenizers
import torch
import transformers
import trl

from fastllm.drop_in import serve_trl


def tiny():
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, pad_token_id=256, eos_token_id=257,
    )  # fmt: skip
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    return transformers.LlamaForCausalLM(config), tokenizer


def main(argv=None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a name or a folder")
    parser.add_argument("--pairs", help="JSON lines of prompt, chosen and rejected")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    if options.model is None:
        model, tokenizer = tiny()
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    if options.pairs is None:
        words = ["red", "blue", "cat", "dog", "tree", "house"]
        texts = [f" {a} {b}" for a in words for b in words if a != b]
        pairs = [{"prompt": "words:", "chosen": text, "rejected": text.upper()} for text in texts]
    else:
        with open(options.pairs, encoding="utf-8") as file:
            pairs = [json.loads(line) for line in file if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            folder, max_steps=options.steps, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(), bf16=False, disable_tqdm=True,
            gradient_checkpointing=False,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            model, ref_model=copy.deepcopy(model), args=arguments, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(pairs),
        )  # fmt: skip
        with serve_trl(trainer):  # the one line
            trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} in the end")
    return losses


if __name__ == "__main__":
    main()
