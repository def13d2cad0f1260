""" lm-evaluation-harness with one of our models: https://github.com/EleutherAI/lm-evaluation-harness, 0.4 """
import json
import os
from collections.abc import Callable

from common import fail

try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    fail("lm_eval: tasks need the harness: pip install lm_eval")


class HarnessModel(LM):
    """ what the harness asks, answered by eval_downstream.py's functions """

    def __init__(self, tokenizer, block_size: int, loglikelihoods: Callable, continue_greedily: Callable):
        super().__init__()
        self.tokenizer, self.block_size = tokenizer, block_size
        self.loglikelihoods, self.continue_greedily = loglikelihoods, continue_greedily

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        return self.loglikelihoods([each.args for each in requests])

    def loglikelihood_rolling(self, requests) -> list[float]:
        """ of whole texts, the first token after an end of text """
        totals = []
        for each in requests:
            ids = self.tokenizer.encode(each.args[0]).tolist()
            windows = get_rolling_token_windows(ids, self.tokenizer.start, self.block_size, 1)
            totals.append(sum(log for log, _ in self.loglikelihoods([make_disjoint_window(each) for each in windows])))
        return totals

    def generate_until(self, requests) -> list[str]:
        texts = []
        for context, options in (each.args for each in requests):
            until = options.get('until') or []
            stop = json.dumps([until] if isinstance(until, str) else until)
            texts += self.continue_greedily([context], options.get('max_gen_toks', 256), stop)
        return texts


def run_harness(task: str, *model, **options) -> dict:
    """ the metrics of lm_eval:NAME, or lm_eval:FOLDER/NAME for a task of one's own described there """
    folder, name = os.path.split(task.removeprefix('lm_eval:'))
    try:
        found = lm_eval.simple_evaluate(model=HarnessModel(*model), tasks=[name], **options,
                                        task_manager=lm_eval.tasks.TaskManager(include_path=folder or None))
    except KeyError:
        fail(f"lm_eval has no task '{name}'")
    several = len(found['results']) > 1   # a group of tasks
    return {f'{each} {key}'.removeprefix('' if several else f'{each} ').removesuffix(',none'): value
            for each, metrics in found['results'].items() for key, value in metrics.items() if isinstance(value, float)}
