"""Tokens and masks of examples, golden on rendered chats. Run: pytest tests/test_encoding.py"""

import doctest
import types

import chats
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from wmss_jax import chat_template, encoding
from wmss_jax.examples import Example


def chat(*turns, trained_from=0):
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Example(7, "chat.jsonl:7", messages=messages, trained_from=trained_from)


def pair(prompt, completion):
    return Example(7, "pairs.jsonl:7", prompt=prompt, completion=completion)


def text(text):
    return Example(7, "texts.jsonl:7", text=text)


def shown(example, tokenizer, **settings):
    encoded = encoding.encode(example, tokenizer, **settings)
    assert (encoded.tokens.dtype, encoded.mask.dtype) == (np.int32, bool)
    assert encoded.tokens.shape == encoded.mask.shape and encoded.tokens.ndim == 1
    return chats.marked(*encoded, tokenizer)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


TWO_TURNS = chat(
    ("system", "Add."),
    ("user", "1 + 1?"),
    ("assistant", "<think>\nLet me\n</think>\n\n2"),
    ("user", "plus 3?"),
    ("assistant", "<think>\n2 + 3\n</think>\n\n5"),
)
QWEN3 = "<|im_start|>assistant\n"


def test_docstring_examples():
    results = doctest.testmod(encoding)
    assert results.attempted >= 1 and results.failed == 0


# -- chats: golden ----------------------------------------------------------------------------------------------------


def test_own_template():
    assert shown(TWO_TURNS, chats.plain()) == (
        "<|system|>Add.<|user|>1 + 1?<|assistant|>⟦<think>\nLet me\n</think>\n\n2<|eos|>⟧"
        "<|user|>plus 3?<|assistant|>⟦<think>\n2 + 3\n</think>\n\n5<|eos|>⟧"
    )


def test_thinking_is_stripped_from_earlier_turns():
    assert shown(TWO_TURNS, chats.qwen3()) == (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧\n"
        "<|im_start|>user\nplus 3?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n2 + 3\n</think>\n\n5<|im_end|>⟧\n"
    )


def test_an_empty_think_block_that_the_template_adds_is_trained():
    """It stands behind the generation prompt, so the model must write it."""
    assert shown(chat(("user", "1?"), ("assistant", "2")), chats.qwen3()).endswith(
        QWEN3 + "⟦<think>\n\n</think>\n\n2<|im_end|>⟧\n"
    )


def test_reasoning_content_is_trained():
    messages = ({"role": "user", "content": "1?"}, {"role": "assistant", "content": "2", "reasoning_content": "hm"})
    example = Example(7, "chat.jsonl:7", messages=messages)
    assert shown(example, chats.qwen3()).endswith("⟦<think>\nhm\n</think>\n\n2<|im_end|>⟧\n")
    with pytest.raises(
        ValueError, match=r"^chat.jsonl:7: .* leaves out the reasoning_content of the answer in message 2$"
    ):
        encoding.encode(example, chats.plain())


def test_calls_of_tools_keep_their_thinking_within_a_question():
    calls = [{"name": "add"}]
    messages = (
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ncall", "tool_calls": calls},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "4"},
    )
    call = "<tool_call>\nadd\n</tool_call>"
    golden = (
        f"{QWEN3}⟦{call}<|im_end|>⟧\n<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        f"{QWEN3}⟦<think>\nhm\n</think>\n\ncall\n{call}<|im_end|>⟧\n"
        f"<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
    )
    last = f"{QWEN3}⟦<think>\n\n</think>\n\n4<|im_end|>⟧\n"
    tokenizer = chats.qwen3()
    assert shown(Example(7, "f:7", messages=messages), tokenizer) == (
        "<|im_start|>user\n1?<|im_end|>\n" + golden + last
    )
    # Another question strips them: what is rendered up to a turn is then no prefix of the whole.
    more = ({"role": "user", "content": "5?"}, {"role": "assistant", "content": "6"})
    stripped = golden.replace("<think>\nhm\n</think>\n\n", "") + last.replace("<think>\n\n</think>\n\n", "")
    assert shown(Example(7, "f:7", messages=messages + more), tokenizer) == (
        "<|im_start|>user\n1?<|im_end|>\n" + stripped
        + f"<|im_start|>user\n5?<|im_end|>\n{QWEN3}⟦<think>\n\n</think>\n\n6<|im_end|>⟧\n"
    )  # fmt: skip


