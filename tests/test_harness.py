"""Our model in lm-eval: what it is asked for, against the plain forward pass."""

import types

import jax
import numpy as np
import pytest
import tiny

import wmss_jax as wmss
from wmss_jax import tokenizer

lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    from wmss_jax.evals.harness import WmssLM

    root = tmp_path_factory.mktemp("model")
    tokenizer.train(["one two three four five six"], 270, root / "tokenizer")
    model = tiny.model(vocab_size=272)
    wmss.save(model, tiny.params(model), root / "model", tokenizer_from=root / "tokenizer")
    return WmssLM(str(root / "model"), batch_size=2, max_length=24)


def request(*args):
    return types.SimpleNamespace(args=args)


def log_probs(lm, tokens):
    """[T, V]: of what follows each token."""
    return np.asarray(jax.nn.log_softmax(lm.model.logits(lm.params, np.array([tokens], np.int32)))[0])


def test_it_is_registered(lm):
    from lm_eval.api.registry import get_model

    assert get_model("wmss") is type(lm)


def test_loglikelihood(lm):
    pairs = [("one two", " three"), ("", "four five"), ("six", " six six six"), ("a", "b")]
    found = lm.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (score, is_greedy) in zip(pairs, found, strict=True):
        before = lm.tok_encode(context) or [lm.eot_token_id]
        tokens = [*before, *lm.tok_encode(context + continuation)[len(lm.tok_encode(context)) :]]
        log_p = log_probs(lm, tokens)
        wanted = sum(log_p[t - 1, tokens[t]] for t in range(len(before), len(tokens)))
        assert score == pytest.approx(wanted, abs=1e-4)
        assert is_greedy == all(log_p[t - 1].argmax() == tokens[t] for t in range(len(before), len(tokens)))


def test_rolling_predicts_each_token_once(lm):
    texts = ["one two", "one two three four five six " * 3]
    found = lm.loglikelihood_rolling([request(text) for text in texts], disable_tqdm=True)
    for text, score in zip(texts, found, strict=True):
        tokens, wanted = lm.tok_encode(text), 0.0
        for start in range(0, len(tokens), lm.max_length):
            # The last window is a full one: it looks further back than its first predicted token.
            end = min(start + lm.max_length, len(tokens))
            window = [lm.eot_token_id, *tokens][max(0, end - lm.max_length) : end + 1]
            log_p = log_probs(lm, window)
            wanted += sum(log_p[t - 1, window[t]] for t in range(len(window) - (end - start), len(window)))
        assert score == pytest.approx(wanted, abs=1e-3)


def test_generation_ends_at_a_stop_text_and_is_greedy(lm):
    free, ended = lm.generate_until(
        [request("one two", {"max_gen_toks": 6, "until": []}), request("one two", {"max_gen_toks": 6, "until": ["x"]})],
        disable_tqdm=True,
    )
    tokens = lm.tok_encode("one two")
    for _ in range(6):
        tokens.append(int(log_probs(lm, tokens)[-1].argmax()))
    wanted = lm.tokenizer.decode(tokens[len(lm.tok_encode("one two")) :], skip_special_tokens=True)
    assert free == wanted and ended == wanted.split("x")[0]
    (cut,) = lm.generate_until([request("one two", {"max_gen_toks": 6, "until": [free[2]]})], disable_tqdm=True)
    assert cut == free[: free.index(free[2])]
    with pytest.raises(ValueError, match="greedily"):
        lm.generate_until([request("x", {"do_sample": True, "temperature": 1.0})])
