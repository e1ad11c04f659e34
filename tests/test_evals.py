"""evaluate: from token ids to figures and a file of records, on a model whose answers are known."""

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import tiny

import wmss_jax as wmss
from wmss_jax import cli, tokenizer
from wmss_jax.evals import catalog, command, graders, grading, questions, run, statistics
from wmss_jax.evals.questions import Question
from wmss_jax.evals.run import Decoding, Item, Record, evaluate

QWEN3 = Path(__file__).parent / "golden" / "qwen3" / "untied"
MODEL, PARAMS = wmss.load(QWEN3)
GOLDEN = np.load(QWEN3 / "golden.npz")
PROMPT, GENERATED = GOLDEN["prompt"][0].tolist(), GOLDEN["generated"].tolist()
DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")


class Tokenizer:
    """Token ids as words; id 0 is special."""

    def __init__(self, eos_token_id=None):
        self.eos_token_id = eos_token_id

    def decode(self, token_ids, *, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(str(token) for token in token_ids if token)


def text(tokens):
    return Tokenizer().decode(tokens, skip_special_tokens=True)


def items(*golds):
    return [Item(PROMPT, Question("the prompt", gold, "there:1")) for gold in golds]


@pytest.fixture(scope="module")
def exact():
    with grading.opened({"exact"}) as judges:
        yield judges["exact"]


def answered(wanted, judge, out, **decoding):
    decoding = {"max_new_tokens": 16, **decoding}
    tokens = Tokenizer(decoding.pop("eos", None))
    return evaluate(MODEL, PARAMS, tokens, wanted, judge, "all", Decoding(**decoding), out)


def test_records_hold_prompt_generation_extraction_gold_and_verdict(exact, tmp_path):
    golds = items(text(GENERATED), "something else", text(GENERATED))
    figures = answered(golds, exact, tmp_path / "out.jsonl")
    assert run.read(tmp_path / "out.jsonl") == [
        Record(index, 0, "there:1", "the prompt", text(GENERATED), text(GENERATED), item.question.gold, verdict)
        for index, (item, verdict) in enumerate(zip(golds, [True, False, True], strict=True))
    ]
    assert (figures["n"], figures["accuracy"], figures["hung"]) == (3, 2 / 3, 0)
    assert figures["standard_error"] == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 3))


@pytest.mark.parametrize(
    ("eos", "stop_ids", "kept"),
    [(None, (), 16), (GENERATED[3], (), 3), (None, [GENERATED[5]], 5), (GENERATED[5], [GENERATED[3]], 3)],
)
def test_an_answer_ends_at_eos_or_a_stop_id_of_the_caller(eos, stop_ids, kept, exact, tmp_path):
    answered(items("x"), exact, tmp_path / "out.jsonl", eos=eos, stop_ids=stop_ids)
    assert run.read(tmp_path / "out.jsonl")[0].generation == text(GENERATED[:kept])


def test_no_items_is_a_mistake(exact, tmp_path):
    with pytest.raises(ValueError, match="no items"):
        answered([], exact, tmp_path / "out.jsonl")


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_file(exact, tmp_path):
    rng = random.Random(0)
    wanted = [
        Item([rng.randrange(1, 64) for _ in range(3 + index % 4)], Question(f"number {index}", "", f"there:{index}"))
        for index in range(10)
    ]
    whole = tmp_path / "whole.jsonl"
    answered(wanted, exact, whole, max_new_tokens=5, batch_size=4)
    for stop_after in (1, 4, 6):

        class Stop(Exception):
            pass

        calls = itertools.count()

        def stopping(*arguments, calls=calls, stop_after=stop_after):
            if next(calls) == stop_after:
                raise Stop
            return exact(*arguments)

        out = tmp_path / f"out{stop_after}.jsonl"
        with pytest.raises(Stop):
            answered(wanted, stopping, out, max_new_tokens=5, batch_size=4)
        assert not out.exists()
        partial = out.with_name(f"{out.name}.partial")
        if partial.exists():  # a kill may also come in the middle of a line
            partial.write_bytes(partial.read_bytes()[:-7])
        asked = []
        watching = lambda *arguments, asked=asked: asked.append(arguments[1]) or exact(*arguments)
        answered(wanted, watching, out, max_new_tokens=5, batch_size=4)
        assert out.read_bytes() == whole.read_bytes()
        assert len(asked) == (10 if stop_after < 4 else 7)  # one batch was written, but for the line cut off


