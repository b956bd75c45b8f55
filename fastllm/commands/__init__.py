"""One file for each command of the command line.

``fastllm/commands/<name>.py`` has a docstring (what ``fastllm <name> --help`` says), ``add_arguments(parser)`` and
``run(arguments)``, which returns the exit code. Only the command that is called gets imported. A module with an
underscore is no command: several commands share it.
"""

# Of these neither the parser nor a refusal imports torch. Nor does their work, but for plan's, which counts what a
# model's forward pass keeps.
WITHOUT_TORCH = ("prepare", "tokenizer", "plan", "report")

# Name and what ``fastllm --help`` says of it, in the order in which people meet them.
COMMANDS = {
    "prepare": "make clean text out of web pages, dumps, books and JSON lines",
    "tokenizer": "train a tokenizer, show the pieces of a text, encode a corpus",
    "train": "train a model on text, from scratch or from where a run stopped",
    "generate": "continue a text",
    "translate": "translate texts",
    "classify": "say which label texts have",
    "answer": "answer questions by passages of a text",
    "eval": "score a model on held-out data",
    "serve": "try models on a local web page",
    "accelerate": "what fastllm.accelerate would do to a transformers model",
    "plan": "memory, communication and time of a training step on many GPUs, on paper",
    "report": "one page with the curves of one or several runs, their samples and what differs in their settings",
    "export": "write a trained model as transformers loads it, or a checkpoint in parts as one",
    "bench": "time the ops beside their rivals (fastllm bench --help)",
    "info": "versions, hardware, and which backend serves each op here and why",
}
