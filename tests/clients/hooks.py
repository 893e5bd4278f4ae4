"""What schemathesis is told: nobody waits for 2 ** 31 tokens."""

import schemathesis

MOST = {"max_tokens": 4, "max_completion_tokens": 4, "min_tokens": 4, "n": 4, "best_of": 4}


@schemathesis.hook
def before_call(context, case, kwargs):
    if isinstance(case.body, dict):
        for name, most in MOST.items():
            if isinstance(case.body.get(name), int):
                case.body[name] = min(case.body[name], most)
