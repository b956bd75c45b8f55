"""Learns ``fastllm/data/clean/block_model.npz`` from pages whose main text a person marked, and cross-validates it.

``python -m fastllm.bench.main_text_training PAGES --out fastllm/data/clean/block_model.npz`` learns from all pages and
reports what models of four fifths of the sites say about the pages of the rest. PAGES is a folder or an archive as
:mod:`.marked_pages` reads it. Needs catboost, rapidfuzz, scikit-learn and scipy, which cleaning does not.

1. A block's label is the share of its words that the marked text has: in runs of four words, or for shorter blocks in
   the longest common subsequence of the page's words and the text's. What the text has once is right in one block. Its
   weight is its share in the page's F1.
2. A lexicon: logistic regressions over the names of the elements around blocks, over blocks' words and those of
   the headings above them; and a ridge regression of pages' types.
3. Trees over :func:`features`, whose lexicon was learned from other sites than the page's.
4. Trees over :func:`context` of what step 3's trees, learned from other sites, say of the page.
5. A network over the rows of step 3, in the order of a page's blocks.
6. The model is the mean of the folds' trees, with a lexicon and a network of all pages.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..data.clean.block_context import context
from ..data.clean.block_model import BlockModel, Trees, mean_of, with_rules
from ..data.clean.block_network import Network
from ..data.clean.body import last_headings
from ..data.clean.elements import Markup
from ..data.clean.features import character_classes, features, page_counts
from ..data.clean.lexicon import Lexicon, element_names, name_tokens, text_tokens
from ..data.clean.main_text import decide, word_list
from ..data.clean.markup import read_markup
from ..data.clean.page_types import PageTypes, page_tokens
from ..data.clean.page_words import PageWords
from ..data.clean.rendering import render
from ..parser import first_paragraph
from .block_network_training import Examples, learn_network
from .cleaning import Score, report
from .marked_pages import MarkedPage, read_marked, words

# The number of sites that must have a word for it to be learned; 1 / (2 C) of an L2 penalty on a mean loss.
LEAST_SITES, INVERSE_PENALTY = 4, 0.006
# The number of pages that must have a token for it to be learned. Of the penalties 0.1, 0.3 and 1 the first names the
# most pages right: 75%, by cross-validation.
LEAST_PAGES, TYPE_PENALTY = 6, 0.1
# Words in a run that tells where a text comes from.
RUN = 4
# Trees see every block of at least this weight, and of the lighter ones a share that counts for all of them: 40% of the
# rows. The 30% of the blocks that are heaviest have 78% of the weight.
ALWAYS = 0.0067
FIRST = {"iterations": 150, "depth": 6, "learning_rate": 0.12}
# Trees of so many seeds are averaged.
SEEDS = 3
SECOND = {"iterations": 75, "depth": 5, "learning_rate": 0.096}


@dataclass
class Labelled:
    """A page's blocks with what is to be learned of them."""

    page: MarkedPage
    markup: Markup
    labels: np.ndarray
    words: PageWords
    weights: np.ndarray
    names: list[set[str]]
    texts: list[set[str]]
    headings: list[set[str]]
    tokens: set[str]
    counts: np.ndarray


def block_labels(blocks: list[list[str]], truth: list[str]) -> np.ndarray:
    """The share of each block's words that ``truth`` has; a block is given as its words.

    What ``truth`` has once counts once: of a text that the page repeats the block that is in order with the rest of
    ``truth`` is right, or else the first one.
    """
    LCSseq = import_module("rapidfuzz.distance").LCSseq

    flat = [word for block in blocks for word in block]
    aligned = np.zeros(len(flat))
    numbers: dict[str, int] = {}
    ours, theirs = ([numbers.setdefault(word, len(numbers)) for word in part] for part in (flat, truth))
    if ours and theirs:
        for step in LCSseq.opcodes(ours, theirs):
            if step.tag == "equal":
                aligned[step.src_start : step.src_end] = 1
    sizes = np.asarray([len(block) for block in blocks])
    owner = np.repeat(np.arange(len(blocks)), sizes)
    in_order = np.bincount(owner, aligned, len(blocks)) / np.maximum(sizes, 1)
    return np.where(sizes <= RUN, in_order, covered_shares(blocks, truth, in_order))


def covered_shares(blocks: list[list[str]], truth: list[str], in_order: np.ndarray) -> np.ndarray:
    """The share of each block's words that lie in runs of words of ``truth``; each run counts once.

    Blocks of which more than half is ``in_order`` with ``truth`` come first.
    """
    left = Counter(tuple(truth[i : i + RUN]) for i in range(len(truth) - RUN + 1))
    covered = np.zeros(len(blocks))
    for number in sorted(range(len(blocks)), key=lambda number: (in_order[number] <= 0.5, number)):
        block = blocks[number]
        have = np.zeros(len(block), bool)
        for i in range(len(block) - RUN + 1):
            run = tuple(block[i : i + RUN])
            if left[run] > 0:
                left[run] -= 1
                have[i : i + RUN] = True
        covered[number] = have.mean() if len(block) else 0.0
    return covered


