"""The web page itself in a headless browser, where there is one."""

import json
import re
import shutil
import subprocess

import pytest
from served import KINDS, Running

# Chromium is no Python package; a machine without it tests the interface alone.
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Fills in the page's forms, one tab after the other, and sends home what they show.
DRIVE = """<!doctype html><meta charset="utf-8"><iframe src="/" style="border:0;width:860px;height:560px"></iframe>
<script>
const STEPS = %s, frame = document.querySelector("iframe"), result = {};
const until = async test => { while (!test()) await new Promise(r => setTimeout(r, 20)); };
frame.onload = async () => {
  const page = frame.contentDocument;
  await until(() => page.querySelectorAll("nav button").length === 4);
  for (const [task, values] of STEPS) {
    page.querySelector(`[data-task=${task}]`).click();
    const section = page.getElementById(task), form = section.querySelector("form");
    for (const [name, value] of Object.entries(values)) form.elements[name].value = value;
    form.requestSubmit();
    const out = section.querySelector("output");
    await until(() => out.dataset.state === "done");
    result[task] = {text: out.textContent, mark: out.querySelector("mark")?.textContent ?? null, shown: !section.hidden,
                    tabs: [...page.querySelectorAll("nav button")].map(b => b.getAttribute("aria-selected"))};
  }
  await fetch("/drive", {method: "POST", body: JSON.stringify(result)});
};
</script>"""
TEXT = "the key \U0001f511 is 7. red cat"
STEPS = [
    ("generate", {"prompt": "the cat", "max_new_tokens": 12}), ("translate", {"text": "red cat", "beams": 2}),
    ("classify", {"text": "<b>the</b> cat"}), ("answer", {"text": TEXT, "question": "which?"}),
]  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_works_in_a_browser(models, tmp_path):
    page = DRIVE % json.dumps(STEPS)
    running = Running(models, page=page)
    try:
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}",
        ]  # fmt: skip
        with subprocess.Popen(
            [BROWSER, *options, f"{running.url}/drive"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as browser:
            try:
                result = running.sent.get(timeout=90)
            finally:
                browser.terminate()
        found = json.loads(running.post("answer", {"text": TEXT, "question": "which?"})[1])
    finally:
        running.close()
    assert set(result) == set(KINDS)
    for number, task in enumerate(KINDS):
        assert result[task]["shown"]
        assert result[task]["tabs"] == [str(i == number).lower() for i in range(4)]
    assert result["generate"]["text"].startswith("the cat")
    assert sorted(re.findall(r"(good|bad) \d+\.\d %", result["classify"]["text"])) == ["bad", "good"]
    # The answer stands where Python's characters say, beyond a character of two UTF-16 units.
    if found["answer"]:
        assert result["answer"]["mark"] == TEXT[found["start"] : found["end"]]
        assert result["answer"]["text"] == TEXT
    else:
        assert result["answer"]["text"] == "No answer in the text."