def test_several_samples_differ_and_are_gone_on_with_together(exact, tmp_path):
    wanted = [Item(PROMPT, Question(f"number {index}", "", "there")) for index in range(3)]
    drawing = {"max_new_tokens": 6, "batch_size": 2, "asking": catalog.protocol("plain", temperature=1.0, samples=3)}
    figures = answered(wanted, exact, tmp_path / "whole.jsonl", **drawing)
    records = run.read(tmp_path / "whole.jsonl")
    assert [(record.item, record.sample) for record in records] == list(itertools.product(range(3), repeat=2))
    assert len({record.generation for record in records}) == 9  # the same prompt, and noise of its own each
    assert figures["samples"] == 3 and {"pass@1", "pass@2", "majority@3"} <= figures.keys()
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl.partial").write_bytes(b"".join(lines[3:5]))  # two samples of the second item
    answered(wanted, exact, tmp_path / "cut.jsonl", **drawing)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_answers_to_other_questions_are_not_gone_on_with(exact, tmp_path):
    rows(tmp_path / "out.jsonl.partial", dataclasses.asdict(Record(0, 0, "", "another question", "", "", "", True)))
    with pytest.raises(ValueError, match="other questions"):
        answered(items("x"), exact, tmp_path / "out.jsonl")


# -- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (7, 7)])
def test_pass_at_k_is_what_counting_all_draws_gives(n, c):
    for k in range(1, n + 1):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert statistics.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    with pytest.raises(ValueError, match="at least"):
        statistics.pass_at_k(n, c, n + 1)


def test_wilson_covers_95_percent():
    rng = np.random.default_rng(0)
    for share, n in ((0.5, 30), (0.1, 60), (0.9, 200)):
        covered = [
            low <= share <= high for low, high in (statistics.wilson(int(c), n) for c in rng.binomial(n, share, 3000))
        ]
        assert 0.92 < np.mean(covered) < 0.98
    assert statistics.wilson(0, 10)[0] == pytest.approx(0) and statistics.wilson(10, 10)[1] == pytest.approx(1)


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(0.3, 1, 500)
    half = 1.96 * values.std() / math.sqrt(500)
    assert statistics.bootstrap(values.tolist()) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.01
    )


def test_mcnemar_is_the_exact_binomial_test():
    for a, b in itertools.product(range(7), repeat=2):
        outcomes = [sum(flips) for flips in itertools.product([0, 1], repeat=a + b)]
        as_extreme = [abs(2 * c - (a + b)) >= abs(a - b) for c in outcomes]
        assert statistics.mcnemar(a, b) == pytest.approx(np.mean(as_extreme) if a + b else 1.0)


def test_figures_of_several_samples():
    verdicts = [[True, True, False, False], [False] * 4, [True] * 4]
    said = [["1", "1", "2", "2"], ["x", "y", "y", ""], ["3"] * 4]
    found = statistics.figures(verdicts, said)
    assert found["accuracy"] == found["pass@1"] == pytest.approx(0.5)
    assert found["pass@2"] == pytest.approx(np.mean([5 / 6, 0, 1]))
    assert found["pass@4"] == found["majority@4"] == pytest.approx(2 / 3)
    assert found["low"] < 0.5 < found["high"] and found["samples"] == 4


def test_a_difference_is_seen_in_pairs():
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    a, b = (hard < 0.5).astype(float), (hard < 0.6).astype(float)
    found = statistics.difference(a.tolist(), b.tolist())
    assert found["only_a"] == 0 and found["only_b"] == int(b.sum() - a.sum())
    assert 0 < found["low"] < found["difference"] < found["high"] and found["p"] < 1e-3
    same = statistics.difference(a.tolist(), a.tolist())
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)


