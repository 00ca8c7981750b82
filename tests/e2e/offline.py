"""Run as a program: `LLM(...)` for each of the cases on standard input, one after the other.

In: {"prompts": [...], "cases": [{"uri": …, "settings": {…}} or {"llm": {…}}]}, the latter also with
"tensorizer": what vLLM's TensorizerConfig is made of. A case with "spawn" starts vLLM's processes
as at a user's; the others fork, so that they need not import vLLM again. Out: for each case the
texts, as last line; with "log_probabilities": true also each text's, as words.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import sys

from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader.tensorizer import TensorizerConfig

from tensorserve import llm_kwargs

FLAGS = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 4}


def main() -> None:
    """Answer the prompts with each case's model."""
    work = json.load(sys.stdin)
    found = []
    get_context = multiprocessing.get_context
    for case in work["cases"]:
        method = "spawn" if case.get("spawn") else "fork"
        multiprocessing.get_context = lambda _=None, method=method: get_context(method)
        kwargs = case.get("llm") or llm_kwargs(case["uri"], **case.get("settings", {}))
        if "tensorizer" in case:
            kwargs["model_loader_extra_config"] = TensorizerConfig(**case["tensorizer"])
        llm = LLM(**kwargs, **FLAGS)
        # One by one, as everywhere where answers are compared: batches change the last bits.
        with_them = work.get("log_probabilities", False)
        params = SamplingParams(
            max_tokens=24, temperature=0, seed=0, logprobs=1 if with_them else None
        )
        answers = [llm.generate(p, params, use_tqdm=False)[0].outputs[0] for p in work["prompts"]]
        found.append([answer.text for answer in answers])
        if with_them:
            found[-1] += [
                str([token.logprob for place in answer.logprobs for token in place.values()])
                for answer in answers
            ]
        del llm
        gc.collect()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
