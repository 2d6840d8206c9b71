"""sft.evaluation.harness: how replies end, what is counted of them, and that they survive kills and signals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evaluating import ANYTHING, REPLY, lines, load, plain_place, run
from sft.evaluation import evaluate, stops
from sft.formats.samples import Reply, Sample
from sft.recipe.schema import Evaluate

place = plain_place


def test_replies_are_kept_with_how_they_ended(place: SimpleNamespace, tmp_path: Path) -> None:
    result = run(place, "capitals", tmp_path)
    samples = lines(tmp_path / "samples" / "capitals.jsonl")
    assert [s["doc_id"] for s in samples] == list(range(5))
    assert all(s["prompt"].startswith("<|im_start|>user\nWhat is the capital") for s in samples)
    assert all(s["prompt"].endswith("<|im_start|>assistant\n") for s in samples)
    assert all((s["ended_by"] == "length") == (s["tokens"] == 6) for s in samples)
    facts = result.generation
    assert facts and facts.n == 5 and facts.stop_rate == sum(s["ended_by"] != "length" for s in samples) / 5
    # lm-eval's text of a reply and the recorded length belong together, whatever order lm-eval worked in
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place.root / "model", dtype=torch.float32)
    for sample in samples[:2]:
        ids = place.model.tokenizer(sample["prompt"], return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, max_new_tokens=6)[0, ids["input_ids"].shape[1] :].tolist()
        kept = [i for i in out if i not in (0, 2)]
        assert sample["replies"] == [place.model.tokenizer.decode(kept, skip_special_tokens=True)]
        assert sample["tokens"] == len(kept)


def test_a_finished_task_is_reused_and_a_killed_one_continues(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    generate = type(place.model)._model_generate

    def counting(self: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(context))
        return generate(self, context, *args, **kwargs)

    monkeypatch.setattr(type(place.model), "_model_generate", counting)
    whole = run(place, "capitals", tmp_path / "a")
    assert sum(rows) == 5
    assert run(place, "capitals", tmp_path / "a") == whole and sum(rows) == 5

    # killed after two replies, in the middle of writing the third
    kept = (tmp_path / "a" / "work" / "capitals.replies.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b" / "work").mkdir(parents=True)
    (tmp_path / "b" / "work" / "capitals.replies.jsonl").write_text("".join(kept[:2]) + kept[2][:30] + "\n")
    again = run(place, "capitals", tmp_path / "b")
    assert sum(rows) == 5 + 3 and again.reused_replies == 2
    assert (tmp_path / "a/samples/capitals.jsonl").read_bytes() == (tmp_path / "b/samples/capitals.jsonl").read_bytes()
    assert replace(again, seconds=whole.seconds, reused_replies=0) == whole


def test_replies_that_never_stop_break_the_task_and_keep_their_samples(place: SimpleNamespace, tmp_path: Path) -> None:
    options = Evaluate(tasks=("capitals",), min_stop_rate=1.0)
    with pytest.raises(
        evaluate.BrokenTask, match=r"capitals: \d+% of 5 replies stop by themselves, min_stop_rate is 1"
    ):
        run(place, "capitals", tmp_path, options)
    assert len(lines(tmp_path / "samples" / "capitals.jsonl")) == 5
    assert not (tmp_path / "work" / "capitals.json").exists()


def test_empty_replies_break_the_task(place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(self: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        return torch.cat([context, torch.full((len(context), 1), 2)], dim=1)

    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(HFLM, "_model_generate", silent)
    with pytest.raises(evaluate.BrokenTask, match=r"100% of 5 replies are empty, max_empty_fraction is 0\.1"):
        run(place, "capitals", tmp_path, Evaluate(tasks=("capitals",)))


def test_a_reply_that_goes_round_in_circles_is_seen() -> None:
    from sft.evaluation.stops import repeats

    assert repeats([1, 2, 3] * 10)
    assert not repeats(list(range(30)))
    assert not repeats([1, 1, 1])


def test_likelihoods_survive_a_kill_too(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(place, "colours", tmp_path / "a")
    kept = (tmp_path / "a" / "work" / "colours.replies.jsonl").read_text().splitlines(keepends=True)
    assert len(kept) == 36
    (tmp_path / "b" / "work").mkdir(parents=True)
    (tmp_path / "b" / "work" / "colours.replies.jsonl").write_text("".join(kept[:30]) + kept[30][:20])
    asked: list[int] = []
    call = type(place.model)._model_call

    def counting(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(inputs))
        return call(self, inputs, *args, **kwargs)

    monkeypatch.setattr(type(place.model), "_model_call", counting)
    again = run(place, "colours", tmp_path / "b")
    assert sum(asked) == 6 and again.reused_replies == 30 and again.metrics == whole.metrics
    assert (tmp_path / "a/samples/colours.jsonl").read_bytes() == (tmp_path / "b/samples/colours.jsonl").read_bytes()


def test_a_signal_leaves_what_was_answered_marked_incomplete(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.evaluation.hf_model import HfModel

    model, logged = HfModel(place.root / "model", batch_size=2, max_length=0, think_end=None), []
    model.log = logged.append
    generate = HfModel._model_generate

    def interrupted(self: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        if len(self.answers.replies) == 4:
            raise SystemExit(143)  # what stage.main makes of SIGTERM
        return generate(self, context, *args, **kwargs)

    monkeypatch.setattr(HfModel, "_model_generate", interrupted)
    with pytest.raises(SystemExit):
        evaluate.run_task(model, "capitals", ANYTHING, place.tasks, place.data, tmp_path)
    file = tmp_path / "samples/capitals.incomplete.jsonl"
    assert logged == [f"interrupted: 4 answers of 5 documents are kept in {file}"]
    rows = lines(file)
    assert len(rows) == 4 and all(r["incomplete"] and "capital" in r["prompt"] and "ended_by" in r for r in rows)
    assert not (tmp_path / "samples/capitals.jsonl").exists() and not (tmp_path / "work/capitals.json").exists()
    monkeypatch.undo()
    assert run(place, "capitals", tmp_path).reused_replies == 4 and not file.exists()


def test_thinking_is_removed_before_scoring(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    from sft.evaluation.hf_model import HfModel

    encode = place.model.tokenizer.encode

    def thinking(self: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        reply = torch.tensor([[*encode("It is ZZZ or so.</think>\n\nParis"), 2]] * len(context))
        return torch.cat([context, reply], dim=1)

    monkeypatch.setattr(HFLM, "_model_generate", thinking)
    assert set(stops.THINK_ENDS) == set(Evaluate.__dataclass_fields__["process_output"].metadata["choices"])
    found = {}
    for kind, end in stops.THINK_ENDS.items():
        model = HfModel(place.root / "model", batch_size=0, max_length=0, think_end=end)
        options = replace(ANYTHING, process_output=kind)
        found[kind] = evaluate.run_task(model, "capitals", options, place.tasks, {}, tmp_path / kind)
        assert found[kind].metrics["exact_match"].value == (kind == "r1_style")
    assert found["r1_style"].generation.tokens.median > 10  # what was generated, thinking included


def scripted(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, think_end: str | None, replies: list[str]) -> Any:
    """A model whose next token is the one its script for that row names, so that everything else is the real thing."""
    from sft.evaluation.hf_model import HfModel

    model = HfModel(place.root / "model", batch_size=len(replies), max_length=0, think_end=think_end)
    scripts = [[*model.tokenizer.encode(text, add_special_tokens=False), 2] for text in replies]
    forward, at = model.model.forward, [0]

    def log(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits[:] = -100.0
        for row in range(len(out.logits)):
            out.logits[row, -1, scripts[row][min(at[0], len(scripts[row]) - 1)]] = 100.0
        at[0] += 1
        return out

    monkeypatch.setattr(model.model, "forward", log)
    return model


def ask(model: Any, prompts: list[str], **kwargs: Any) -> tuple[list[str], list[Reply]]:
    from lm_eval.api.instance import Instance

    arguments = {"max_gen_toks": 80, "do_sample": False, **kwargs}
    texts = model.generate_until([Instance("generate_until", {}, (p, dict(arguments)), 0) for p in prompts])
    return texts, [entry for entries in model.answers.replies.values() for entry in entries]


@pytest.mark.seconds
def test_a_thought_is_not_stopped_by_a_stop_string_and_an_unclosed_one_has_no_answer(
    place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = ["<think>a ZZZ b</think> Paris ZZZ not this", "<think>so it is Paris", "Paris ZZZ or so"]
    model = scripted(place, monkeypatch, "</think>", replies)
    texts, entries = ask(model, ["bbb", "ccc", "ddd"], until=["ZZZ"])
    assert [t.strip() for t in texts] == ["Paris", "", "Paris"]
    ends = [e.ended_by for e in entries]
    assert ends == ["stop string", "unclosed thought", "stop string"]
    model = scripted(place, monkeypatch, "</think>", ["it is Paris"])
    assert ask(model, ["who?<think>\n"])[1][0].ended_by == "unclosed thought"
    model = scripted(place, monkeypatch, None, ["<think>it is Paris"])
    texts, entries = ask(model, ["who?"], until=["is"])
    assert texts == ["<think>it "] and entries[0].ended_by == "stop string"


def test_unclosed_thoughts_lower_the_stop_rate() -> None:
    from sft.evaluation.scores import generation

    sample = Sample(doc_id=0, filter="none", prompt="", target="", replies=("",), filtered=[""], scores={}, doc={},
                    ended_by="unclosed thought", tokens=9, repeats=False)  # fmt: skip
    facts = generation([sample, replace(sample, replies=("x",), ended_by="terminator")])
    assert facts and facts.stop_rate == facts.terminator_rate == 0.5 and facts.empty == 0


@pytest.mark.seconds
def test_how_a_reply_ended_does_not_depend_on_its_neighbours(
    place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = ["Rome ZZZ " + "round and round " * 3, "a longer answer comes here ZZZ"]
    both = ask(scripted(place, monkeypatch, None, replies), ["bbb", "ccc"], until=["ZZZ"])
    for i in (0, 1):
        alone = ask(scripted(place, monkeypatch, None, replies[i : i + 1]), [["bbb", "ccc"][i]], until=["ZZZ"])
        assert alone == ([both[0][i]], [both[1][i]])
    encode = place.model.tokenizer.encode
    assert both[1][0].tokens <= len(encode("Rome ZZZ ", add_special_tokens=False))


def test_several_replies_to_a_document_are_all_counted(place: SimpleNamespace, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "capitals.jsonl").write_text((place.tasks / "capitals.jsonl").read_text())
    text = REPLY.replace("do_sample: false", "do_sample: true, temperature: 1.0").replace(
        "metric_list", "repeats: 3\nmetric_list"
    )
    (tasks / "capitals.yaml").write_text(text.replace('"ZZZ"', '"a", "e", "i", "o"'))

    def once(out: str) -> Any:
        return evaluate.run_task(place.model, "capitals", ANYTHING, tasks, {}, tmp_path / out)

    result = once("a")
    samples = lines(tmp_path / "a/samples/capitals.jsonl")
    ends = [end for s in samples for end in s["ended_by"]]
    assert all(len(s["replies"]) == len(s["ended_by"]) == len(s["tokens"]) == 3 for s in samples)
    assert len({tuple(s["replies"]) for s in samples}) > 1 and len(set(ends)) > 1
    facts = result.generation
    assert facts.n == 15 and facts.stop_rate == sum(e != "length" for e in ends) / 15
    assert facts.empty == sum(not r.strip() for s in samples for r in s["replies"]) / 15
    # a killed attempt keeps its replies, in their places
    kept = (tmp_path / "a" / "work" / "capitals.replies.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b" / "work").mkdir(parents=True)
    (tmp_path / "b" / "work" / "capitals.replies.jsonl").write_text("".join(kept[:7]))
    assert once("b").reused_replies == 7
    again = [r for s in lines(tmp_path / "b/samples/capitals.jsonl") for r in s["replies"]]
    assert len(again) == 15 and {json.loads(k)["text"] for k in kept[:7]} <= set(again)


def test_reply_lengths_are_counted_in_bins() -> None:
    from sft.evaluation.scores import length_bins

    assert length_bins([0, 3, 8, 9, 40]) == ((8, 3), (16, 1), (32, 0), (64, 1))
    assert length_bins([20]) == ((32, 1),) and length_bins([70_000]) == ((70_000, 1),)


@pytest.mark.seconds
def test_scores_of_replies_are_lm_evals_own_also_through_a_filter(place: SimpleNamespace, tmp_path: Path) -> None:
    """Two filters over the same replies: as they are, and their first letter; half of the answers are that letter."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    replies = [
        s["replies"][0] for s in (run(place, "capitals", tmp_path), lines(tmp_path / "samples/capitals.jsonl"))[1]
    ]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = lines(place.tasks / "capitals.jsonl")
    letters = [next((c for c in reply if c.isalpha()), "?") for reply in replies]
    rows = [
        {**row, "answer": letters[i] if i % 2 else reply}
        for i, (row, reply) in enumerate(zip(rows, replies, strict=True))
    ]
    (tasks / "capitals.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pattern = "filter_list:\n  - {name: whole, filter: [{function: take_first}]}\n  - name: letter\n    filter:\n"
    pattern += '      - {function: regex, regex_pattern: "([A-Za-z])"}\n      - {function: take_first}\n'
    (tasks / "capitals.yaml").write_text(REPLY + pattern)
    ours = evaluate.run_task(place.model, "capitals", ANYTHING, tasks, {}, tmp_path / "ours").metrics
    lm = HFLM(pretrained=str(place.root / "model"), device="cpu", dtype="float32", batch_size=3)
    task = load("capitals", tasks, {})
    theirs = simple_evaluate(
        model=lm,
        tasks=[task],
        apply_chat_template=True,
        bootstrap_iters=100,
        task_manager=TaskManager(include_defaults=False),
    )["results"]["capitals"]
    assert len(ours) == 2 and {m.value for m in ours.values()} & {0.4, 0.6}
    for name, metric in ours.items():
        key = next(k for k in theirs if "stderr" not in k and k.split(",")[-1] in name)
        assert metric.value == theirs[key]
        assert metric.stderr == pytest.approx(theirs[key.replace(",", "_stderr,")])