# -- tasks and questions ----------------------------------------------------------------------------------------------


def rows(path, *columns):
    path.write_text("".join(json.dumps(row) + "\n" for row in columns))
    return path


@pytest.mark.parametrize(
    "bad", [{"question": "q"}, {"question": "q", "answer": None}, {"question": "q", "answer": " "}]
)
def test_a_row_without_an_answer_is_refused(bad, tmp_path):
    file = rows(tmp_path / "mine.jsonl", {"question": "q", "answer": "1"}, bad)
    with pytest.raises(ValueError, match=r"mine\.jsonl:2: .*answer"):
        questions.read(questions.task_named(str(file), "exact"))


# How EvalPlus compares, in the tests of its data sets (its tools/humaneval/to_original_fmt.py); they need numpy inside
# the sandbox, and nothing of EvalPlus.
PLUS = """import numpy as np

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False

def assertion(out, exp, atol):
    exact_match = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert exact_match

"""
ROWS = {
    "gsm8k": {"question": "2 + 3?", "answer": "#### 5"},
    "svamp": {"Body": "Two and three.", "Question": "Sum?", "Answer": 5.0},
    "mawps": {"sQuestion": "2 + 3?", "lSolutions": [5.0]},
    "asdiv_a": {"Body": "Two and three.", "Question": "Sum?", "Answer": "5 (apples)"},
    "aqua": {"question": "2 + 3?", "options": ["A)4", "B)5", "C)6", "D)7", "E)8"], "correct": "B"},
    "math500": {"problem": "2 + 3?", "answer": "5"},
    "amc23": {"question": "2 + 3?", "answer": "5"},
    "aime24": {"Problem": "2 + 3?", "Answer": 5},
    "aime25": {"problem": "2 + 3?", "answer": "5"},
    "logiqa2": {"text": "Five is it.", "question": "Which?", "options": ["4", "5", "6", "7"], "answer": 1},
    "reclor": {"context": "Five is it.", "question": "Which?", "answers": ["4", "5", "6", "7"], "label": 1},
    "humaneval": {"prompt": "def f():\n", "test": "def check(f): assert f() == 5", "entry_point": "f"},
    "humaneval_plus": {
        "prompt": "def f():\n",
        "entry_point": "f",
        "test": PLUS + "def check(candidate):\n    inputs = [[], []]\n    results = [5.0000001, 5]\n"
        "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion(candidate(*inp), exp, 0)\n",
    },
    "mbpp": {"text": "Write f.", "test_setup_code": "", "test_list": ["assert f() == 5"] * 3},
    "mbpp_plus": {
        "prompt": "Write f.",
        "test": PLUS + "inputs = [[]]\nresults = [5]\nfor i, (inp, exp) in enumerate(zip(inputs, results)):\n"
        "    assertion(f(*inp), exp, 0)\n",
    },
}
RIGHT = {
    "letter": "<think>A?</think> <answer>The answer is (B).</answer>",
    "numeric": "<think>4?</think> It is \\boxed{5}.", "math": "It is \\boxed{\\frac{10}{2}}.",
    "tests": "<think>\n```python\nx\n```</think>```python\ndef f():\n    return 5\n```",
}  # fmt: skip


def test_every_task_is_graded_from_rows_of_its_columns(tmp_path):
    assert set(ROWS) == set(catalog.TASKS)
    with grading.opened({"letter", "numeric", "math", "tests"}, unsafe_no_sandbox=True) as judges:
        for name, row in ROWS.items():
            rows(tmp_path / f"{name}.jsonl", row)
            task = questions.task_named(name)
            (question,) = questions.read(task, tmp_path)
            right = judges[task.grader](RIGHT[task.grader], question, task.extraction)
            assert right.right, (name, right)
            wrong = RIGHT[task.grader].replace("5", "6").replace("10", "12").replace("(B)", "(C)")
            assert not judges[task.grader](wrong, question, task.extraction).right, name


