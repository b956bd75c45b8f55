"""Instructions, preferences and a teacher: what is read, what is learnt, what is refused; and their runs."""

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from cells import SHAPE, config_for, dataset, examples, setting
from command_line import run

from fastllm import losses
from fastllm.config import InputError
from fastllm.data import Tokenizer
from fastllm.data.batches import IGNORE
from fastllm.models import build_model, load_model
from fastllm.tasks.features import answer_features, answer_ids, pair_parts, preference_features
from fastllm.tasks.preferences import pair_log_probs, preference_scores, right_pairs, score_pairs
from fastllm.tasks.prompts import SIDES, prompt_form, read_instructions, read_preferences, rendered
from fastllm.tasks.store import open_examples, prepare_examples
from fastllm.training.objectives import make_objective
from fastllm.training.objectives.prompts import DPO
from fastllm.training.prompts import fitting
from fastllm.training.reports.progress import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Done"},
]


@cache
def tokenizer(template=None) -> Tokenizer:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    trained = Tokenizer.train(["some plain words to begin with"], 300, special_tokens=special)
    return Tokenizer(trained.definition, template)


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def learnt(example, tokenizer):
    """The text of the tokens that a model learns, and of all of them."""
    ids, counts = answer_ids(example, tokenizer)
    name = lambda some: "".join(tokenizer.token(i) for i in some).replace("Ġ", " ").replace("Ċ", "\n")  # noqa: E731
    return name([i for i, c in zip(ids, counts, strict=True) if c]), name(ids)


# What is read


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ({"prompt": "a =", "answer": " b"}, [["a =", False], [" b", True]]),
        ({"prompt": "a", "completion": "b", "id": 3}, [["a", False], ["b", True]]),
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, [["Add.\n\n1 1\n\n", False], ["2", True]]),
        ({"instruction": "Add.", "input": "", "output": "2"}, [["Add.", False], ["2", True]]),
        (
            {"messages": TALK},
            [["### System\nBe brief.\n\n### User\nHi\n\n### Assistant\n", False], ["Ho", True],
             ["### User\nAnd?\n\n### Assistant\n", False], ["Done", True]],
        ),
    ],
)  # fmt: skip
def test_instructions_are_read(line, parts, tmp_path):
    path = write(tmp_path / "x.jsonl", "", line)
    (example,) = read_instructions([path])
    assert rendered(example, tokenizer()) == {"parts": parts, "templated": False}
    assert prompt_form(path) == "instruct"


def test_answers_and_their_ends_alone_are_learnt():
    parts = [["### User\nHi\n\n### Assistant\n", False], ["Ho", True], ["### User\n", False], ["Done", True]]
    text, whole = learnt({"parts": parts, "templated": False}, tokenizer())
    assert text == "Ho<|endoftext|>Done<|endoftext|>"
    assert whole.startswith("<|endoftext|>### User")
    features = answer_features([{"parts": parts, "templated": False}], tokenizer(), 100)
    batch = features.batch([0])
    ids, counts = answer_ids({"parts": parts, "templated": False}, tokenizer())
    assert batch["tokens"][0].tolist() == ids[:-1]
    assert batch["targets"][0].tolist() == [i if c else IGNORE for i, c in zip(ids[1:], counts[1:], strict=True)]
    assert not len(answer_features([{"parts": parts, "templated": False}], tokenizer(), len(ids) - 2))


def test_a_chat_template_writes_its_tokens_and_its_answers_are_learnt():
    example = rendered({"messages": TALK}, tokenizer(CHATML))
    text, whole = learnt(example, tokenizer(CHATML))
    assert text == "Ho<|im_end|>\nDone<|im_end|>\n"
    assert whole == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)
    assert tokenizer().encode_template("<|im_end|>") != tokenizer().encode("<|im_end|>")
    pair = rendered({"prompt": TALK[:2], "chosen": "Ho", "rejected": "Humbug"}, tokenizer(CHATML))
    assert learnt(pair_parts(pair, "rejected"), tokenizer(CHATML))[0] == "Humbug<|im_end|>\n"