def test_generation_prompt_that_opens_the_thinking():
    tokenizer = chats.with_template(chats.R1)
    assert chat_template.chat_format(tokenizer).header == "<|turn|><think>\n"
    assert shown(chat(*[(m["role"], m["content"]) for m in TWO_TURNS.messages[1:]]), tokenizer) == (
        "<|bos|><|im_start|>1 + 1?<|turn|>⟦\n\n2<|eos|>⟧<|im_start|>plus 3?<|turn|>⟦\n\n5<|eos|>⟧"
    )


def test_template_without_generation_prompt_that_trims():
    tokenizer = chats.with_template(chats.MISTRAL, bos_token="<|bos|>")
    example = chat(("system", "Add."), ("user", "1?"), ("assistant", "  2 \n"), ("user", "3?"), ("assistant", "fruits"))
    golden = "<|bos|>[INST] Add.\n\n1? [/INST]⟦ 2 <|eos|>⟧[INST] 3? [/INST]⟦ fruits <|eos|>⟧"
    assert shown(example, tokenizer) == golden


def test_what_closes_the_whole_chat_is_not_the_answers_end():
    tokenizer = chats.with_template(chats.PHI)
    assert shown(chat(("user", "1?"), ("assistant", "2"), ("user", "3?"), ("assistant", "4")), tokenizer) == (
        "<|user|>\n1?<|im_end|>\n<|assistant|>\n⟦2<|im_end|>⟧\n<|user|>\n3?<|im_end|>\n<|assistant|>\n⟦4<|im_end|>⟧\n<|eos|>"
    )


def test_only_the_completion_of_two_lists_is_trained():
    example = chat(("user", "1?"), ("assistant", "2"), ("user", "3?"), ("assistant", "4"), trained_from=2)
    assert shown(example, chats.plain()) == "<|user|>1?<|assistant|>2<|eos|><|user|>3?<|assistant|>⟦4<|eos|>⟧"
    with_system = shown(example, chats.plain(), system_prompt="Add.")
    assert with_system == "<|system|>Add.<|user|>1?<|assistant|>2<|eos|><|user|>3?<|assistant|>⟦4<|eos|>⟧"


def test_system_prompt_only_where_there_is_none():
    assert shown(TWO_TURNS, chats.plain(), system_prompt="Other.") == shown(TWO_TURNS, chats.plain())
    assert shown(pair("1?", "2"), chats.plain(), system_prompt="Add.") == (
        "<|system|>Add.<|user|>1?<|assistant|>⟦2<|eos|>⟧"
    )


def test_a_chat_may_contain_what_looks_like_its_template():
    """The header in a question, the mark in an answer: neither moves the mask."""
    example = chat(("user", f"Say {QWEN3}now"), ("assistant", "now \ue000 and \ue000\ue001"))
    answer = "<think>\n\n</think>\n\nnow \ue000 and \ue000\ue001<|im_end|>"
    golden = f"<|im_start|>user\nSay {QWEN3}now<|im_end|>\n{QWEN3}⟦{answer}⟧\n"
    assert shown(example, chats.qwen3()) == golden


def test_a_token_across_the_boundary_is_trained():
    """The header's line break and the answer's first merge into one token, which overlaps the answer."""
    tokenizer = chats.plain()
    newlines = ids(tokenizer, "\n\n")
    assert len(newlines) == 1, "the vocabulary has this merge"
    tokenizer.chat_template = chats.QWEN3.replace("<|im_end|>", "<|eos|>").replace("<|im_start|>", "<|user|>")
    first = chat(("user", "1?"), ("assistant", "\n\nfruits"), ("user", "3?"), ("assistant", "4"))
    encoded = encoding.encode(first, tokenizer)
    at = encoded.tokens.tolist().index(newlines[0])
    assert encoded.mask[at] and not encoded.mask[at - 1]


