"""Does transformers give the same greedy answers as `wmss generate`, from the same directory to the same prompts?

    wmss generate EXPORTED_DIR --file PROMPTS.jsonl --max-new-tokens 64 > ANSWERS.jsonl

then in a scratch environment with torch and transformers:

    python tests/golden/check_answers.py EXPORTED_DIR PROMPTS.jsonl ANSWERS.jsonl --max-new-tokens 64

EXPORTED_DIR is a float32 export with a tokenizer, PROMPTS.jsonl has a "prompt" in every row. Prompts go through the
chat template if there is one, with --plain as they are (`wmss generate --no-chat-template`). Exits 1 when an answer
differs although no two best logits of it are within 1e-4.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers

GAP = 1e-4


def rows(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]


def prompt_tokens(tokenizer, prompt: str, plain: bool) -> torch.Tensor:
    if tokenizer.chat_template is not None and not plain:
        chat = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    return tokenizer(prompt, return_tensors="pt").input_ids


@torch.no_grad()
def main() -> int:
    """Returns the exit code: 0 when all answers agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exported_dir")
    parser.add_argument("prompts")
    parser.add_argument("answers")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--plain", action="store_true", help="without the chat template")
    args = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.exported_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.exported_dir, dtype=torch.float32).eval()
    ours = {answer["prompt"]: answer for answer in rows(args.answers)}
    prompts = rows(args.prompts)
    same, close, ended = 0, 0, 0
    for number, row in enumerate(prompts):
        tokens = prompt_tokens(tokenizer, row["prompt"], args.plain)
        made = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=args.max_new_tokens, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        new = made.sequences[0, tokens.shape[1] :].tolist()
        ended += new[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(new, skip_special_tokens=True)
        if number in ours and text == ours[number]["text"]:
            same += 1
            continue
        best_two = torch.cat(made.logits).topk(2).values
        gap = float((best_two[:, 0] - best_two[:, 1]).min())
        close += gap <= GAP
        print(f"prompt {number} differs (smallest gap {gap:.2g}):\n  {text!r}\n  {ours.get(number)}")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"{same} of {len(prompts)} answers are the same ({ended} end with EOS), {close} differ at a tie")
    ok = same + close == len(prompts) and same > 0
    print("ok" if ok else "FAILED")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
