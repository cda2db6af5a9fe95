"""Checks of a sample against the model that is to answer it, once its prompt is tokenised.

It knows no tokenizer and no engine; the worker's frontend has both and calls it. Neighbour: `generate`.
"""

from common.errors import RequestError
from common.protocol.generate import Sample


def check_limits(
    sample: Sample, num_prompt_tokens: int, *, vocab_size: int, context_tokens: int, kv_pool_tokens: int
) -> None:
    """Refuse what this worker can never serve, with a RequestError that names the field and the numbers.

    `num_prompt_tokens` is P; `context_tokens` bounds P plus the output, and so does `kv_pool_tokens`.
    """
    sampling, options = sample.options.sampling, sample.options
    if sample.input_ids is not None and max(sample.input_ids) >= vocab_size:
        index = next(i for i, token_id in enumerate(sample.input_ids) if token_id >= vocab_size)
        raise RequestError("input_ids", f"id {sample.input_ids[index]} at index {index} is outside [0, {vocab_size})")
    for name, token_ids in (("stop_token_ids", sampling.stop_token_ids), ("logit_bias", tuple(sampling.logit_bias))):
        if token_ids and max(token_ids) >= vocab_size:
            raise RequestError(f"sampling_params.{name}", f"id {max(token_ids)} is outside [0, {vocab_size})")
    _check_lengths(sample, num_prompt_tokens, context_tokens=context_tokens, kv_pool_tokens=kv_pool_tokens)
    for name, is_asked, start in (
        ("routed_experts_start_len", options.return_routed_experts, options.routed_experts_start_len),
        ("logprob_start_len", options.return_logprob, options.logprob_start_len),
    ):
        if is_asked and start > num_prompt_tokens:
            raise RequestError(name, f"{start} is outside [0, {num_prompt_tokens}], the range of the prompt's tokens")


def _check_lengths(sample: Sample, num_prompt_tokens: int, *, context_tokens: int, kv_pool_tokens: int) -> None:
    prompt_field, max_new_tokens = sample.prompt_field, sample.options.sampling.max_new_tokens
    if num_prompt_tokens == 0:
        raise RequestError(prompt_field, "the prompt has no tokens")
    for limit, what in ((context_tokens, "the context"), (kv_pool_tokens, "the KV pool")):
        if num_prompt_tokens + min(1, max_new_tokens) > limit:
            raise RequestError(
                prompt_field, f"the prompt has {num_prompt_tokens} tokens, too many for {what} of {limit} tokens"
            )
        if num_prompt_tokens + max_new_tokens > limit:
            raise RequestError(
                "sampling_params.max_new_tokens",
                f"{num_prompt_tokens} prompt tokens and {max_new_tokens} new ones are more than {what} of {limit}",
            )
