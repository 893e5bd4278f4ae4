"""lm-evaluation-harness, as it is: what it finds through the API is what `score` gives."""

import json
import math
import re

import httpx
import pytest

from tests.clients.conftest import project

lm_eval = pytest.importorskip("lm_eval", reason="NOT TESTED: lm-eval is not installed")
from lm_eval.tasks import TaskManager

TEXTS = [
    "It was the best of times, it was the worst of times.",
    "Call me Ishmael. Some years ago — never mind how long precisely",
    "“Queequeg!” cried I; ça va, naïve whale?",
    "\n\nCHAPTER 1. Loomings.\n\n",
    "x",
]
QUESTIONS = [
    {"question": f"{text[: 5 + i]}", "choices": [f" {word}" for word in words], "label": i % 3}
    for i, (text, words) in enumerate(
        zip(TEXTS * 3, [("whale", "ship", "sea ice"), ("a", "é", "not this")] * 8, strict=False)
    )
]
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {output}
"""
TASKS = {
    "choose": (
        "multiple_choice",
        """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    ),
    "roll": (
        "loglikelihood_rolling",
        """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    ),
    "end": (
        "loglikelihood",
        """
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
target_delimiter: ""
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    ),
    "write": (
        "generate_until",
        """
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
target_delimiter: ""
generation_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 12, temperature: 0}
metric_list: [{metric: exact_match}]
""",
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Tasks in files, and where the harness keeps what it makes of them."""
    folder = tmp_path_factory.mktemp("tasks")
    files = {"questions": QUESTIONS, "texts": [{"text": text} for text in TEXTS]}
    for name, documents in files.items():
        path = folder / f"{name}.json"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, (output, rest) in TASKS.items():
        data = folder / ("texts.json" if name == "roll" else "questions.json")
        head = COMMON.format(name=name, data=data, output=output)
        (folder / f"{name}.yaml").write_text(head.lstrip() + rest.lstrip())
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def expected(runs):
    """By model: what the harness should find, by `score`."""
    found = {}
    for model in ("bytes", "bpe"):
        pairs = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]]
        texts = [("", text) for text in TEXTS]
        both = json.loads(project(runs, "score", str(runs / model), given=[*pairs, *texts]))
        scores = [(sum(logprobs), greedy) for logprobs, greedy in both]
        right, plain = [], []
        ends = []
        for i, question in enumerate(QUESTIONS):
            sums = [s for s, _ in scores[3 * i : 3 * i + 3]]
            lengths = [len(choice) for choice in question["choices"]]
            label = question["label"]
            right.append(sums.index(max(sums)) == label)
            means = [s / n for s, n in zip(sums, lengths, strict=True)]
            plain.append(means.index(max(means)) == label)
            ends.append(scores[3 * i + label])
        total = sum(s for s, _ in scores[len(pairs) :])
        words = sum(len(re.split(r"\s+", text)) for text in TEXTS)  # as the harness counts them
        size = sum(len(text.encode()) for text in TEXTS)
        found[model] = {
            ("choose", "acc"): sum(right) / len(right),
            ("choose", "acc_norm"): sum(plain) / len(plain),
            ("end", "acc"): sum(greedy for _, greedy in ends) / len(ends),
            ("end", "perplexity"): math.exp(-sum(s for s, _ in ends) / len(ends)),
            ("roll", "byte_perplexity"): math.exp(-total / size),
            ("roll", "bits_per_byte"): -total / size / math.log(2),
            ("roll", "word_perplexity"): math.exp(-total / words),
        }
    return found


CASES = [("bytes", 1, 1), ("bytes", 8, 1), ("bytes", 1, 4), ("bpe", 8, 4)]


@pytest.mark.parametrize(("model", "batch", "concurrent"), CASES)
def test_as_score(request, tasks, expected, model, batch, concurrent):
    server = request.getfixturevalue("server" if model == "bytes" else "bpe_server")
    arguments = {
        "model": model,
        "base_url": f"{server.url}/completions",
        "num_concurrent": concurrent,
        "tokenizer_backend": "remote",
    }
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=tasks,
        batch_size=batch,
        bootstrap_iters=0,
        log_samples=True,
    )
    for (task, metric), value in expected[model].items():
        found = results["results"][task][f"{metric},none"]
        assert found == pytest.approx(value, rel=1e-4), (task, metric)
    assert 0 < expected[model]["choose", "acc"] < 1  # it could have been wrong
    stop = ["e", "\n\n"]
    if concurrent == 1:  # then the harness adds one, else it does not
        stop.append(httpx.get(f"{server.url}/tokenizer_info").json()["eos_token"])
    for sample in results["samples"]["write"]:
        body = {"prompt": sample["doc"]["question"], "max_tokens": 12, "temperature": 0}
        body["stop"] = stop
        answer = httpx.post(f"{server.url}/completions", json=body).json()
        assert sample["resps"][0][0] == answer["choices"][0]["text"]
