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


# Thinking is kept after the last question only, and the last turn always has a think block, as in Qwen3.
QWEN3 = """\
{%- set ns = namespace(last=messages|length - 1, looking=true) %}
{%- for message in messages[::-1] %}
    {%- set index = messages|length - 1 - loop.index0 %}
    {%- if ns.looking and message.role == 'user' %}{%- set ns.looking = false %}{%- set ns.last = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n' + call.name + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

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


def with_template(template: str, **special: str):
    """A tokenizer with that chat template, and the special tokens that such templates write."""
    made = plain()
    made.add_special_tokens({"additional_special_tokens": ADDED, **special})
    made.chat_template = template
    return made


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