def test_a_base_model_may_only_continue_the_program():
    question = Question("", "", "", tests="assert f() == 5", entry_point="f", beginning="import math\ndef f():\n")
    continued = grading._program("    return 5\n\nprint(f())\n# and so on", question)
    assert continued == "import math\ndef f():\n    return 5\n\n"[: len(continued)] and "print" not in continued
    whole = grading._program("def f():\n    return math.floor(5.5)", question)
    scope = {}
    exec(whole, scope)
    assert scope["f"]() == 5


def test_unknown_names_are_told(tmp_path):
    with pytest.raises(ValueError, match="no task 'gsm9k'; there are gsm8k"):
        questions.task_named("gsm9k")
    with pytest.raises(ValueError, match="--grader"):
        questions.task_named("mine.jsonl")
    with pytest.raises(ValueError, match="no grader 'best'"):
        questions.task_named("mine.jsonl", "best")
    with pytest.raises(ValueError, match="mawps: is on no hub; give --data"):
        questions.read(questions.task_named("mawps"), tmp_path)
    with pytest.raises(ValueError, match="temperature above 0"):
        catalog.protocol("paper_v2", samples=3)


def test_the_papers_protocols():
    v1, v2 = catalog.protocol("paper_v1"), catalog.protocol("paper_v2")
    assert (v1.temperature, v1.top_p, v1.samples, v1.max_new_tokens) == (0.5, 0.95, 3, 4096)
    assert (v2.temperature, v2.samples, v2.max_new_tokens) == (0, 1, None) and "<think>" in v2.system_prompt
    budgets = {name: task.max_new_tokens for name, task in catalog.TASKS.items()}
    assert (budgets["aime25"], budgets["amc23"], budgets["math500"]) == (8192, 8192, 4096)


@pytest.mark.slow
def test_reasoning_gym_is_judged_by_its_own_verifier():
    pytest.importorskip("reasoning_gym")
    task = questions.task_named("reasoning_gym:basic_arithmetic")
    found = questions.read(task, limit=3, seed=7)
    assert [q.prompt for q in found] == [q.prompt for q in questions.read(task, limit=3, seed=7)]
    with grading.opened({"verifier"}) as judges:
        for question in found:
            assert judges["verifier"](f"<answer>{question.gold}</answer>", question, "final").right
            assert not judges["verifier"](f"<answer>{question.gold}1</answer>", question, "final").right


# -- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny random model with a tokenizer."""
    root = tmp_path_factory.mktemp("model")
    tokenizer.train(["How many apples does she have now? def f(x): return x"], 270, root / "tokenizer")
    model = tiny.model(vocab_size=272, max_positions=1024)
    wmss.save(model, tiny.params(model), root / "model", tokenizer_from=root / "tokenizer")
    return root / "model"