def test_a_template_that_rewrites_what_came_before_is_refused():
    with pytest.raises(InputError, match="the text before an answer changes"):
        rendered({"messages": TALK}, tokenizer("{{ messages | length }}"))
    with pytest.raises(InputError, match="chat template: no tools"):
        rendered({"messages": TALK}, tokenizer("{{ raise_exception('no tools') }}"))
    with pytest.raises(InputError, match="chat template: Expected an expression"):
        rendered({"messages": TALK}, tokenizer("{% if %}"))
    injected = [{"role": "user", "content": "x<|im_end|>"}, TALK[2]]
    with pytest.raises(InputError, match=r"a user's message holds the special token '<\|im_end\|>'"):
        rendered({"messages": injected}, tokenizer(CHATML))


def test_a_tokenizers_chat_template_travels_with_it(tmp_path):
    tokenizer(CHATML).save_pretrained(tmp_path / "a")
    assert Tokenizer.load(tmp_path / "a/tokenizer.json").chat_template == CHATML
    assert Tokenizer.load(tmp_path / "a/tokenizer.json").with_special_tokens(["[NEW]"]).chat_template == CHATML
    (tmp_path / "a/chat_template.jinja").write_text("other")
    assert Tokenizer.load(tmp_path / "a/tokenizer.json").chat_template == "other"
    (tmp_path / "a/chat_template.jinja").unlink()
    (tmp_path / "a/tokenizer_config.json").write_text("[")
    with pytest.raises(InputError, match="not a tokenizer's configuration"):
        Tokenizer.load(tmp_path / "a/tokenizer.json")


USER, ANSWERS = TALK[1], ({"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B"})


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ({"prompt": "Hi", "chosen": "A", "rejected": "B"}, "Hi"),
        ({"prompt": [USER], "chosen": "A", "rejected": "B"}, [USER]),
        ({"prompt": [USER], "chosen": [ANSWERS[0]], "rejected": [ANSWERS[1]]}, [USER]),
        ({"chosen": [USER, ANSWERS[0]], "rejected": [USER, ANSWERS[1]]}, [USER]),
        ({"prompt": [USER], "chosen": [USER, ANSWERS[0]], "rejected": [USER, ANSWERS[1]]}, [USER]),
        ({"prompt": "Hi", "chosen": [USER, ANSWERS[0]], "rejected": [USER, ANSWERS[1]]}, [USER]),
        ({"prompt": "Hi", "chosen": [ANSWERS[0]], "rejected": [ANSWERS[1]]}, [USER]),
    ],
)
def test_preferences_are_read(line, prompt, tmp_path):
    path = write(tmp_path / "x.jsonl", line)
    assert read_preferences([path]) == [{"prompt": prompt, "chosen": "A", "rejected": "B"}]
    assert prompt_form(path) == "dpo"


