"""A list of hosts and addresses that are left out."""

import json

import pytest
from extras import needed
from pages import article

from fastllm.config import InputError, build_settings
from fastllm.data.clean import CleanConfig, Document, Rejection, clean
from fastllm.data.pipeline import prepare_text

LIST = "# spam\nbad.example\nwww.mixed.example/shop/   # a part of it\nhttps://other.example/a\n\nBIG.Example\nB\u00dcCHER.example\n"


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("http://bad.example/x", "bad.example"),
        ("https://www.BAD.example:8080/", "bad.example"),
        ("http://deep.sub.bad.example", "bad.example"),
        ("http://user@bad.example./x?y", "bad.example"),
        ("http://notbad.example/", None),
        ("http://bad.example.org/", None),
        ("http://good.example/?u=bad.example", None),
        ("http://mixed.example/Shop/item", "mixed.example/shop"),
        ("http://mixed.example/shopping", None),
        ("http://mixed.example/", None),
        ("http://other.example/a?b", "other.example/a"),
        ("http://big.example", "big.example"),
        ("http://xn--schlo-pqa.example/", None),
        ("http://xn--bcher-kva.example/", "xn--bcher-kva.example"),
        ("https://shop.b\u00fccher.example", "xn--bcher-kva.example"),
        ("http://other.example/%61/x", "other.example/a"),
        ("http://other.example//b/../a", "other.example/a"),
        ("//other.example/a", "other.example/a"),
        ("other.example/a?u=http://good.example", "other.example/a"),
        ("http://other.example/a%2fb", "other.example/a"),
        ("http://a..bad/", None),
        ("http://[broken", None),
        ("", None),
        (None, None),
    ],
)
def test_hosts_and_parts_of_them_are_left_out(tmp_path, url, entry):
    needed("ftfy", "data")
    path = tmp_path / "list.txt"
    path.write_text(LIST, "utf-8")
    document = Document("x", article(1), metadata={} if url is None else {"url": url})
    found, _ = clean(document, CleanConfig(rules=("none",), block_urls=str(path)))
    assert isinstance(found, Rejection) == (entry is not None)
    if entry:
        assert (found.rule, found.details["entry"]) == ("url", entry)


def test_a_list_that_cannot_be_used_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"block_urls: .*missing.txt: cannot be read"):
        CleanConfig(block_urls=str(tmp_path / "missing.txt"))
    (tmp_path / "bad.txt").write_text("good.example\nno host here\n")
    with pytest.raises(InputError, match=r"line 2: expected a host or host/path, got 'no host here'"):
        build_settings(CleanConfig, {"block_urls": str(tmp_path / "bad.txt")}, "command line")


def test_a_run_counts_what_it_left_out(tmp_path):
    needed("ftfy", "data")
    (tmp_path / "list.txt").write_text("bad.example")
    lines = [
        json.dumps({"text": article(i), "url": f"http://{'bad' if i % 2 else 'good'}.example/{i}"}) for i in range(6)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    config = CleanConfig(rules=("none",), block_urls=str(tmp_path / "list.txt"))
    report = prepare_text([tmp_path / "in.jsonl"], tmp_path / "out", config, workers=0)
    assert (report["documents_kept"], report["rejected"]) == (3, {"url": 3})