# -- the families' own templates: golden ------------------------------------------------------------------------------

Q, A = ("user", "2 + 3?"), ("assistant", "5")
CHATS = {
    "one": (Q, A),
    "system": (("system", "Add."), Q, A),
    "no thinking": (("system", "Add. /no_think"), Q, A),
    "turns": tuple((m["role"], m["content"].replace("Let me", "hm")) for m in TWO_TURNS.messages[1:]),
    "blanks": (Q, ("assistant", " 5 \n")),
}
RENDERED = [(family, name) for family in chats.FAMILIES for name in chats.golden(family)]


@pytest.mark.parametrize(("family", "name"), RENDERED)
def test_templates_of_the_families(family, name, monkeypatch):
    monkeypatch.setattr(chat_template_utils, "datetime", types.SimpleNamespace(now=lambda: chat_template.TODAY))
    golden, tokenizer = chats.golden(family)[name], chats.of_family(family)
    example = chat(*CHATS[name])._replace(location="f:1")
    if golden.startswith("! "):
        with pytest.raises(ValueError, match="^" + golden[2:] + "$"):
            encoding.encode(example, tokenizer)
        return
    assert shown(example, tokenizer) == golden
    by_transformers = tokenizer.apply_chat_template(list(example.messages), tokenize=False)
    assert by_transformers == golden.replace("⟦", "").replace("⟧", "")


@pytest.mark.parametrize("system", [None, "Add.", "Add. /no_think"])
@pytest.mark.parametrize("family", chats.FAMILIES)
def test_what_is_asked_begins_what_is_trained_in_every_family(family, system):
    """A prompt as it is evaluated; with the answer it is the pair's tokens, and in a chat the same is trained."""
    tokenizer = chats.of_family(family)
    if family == "gemma2" and system:
        with pytest.raises(ValueError, match="System role not supported"):
            encoding.encode(pair("2 + 3?", "5"), tokenizer, system_prompt=system)
        return
    tokens, mask = encoding.encode(pair("2 + 3?", "5"), tokenizer, system_prompt=system)
    assert encoding.prompt_tokens("2 + 3?", tokenizer, system_prompt=system).tolist() == tokens[~mask].tolist()
    if family == "mistral" and system:
        return  # in a chat that is over its template has no place for it, which is refused
    in_chat, chat_mask = encoding.encode(chat(Q, A), tokenizer, system_prompt=system)
    first = int(np.flatnonzero(chat_mask)[0])
    assert in_chat[:first].tolist() == tokens[~mask].tolist(), "the answer begins where generation begins"
    if family != "qwen3":  # which adds an empty think block to a chat's last answer
        assert in_chat[chat_mask].tolist() == tokens[mask].tolist()


def test_a_date_does_not_change_from_day_to_day(monkeypatch):
    monkeypatch.setattr(chat_template_utils, "datetime", None)  # what would ask for today
    assert "Today Date: 26 Jul 2024" in shown(chat(Q, A), chats.of_family("llama3"))


def test_special_tokens_that_swallow_what_follows():
    """Those of Phi-3 do."""
    from transformers import AddedToken

    swallowing = [AddedToken("<|end|>", rstrip=True, special=True)]
    tokenizer = chats.with_template(chats.of_family("phi3").chat_template, swallowing, eos_token="<|endoftext|>")
    tokens, mask = encoding.encode(chat(Q, A, Q, A), tokenizer)
    assert tokenizer.decode(tokens[mask]) == "5<|end|>5<|end|>" and tokens[-1] == tokenizer.eos_token_id


# -- prompts with completions, texts ----------------------------------------------------------------------------------


def test_pair_in_a_chat_ends_with_the_end_of_turn():
    tokenizer = chats.qwen3()
    assert shown(pair("1?", "2"), tokenizer) == f"<|im_start|>user\n1?<|im_end|>\n{QWEN3}⟦2<|im_end|>⟧"
    assert shown(pair("1?", "2<|im_end|>"), tokenizer).endswith("⟦2<|im_end|>⟧")
    mistral = chats.with_template(chats.MISTRAL, bos_token="<|bos|>")
    assert shown(pair("1?", "2"), mistral) == "<|bos|>[INST] 1? [/INST]⟦ 2 <|eos|>⟧"