@pytest.mark.parametrize(
    ("reader", "line", "message"),
    [
        (read_instructions, "{", "line 1: not JSON"),
        (read_instructions, "[1]", "line 1: expected a JSON object"),
        (read_instructions, {"prompt": "a"}, "line 1: no answer: expected an answer"),
        (read_instructions, {"answer": "a"}, "line 1: no prompt: expected a prompt"),
        (read_instructions, {"prompt": "a", "answer": " \n"}, "line 1: answer: is empty"),
        (read_instructions, {"prompt": "a", "answer": None}, "line 1: answer: expected a text, got null"),
        (read_instructions, {"messages": TALK[:2]}, "no answer to learn: none is an assistant's"),
        (read_instructions, {"messages": [{"role": "bot", "content": "x"}]}, "message 1: expected a role among"),
        (read_instructions, '{"prompt": "\\ud800", "answer": "x"}', "half a surrogate pair"),
        (read_preferences, {"prompt": "a", "chosen": "b"}, "line 1: a pair without rejected"),
        (read_preferences, {"chosen": "a", "rejected": "b"}, "line 1: a pair without prompt"),
        (read_preferences, {"prompt": "a", "chosen": "b", "rejected": ""}, "line 1: rejected: is empty"),
        (read_preferences, {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        (read_preferences, {"chosen": [USER, ANSWERS[0]], "rejected": [TALK[3], ANSWERS[1]]}, "the last one differ"),
        (read_preferences, {"chosen": [USER], "rejected": [USER]}, "expected an assistant's message at the end"),
        (read_preferences, "", "an empty file"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused_by_its_line(reader, line, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        reader([write(tmp_path / "x.jsonl", line)])
    assert "\n" not in str(caught.value)


def test_examples_that_do_not_fit_are_left_out_and_empty_answers_refused():
    some = [{"parts": [["a " * n, False], ["b", True]], "templated": False} for n in (3, 40)]
    assert fitting(some, tokenizer(), 20) == some[:1]
    with pytest.raises(InputError, match="no example fits into 4 tokens; the shortest has"):
        fitting(some, tokenizer(), 4)
    with pytest.raises(InputError, match="example 1: all its tokens are ignored"):
        fitting([{"parts": [["a", False], ["", True]], "templated": True}], tokenizer(), 20)


# What is learnt


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return tmp_path_factory.mktemp("toys")


def test_pairs_are_scored_as_their_answers_alone_would_be(toys):
    objective, model = setting("dpo", "none", "transformer", toys)
    tokenizer, batch = objective.dataset.tokenizer, objective.batch(0)
    found = pair_log_probs(model.eval(), batch)
    for side, sums in zip(("chosen", "rejected"), found, strict=True):
        for row in range(len(sums)):
            length = int(batch[f"{side}_lengths"][row])
            log_p = model(batch[side][row : row + 1, :length])[0].log_softmax(-1)
            targets = batch[f"{side}_targets"][row, :length]
            kept = (targets != IGNORE).nonzero()[:, 0]
            assert targets[kept[-1]] == tokenizer.end_of_text
            torch.testing.assert_close(sums[row], log_p[kept, targets[kept]].sum(), rtol=1e-5, atol=1e-4)


def test_a_model_that_fails_while_it_scores_is_in_training_mode_again(toys, monkeypatch):
    objective, model = setting("dpo", "none", "transformer", toys)
    monkeypatch.setattr(model, "hidden", lambda tokens: 1 / 0)
    model.train()
    with pytest.raises(ZeroDivisionError):
        score_pairs(model, objective.train, 7)
    assert model.training


def test_a_models_own_reference_makes_every_margin_zero_and_log_2_the_loss(toys):
    objective, model = setting("dpo", "none", "transformer", toys)
    features = objective.train
    scores = score_pairs(model, features, 7)
    assert score_pairs(model, features, 3)["chosen"] == pytest.approx(scores["chosen"], abs=1e-4)
    numbers = np.arange(4)
    batch = features.batch(numbers)
    batch |= {f"reference_{name}": values[:4] for name, values in scores.items()}
    assert objective.losses(model, batch)["loss"].item() == pytest.approx(math.log(2), abs=1e-5)
    found = preference_scores(scores, scores, 0.1)
    assert (found["reward_accuracy"], found["margin"]) == (0.0, 0.0)
    likelier = [chosen > rejected for chosen, rejected in zip(*(scores[name].tolist() for name in SIDES), strict=True)]
    assert right_pairs(scores) == sum(likelier)
    assert found["preference_accuracy"] == sum(likelier) / len(features)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_student_minimises_the_texts_loss_and_the_teachers_divergence(share, toys):
    data, config = dataset("distill", toys), config_for("distill", toys)
    config = type(config)("distill", teacher=config.teacher, teacher_share=share, temperature=2.0, direction="reverse")
    objective = make_objective(config, data, 32, 2, 0)
    torch.manual_seed(0)
    shape = SHAPE.replace(vocab_size=data.tokenizer.vocab_size, logit_scale=0.5)
    model, teacher, batch = build_model(shape), load_model(toys / "teacher"), objective.batch(0)
    terms = objective.losses(model, batch)
    q, p = (m(batch["tokens"]).double() for m in (model, teacher))
    text = torch.nn.functional.cross_entropy(q.flatten(0, 1), batch["targets"].flatten())
    q, p = ((logits / 2).log_softmax(-1) for logits in (q, p))
    divergence = 4 * (q.exp() * (q - p)).sum(-1).mean()
    expected = {"teacher": share * divergence} | ({"text": (1 - share) * text} if share < 1 else {})
    assert set(terms) == set(expected) == set(objective.counts(batch))
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4)
    sum(terms.values()).backward()
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    scores = objective.evaluate(teacher, 4, "float32", 2).scores
    assert scores["kl_to_teacher"] == pytest.approx(0.0, abs=1e-5)


QUICK = [
    "--steps", "2", "--batch-size", "4", "--dtype", "float32", "--device", "cpu", "--quiet",
    "--eval-interval", "0",
]  # fmt: skip
SMALL = ["--context-length", "48", "--num-layers", "1", "--hidden-size", "16", "--num-heads", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, a run on instructions and one on preferences."""
    folder = tmp_path_factory.mktemp("prompts")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("fastllm.training.run.matmul_flops", lambda *args: 1e11)
        patch.setattr("fastllm.tasks.show.ANSWER_TOKENS", 3)
        for name in ("instruct", "dpo"):
            write(folder / f"{name}.jsonl", *examples(name))
        for number in range(4):
            (folder / f"{number}.txt").write_text("\n\n".join(e["prompt"] for e in examples("dpo")) + str(number))
        train = ["train", *QUICK]
        shape = [*SMALL, "--vocab-size", "300", "--dropout", "0.5"]
        assert run(*train, *shape, "--objective", "instruct", "--data", "instruct.jsonl", "--out", "told") == 0
        dpo = ["--objective", "dpo", "--data", "dpo.jsonl", "--pretrained", "told"]
        assert run(*train, *dpo, "--checkpoint-interval", "1", "--out", "preferring") == 0
        yield folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("fastllm.training.run.matmul_flops", lambda *args: 1e11)
    return place


def test_the_reference_is_the_pretrained_model_and_is_kept_with_the_pairs(here):
    model = load_model("told/model")
    assert load_model("preferring/model").config == model.config.replace(dropout=0.0)
    tokenizer = Tokenizer.load("told/model/tokenizer.json")
    stored = [json.loads(line) for line in (here / "preferring/data/train.jsonl").read_text().splitlines()]
    scores = score_pairs(model, preference_features(stored, tokenizer, 48), 4)
    for name, values in scores.items():
        assert [e["reference"][name] for e in stored] == pytest.approx(values.tolist(), abs=1e-4)
    assert "expected:" in (here / "preferring/samples.txt").read_text()
    first = read_metrics(here / "preferring/metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_resumed_run_needs_its_reference_no_more(here, tmp_path):
    import shutil

    shutil.copytree("preferring", tmp_path / "again")
    (tmp_path / "again/config.toml").write_text(
        (tmp_path / "again/config.toml").read_text().replace('pretrained = "told"', 'pretrained = "gone"')
    )
    assert run("train", "--resume", tmp_path / "again", "--steps", "3", "--quiet") == 0
    assert read_metrics(tmp_path / "again/metrics.jsonl")[-1]["step"] == 3


def test_the_references_last_bits_do_not_choose_the_batches(here, tmp_path):
    stored = open_examples("preferring/data")

    def nudged(part):
        return [{**e, "reference": {k: v + 1e-5 for k, v in e["reference"].items()}} for e in part.examples]

    other = prepare_examples(
        tmp_path, "dpo", "pairs", nudged(stored.train), nudged(stored.validation), stored.tokenizer
    )
    assert stored.train.sha256 != other.train.sha256
    one, two = (DPO(dataset, 48, 2, 0, beta=0.1, kind="sigmoid") for dataset in (stored, other))
    for step in range(32):
        assert torch.equal(one.batch(step)["chosen"], two.batch(step)["chosen"])


def test_a_pretrained_student_has_its_own_context_beside_a_teacher(here, tmp_path):
    models = ["--teacher", "told", "--pretrained", "told"]
    assert run("train", *QUICK, "--objective", "distill", *models, "--data", "0.txt", "--out", tmp_path / "taught") == 0
    assert load_model(tmp_path / "taught/model").config == load_model("told/model").config


def test_eval_gives_accuracy_margins_and_divergence(here, capsys):
    assert run("eval", "--run", "preferring", "dpo.jsonl", "--out", "scores") == 0
    scores = json.loads((here / "scores/scores.json").read_text())
    tokenizer = Tokenizer.load("told/model/tokenizer.json")
    pairs = [rendered(example, tokenizer) for example in examples("dpo")]
    features = preference_features(pairs, tokenizer, 48)
    own, reference = (score_pairs(load_model(f"{name}/model"), features, 8) for name in ("preferring", "told"))
    _, logged = losses.dpo(*own.values(), *reference.values(), beta=0.1, return_metrics=True)
    assert scores["margin"] == pytest.approx(logged["margin"].item(), abs=1e-4)
    assert scores["reward_accuracy"] == logged["accuracy"].item()
    assert scores["preference_accuracy"] == pytest.approx((own["chosen"] > own["rejected"]).float().mean().item())
    assert run("eval", "--run", "told", "instruct.jsonl") == 0
    assert "perplexity:" in capsys.readouterr().out
    assert run("eval", "--run", "told", "--teacher", "told", "0.txt") == 0
    assert "kl to teacher: 0.0000" in capsys.readouterr().out.replace("-0.0000", "0.0000")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--objective", "dpo", "--data", "dpo.jsonl"], "pretrained: objective dpo needs a model"),
        (["train", "--objective", "distill"], "teacher: objective distill needs one"),
        (["train", "--objective", "distill", "--teacher", "told"], "context_length: the teacher told/model reads 48"),
        (
            ["train", *SMALL, "--objective", "distill", "--teacher", "told", "--vocab-size", "299"],
            "tokens do not match vocab_size 299",
        ),
        (
            ["train", *SMALL, "--objective", "distill", "--teacher", "told", "--tokenizer", "other.json"],
            "is not the one that told/model was trained with, which teacher names",
        ),
        (["train", "--objective", "distill", "--teacher", "told", "--temperature", "0"], "temperature: expected more"),
        (["train", "--objective", "distill", "--teacher", "told", "--jsd-beta", "1"], "jsd_beta: expected less than 1"),
        (["train", "--objective", "dpo", "--pretrained", "told", "--beta", "-1"], "beta: expected more than 0"),
        (["train", "--objective", "instruct", "--beta", "0.2"], "beta: is for objective dpo, not for instruct"),
        (["train", "--objective", "instruct", "--data", "empty.jsonl"], "line 1: answer: is empty"),
        (["eval", "--run", "told", "dpo.jsonl", "--beta", "0"], "beta: expected a number above 0"),
        (["eval", "--run", "told", "dpo.jsonl", "--teacher", "told"], "teacher: is for text"),
        (["eval", "--run", "told", "dpo.jsonl", "instruct.jsonl"], "files of one form"),
    ],
)
def test_what_cannot_be_trained_or_scored_is_refused_before_any_work(arguments, message, here, capsys):
    write(here / "empty.jsonl", {"prompt": "a", "answer": ""})
    tokenizer().save(here / "other.json")
    out = [] if arguments[0] == "eval" else ["--out", "refused"]
    assert run(*arguments, *out) == 2
    assert message in capsys.readouterr().err
    assert not (here / "refused").exists()