def label(page: MarkedPage) -> Labelled:
    markup = read_markup(page.html)
    blocks = [word_list(text) for text in markup.texts]
    labels = block_labels(blocks, word_list(page.text))
    found = PageWords.of(markup.texts)
    sizes = found.counts
    total = page.words.total()
    # What a block adds to or takes from F1 is about its size over the text's; a page of menus has many such blocks.
    weights = (sizes + 0.5) / (total + 0.5 * sizes[labels < 0.3].sum() + 50)
    around: list[set[str]] = []
    for tag, attributes, parent in zip(markup.tags, markup.attributes, markup.parents, strict=True):
        around.append({*name_tokens(tag, attributes), *(around[parent] if parent >= 0 else ())})
    names = [around[place] for place in markup.places]
    texts = [set(text_tokens(text)) for text in markup.texts]
    headings = [texts[block] if block >= 0 else set() for block in last_headings(markup)[0]]
    tokens = page_tokens(element_names(markup)[0], found)
    counts = page_counts(page.html, markup, character_classes(markup.texts)[0]) if markup.texts else np.zeros(0)
    return Labelled(page, markup, labels, found, weights, names, texts, headings, tokens, counts)


def learn_lexicon(pages: Sequence[Labelled]) -> Lexicon:
    pairs = [(page.tokens, page.counts) for page in pages]
    types = PageTypes.learn(pairs, [page.page.type for page in pages], LEAST_PAGES, TYPE_PENALTY)
    names, texts, headings = (_learn_words(pages, kind) for kind in ("names", "texts", "headings"))
    return Lexicon(names, texts, headings, types)


def _learn_words(pages: Sequence[Labelled], kind: str) -> dict[str, float]:
    sparse = import_module("scipy.sparse")
    linear_model = import_module("sklearn.linear_model")

    sites = defaultdict(set)
    for page in pages:
        for word in set().union(*getattr(page, kind)):
            sites[word].add(page.page.site)
    known = sorted(word for word, found in sites.items() if len(found) >= LEAST_SITES)
    columns = {word: number for number, word in enumerate(known)}
    rows = [sorted(columns[w] for w in block if w in columns) for page in pages for block in getattr(page, kind)]
    ends = np.cumsum([0, *map(len, rows)])
    matrix = sparse.csr_matrix((np.ones(ends[-1]), np.concatenate(rows), ends), (len(rows), len(known)))
    labels, weights = (np.concatenate([getattr(page, name) for page in pages]) for name in ("labels", "weights"))
    weights *= len(weights) / weights.sum()
    # A label between 0 and 1 is both, in shares.
    both, target = sparse.vstack([matrix, matrix]), np.repeat([1, 0], len(rows))
    shares = np.concatenate([weights * labels, weights * (1 - labels)])
    used = shares > 0
    fit = linear_model.LogisticRegression(C=INVERSE_PENALTY, max_iter=200).fit(both[used], target[used], shares[used])
    return {word: float(weight) for word, weight in zip(known, fit.coef_[0], strict=True) if abs(weight) > 0.02}


def learn_trees(rows: np.ndarray, labels: np.ndarray, weights: np.ndarray, settings: dict[str, Any]) -> Trees:
    """The mean of the trees of :data:`SEEDS` seeds, each of which sees its own sample of the light blocks."""
    return Trees.mean([_trees_of_seed(rows, labels, weights, settings, seed) for seed in range(1, SEEDS + 1)])


def _trees_of_seed(
    rows: np.ndarray, labels: np.ndarray, weights: np.ndarray, settings: dict[str, Any], seed: int
) -> Trees:
    catboost = import_module("catboost")

    chance = np.minimum(1, weights / ALWAYS)
    seen = np.random.default_rng(seed).random(len(weights)) < chance
    rows, labels, weights = rows[seen], labels[seen], (weights / chance)[seen]
    model = catboost.CatBoostClassifier(
        **settings, l2_leaf_reg=5, loss_function="CrossEntropy", verbose=0, thread_count=2, random_seed=seed,
        border_count=32, rsm=0.3, bootstrap_type="Bernoulli", subsample=0.6, allow_writing_files=False,
    )  # fmt: skip
    model.fit(catboost.Pool(rows, np.clip(labels, 0, 1), weight=weights))
    return _as_trees(model, settings["depth"])