def test_pair_without_a_template():
    assert shown(pair("1?", " 2"), chats.qwen3(), chat_template=False) == "1?⟦ 2<|eos|>⟧"
    assert shown(pair("1?", " 2<|eos|>"), chats.plain(), chat_template=False) == "1?⟦ 2<|eos|>⟧"
    untemplated = chats.plain()
    untemplated.chat_template = None
    assert shown(pair("1?", " 2"), untemplated, chat_template=False) == "1?⟦ 2<|eos|>⟧"


def test_the_boundary_does_not_depend_on_merges():
    tokenizer = chats.plain()
    whole, prompt, completion = "How many apples", "How ma", "ny apples"
    assert len(ids(tokenizer, whole)) < len(ids(tokenizer, prompt)) + len(ids(tokenizer, completion))
    tokens, mask = encoding.encode(pair(prompt, completion), tokenizer, chat_template=False)
    assert tokens.tolist() == [*ids(tokenizer, prompt), *ids(tokenizer, completion), 1]
    assert tokens[~mask].tolist() == ids(tokenizer, prompt)


def test_bos_begins_a_text_of_tokenizers_that_write_it():
    from tokenizers.processors import TemplateProcessing

    tokenizer = chats.with_template(chats.R1, bos_token="<|bos|>")
    bos = tokenizer.bos_token_id
    assert shown(text("fruits"), tokenizer) == shown(text("fruits"), chats.plain())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    assert shown(pair("1?", " 2"), tokenizer, chat_template=False) == "<|bos|>1?⟦ 2<|eos|>⟧"
    assert shown(text("2"), tokenizer) == "<|bos|>⟦2<|eos|>⟧"
    chat_tokens = encoding.encode(pair("1?", "2"), tokenizer).tokens
    assert chat_tokens.tolist().count(bos) == 1, "in a chat only the template writes it"


def test_text_is_trained_whole():
    tokenizer = chats.plain()
    tokens, mask = encoding.encode(text("Tom has fruits."), tokenizer)
    assert tokens.tolist() == [*ids(tokenizer, "Tom has fruits."), 1]
    assert mask.tolist() == [False] + [True] * (len(tokens) - 1)  # nothing predicts the first one


@pytest.mark.parametrize("chat_template", [True, False])
@pytest.mark.parametrize("make", [chats.plain, chats.qwen3])
def test_what_is_asked_in_evaluation_is_what_was_trained(make, chat_template):
    tokenizer = make()
    settings = {"chat_template": chat_template} | ({"system_prompt": "Add."} if chat_template else {})
    tokens, mask = encoding.encode(pair("1 + 1?", "2"), tokenizer, **settings)
    assert encoding.prompt_tokens("1 + 1?", tokenizer, **settings).tolist() == tokens[~mask].tolist()
    assert tokens[-1] == encoding.stop_token(tokenizer, chat_template=chat_template)


# -- every kind -------------------------------------------------------------------------------------------------------


def test_loss_on_all_is_all_but_the_first():
    for example in (TWO_TURNS, pair("1?", "2"), text("fruits")):
        mask = encoding.encode(example, chats.plain(), loss_on="all").mask
        assert mask.tolist() == [False] + [True] * (len(mask) - 1)
    with pytest.raises(ValueError, match="loss_on 'prompt' is unknown; choose 'completion' or 'all'"):
        encoding.encode(text("fruits"), chats.plain(), loss_on="prompt")


@pytest.mark.parametrize("make", [chats.plain, chats.qwen3])
def test_pad_equal_to_eos_changes_nothing(make):
    examples = [TWO_TURNS, pair("1?", "2"), text("fruits")]
    padded = chats.with_template(make().chat_template)
    padded.pad_token = padded.eos_token
    for example in examples:
        for one, other in zip(encoding.encode(example, make()), encoding.encode(example, padded), strict=True):
            assert np.array_equal(one, other)


