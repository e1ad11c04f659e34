"""Real tokenizers with chat templates of the kinds that are in use, made in-process, for tests."""

import functools
import tempfile
from pathlib import Path

import numpy as np

from wmss_jax import tokenizer

TEXTS = [
    f"Tom has {a} apples and {b} pears. How many fruits has Tom? He has {a} + {b} = {a + b} fruits.\n\n\nYou are "
    "a helpful assistant. <think>Let me add the numbers.</think> The answer is héllo wörld 日本 user system assistant."
    for a in range(1, 30)
    for b in range(1, 6)
]


@functools.cache
def directory(vocab_size: int = 360) -> Path:
    out = Path(tempfile.mkdtemp()) / "tokenizer"
    tokenizer.train(TEXTS, vocab_size, out)
    return out


def plain():
    """A fresh tokenizer of `tokenizer.train`, with its own chat template."""
    return tokenizer.load(directory())


GOLDEN = Path(__file__).parent / "golden/chats"
# Thinking is kept after the last question only, and the last turn always has a think block.
QWEN3 = (GOLDEN / "qwen3.jinja").read_text()

# The generation prompt opens the thinking, and every rendered turn has lost it, as in the R1 distillations.
R1 = """\
{{- '<|bos|>' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>' + message.content }}
    {%- else %}
        {{- '<|turn|>' + message.content.split('</think>')[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn|><think>\\n' }}{%- endif %}"""

# No generation prompt, blanks are trimmed and put before the end, the system prompt goes into the first question.
MISTRAL = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\\n\\n' %}{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system if loop.first and system else '') + message.content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

# Something closes the whole chat, unless an answer is awaited, as in Phi-3.
PHI = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

ADDED = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|turn|>"]
# Of the families whose templates are golden: what begins a text, EOS (of the base models), and further special tokens.
FAMILIES = {
    "qwen2.5": (None, "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "qwen3": (None, "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>", "[INST]", "[/INST]"),
    "gemma2": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "gemma3": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<s>", "<|endoftext|>", "<|end|>"),
    "olmo2": ("<|endoftext|>", "<|endoftext|>"),
    "smollm3": (None, "<|end_of_text|>", "<|im_start|>", "<|im_end|>"),
}


def with_template(template: str, added=ADDED, **special: str):
    """A tokenizer with that chat template, and the special tokens that such templates write."""
    made = plain()
    made.add_special_tokens({"additional_special_tokens": list(added), **special})
    made.chat_template = template
    return made


def of_family(name: str):
    """A tokenizer with the template and special tokens of a family."""
    bos, eos, *added = FAMILIES[name]
    special = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    return with_template((GOLDEN / f"{name}.jinja").read_text(), added, **special)


def golden(name: str) -> dict[str, str]:
    """{chat: how the family renders it, what is trained between ⟦ and ⟧; or "! " and how it is refused}."""
    parts = (GOLDEN / f"{name}.txt").read_text().split("--- ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2].removesuffix("\n") for part in parts}


@functools.cache
def qwen3():
    """End of turn (<|im_end|>) and EOS (<|eos|>) differ, as in Qwen3's base models."""
    return with_template(QWEN3)


def marked(tokens, mask, tokenizer) -> str:
    """The text of an example with its trained tokens between ⟦ and ⟧, stretch by stretch."""
    cuts = np.flatnonzero(np.diff(mask)) + 1
    parts = zip(np.split(tokens, cuts), np.split(mask, cuts), strict=True)
    texts = [(tokenizer.decode(part, skip_special_tokens=False), trained[0]) for part, trained in parts]
    return "".join(f"⟦{text}⟧" if trained else text for text, trained in texts)
