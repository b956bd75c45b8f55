"""The assertions of transformers' own model tests, written again, as tests/transformers_checks.py runs them.

Each takes a model and its inputs, and returns values that must be the same with and without fastllm.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from architectures import VOCABULARY
from torch.utils import _pytree as pytree

CHECKS: dict[str, Callable] = {}


def check(function: Callable) -> Callable:
    CHECKS[function.__name__] = function
    return function


def tensors(output) -> dict[str, torch.Tensor]:
    """The tensors of an output, caches left out, by their paths."""
    if hasattr(output, "items"):
        output = {k: v for k, v in output.items() if k not in ("past_key_values", "encoder_outputs")}
    leaves, _ = pytree.tree_flatten_with_path(dict(output) if hasattr(output, "items") else output)
    return {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def without_labels(inputs: dict) -> dict:
    return {k: v for k, v in inputs.items() if k != "labels" or "decoder_input_ids" in inputs}


def call(model, inputs, **more):
    return model(**inputs, **more)


def gradients(model, inputs) -> dict:
    model.zero_grad(set_to_none=True)
    loss = call(model, inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@check
def signature(model, inputs):
    return str(inspect.signature(model.forward)), [n for n, _ in model.named_parameters()], list(model.state_dict())


@check
def outputs_in_evaluation(model, inputs):
    with torch.no_grad():
        return tensors(call(model.eval(), inputs))


@check
def outputs_in_training(model, inputs):
    return tensors(call(model, inputs))


@check
def outputs_as_a_tuple(model, inputs):
    with torch.no_grad():
        return [x for x in call(model.eval(), inputs, return_dict=False) if isinstance(x, torch.Tensor)]


@check
def training(model, inputs):
    return gradients(model, inputs)


@check
def gradient_checkpointing(model, inputs):
    model.gradient_checkpointing_enable()
    return gradients(model, inputs)


@check
def gradient_checkpointing_reentrant(model, inputs):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    return gradients(model, inputs)


@check
def hidden_states(model, inputs):
    with torch.no_grad():
        return tensors(call(model.eval(), inputs, output_hidden_states=True))


@check
def attentions(model, inputs):
    with torch.no_grad():
        return tensors(call(model.eval(), inputs, output_attentions=True))


@check
def attentions_of_eager(model, inputs):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return tensors(call(model.eval(), inputs, output_attentions=True))


@check
def sdpa_afterwards(model, inputs):
    model.set_attn_implementation("sdpa")
    return gradients(model, inputs)


@check
def gradients_of_retained_hidden_states(model, inputs):
    output = call(model, inputs, output_hidden_states=True)
    states = next(v for k, v in output.items() if k.endswith("hidden_states") and v is not None)
    for state in states:
        state.retain_grad()
    (output.loss if output.get("loss") is not None else next(iter(tensors(output).values())).sum()).backward()
    return [state.grad for state in states]


@check
def save_and_load(model, inputs):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = sorted(path.name for path in Path(folder).iterdir())
        config = (Path(folder) / "config.json").read_text(encoding="utf-8")
        loaded = type(model).from_pretrained(folder).train(model.training)
        with torch.no_grad():
            return files, config, type(loaded).__name__, tensors(call(loaded.eval(), inputs))


@check
def load_into(model, inputs):
    state = {k: v + 0.01 if v.is_floating_point() else v for k, v in copy.deepcopy(model.state_dict()).items()}
    result = model.load_state_dict(state)
    return str(result), gradients(model, inputs)


@check
def pickled(model, inputs):
    return gradients(pickle.loads(pickle.dumps(model)), inputs)


@check
def copied(model, inputs):
    return gradients(copy.deepcopy(model), inputs)


@check
def tied_weights(model, inputs):
    model.tie_weights()
    pointers = [p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False)]
    return [pointers.index(p) for p in pointers], gradients(model, inputs)


@check
def resized_embeddings(model, inputs):
    torch.manual_seed(0)
    model.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    wider = model.get_input_embeddings().weight.shape, gradients(model, inputs)
    model.resize_token_embeddings(VOCABULARY)
    return wider, gradients(model, inputs)


@check
def another_embedding(model, inputs):
    torch.manual_seed(0)
    old = model.get_input_embeddings()
    model.set_input_embeddings(torch.nn.Embedding(*old.weight.shape))
    with torch.no_grad():
        return tensors(call(model.eval(), inputs))


@check
def embedded_inputs(model, inputs):
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    return gradients(model, {k: v for k, v in inputs.items() if k != "input_ids"} | {"inputs_embeds": embedded})


@check
def left_padding(model, inputs):
    mask = inputs["attention_mask"].flip(-1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    given = dict(input_ids=inputs["input_ids"].flip(-1), attention_mask=mask)
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = places
    with torch.no_grad():
        return model.eval()(**given).logits[:, -1]


@check
def without_a_mask(model, inputs):
    return gradients(model, {k: v for k, v in inputs.items() if k != "attention_mask"})


@check
def one_row_at_a_time(model, inputs):
    rows = [{k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()} for i in range(2)]
    with torch.no_grad():
        return [tensors(call(model.eval(), row)) for row in rows]


@check
def last_logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**without_labels(inputs), logits_to_keep=1).logits


@check
def items_in_a_batch(model, inputs):
    loss = call(model, inputs, num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@check
def a_loss_outside(model, inputs):
    logits = model(**without_labels(inputs)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), logits.argmax(-1).flatten())
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@check
def steps(model, inputs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = call(model, inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@check
def in_double(model, inputs):
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # torch's grouped product has no fp64
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return gradients(model.double(), wide)


@check
def under_autocast(model, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        loss = call(model, inputs).loss
    loss.backward()
    return {k: v.bfloat16() for k, v in tensors({"loss": loss.detach()}).items()}


@check
def in_inference_mode(model, inputs):
    with torch.inference_mode():
        return {k: v.clone() for k, v in tensors(call(model.eval(), inputs)).items()}


@check
def hooks(model, inputs):
    seen = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, a, out, name=name: seen.append(name))
    with torch.no_grad():
        call(model.eval(), inputs)
    return seen


@check
def frozen_but_the_head(model, inputs):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(True)
    return gradients(model, inputs)


@check
def per_layer_names(model, inputs):
    return [name for name, _ in model.named_modules()], [type(m).__name__ for m in model.modules()]


def _generated(model, inputs, **options):
    torch.manual_seed(0)
    given = {k: v for k, v in inputs.items() if k not in ("labels", "return_loss")}
    out = model.eval().generate(
        **given, max_new_tokens=5, min_new_tokens=5, return_dict_in_generate=True, output_scores=True, **options
    )  # fmt: skip
    return out.sequences, [s.clamp(min=-1e4) for s in out.scores]


@check
def generate_greedy(model, inputs):
    return _generated(model, inputs, do_sample=False)


@check
def generate_without_a_cache(model, inputs):
    return _generated(model, inputs, do_sample=False, use_cache=False)


@check
def generate_by_sampling(model, inputs):
    return _generated(model, inputs, do_sample=True)


@check
def generate_by_beams(model, inputs):
    return _generated(model, inputs, do_sample=False, num_beams=3)


@check
def generate_with_a_static_cache(model, inputs):
    return _generated(model, inputs, do_sample=False, cache_implementation="static", disable_compile=True)


@check
def generate_assisted(model, inputs):
    one = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return _generated(model, one, do_sample=False, assistant_model=copy.deepcopy(model))[0]


@check
def generate_by_prompt_lookup(model, inputs):
    one = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return _generated(model, one, do_sample=False, prompt_lookup_num_tokens=2)[0]


@check
def generate_with_attentions(model, inputs):
    model.set_attn_implementation("eager")
    out = model.eval().generate(
        inputs["input_ids"], max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_attentions=True,
        output_hidden_states=True,
    )  # fmt: skip
    return tensors(dict(out))


@check
def continued_from_a_cache(model, inputs):
    ids = inputs["input_ids"][:1]
    with torch.no_grad():
        first = model.eval()(ids[:, :-2], use_cache=True)
        return model(ids[:, -2:], past_key_values=first.past_key_values, use_cache=True).logits