def test_a_batch_of_all_kinds_is_the_examples_one_by_one():
    examples = [text("a b"), TWO_TURNS, pair("1?", "2"), chat(("user", "x"), ("assistant", "y")), text("héllo 日本")]
    batch = encoding.encode_batch(examples, chats.qwen3())
    for example, encoded in zip(examples, batch, strict=True):
        one = encoding.encode(example, chats.qwen3())
        assert np.array_equal(encoded.tokens, one.tokens) and np.array_equal(encoded.mask, one.mask)


words = st.text("ab 1\n<>|é日🙂", max_size=8)
filled = words.filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(words, filled, st.booleans()), min_size=1, max_size=4), st.sampled_from(["own", "qwen3", "phi"])
)
def test_every_answer_and_its_end_are_trained_and_nothing_else(turns, name):
    tokenizer = _TOKENIZERS[name]
    messages = []
    for question, answer, thinks in turns:
        messages += [("user", question), ("assistant", f"<think>\nhm\n</think>\n\n{answer}" if thinks else answer)]
    tokens, mask = encoding.encode(chat(*messages), tokenizer)
    stop = encoding.stop_token(tokenizer)
    ends = np.flatnonzero(mask & ~np.append(mask[1:], False))
    assert len(ends) == len(turns) and (tokens[ends] == stop).all()
    starts = np.flatnonzero(mask & ~np.append(False, mask[:-1]))
    for start, end, (_, answer, _) in zip(starts, ends, turns, strict=True):
        assert answer.strip() in tokenizer.decode(tokens[start : end + 1], skip_special_tokens=False)


_TOKENIZERS = {"own": chats.plain(), "qwen3": chats.qwen3(), "phi": chats.with_template(chats.PHI)}


# -- what cannot be encoded -------------------------------------------------------------------------------------------

QA = chat(("user", "1?"), ("assistant", "2"))
_PLAIN_ENDS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "example", "message"),
    [
        (None, QA, "^the tokenizer has no chat template: set chat_template to false"),
        (_PLAIN_ENDS, QA, r"^the chat template ends an answer with '\\n', without a special token, .*would never stop"),
        ("x", QA, "^the chat template leaves answers out"),
        (
            "{% for m in messages %}{{ m.content[:1] }}<|im_end|>{% endfor %}",
            chat(("user", "1?"), ("assistant", "long")),
            "^chat.jsonl:7: the chat template changes the answer in message 2$",
        ),
        (
            "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{{ eos_token }}",
            chat(("user", "1?"), ("assistant", "2"), ("user", "3?"), ("assistant", "4")),
            "^chat.jsonl:7: the chat template puts no '<|eos|>' behind the answer in message 2$".replace("|", r"\|"),
        ),
        (
            "{% for m in messages[:2] %}{{ m.content }}<|im_end|>{% endfor %}",
            chat(("user", "1?"), ("assistant", "2"), ("user", "3?"), ("assistant", "4")),
            "^chat.jsonl:7: the chat template leaves out the answer in message 4$",
        ),
        (
            chats.MISTRAL,
            chat(("user", "1?"), ("user", "2?"), ("assistant", "3")),
            "^chat.jsonl:7: the chat template refuses this chat: roles must alternate user/assistant$",
        ),
        (
            chats.QWEN3,
            chat(("user", "1?"), ("assistant", "2<|im_end|>3")),
            r"^chat.jsonl:7: the text of an answer contains the end-of-turn token '<\|im_end\|>'",
        ),
    ],
)
def test_chats_that_cannot_be_encoded(template, example, message):
    tokenizer = chats.with_template(template, bos_token="<|bos|>")
    with pytest.raises(ValueError, match=message) as error:
        encoding.encode(example, tokenizer)
    assert "\n" not in str(error.value)


def test_other_errors():
    tokenizer = chats.plain()
    with pytest.raises(ValueError, match=r"pairs.jsonl:7: system_prompt needs chat_template"):
        encoding.encode(pair("1?", "2"), tokenizer, chat_template=False, system_prompt="Add.")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        encoding.encode(text("2"), tokenizer)
    with pytest.raises(ValueError, match=r"texts.jsonl:7: has no trained token"):
        encoding.encode(text("<|eos|>"), chats.plain())
