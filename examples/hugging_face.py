"""Accelerate a model of Hugging Face and train it with the Trainer, which stays as it is.

    pip install transformers accelerate
    python examples/hugging_face.py --model gpt2 --text book.txt

Without ``--model`` a tiny Llama with random weights is trained on bytes, so that it runs anywhere.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import transformers

import fastllm

WINDOW = 64


def model_and_tokens(name: str | None, text: str):
    if name is None:
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
        return transformers.LlamaForCausalLM(config), list(text.encode())
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    return transformers.AutoModelForCausalLM.from_pretrained(name), tokenizer(text)["input_ids"]


def main(argv=None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a name or a folder")
    parser.add_argument("--text", type=Path, default=Path(__file__))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    model, tokens = model_and_tokens(options.model, options.text.read_text("utf-8"))
    print(fastllm.accelerate(model))  # the one line
    rows = [tokens[at : at + WINDOW] for at in range(0, len(tokens) - WINDOW, WINDOW)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=options.steps, per_device_train_batch_size=4, learning_rate=3e-3, save_strategy="no",
            report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        result = transformers.Trainer(
            model, arguments, train_dataset=data, data_collator=transformers.default_data_collator
        ).train()
    print(f"mean loss over {options.steps} steps: {result.training_loss:.3f}")
    return result.training_loss


if __name__ == "__main__":
    main()
