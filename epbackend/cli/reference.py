"""Hugging Face transformers' own greedy answers: what every engine's tokens are held against."""

from collections.abc import Sequence


def greedy_tokens(model_path: str, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """The `max_new_tokens` ids that greedy float32 `generate` continues each prompt with; none ends the text early."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokens = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                min_new_tokens=max_new_tokens,  # what the engine does with ignore_eos
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        tokens.append(output[0, inputs.input_ids.shape[1] :].tolist())
    return tokens