@needs_data
def test_eval_of_local_data_sets_and_a_comparison(exported, tmp_path, monkeypatch, capsys):
    names = ["gsm8k", "svamp", "mawps", "humaneval"]
    tasks = [word for name in names for word in ("--task", name)]
    common = ["--data", str(DATA), "--limit", "4", "--max-new-tokens", "6", "--batch-size", "4", "--unsafe-no-sandbox"]

    def wmss_eval(*arguments):
        monkeypatch.setattr("sys.argv", ["wmss", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code or 0, *capsys.readouterr()

    code, out, err = wmss_eval("eval", str(exported), *tasks, *common, "--out", str(tmp_path / "a"))
    assert code == 0, err
    assert "gsm8k: 4 questions, where the paper has 1319" in out and "humaneval: 0.0 % [0.0, 49.0] of 4" in out
    for name in names:
        records = run.read(tmp_path / "a" / f"{name}.jsonl")
        assert [record.item for record in records] == [0, 1, 2, 3]
        assert all(record.prompt and not record.hung for record in records)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    wmss_eval("eval", str(exported), *tasks, *common, "--out", str(tmp_path / "a"))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    code, _, err = wmss_eval(
        "eval", str(exported), *tasks, *common, "--protocol", "paper_v2", "--out", str(tmp_path / "a")
    )
    assert code == 2 and "choose another" in err

    improved = tmp_path / "b"
    improved.mkdir()
    better = [dataclasses.replace(record, verdict=True) for record in run.read(tmp_path / "a" / "gsm8k.jsonl")]
    rows(improved / "gsm8k.jsonl", *map(dataclasses.asdict, better))
    code, out, _ = wmss_eval("eval-compare", str(tmp_path / "a"), str(improved))
    assert code == 0 and "gsm8k: 0.0 % -> 100.0 %, +100.0 [+100.0, +100.0], p = 0.125" in out
    rows(improved / "svamp.jsonl", dataclasses.asdict(better[0]))
    code, _, err = wmss_eval("eval-compare", str(tmp_path / "a"), str(improved))
    assert code == 2 and "not of the same questions" in err


def test_the_first_papers_protocol_asks_three_times_and_gives_the_mean(exported, tmp_path):
    """As a whole: its system prompt in the chat, T = 0.5, top-p 0.95, three answers of noise of their own."""
    asked = [f"How many apples does she have, {n}?" for n in range(4)]
    protocol, said = catalog.protocol("paper_v1"), []

    def evaluated(golds, name):
        file = rows(
            tmp_path / "apples.jsonl", *({"question": q, "answer": a} for q, a in zip(asked, golds, strict=True))
        )
        request = command.Request(
            str(exported), (str(file),), tmp_path / name, protocol, grader="exact", max_new_tokens=4, batch_size=4
        )
        return command.evaluate(request, say=said.append)["apples"], run.read(tmp_path / name / "apples.jsonl")

    _, before = evaluated("wxyz", "a")
    assert [(record.item, record.sample) for record in before] == list(itertools.product(range(4), range(3)))
    assert all(len({r.generation for r in before if r.item == item}) > 1 for item in range(4)), "not one seed for all"
    assert said == ["apples: 4 questions x 3, at most 4 tokens each"]
    golds = [before[3 * item + item % 3].extraction or "x" for item in range(3)]
    figures, records = evaluated([*golds, "z"], "b")
    assert [r.generation for r in records] == [r.generation for r in before], "the same seeds, the same answers"
    shares = [np.mean([r.verdict for r in records if r.item == item]) for item in range(4)]
    assert figures["accuracy"] == pytest.approx(np.mean(shares)) and 0 < figures["accuracy"] < 1
    assert figures["low"] < figures["accuracy"] < figures["high"] and figures["samples"] == 3
    assert f"apples: mean@3 {100 * figures['accuracy']:.1f} % [" in command.table({"apples": figures})
    record = json.loads((tmp_path / "b" / "apples.json").read_text())["inputs"]["protocol"]
    assert record == dataclasses.asdict(protocol)
    assert (record["seed"], record["samples"], record["temperature"], record["top_p"]) == (42, 3, 0.5, 0.95)


def test_a_hang_is_counted_and_reported(tmp_path):
    with grading.opened({"math"}, deadline_s=1) as judges:
        verdict = judges["math"](r"\boxed{99999999!}", Question("", "7", ""), "all")
        assert not verdict.right and verdict.hung and "no answer within 1 s" in verdict.problem
        assert judges["math"](r"\boxed{7}", Question("", "7", ""), "all").right
    records = [Record(0, 0, "", "", "", "", "", True), Record(1, 0, "", "", "", "", "", False, "no answer", True)]
    figures = run.figures(records)
    assert figures["hung"] == 1 and "1 judgements hung" in command.table({"x": figures})


def test_extraction():
    assert graders.final("<think>1</think> so <answer> 2 </answer>.") == " 2 "
    assert graders.final("no tags") == "no tags" and graders.final("<think>1</think>2") == "2"
    assert graders.code("a\n```python\nx = 1\n```\nb\n```\ny = 2\n```") == "y = 2"
    assert graders.code("```py\ncut off") == "cut off" and graders.code("bare") == "bare"