def _as_trees(model: Any, depth: int) -> Trees:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        model.save_model(str(path), format="json")
        found = json.loads(path.read_text())
    trees = found["oblivious_trees"]
    columns = np.zeros((len(trees), depth), np.int64)
    # A level that is not there is never above its border.
    borders = np.full((len(trees), depth), np.inf, np.float32)
    leaves = np.zeros((len(trees), 1 << depth), np.float32)
    for number, tree in enumerate(trees):
        for level, split in enumerate(tree["splits"] or ()):
            columns[number, level], borders[number, level] = split["float_feature_index"], split["border"]
        leaves[number, : len(tree["leaf_values"])] = tree["leaf_values"]
    scale, bias = found["scale_and_bias"]
    return Trees(columns, borders, leaves * scale, float(np.ravel(bias)[0]))


def folds(pages: Sequence[Labelled], count: int, seed: int) -> np.ndarray:
    """The fold of each page, by its site alone."""
    return np.asarray([zlib.crc32(f"{page.page.site}{seed}".encode()) % count for page in pages])


def _out_of_fold(
    pages: Sequence[Labelled], fold: np.ndarray, learn: Callable, apply: Callable
) -> tuple[list[np.ndarray], list[Any]]:
    """What ``apply`` makes of each page with what ``learn`` made of the other folds' pages; and what it made of all."""
    result: list[np.ndarray | None] = [None] * len(pages)
    models = []
    for number in np.unique(fold):
        inside, outside = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        models.append(learn(outside))
        for at in inside:
            result[at] = apply(models[-1], at)
    return [values for values in result if values is not None], models


def learn_model(pages: Sequence[Labelled], count: int) -> tuple[BlockModel, list[np.ndarray]]:
    """A model of all ``pages``, and what models of the other folds' sites say of each page's blocks.

    The trees of a fold are learned from the other folds alone. The lexicon of the rows that they are learned from, and
    the first estimates that the second trees are learned from, come from the same folds, as in stacking. The model of
    all pages is the mean of the folds' trees, with a lexicon of all pages.
    """
    fold = folds(pages, count, 7)
    rows, _ = _out_of_fold(
        pages, fold, lambda others: learn_lexicon([pages[i] for i in others]),
        lambda lexicon, i: features(pages[i].page.html, pages[i].markup, pages[i].words, lexicon),
    )  # fmt: skip
    labels, weights = [page.labels for page in pages], [page.weights for page in pages]

    def trees_of(values: list[np.ndarray], chosen: Sequence[int], settings: dict[str, Any]) -> Trees:
        rows, targets, shares = (np.concatenate([column[i] for i in chosen]) for column in (values, labels, weights))
        return learn_trees(rows, targets, shares, settings)

    first, first_trees = _out_of_fold(
        pages, fold, lambda others: trees_of(rows, others, FIRST), lambda trees, i: trees.probabilities(rows[i])
    )
    around = [context(first[i], pages[i].words.counts + 0.5, pages[i].markup) for i in range(len(pages))]
    second, second_trees = _out_of_fold(
        pages, fold, lambda others: trees_of(around, others, SECOND), lambda trees, i: trees.probabilities(around[i])
    )

    def network_of(chosen: Sequence[int]) -> Network:
        return learn_network(Examples(*([column[i] for i in chosen] for column in (rows, labels, weights))), seed=1)

    network, _ = _out_of_fold(pages, fold, network_of, lambda learned, i: learned.probabilities(rows[i]))
    model = BlockModel(
        learn_lexicon(pages), Trees.mean(first_trees), Trees.mean(second_trees), network_of(range(len(pages)))
    )
    estimates = [
        with_rules(page.markup, of_page, mean_of(*found))
        for page, of_page, *found in zip(pages, rows, first, second, network, strict=True)
    ]
    return model, estimates


def score(page: Labelled, probabilities: np.ndarray) -> Score:
    kept = np.flatnonzero(decide(page.markup, probabilities, page.words.counts)).tolist()
    return Score.of(page.page.type, words(render(page.markup, kept)), page.page.words)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastllm.bench.main_text_training", description=first_paragraph(__doc__)
    )
    parser.add_argument("pages", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--folds", type=int, default=5, metavar="N", help="folds of sites (default: %(default)s)")
    arguments = parser.parse_args(argv)
    pages = read_marked(arguments.pages)
    labelled = [page for page in map(label, pages) if page.markup.texts]
    print(f"{len(labelled)} pages with text of {len(pages)}, {len({page.site for page in pages})} sites", flush=True)
    model, estimates = learn_model(labelled, arguments.folds)
    model.save(arguments.out)
    scores = [score(page, estimate) for page, estimate in zip(labelled, estimates, strict=True)]
    scores += [Score.of(page.type, words(""), page.words) for page in pages if not read_markup(page.html).texts]
    print(report({f"{arguments.folds} folds of sites": scores}))


if __name__ == "__main__":
    main()
